"""The reference's own answers: the tokens it writes, and its log probabilities of the whole vocabulary at each position.

A cache keeps them on disk, so that another folder of the same checkpoint is compared without computing them again. Knows the
PyTorch path and no model folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.checkpoint import Checkpoint
from convert.reference.language import LlamaWithVisualExperts
from convert.reference.model import computing_quickly
from convert.tokenizer import context_id, prompt_of
from runtime.answer.prompt import CONTEXT_TOKEN, IMAGE_END, IMAGE_START
from runtime.errors import OptionError

TOKENS = 32  # of an answer that is compared
REFERENCE_FILE = "reference.json"
ENDS = 1 << 16  # bytes at both ends of a weight file that go into the fingerprint
Reached = Callable[[], Any]


@dataclass(frozen=True)
class Question:
    """A question, with one tile (1, 3, S, S) if it is about a picture."""

    text: str
    tile: np.ndarray | None = None


@dataclass(frozen=True)
class Prompt:
    """A question as a model reads it: ids (T), with the context tokens of its tile."""

    ids: np.ndarray
    tile: np.ndarray | None
    context: int  # id of the context token

    @property
    def key(self) -> str:
        """A hash of the ids and the tile."""
        told = hashlib.sha256(self.ids.astype(np.int64).tobytes())
        told.update(b"" if self.tile is None else self.tile.astype(np.float32).tobytes())
        return told.hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """A prompt and its answer, teacher-forced: ids (T + A); embeddings (T + A, D) float32 of the reference; log probabilities
    (A, V) of the next token, in float16, at the A positions before the answer's tokens."""

    ids: np.ndarray
    prompt_tokens: int
    context: int
    embeds: np.ndarray
    log_probs: np.ndarray

    @property
    def visual(self) -> np.ndarray:
        """1 on context tokens of the prompt, (T + A) int64."""
        here = self.ids == self.context
        here[self.prompt_tokens :] = False
        return here.astype(np.int64)


def prompts_of(questions: Iterable[Question], tokenizer: PreTrainedTokenizerBase, tokens_per_tile: int) -> list[Prompt]:
    """Render questions as prompts with the model's chat template."""
    picture = f"{IMAGE_START}{CONTEXT_TOKEN * tokens_per_tile}{IMAGE_END}\n"
    context = context_id(tokenizer)
    return [
        Prompt(np.array(tokenizer.encode(prompt_of(tokenizer, (picture if q.tile is not None else "") + q.text))), q.tile, context)
        for q in questions
    ]


