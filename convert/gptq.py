"""GPTQ: rounds a matrix to four bits so that its product with the calibration inputs stays close.

Columns are rounded one after another, and later columns compensate the error of each, by the inverse of the Hessian H = X^T X:
E. Frantar et al. 2023, arXiv:2210.17323, with columns in the order of H's diagonal (act-order) and static groups.
Tensors in, `FourBits` out: knows nothing of models, files or the source of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from convert.four_bits import BITS, FourBits, pairs

DAMPINGS = (0.03, 0.1)  # shares of the mean of H's diagonal that are added to it: the first that makes H invertible
COLUMNS_AT_ONCE = 32  # a block, whose errors are applied to the later columns together
WEIGHTS_AT_ONCE = 1 << 24
WIDEST = 2048  # columns of one Hessian; wider matrices are cut into spans, so that H and its inverse stay small
RANGES = (1.0, 0.92, 0.84)  # clipping: shares of a group's range that are tried
HIGHEST = (1 << BITS) - 1
TINY = 1e-8


def span_of(columns: int, group: int) -> int:
    """Columns of a span: the largest width up to WIDEST that divides the matrix equally and holds whole groups."""
    groups = columns // group
    count = next(n for n in range(min(groups, -(-columns // WIDEST)), groups + 1) if groups % n == 0)
    return columns // count


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: in thousands of small steps synchronisation costs more than it gains, ten times on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Inputs:
    """The inputs of a matrix: Hessians H (S, k, k) of the S spans of its columns, summed over rows of inputs."""

    def __init__(self, columns: int, group: int):
        self.group, self.span = group, span_of(columns, group)
        self.sums = torch.zeros(columns // self.span, self.span, self.span)
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tried = False

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (N, K) of inputs. H is summed in float32: in 16 bits one very large input makes it singular."""
        for number, total in enumerate(self.sums):
            part = rows[:, number * self.span : (number + 1) * self.span]
            total.addmm_(part.t(), part)

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The order of columns (S, k) and, in it, the upper Cholesky factors (S, k, k) of H^-1; None if an H is singular."""
        if not self._tried:
            self._tried = True
            with _one_thread():
                found = [_factor(total) for total in self.sums]
            whole = [each for each in found if each is not None]
            if len(whole) == len(found):
                order, upper = zip(*whole, strict=True)
                self._factors = torch.stack(order), torch.stack(upper)
        return self._factors


def _factor(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    diagonal = total.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0 or not torch.isfinite(diagonal).all():
        return None
    order = diagonal.argsort(descending=True)
    for damping in DAMPINGS:
        damped = total[order][:, order]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return order, upper
    return None


def scales_and_zeros(
    matrix: torch.Tensor, group: int, importance: torch.Tensor | None = None, shares: Sequence[float] = RANGES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix (R, K) -> scales, rounded to float16, and zeros 0..15, (R, K / group) float32 each.

    Each group takes the share of its range with the least squared error, columns weighted by `importance` (K).
    """
    grouped = matrix.unflatten(-1, (-1, group))  # (R, G, group)
    weights = torch.ones(matrix.shape[-1]) if importance is None else importance
    weights = weights.view(1, -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best = scales = zeros = None
    for share in shares:
        scale = ((high - low) * share / HIGHEST).clamp(min=TINY).half().float().clamp(min=6e-8)
        zero = (-low * share / scale).round().clamp(0, HIGHEST)
        codes = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, HIGHEST)
        lost = ((codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(grouped)).square_() * weights).sum(-1)
        if best is None or scales is None or zeros is None:
            best, scales, zeros = lost, scale, zero
            continue
        better = lost < best
        best, scales, zeros = (torch.where(better, a, b) for a, b in ((lost, best), (scale, scales), (zero, zeros)))
    assert scales is not None
    assert zeros is not None
    return scales, zeros


def loss_of_rounding(matrix: torch.Tensor, group: int, importance: torch.Tensor) -> float:
    """Squared error of rounding a matrix (R, K) to the nearest, columns weighted by `importance` (K)."""
    scales, zeros = scales_and_zeros(matrix, group, shares=(1.0,))
    kept = (nearest(matrix, scales, zeros).unflatten(-1, (-1, group)) - zeros[..., None]) * scales[..., None]
    return float(((kept.flatten(-2) - matrix).square_() @ importance).sum())


def nearest(matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Codes (R, K) float32 of a matrix, rounded to the nearest."""
    grouped = matrix.unflatten(-1, (scales.shape[-1], -1))
    return (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, HIGHEST).flatten(-2)


def gptq(matrix: torch.Tensor, inputs: Inputs) -> FourBits:
    """Quantise a matrix (R, K) in groups of `inputs.group` columns; rounds to the nearest if `inputs.factors` is None."""
    rows, factors = max(1, WEIGHTS_AT_ONCE // matrix.shape[1]), inputs.factors
    with _one_thread():
        parts = [_of_rows(some.float(), inputs, factors) for some in matrix.split(rows)]
    return FourBits(*(torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "zeros", "scales")))


def _of_rows(matrix: torch.Tensor, inputs: Inputs, factors: tuple[torch.Tensor, torch.Tensor] | None) -> FourBits:
    importance = inputs.sums.diagonal(dim1=1, dim2=2).flatten() if factors is not None else None
    scales, zeros = scales_and_zeros(matrix, inputs.group, importance)
    if factors is None:
        codes = nearest(matrix, scales, zeros).to(torch.uint8)
    else:
        codes = _rounded(matrix, scales, zeros, inputs.group, *factors)
    return FourBits(pairs(codes), zeros.to(torch.uint8), scales.half())


def _rounded(
    matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int, order: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Codes (R, K) uint8. All spans are computed together, the columns of each in its `order`."""
    spans, width = order.shape

    def taken(numbers: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # (S, n, R) at (S, m) -> (S, m, R)
        return torch.stack([part.index_select(0, some) for part, some in zip(numbers, index, strict=True)])

    # transposed, so that a column of the matrix is contiguous
    turned, scales, zeros = (n.t().contiguous().unflatten(0, (spans, -1)) for n in (matrix, scales, zeros))
    left, codes = taken(turned, order), torch.empty(spans, width, len(matrix), dtype=torch.uint8)
    for first in range(0, width, COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, width)
        block, here = left[:, first:last], upper[:, first:last, first:last]
        scale, zero = (taken(numbers, order[:, first:last] // group) for numbers in (scales, zeros))
        lost = torch.empty_like(block)
        for n in range(last - first):
            column = block[:, n]  # (S, R)
            if n:
                column = column - (here[:, None, :n, n] @ lost[:, :n])[:, 0]
            code = (column / scale[:, n]).round_().add_(zero[:, n]).clamp_(0, HIGHEST)
            codes[:, first + n] = code
            torch.sub(column, code.sub_(zero[:, n]).mul_(scale[:, n]), out=lost[:, n])
            lost[:, n] /= here[:, n, n, None]
        left[:, last:].baddbmm_(upper[:, first:last, last:].transpose(1, 2), lost, alpha=-1)
    placed = torch.empty_like(codes)
    for number, some in enumerate(order):
        placed[number, some] = codes[number]
    return placed.flatten(0, 1).t()
