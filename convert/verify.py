"""The proof of a conversion: the model folder's parts in float32 against the PyTorch path, on a small input and on answers.

Reads a finished folder as any runtime would; its bounds limit the drift of each weight format.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from convert.answers import TOKENS, Kept, Prompt, Question, answer, fingerprint, hidden_states, prompts_of
from convert.checkpoint import Checkpoint
from convert.exact import EXACT, LanguagePart, Part
from convert.options import W8A8
from convert.quality import Quality, measure
from convert.reference.model import compute_in_float32, load_language, load_router, load_text_embeddings, load_vision
from convert.scratch import Scratch
from convert.tokenizer import context_id, end_tokens, probe_prompt
from runtime.errors import DriftError
from runtime.folder.files import PART_FILES, PARTS

PROBE = "probe"  # name of the small input's arrays
AT_ONCE = 8  # answers in a batch
GREEDY_TOKENS = 8  # of a caption
SEED = 0

# Bounds of each weight format on the probe: the least cosine to the reference, and the largest difference as a share of the
# reference's largest value. Set with random weights of the published shapes, which lose more than trained ones: the language
# parts of 1B to 8B had 0.84 to 0.89 in int4. A wrong part falls to 0.
LEAST_COSINE = {"fp32": 0.999999, "fp16": 0.9999, "int8": 0.99, W8A8: 0.95, "int4": 0.7}
LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.5, W8A8: 1.0, "int4": 2.0}


@dataclass(frozen=True)
class Row:
    """How one part compares: absolute differences, the reference's largest absolute value, and the cosine of all values."""

    part: str
    weight_format: str
    largest: float
    mean: float
    scale: float
    cosine: float

    @property
    def drifted(self) -> bool:
        # written so that NaN counts as drift
        fine = self.cosine >= LEAST_COSINE[self.weight_format]
        return not (fine and self.largest <= LARGEST_DIFFERENCE[self.weight_format] * max(self.scale, 1.0))


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    quality: Quality | None = None  # on the reference's answers, of a chat model
    greedy_agreed: int = 0  # of a caption: tokens that the folder picks as the reference does, after the reference's tokens
    greedy_tokens: int = 0

    def lines(self) -> list[str]:
        """The report as a table."""
        head = f"{'part':<16}{'weights':<9}{'largest diff':>13}{'mean diff':>12}{'cosine':>11}   bound"
        body = [
            f"{row.part:<16}{row.weight_format:<9}{row.largest:>13.2e}{row.mean:>12.2e}{row.cosine:>11.6f}   "
            f"cosine >= {LEAST_COSINE[row.weight_format]}"
            for row in self.rows
        ]
        greedy = (
            [f"greedy tokens: {self.greedy_agreed} of {self.greedy_tokens} equal the reference's"] if self.greedy_tokens else []
        )
        return [head, *body, *greedy, *(self.quality.lines() if self.quality is not None else [])]

    def raise_if_drifted(self) -> None:
        """Raise DriftError naming the parts that exceed the bound of their weight format."""
        bad = [
            f"{row.part} ({row.weight_format}: cosine {row.cosine:.6f}, largest {row.largest:.2e})"
            for row in self.rows
            if row.drifted
        ]
        if bad:
            raise DriftError(
                f"the converted model differs from the PyTorch path by more than its weight format allows: {', '.join(bad)}; "
                "no folder was written. Try --weight-format int8, or report it with the table above"
            )


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    formats: dict[str, str],
    questions: Sequence[Question],
    cache: Path | None = None,
    search: dict[str, Any] | None = None,
) -> Report:
    """Compare a folder with the reference: each part on a small input, and all parts on the answers to `questions`.

    Every part gets the reference's input, so that a difference is its own. The small input is one random tile and a short prompt,
    in which the language part gets two rows of the tile; that suffices. The reference's results are stored in `cache`, and read
    from it if they are there. Writes the quality, and what a `search` found, into the folder. Raises OptionError for another
    checkpoint's cache.
    """
    scratch = Scratch(folder)
    prompts = prompts_of(questions, tokenizer, checkpoint.config.tokens_per_tile)
    with ExitStack() as opened:
        place = cache if cache is not None else Path(opened.enter_context(TemporaryDirectory(dir=folder, prefix="reference-")))
        kept = Kept(place, fingerprint(checkpoint), name=checkpoint.name)
        steps = reference_steps(len(prompts)) + len(PARTS) + len(prompts)
        bar = opened.enter_context(tqdm(total=steps, desc="Comparing with PyTorch", disable=None, leave=False))
        ask_reference(checkpoint, tokenizer, prompts, kept, scratch, bar)
        rows = _compare_parts(checkpoint, folder, tokenizer, formats, kept, bar)
        answers = ((kept.answer(prompt.key), prompt.tile) for prompt in prompts)
        quality = measure(folder, answers, len(prompts), bar.update)
    quality.write(folder, search)
    return Report(rows, quality)