def write(
    model: PreTrainedModel,
    table: Tensor,
    prompts: Sequence[Tensor],
    visual: Sequence[Tensor],
    count: int,
    ends: set[int],
    *,
    reached: Reached = lambda: None,
) -> list[list[int]]:
    """Decode greedily: at most `count` tokens after each prompt, without end tokens.

    Prompts are embeddings (T, D); `visual` (T) is 1 on context tokens; `table` (V, D) embeds new tokens. All prompts are one
    batch, computed in 16 bits where that is faster on this processor.
    """
    length = max(map(len, prompts))
    embeds = torch.zeros(len(prompts), length, prompts[0].shape[-1])
    mask, seen = torch.zeros(len(prompts), length, dtype=torch.int64), torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, (prompt, here) in enumerate(zip(prompts, visual, strict=True)):
        embeds[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
        seen[row, length - len(prompt) :] = here
    routing = {"visual_token_mask": seen} if isinstance(model, LlamaWithVisualExperts) else {}
    written: list[list[int]] = [[] for _ in prompts]
    going, past = set(range(len(prompts))), None
    with torch.inference_mode(), computing_quickly(model):
        while count and going:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            out = model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
                **routing,
            )
            past, routing, count = out.past_key_values, {}, count - 1
            chosen = out.logits[:, -1].argmax(-1)
            for row in list(going):
                if int(chosen[row]) in ends:
                    going.discard(row)
                else:
                    written[row].append(int(chosen[row]))
            embeds, mask = F.embedding(chosen[:, None], table).float(), F.pad(mask, (0, 1), value=1)
            reached()
    return written


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, embeds: Tensor, mask: Tensor, visual: Tensor | None = None) -> Tensor:
    """Embeddings (B, T, D) under an attention `mask` (B, T) -> hidden states (B, T, D), the input of the head."""
    if isinstance(model, LlamaWithVisualExperts):
        model.routing.mask = visual
    return model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    table: Tensor,
    prompts: Sequence[Prompt],
    features: Sequence[Tensor | None],
    ends: set[int],
    reached: Reached = lambda: None,
) -> Iterator[Answer]:
    """The reference's answers to prompts with the features (P, D) of their tiles; `model` computes in float32.

    An answer that ends at once has no tokens. All prompts are one batch.
    """
    ids = [torch.from_numpy(prompt.ids) for prompt in prompts]
    embeds = [F.embedding(each, table).float() for each in ids]
    visual = [torch.eq(each, prompt.context).long() for each, prompt in zip(ids, prompts, strict=True)]
    for rows, here, found in zip(embeds, visual, features, strict=True):
        if found is not None:
            rows[here.bool()] = found
    written = write(model, table, embeds, visual, TOKENS, ends, reached=reached)
    whole = [
        torch.cat([rows, F.embedding(torch.tensor(more, dtype=torch.int64), table).float()])
        for rows, more in zip(embeds, written, strict=True)
    ]
    batch = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(rows), dtype=torch.int64) for rows in whole], batch_first=True)
    seen = F.pad(torch.nn.utils.rnn.pad_sequence(visual, batch_first=True), (0, batch.shape[1] - max(map(len, visual))))
    states = hidden_states(model, batch, mask, seen)
    for row, (prompt, more) in enumerate(zip(prompts, written, strict=True)):
        first = len(prompt.ids) - 1
        logits = model.lm_head(states[row, first : first + len(more)]).float()
        yield Answer(
            np.concatenate([prompt.ids, np.array(more, np.int64)]),
            len(prompt.ids),
            prompt.context,
            whole[row].numpy(),
            logits.log_softmax(-1).half().numpy(),
        )
        reached()


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that identifies a checkpoint: its configuration, tensor names and shapes, and the ends of its weight files."""
    told = hashlib.sha256(json.dumps([checkpoint.raw_config, sorted(checkpoint.shapes.items())], sort_keys=True).encode())
    folders = [checkpoint.folder, *([checkpoint.adapter.folder] if checkpoint.adapter is not None else [])]
    for file in sorted(file for folder in folders for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)):
        size = file.stat().st_size
        with open(file, "rb") as read:
            told.update(f"{file.name} {size}".encode() + read.read(ENDS))
            read.seek(max(0, size - ENDS))
            told.update(read.read(ENDS))
    return told.hexdigest()


class Kept:
    """A folder with the reference's results, arrays by name; it belongs to one checkpoint."""

    def __init__(self, folder: Path, checkpoint: str, *, name: str):
        """Raises OptionError for a folder of another checkpoint."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / REFERENCE_FILE
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("fingerprint") != checkpoint:
                raise OptionError(
                    f"{folder} keeps the answers of another checkpoint ({found.get('checkpoint')}, here {name}): give this one "
                    "a --reference-cache of its own"
                )
        file.write_text(json.dumps({"checkpoint": name, "fingerprint": checkpoint}) + "\n", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return (self._folder / f"{key}.npz").exists()

    def put(self, key: str, **arrays: Any) -> None:
        """Store arrays, all or none."""
        beside = self._folder / f"{key}.part.npz"
        np.savez(beside, **arrays)
        beside.replace(self._folder / f"{key}.npz")

    def get(self, key: str) -> dict[str, np.ndarray]:
        """Load stored arrays."""
        with np.load(self._folder / f"{key}.npz") as file:
            return dict(file)

    def put_answer(self, key: str, one: Answer) -> None:
        self.put(key, **vars(one))

    def answer(self, key: str) -> Answer:
        found: dict[str, Any] = self.get(key)
        return Answer(**found | {name: int(found[name]) for name in ("prompt_tokens", "context")})
