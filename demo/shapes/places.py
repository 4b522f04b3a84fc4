"""Teach a trained checkpoint to say where things are, in four stages, without losing what it can.

vision: tiles -> context embeddings that keep the directions the language model uses and carry the vectors of `extents.py` in the
others. language: answers from embeddings of the untaught vision part with the true vectors added, so that it needs no vision stage
and both can run side by side. joint: everything together, on what the vision part really writes. mend: the same, with more scenes
of the exam's own tasks, which are part of every stage. A stage is a pure function of its options and of the stages before it, and
resumes from its state file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from demo.shapes.branches import collate_rows
from demo.shapes.evaluate import LEAST_SHARED
from demo.shapes.extents import LENGTH, edges_of, importances
from demo.shapes.layout import PRESETS, build_tokenizer, config_json
from demo.shapes.optimisers import optimisers
from demo.shapes.place_samples import LEVEL, PlaceOptions, PlaceSteps, Sample
from demo.shapes.samples import IGNORED, Encoder
from demo.shapes.scenes import make_scene
from demo.shapes.student import Student
from demo.shapes.train import save_checkpoint, stay, worker_count
from runtime.answer.boxes import FULL, find_boxes, intersection_over_union
from runtime.errors import OptionError
from runtime.folder.config import InternVLConfig
from runtime.media.tiles import normalise

CHECKED = (((112, 112), 1), ((112, 336), 12), ((1493, 112), 1), ((1493, 112), 12))  # sizes and limits of tiles
BEFORE = {"joint": ("vision", "language"), "mend": ("joint",)}  # stages whose weights a stage of both parts starts from
LOOKING = (2, 3)  # layers after which the token that opens a box should know its thing


@dataclass(frozen=True)
class Directions:
    """An orthonormal basis of context embeddings by their variance: `kept` rows first, then LENGTH that carry vectors."""

    mean: Tensor  # (D)
    rows: Tensor  # (D, D)
    variances: Tensor  # (D)

    @classmethod
    @torch.no_grad()
    def of(cls, vision: nn.Module, encoder: Encoder, scenes: int) -> Directions:
        """Of embeddings of training scenes."""
        tiles = [cut for n in range(scenes) for cut in encoder.tiles(make_scene(5, "train", n, level=LEVEL))[0]]
        found = torch.cat([vision(torch.from_numpy(cut)) for cut in tiles]).flatten(0, 1)
        mean = found.mean(0)
        _, scale, rows = torch.linalg.svd(found - mean, full_matrices=False)
        return cls(mean, rows, scale**2 / len(found))

    def split(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Context embeddings (..., D) -> what is kept (..., D - LENGTH) and vectors (..., LENGTH)."""
        turned = (context - self.mean) @ self.rows.T
        return turned[..., :-LENGTH], turned[..., -LENGTH:]

    def joined(self, kept: Tensor, vectors: Tensor) -> Tensor:
        """The way back."""
        return torch.cat([kept, vectors], dim=-1) @ self.rows + self.mean