def reference_steps(prompts: int) -> int:
    """The approximate number of progress steps of `ask_reference`."""
    return len(PARTS) + prompts + TOKENS * -(-prompts // AT_ONCE)


@torch.inference_mode()
def ask_reference(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kept: Kept,
    scratch: Scratch,
    bar: tqdm,
) -> None:
    """Compute and store the reference's results for the small input and for the prompts that `kept` lacks."""
    missing = [prompt for prompt in prompts if prompt.key not in kept]
    if not missing and PROBE in kept:
        return
    side = checkpoint.config.tile_size
    ids = torch.tensor([tokenizer.encode(probe_prompt(tokenizer))])  # (1, T)
    table = load_text_embeddings(checkpoint, None)
    probe: dict[str, Tensor] = {"text": F.embedding(ids, table).float()}  # (1, T, D)
    vision = load_vision(checkpoint, None, empty=scratch.empty)
    compute_in_float32(vision)
    probe["patches"] = vision.patches(_random_tile(side))
    probe["vision"] = vision.context(probe["patches"])  # (1, P, D)
    features = [None if prompt.tile is None else vision(torch.from_numpy(prompt.tile))[0] for prompt in missing]
    del vision
    scratch.clear()
    if checkpoint.config.flash is not None:
        router = load_router(checkpoint, None, empty=scratch.empty)
        compute_in_float32(router)
        probe["few"], probe["probabilities"] = router(probe["patches"])
        del router
        scratch.clear()
    bar.update(2)
    here = torch.eq(ids[0], context_id(tokenizer))
    embeds = probe["text"].clone()
    embeds[:, here] = probe["vision"][:, : int(here.sum())]
    model = load_language(checkpoint, None, empty=scratch.empty, single=True)
    compute_in_float32(model)
    states = hidden_states(model, embeds, torch.ones_like(ids), here.long()[None])
    probe["language"] = model.lm_head(states)  # (1, T, V)
    kept.put(PROBE, embeds=embeds.numpy(), visual=here.long()[None].numpy(), **{name: t.numpy() for name, t in probe.items()})
    bar.update()
    ends = end_tokens(tokenizer, checkpoint.config, checkpoint.folder)
    for pictured in (False, True):  # prompts with a picture are much longer, and a batch is as long as its longest
        some = [(prompt, found) for prompt, found in zip(missing, features, strict=True) if (found is not None) == pictured]
        for start in range(0, len(some), AT_ONCE):
            batch, rows = zip(*some[start : start + AT_ONCE], strict=True)
            for prompt, answered in zip(batch, answer(model, table, batch, rows, ends, bar.update), strict=True):
                kept.put_answer(prompt.key, answered)
    del model
    scratch.clear()


def _random_tile(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED))


def _compare_parts(
    checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase, formats: dict[str, str], kept: Kept, bar: tqdm
) -> list[Row]:
    """Each part on the small input, with the reference's input."""
    probe = kept.get(PROBE)
    ids = np.array([tokenizer.encode(probe_prompt(tokenizer))])

    def row(part: str, found: np.ndarray, name: str, formats: dict[str, str] = formats) -> Row:
        bar.update()
        return compare(part, formats, torch.from_numpy(probe[name]), found)

    rows = [row("text_embeddings", Part(folder, "text_embeddings")(ids), "text")]
    rows.append(row("vision", Part(folder, "vision")(_random_tile(checkpoint.config.tile_size).numpy()), "vision"))
    if checkpoint.config.flash is not None:
        found = ov.Core().compile_model(folder / PART_FILES["router"], "CPU", EXACT)(probe["patches"])
        exact = formats | {"router": "fp16" if formats["router"] == "fp16" else "fp32"}  # small differences change its choice
        rows += [row("router", found[0], "few"), row("router", found[1], "probabilities", exact)]
    logits = LanguagePart(folder).logits(probe["embeds"], np.ones(ids.shape, np.int64), visual=probe["visual"])
    return [*rows, row("language", logits, "language")]


def compare(part: str, formats: dict[str, str], expected: Tensor, found: np.ndarray) -> Row:
    a, b = expected.flatten(), torch.from_numpy(found).flatten()
    difference = (a - b).abs_()
    dot, aa, bb = (float(torch.sum(x * y, dtype=torch.float64)) for x, y in ((a, b), (a, a), (b, b)))
    largest, mean = float(difference.max()), float(difference.mean(dtype=torch.float64))
    return Row(part, formats[part], largest, mean, float(a.abs().max()), dot / max((aa * bb) ** 0.5, 1e-30))
