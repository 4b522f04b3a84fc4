"""int4 of a language part: bits and quantisation groups of each matrix, calibrated in one forward pass over texts.

A matrix is quantised when the pass first uses it, so that later matrices get the outputs of its quantised weights, and one layer
is in memory at a time. Takes a decoder and its inputs; knows nothing of checkpoints, pictures or the source of the texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from convert.answers import hidden_states
from convert.four_bits import FourBits, Ready
from convert.gptq import Inputs, gptq, loss_of_rounding
from convert.options import Recipe
from convert.reference.language import LlamaWithVisualExperts
from convert.reference.model import multiplying_quickly, quick_type

SINGULAR = "language: rounded to nearest, because the Hessian of their inputs is singular: "
Empty = Callable[..., Tensor]
NORMS = ("input_layernorm", "post_attention_layernorm")
POWERS = (0.25, 0.5, 0.75, 1.0)
HELPS = 0.95  # scaling must lower the loss to this share; smaller gains are noise
TRIED_ROWS = 512
LEAST_SIZE, TINY = 1e-2, 1e-6  # lower bounds of a column's mean size: a share of the overall mean, plus a constant


@dataclass(frozen=True)
class Texts:
    """Inputs of a decoder: embeddings (B, T, D) float32, the attention mask (B, T), and 1 on context tokens (B, T)."""

    embeds: Tensor
    mask: Tensor
    visual: Tensor


@torch.no_grad()
def round_by_inputs(
    model: PreTrainedModel, texts: Texts, recipe: Recipe, empty: Empty, reached: Callable[[], Any], *, both: bool = False
) -> tuple[dict[str, FourBits], list[str]]:
    """The matrices of a decoder's layers in four bits, by name, and the names of those that were only rounded: singular Hessian.

    Where some channels after a norm are much larger than others, a scale moves from the norm into the next matrices' columns, in
    `model` too: X diag(s)^-1 diag(s) W, J. Lin et al. 2023, arXiv:2306.00978 (AWQ). `empty` gives the memory of the results;
    `reached` is called once per matrix. With `both`, a matrix in four bits also stays in `model` with that scale, so that the
    model in full precision computes as before.
    """
    layers: nn.ModuleList = model.model.layers
    spares = partial(recipe.spares, depth=len(layers))
    walk = _Walk(texts.mask.bool(), recipe.group, spares, both, empty, reached, quick_type())
    names: dict[Any, str] = {module: f"layers.{name}" for name, module in layers.named_modules() if type(module) is nn.Linear}
    norms = [module for name, module in layers.named_modules() if name.endswith(NORMS)]
    if isinstance(model, LlamaWithVisualExperts):  # its visual experts read the second norm too
        norms = [module for name, module in layers.named_modules() if name.endswith(NORMS[0])]
    hooks = [norm.register_forward_hook(walk.normed) for norm in norms]
    try:
        for module, name in names.items():
            module.__class__ = _Watched
            module.walk, module.called = walk, name
        hidden_states(model, texts.embeds, texts.mask, texts.visual)
    finally:
        for module in names:
            module.__class__ = nn.Linear
            del module.walk, module.called
        for hook in hooks:
            hook.remove()
    return walk.found, walk.rounded


class _Watched(nn.Linear):
    """A linear layer that is quantised when it is called, and computes with the dequantised weights."""

    walk: _Walk
    called: str

    def forward(self, x: Tensor) -> Tensor:
        return self.walk.through(self, self.called, x)


@dataclass(frozen=True)
class _Seen:
    """The shared input of some matrices: x, the divisor of its columns, and the Hessian after the division."""

    x: Tensor
    divisor: Tensor | None
    inputs: Inputs


class _Walk:
    def __init__(
        self,
        mask: Tensor,
        group: int,
        spares: Callable[[str], bool],
        both: bool,
        empty: Empty,
        reached: Callable[[], Any],
        kind: torch.dtype,
    ):
        self.found: dict[str, FourBits] = {}
        self.rounded: list[str] = []
        self._mask, self._group, self._spares, self._both = mask, group, spares, both
        self._empty, self._reached, self._kind = empty, reached, kind
        self._norm: tuple[Any, Tensor] | None = None
        self._seen: _Seen | None = None

    def normed(self, norm: nn.Module, _: Any, x: Tensor) -> None:
        """Remember the norm that returned x."""
        self._norm = norm, x

    def through(self, module: nn.Linear, name: str, x: Tensor) -> Tensor:
        """x (..., K) -> the output of the quantised matrix; quantises it first."""
        seen = self._look(module, x)
        matrix: Tensor = module.weight
        if seen.divisor is not None:
            x = x / seen.divisor
            matrix = matrix * seen.divisor
        spared = self._spares(name)
        if seen.divisor is not None and (spared or self._both):
            kept = self._empty(matrix.shape, dtype=module.weight.dtype).copy_(matrix)
            module.weight = nn.Parameter(kept, requires_grad=False)
        if not spared:
            four = gptq(matrix, seen.inputs)
            if seen.inputs.factors is None:
                self.rounded.append(name)
            self.found[name] = FourBits(self._empty(four.codes.shape, dtype=torch.uint8).copy_(four.codes), four.zeros, four.scales)
            matrix = four.unpack(torch.empty(matrix.shape, dtype=self._kind))
        self._reached()
        out = F.linear(x.to(self._kind), matrix.to(self._kind)).to(x.dtype)
        return out if module.bias is None else out + module.bias

    def _look(self, module: nn.Linear, x: Tensor) -> _Seen:
        """The statistics of x, computed once for all matrices that read it; the first of them chooses the divisor."""
        if self._seen is not None and self._seen.x is x:
            return self._seen
        width = x.shape[-1]
        group = width if self._group == -1 else self._group
        rows = x[self._mask] if x.shape[:-1] == self._mask.shape else x.reshape(-1, width)
        divisor, inputs = None, Inputs(width, group)
        if self._norm is not None and self._norm[1] is x and len(rows):
            divisor = _divisor(rows, module.weight, group)
        if divisor is not None and self._norm is not None:
            rows = rows / divisor
            norm = self._norm[0]
            norm.weight = nn.Parameter(norm.weight / divisor, requires_grad=False)
        with multiplying_quickly():
            inputs.add(rows)
        self._seen = _Seen(x, divisor, inputs)
        return self._seen


def _divisor(rows: Tensor, matrix: Tensor, group: int) -> Tensor | None:
    """The divisor of the columns of inputs (N, K) with which rounding a matrix (R, K) loses least; None if none helps.

    It is a power, from POWERS, of the columns' mean absolute value; tried on some rows of the matrix.
    """
    size = rows.abs().mean(0).clamp(min=LEAST_SIZE * float(rows.abs().mean()) + TINY)
    size = size / size.log().mean().exp()
    square, some = rows.square().mean(0), matrix[:: max(1, len(matrix) // TRIED_ROWS)].float()
    least, best = HELPS * loss_of_rounding(some, group, square), None
    for power in POWERS:
        divisor = size**power
        lost = loss_of_rounding(some * divisor, group, square / divisor.square())
        if lost < least:
            least, best = lost, divisor
    return best


def take_place(
    model: PreTrainedModel, found: dict[str, FourBits], recipe: Recipe, ready: Ready, plain: Callable[[Tensor], FourBits]
) -> None:
    """Replace a decoder's matrices by placeholders for their four-bit versions, before tracing.

    A matrix that the pass did not use (of a visual expert that got no token) is rounded by `plain`.
    """
    layers = model.model.layers
    for name, module in layers.named_modules():
        called = f"layers.{name}"
        if type(module) is not nn.Linear or recipe.spares(called, len(layers)):
            continue
        matrix = module.weight
        load = partial(found.pop, called) if called in found else partial(plain, matrix)
        # float16, as packed matrices are: bfloat16 adds a conversion between codes and products
        module.weight = nn.Parameter(ready.placeholder(matrix.shape, torch.float16, load), requires_grad=False)