class Places:
    """A stage in a folder: student, averaged weights, optimisers, step; saved and resumed as one file."""

    def __init__(self, folder: Path, options: PlaceOptions):
        self.folder, self.options = folder, options
        for stage in BEFORE.get(options.stage, ()):
            if not (folder / f"{stage}.pt").exists():
                raise OptionError(f"{options.stage} starts from the stage {stage}, which {folder} does not hold: run that first")
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        torch.manual_seed(options.seed)
        self.tokenizer = build_tokenizer()
        self.config_json = config_json(PRESETS["cpu"], len(self.tokenizer), self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.config = InternVLConfig.from_dict(self.config_json)
        self.encoder = Encoder(self.config, self.tokenizer)
        self.student, known = Student(self.config, self.tokenizer), Student(self.config, self.tokenizer)
        for model in (self.student, known):
            model.start_from(Path(options.start))
        self.known = known.vision.requires_grad_(False)
        self.directions = Directions.of(self.known, self.encoder, options.measured)
        self.importances = torch.from_numpy(importances())
        parts = ["vision", "language"] if options.stage in BEFORE else [options.stage]
        self.trained = nn.ModuleDict({part: getattr(self.student, part) for part in parts})
        if "language" in parts:  # what reads a thing's vector from hidden states; not saved in checkpoints
            width = self.config.language["hidden_size"]
            self.trained["heads"] = nn.ModuleList(nn.Linear(width, LENGTH) for _ in LOOKING)
        for stage in BEFORE.get(options.stage, ()):
            self.trained.load_state_dict(torch.load(folder / f"{stage}.pt")["average"], strict=False)
        self.average = {name: parameter.detach().clone() for name, parameter in self.trained.named_parameters()}
        self.optimisers = optimisers(self.trained, options.rate)
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.step = 0

    @property
    def state_file(self) -> Path:
        return self.folder / f"{self.options.stage}.pt"

    def load(self) -> None:
        """Resume from the state file, if there is one."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file)
        self.trained.load_state_dict(state["trained"])
        self.average, self.step = state["average"], state["step"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def save(self) -> None:
        """Write the state beside its final name, then move it there."""
        state = {"trained": self.trained.state_dict(), "average": self.average, "step": self.step, "options": asdict(self.options)}
        beside = self.state_file.with_suffix(".new")
        torch.save(state | {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}, beside)
        os.replace(beside, self.state_file)

    def losses(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Losses of a micro-batch: "keep" and "vectors" of the vision part (means), "answers" (a weighted sum)."""
        kept, vectors, context = self.context(samples)
        found = {}
        if "vision" in self.trained:
            own, written = self.directions.split(context)
            scale = self.directions.variances[:-LENGTH] + 0.05
            found["keep"] = ((own - kept).square() / scale).mean()
            found["vectors"] = ((written - vectors).square() * self.importances).mean()
        if "language" in self.trained:
            logits, labels, weights, looked = self.answers(samples, context)
            found["looked"] = looked
            found["answers"] = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        return found

    def context(self, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """What tiles should keep and tell, and their context embeddings: the student's own, or made of these two."""
        tiles = torch.from_numpy(normalise(np.concatenate([sample.tiles for sample in samples])))
        vectors = torch.from_numpy(np.concatenate([sample.vectors for sample in samples]))
        with torch.no_grad():
            kept, _ = self.directions.split(self.known(tiles).float())
        own = "vision" in self.trained
        return kept, vectors, self.student.vision(tiles).float() if own else self.directions.joined(kept, vectors)

    def answers(self, samples: list[Sample], context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (M, V) at the M labelled tokens, their labels and weights, and the loss of what looking tokens know."""
        batch = collate_rows([sample.row for sample in samples], self.tokenizer.pad_token_id)
        embeds = self.student.language.get_input_embeddings()(batch["ids"])
        here = batch["ids"] == self.student.context_id
        found = self.student.language.model(
            inputs_embeds=embeds.masked_scatter(here[..., None], context),
            attention_mask=batch["scores"],
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=True,
        )
        looking = batch["looks"] >= 0
        before = np.cumsum([0, *(len(sample.things) for sample in samples[:-1])])
        told = torch.from_numpy(np.concatenate([sample.things for sample in samples]))
        told = told[(batch["looks"] + torch.from_numpy(before)[:, None])[looking]]
        known = [
            head(found.hidden_states[layer][looking]).float() for layer, head in zip(LOOKING, self.trained["heads"], strict=True)
        ]
        missing = [((one - told).square() * self.importances).sum() / LENGTH for one in known]
        looked = torch.stack(missing).mean() / max(1, len(told)) * len(samples)
        labelled = batch["labels"][:, 1:] != IGNORED
        logits = self.student.language.lm_head(found.last_hidden_state[:, :-1][labelled]).float()
        return logits, batch["labels"][:, 1:][labelled], batch["weights"][:, 1:][labelled], looked

    def learn(self, samples: list[Sample]) -> dict[str, float]:
        """One optimiser step. Scenes to find things in and the others count alike, however many tokens they have."""
        o, parameters = self.options, list(self.trained.parameters())
        totals = {finds: sum(float(s.row.weights.sum()) for s in samples if s.finds == finds) for finds in (True, False)}
        parts = [
            own[n : n + o.micro]
            for own in ([s for s in samples if s.finds == f] for f in totals)
            for n in range(0, len(own), o.micro)
        ]

        def gradients(part: list[Sample]) -> tuple[dict[str, float], tuple[Tensor, ...]]:
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast on processors with AMX
                found = self.losses(part)
            share = len(part) / len(samples)
            weights = {"answers": 1 / totals[part[0].finds], "keep": share * o.keep * o.vectors, "vectors": share * o.vectors}
            weights["looked"] = o.looked / o.finds
            loss = sum((weights[name] * value for name, value in found.items()), torch.zeros(()))
            shares = {"answers": weights["answers"], "looked": 1 / o.finds}
            kind = "find" if part[0].finds else "others"
            names = {"answers": f"{kind}_answers"}
            told = {names.get(name, name): value.item() * shares.get(name, share) for name, value in found.items()}
            return told, torch.autograd.grad(loss, parameters, allow_unused=True)

        measured: dict[str, float] = {}
        with plain_attention():
            done = [*self.pool.map(gradients, parts)]
        for told, found in done:
            for name, value in told.items():
                measured[name] = measured.get(name, 0.0) + value
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = o.rate_at(self.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(o.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p for _, p in self.trained.named_parameters()], 1 - keep)
        return {name: round(value, 4) for name, value in measured.items()}

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """With averaged weights, on held-out scenes: share of cells whose vectors tell a right box, and of answers that do.

        Each token of these answers follows the true ones.
        """
        trained = {name: parameter.detach().clone() for name, parameter in self.trained.named_parameters()}
        self.trained.load_state_dict(self.average)
        asked, right = PlaceSteps(self.options, self.encoder), {}
        for (width, height), limit in CHECKED:
            samples = [sample for n in range(self.options.checked) if (sample := asked.single(n, (width, height), limit))]
            _, vectors, context = self.context(samples)
            form = f"{width} x {height}, {limit}"
            if "vision" in self.trained:
                owned = vectors[..., 0] > 0
                shared = overlap(edges_of(self.directions.split(context)[1][owned]), edges_of(vectors[owned]))
                right[f"cells {form}"] = round((shared >= LEAST_SHARED).float().mean().item(), 3)
            if "language" in self.trained:
                logits, labels, *_ = self.answers(samples, context)
                lengths = [int((sample.row.labels != IGNORED).sum()) for sample in samples]
                pairs = zip(logits.argmax(-1).split(lengths), labels.split(lengths), strict=True)
                shared = torch.stack([self._shared(given, expected) for given, expected in pairs])
                right[f"answers {form}"] = round((shared >= LEAST_SHARED).float().mean().item(), 3)
        self.trained.load_state_dict(trained)
        return right

    def _shared(self, given: Tensor, expected: Tensor) -> Tensor:
        """Intersection over union of the first boxes of two answers, in ids; 0 where there is none."""
        found = [find_boxes(self.tokenizer.decode(ids), (FULL, FULL)) for ids in (given, expected)]
        if not all(found):
            return torch.zeros(())
        return torch.tensor(intersection_over_union(found[0][0], found[1][0]))


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention written out, for all threads. In bfloat16 torch's fused kernel takes half of the time of a step.

    torch's own plain one makes a step 1.15 to 1.3 times as long: it looks for rows in which everything is masked.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any) -> Tensor:
        scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.mT
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1).to(v.dtype) @ v

    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) with boxes (..., 4), edge by edge: left, top, right, bottom."""
    common = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0).prod(-1)
    areas = sum((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (one, other))
    return common / (areas - common).clamp(min=1e-9)


def teach_places(
    folder: Path, output: Path | None, options: PlaceOptions, *, minutes: float = 1e9, saved_every: int = 100
) -> Places:
    """Run one stage until its steps are done, `minutes` have passed or the process is asked to end.

    Joint and mend write a checkpoint when their steps are done.
    """
    places = Places(folder, options)
    places.load()
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    started = time.monotonic()
    loader = DataLoader(
        PlaceSteps(options, places.encoder),
        batch_size=None,
        sampler=range(places.step, options.steps),
        num_workers=worker_count(),
        prefetch_factor=4,
        worker_init_fn=stay,
    )
    with (folder / f"{options.stage}.jsonl").open("a", encoding="utf-8") as log:
        bar = tqdm(loader, initial=places.step, total=options.steps, unit="step", mininterval=5, file=sys.stderr)
        for samples in bar:
            measured = places.learn(samples)
            if places.step % saved_every == 0 or places.step == options.steps:
                measured |= places.check()
                places.save()
            if places.step % 10 == 0 or places.step == options.steps:
                print(
                    json.dumps({"step": places.step, "seconds": round(time.monotonic() - started), **measured}),
                    file=log,
                    flush=True,
                )
            if asked or time.monotonic() - started > 60 * minutes:
                break
    signal.signal(signal.SIGTERM, before)
    places.save()
    if output and options.stage in BEFORE and places.step == options.steps:
        weights = {name: value for name, value in places.average.items() if not name.startswith("heads")}
        save_checkpoint(output, weights, places.tokenizer, places.config_json)
    return places
