"""The proof of a conversion: the model folder's parts, run in float32, against the PyTorch path on a small input.

Reads a finished folder as any runtime would; its bounds say how far a weight format may drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from convert.checkpoint import Checkpoint
from convert.options import W8A8
from convert.reference.language import LlamaWithVisualExperts
from convert.reference.model import compute_in_float32, load_language, load_router, load_text_embeddings, load_vision
from convert.scratch import Scratch
from convert.tokenizer import context_id, probe_prompt
from runtime.errors import DriftError
from runtime.folder.files import PART_FILES
from runtime.parts.part import VISUAL_MASK

GREEDY_TOKENS = 8
SEED = 0

# What a weight format may cost on the probe: the least cosine to the reference, and the largest difference as a share of the
# reference's largest value. Set from random weights of the published shapes, which keep less of a signal than trained ones:
# the language parts of 1B to 8B reached 0.84 to 0.89 in int4. A part that is wrong falls to 0.
LEAST_COSINE = {"fp32": 0.999999, "fp16": 0.9999, "int8": 0.99, W8A8: 0.95, "int4": 0.7}
LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.5, W8A8: 1.0, "int4": 2.0}

# Compute in float32 throughout, so that what is measured is the weights and not the device's shortcuts.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class Part:
    """One part of a model folder on the CPU in float32: arrays in, an array out."""

    def __init__(self, folder: Path, part: str):
        self._request = ov.Core().compile_model(folder / PART_FILES[part], "CPU", EXACT).create_infer_request()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Tiles (N, 3, S, S) -> context embeddings (N, P, D), or token ids (B, T) -> embeddings (B, T, D)."""
        return self._request.infer([array])[0]


class LanguagePart(Part):
    """The stateful language part, with its one KV cache."""

    def __init__(self, folder: Path):
        super().__init__(folder, "language")
        self._routed = any(VISUAL_MASK in port.get_names() for port in self._request.model_inputs)

    def logits(
        self, embeds: np.ndarray, attention_mask: np.ndarray, *, visual: np.ndarray | None = None, reset: bool = True
    ) -> np.ndarray:
        """Embeddings (B, T, D) under a mask (B, past + T) -> logits (B, T, V), valid until the next call.

        `visual` (B, T) is 1 on context tokens, for visual experts. `reset` forgets what came before.
        """
        if reset:
            self._request.reset_state()
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -embeds.shape[1] :]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "beam_idx": np.arange(len(embeds), dtype=np.int32),
        }
        if self._routed:
            inputs[VISUAL_MASK] = np.zeros(embeds.shape[:2], np.int64) if visual is None else visual
        self._request.infer(inputs, share_outputs=True)
        return self._request.get_tensor("logits").data


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
    greedy_agreed: int  # tokens the folder picks like the reference, given the reference's tokens before
    greedy_tokens: int

    def lines(self) -> list[str]:
        """The report as a table for people."""
        head = f"{'part':<16}{'weights':<9}{'largest diff':>13}{'mean diff':>12}{'cosine':>11}   bound"
        body = [
            f"{row.part:<16}{row.weight_format:<9}{row.largest:>13.2e}{row.mean:>12.2e}{row.cosine:>11.6f}   "
            f"cosine >= {LEAST_COSINE[row.weight_format]}"
            for row in self.rows
        ]
        greedy = [f"greedy tokens: {self.greedy_agreed} of {self.greedy_tokens} as the reference"] if self.greedy_tokens else []
        return [head, *body, *greedy]

    def raise_if_drifted(self) -> None:
        """Raise DriftError naming the parts that are past the bound of their weight format."""
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


@torch.inference_mode()
def verify(checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase, formats: dict[str, str]) -> Report:
    """Run one tile and a short prompt through the reference and the folder, one part in memory at a time.

    Every part gets the reference's input, so that a difference is its own. The language part sees two rows of the tile and the
    probe prompt, which is enough to tell and keeps the logits small.
    """
    with tqdm(total=2 + GREEDY_TOKENS, desc="Comparing with PyTorch", disable=None, leave=False) as bar:
        return _verify(checkpoint, folder, tokenizer, formats, bar)


