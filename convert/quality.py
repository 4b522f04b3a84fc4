"""The quality of a model folder: how far its next token is from the reference's, on the reference's own answers.

Teacher-forced: both read the same tokens. Measured are the mean Kullback-Leibler divergence of the next token, the share of tokens
with the same likeliest token, and the first token that differs (median of the answers), for each part alone and for all together.
The language part alone gets the reference's inputs; another part alone is measured by how its rows change the logits of the
folder's own language part.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.answers import Answer
from convert.exact import LanguagePart, Part
from runtime.folder.files import QUALITY_FILE
from runtime.folder.quality import WHOLE


@dataclass
class Measured:
    """Sums over the tokens measured so far, and the first differing token of each answer (from 1), None if there is none."""

    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0
    firsts: list[int | None] = field(default_factory=list)

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Add one answer: log probabilities (A, V) of the reference and of the folder."""
        self.tokens += len(wanted)
        self.divergence += float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))
        same = wanted.argmax(-1) == found.argmax(-1)
        self.agreed += int(same.sum())
        other = (~same).nonzero()
        self.firsts.append(int(other[0]) + 1 if len(other) else None)

    @property
    def kl(self) -> float:
        """Mean divergence per token, in nats; float16 rounding can push the sum slightly below 0."""
        return max(0.0, self.divergence / self.tokens)

    @property
    def same(self) -> float:
        """Share of tokens with the same likeliest token."""
        return self.agreed / self.tokens

    @property
    def first(self) -> int | None:
        """The first differing token of the median answer; None if it has none."""
        ends = [float("inf") if first is None else first for first in self.firsts]
        middle = statistics.median_low(ends)
        return None if middle == float("inf") else int(middle)

    def to_dict(self) -> dict[str, Any]:
        return {"kl": self.kl, "same": self.same, "first": self.first}


@dataclass
class Quality:
    """What a folder loses, by each part alone and by all together; `answered` of `asked` questions had an answer."""

    parts: dict[str, Measured]
    asked: int
    answered: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "questions": self.answered,
            "asked": self.asked,
            "tokens": self.parts[WHOLE].tokens,
            "parts": {part: measured.to_dict() for part, measured in self.parts.items() if measured.tokens},
        }

    def write(self, folder: Path, search: dict[str, Any] | None = None) -> None:
        """Write quality.json into the model folder, with what a `search` found. Raises OSError."""
        told = self.to_dict() | ({"search": search} if search is not None else {})
        (folder / QUALITY_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """A table for people."""
        if not self.answered:
            return [f"answers: all {self.asked} of the reference are empty, nothing to compare"]
        rows = [f"{'answers':<16}{'KL a token':>12}{'same token':>12}{'first other':>13}"]
        for part, found in self.parts.items():
            if found.tokens:
                rows.append(f"{part:<16}{found.kl:>12.5f}{found.same:>12.1%}{found.first or 'none':>13}")
        tokens = self.parts[WHOLE].tokens
        return [*rows, f"of {tokens} tokens: {self.answered} of {self.asked} questions"]


def measure(
    folder: Path,
    answers: Iterable[tuple[Answer, np.ndarray | None]],
    asked: int,
    reached: Callable[[], Any] = lambda: None,
    *,
    alone: bool = True,
) -> Quality:
    """Compare a folder with the reference's answers, each with the tile (1, 3, S, S) that it is about.

    `alone` False measures only all parts together. `reached` is called once per answer.
    """
    vision, text, language = Part(folder, "vision"), Part(folder, "text_embeddings"), LanguagePart(folder)
    parts = {part: Measured() for part in (("language", "vision", "text_embeddings", WHOLE) if alone else (WHOLE,))}
    answered = 0
    for one, tile in answers:
        reached()
        count = len(one.log_probs)
        if not count:
            continue
        answered += 1
        places = slice(one.prompt_tokens - 1, one.prompt_tokens - 1 + count)
        wanted = torch.from_numpy(one.log_probs).float()

        def said(embeds: np.ndarray, places: slice = places, one: Answer = one) -> Tensor:
            mask = np.ones((1, len(embeds)), np.int64)
            logits = language.logits(embeds[None], mask, visual=one.visual[None])[0, places]
            return torch.from_numpy(logits).log_softmax(-1)

        pictured = one.visual.astype(bool)
        read = np.array(text(one.ids[None]))[0]  # (T, D)
        seen = None if tile is None else np.array(vision(tile)).reshape(-1, read.shape[-1])
        every = read.copy()
        if seen is not None:
            every[pictured] = seen
        whole = said(every)
        parts[WHOLE].add(wanted, whole)
        if not alone:
            continue
        own = said(one.embeds)
        parts["language"].add(wanted, own)
        if seen is not None:
            swapped = one.embeds.copy()
            swapped[pictured] = seen
            parts["vision"].add(own, said(swapped))
            swapped = read.copy()
            swapped[pictured] = one.embeds[pictured]
            whole = said(swapped)
        parts["text_embeddings"].add(own, whole)
    return Quality(parts, asked, answered)
