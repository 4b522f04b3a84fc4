"""int4 of a language part: bits and quantisation groups of each matrix, calibrated in one forward pass over texts.

A matrix is quantised when the pass first uses it, so that later matrices get the outputs of its quantised weights, and one layer
is in memory at a time. Takes a decoder and its inputs; knows nothing of checkpoints, pictures or the source of the texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
HEAD = "lm_head"
LEAST_SIZE, TINY = 1e-2, 1e-6  # lower bounds of a column's mean size: a share of the overall mean, plus a constant


@dataclass(frozen=True)
class Texts:
    """Inputs of a decoder: embeddings (B, T, D) float32, the attention mask (B, T), and 1 on context tokens (B, T)."""

    embeds: Tensor
    mask: Tensor
    visual: Tensor


def exchange(model: PreTrainedModel, recipe: Recipe) -> Recipe:
    """The recipe for this decoder: with as many of the last layers in 8 bits as a head in four bits pays for, a third at most.

    A head that pays for none stays in 8 bits.
    """
    if not recipe.exchanged:
        return recipe
    saved = model.lm_head.weight.numel()
    depth, costs = len(model.model.layers), dict[int, int]()
    for name, module in matrices_of(model).items():
        if not recipe.spares(name, depth):
            layer = int(name.split(".")[1])
            costs[layer] = costs.get(layer, 0) + module.weight.numel()
    last = 0
    while last < depth // 3 and (saved := saved - costs.get(depth - 1 - last, 0)) >= 0:
        last += 1
    return replace(recipe, exchanged=last > 0, last_in_8_bits=last)


@torch.no_grad()
def round_by_inputs(
    model: PreTrainedModel, texts: Texts, recipe: Recipe, empty: Empty, reached: Callable[[], Any], *, both: bool = False
) -> tuple[dict[str, FourBits], list[str]]:
    """The matrices of a decoder's layers in four bits, by name, and the names of those that were only rounded: singular Hessian.

    With `recipe.exchanged` the head is one of them.

    Where some channels after a norm are much larger than others, a scale moves from the norm into the next matrices' columns, in
    `model` too: X diag(s)^-1 diag(s) W, J. Lin et al. 2023, arXiv:2306.00978 (AWQ). `empty` gives the memory of the results;
    `reached` is called once per matrix. With `both`, a matrix in four bits also stays in `model` with that scale, so that the
    model in full precision computes as before.
    """
    layers: nn.ModuleList = model.model.layers
    spares = partial(recipe.spares, depth=len(layers))
    walk = _Walk(texts.mask.bool(), recipe.group, spares, both, empty, reached, quick_type())
    names: dict[Any, str] = {module: name for name, module in matrices_of(model).items()}
    norms = [module for name, module in layers.named_modules() if name.endswith(NORMS)]
    if isinstance(model, LlamaWithVisualExperts):  # its visual experts read the second norm too
        norms = [module for name, module in layers.named_modules() if name.endswith(NORMS[0])]
    hooks = [norm.register_forward_hook(walk.normed) for norm in norms]
    try:
        for module, name in names.items():
            module.__class__ = _Watched
            module.walk, module.called = walk, name
        states = hidden_states(model, texts.embeds, texts.mask, texts.visual)
    finally:
        for module in names:
            module.__class__ = nn.Linear
            del module.walk, module.called
        for hook in hooks:
            hook.remove()
    if recipe.exchanged:
        walk.head(model.lm_head.weight, states)
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
            self._quantise(name, matrix, seen.inputs)
            matrix = self.found[name].unpack(torch.empty(matrix.shape, dtype=self._kind))
        self._reached()
        out = F.linear(x.to(self._kind), matrix.to(self._kind)).to(x.dtype)
        return out if module.bias is None else out + module.bias

    def head(self, matrix: Tensor, states: Tensor) -> None:
        """Quantise the head (V, D) by its inputs (B, T, D)."""
        inputs = Inputs(matrix.shape[1], matrix.shape[1] if self._group == -1 else self._group)
        with multiplying_quickly():
            inputs.add(states[self._mask])
        self._quantise(HEAD, matrix, inputs)
        self._reached()

    def _quantise(self, name: str, matrix: Tensor, inputs: Inputs) -> None:
        four = gptq(matrix, inputs)
        if inputs.factors is None:
            self.rounded.append(name)
        self.found[name] = FourBits(self._empty(four.codes.shape, dtype=torch.uint8).copy_(four.codes), four.zeros, four.scales)

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
    depth = len(model.model.layers)
    replaced = {name: module for name, module in matrices_of(model).items() if not recipe.spares(name, depth)}
    if recipe.exchanged:
        replaced[HEAD] = model.lm_head
    for name, module in replaced.items():
        matrix = module.weight
        load = partial(found.pop, name) if name in found else partial(plain, matrix)
        # float16, as packed matrices are: bfloat16 adds a conversion between codes and products
        module.weight = nn.Parameter(ready.placeholder(matrix.shape, torch.float16, load), requires_grad=False)


def matrices_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The matrices of a decoder's layers, by the names that recipes use."""
    layers = model.model.layers.named_modules()
    return {f"layers.{name}": module for name, module in layers if type(module) is nn.Linear}