def _verify(checkpoint: Checkpoint, folder: Path, tokenizer: PreTrainedTokenizerBase, formats: dict[str, str], bar: tqdm) -> Report:
    side = checkpoint.config.tile_size
    tile = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    ids = torch.tensor([tokenizer.encode(probe_prompt(tokenizer))])  # (1, T)

    text = F.embedding(ids, load_text_embeddings(checkpoint, None)).float()  # (1, T, D)
    rows = [compare("text_embeddings", formats, text, Part(folder, "text_embeddings")(ids.numpy()))]

    scratch = Scratch(folder)
    vision = load_vision(checkpoint, None, empty=scratch.empty)
    compute_in_float32(vision)
    patches = vision.patches(tile)
    features = vision.context(patches)  # (1, P, D)
    del vision
    scratch.clear()
    rows.append(compare("vision", formats, features, Part(folder, "vision")(tile.numpy())))
    if checkpoint.config.flash is not None:
        rows += _compare_router(checkpoint, folder, formats, patches, scratch)
    bar.update()

    embeds = text.clone()
    here = torch.eq(ids[0], context_id(tokenizer))
    embeds[:, here] = features[:, : int(here.sum())]
    model = load_language(checkpoint, None, empty=scratch.empty, single=True)
    compute_in_float32(model)
    visual = here.long()[None]
    routing = {VISUAL_MASK: visual} if isinstance(model, LlamaWithVisualExperts) else {}
    expected = model(inputs_embeds=embeds, use_cache=False, **routing).logits  # (1, T, V)
    bar.update()
    # no end token: what follows one is compared like the rest
    model.generation_config = GenerationConfig(max_new_tokens=GREEDY_TOKENS, do_sample=False, pad_token_id=0)
    options = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids), "streamer": _Ticks(bar)} | routing
    greedy = model.generate(**options)  # type: ignore[operator]
    steps = model.get_input_embeddings()(greedy)  # (1, G, D)
    del model
    scratch.clear()
    language = LanguagePart(folder)
    rows.append(
        compare("language", formats, expected, language.logits(embeds.numpy(), np.ones(ids.shape, np.int64), visual=visual.numpy()))
    )
    return Report(rows, _agreement(language, embeds, visual, steps, greedy), greedy.shape[1])


def _compare_router(checkpoint: Checkpoint, folder: Path, formats: dict[str, str], patches: Tensor, scratch: Scratch) -> list[Row]:
    """What the router part gives for the reference's patches; its probabilities are computed with weights as they were stored."""
    router = load_router(checkpoint, None, empty=scratch.empty)
    compute_in_float32(router)
    few, probabilities = router(patches)
    del router
    scratch.clear()
    found = ov.Core().compile_model(folder / PART_FILES["router"], "CPU", EXACT)(patches.numpy())
    exact = formats | {"router": "fp16" if formats["router"] == "fp16" else "fp32"}
    return [compare("router", formats, few, found[0]), compare("router", exact, probabilities, found[1])]


class _Ticks(BaseStreamer):
    """Moves a bar by one a token."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def put(self, value: Tensor) -> None:
        self.bar.update(int(value.numel() > 0))  # the first one is the empty prompt

    def end(self) -> None:
        pass


def _agreement(language: LanguagePart, embeds: Tensor, visual: Tensor, steps: Tensor, greedy: Tensor) -> int:
    """Count the positions where the folder's next token is the reference's, feeding it the reference's tokens one by one."""
    agreed, length = 0, embeds.shape[1]
    logits = language.logits(embeds.numpy(), np.ones((1, length), np.int64), visual=visual.numpy())
    for n, token in enumerate(greedy[0].tolist()):
        agreed += int(logits[0, -1].argmax() == token)
        if n + 1 < greedy.shape[1]:
            logits = language.logits(steps[:, n : n + 1].numpy(), np.ones((1, length + n + 1), np.int64), reset=False)
    return agreed


def compare(part: str, formats: dict[str, str], expected: Tensor, found: np.ndarray) -> Row:
    a, b = expected.flatten(), torch.from_numpy(found).flatten()
    difference = (a - b).abs_()
    dot, aa, bb = (float(torch.sum(x * y, dtype=torch.float64)) for x, y in ((a, b), (a, a), (b, b)))
    largest, mean = float(difference.max()), float(difference.mean(dtype=torch.float64))
    return Row(part, formats[part], largest, mean, float(a.abs().max()), dot / max((aa * bb) ** 0.5, 1e-30))
