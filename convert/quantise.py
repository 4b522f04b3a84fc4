"""w8a8: the vision part with weights and activations in 8 bits, calibrated on pictures and proven on held-out ones.

Every product with a constant matrix gets 8-bit inputs with one asymmetric range per layer, and weights with a symmetric scale a
row. Outlier channels are first scaled down, and the matrix scaled up: X diag(s)^-1 diag(s) W, s_j = max|X_j|^a / max|W_j|^(1-a):
SmoothQuant, G. Xiao et al. 2022, arXiv:2211.10438. Takes and returns ov.Model; knows nothing of checkpoints, folders or the source
of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from tqdm import tqdm

from runtime.parts.attention import open_attention
from runtime.parts.memory import leaving, page_out

LEAST_COSINE, LEAST_WORST = 0.998, 0.99  # of image features before and after: all of them, and the 1st percentile
SMOOTHING = 0.3  # larger values overfit the calibration pictures and clip others (docs/experiments.md)
SPARED = (0.0, 0.125, 0.25)  # shares of the products, noisiest first, that are not quantised: tried until the proof holds
SAMPLED = 3  # tiles that rank the products by noise
LEVELS, MOST = 256, 127  # of an activation, and the largest quantised weight
TINY = 1e-5
WITHOUT_8_BIT_INPUTS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # as exact as the processor's own precision


@dataclass(frozen=True)
class Proof:
    """How close image features come to the unquantised model's: cosine of all, and the 1st percentile of tokens."""

    cosine: float
    worst: float

    @property
    def holds(self) -> bool:
        """Whether both bounds hold; False for NaN."""
        return self.cosine >= LEAST_COSINE and self.worst >= LEAST_WORST

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, 1st percentile {self.worst:.4f}"


@dataclass(frozen=True)
class _Range:
    """Smallest and largest input (K,) of each column of a matrix."""

    low: np.ndarray
    high: np.ndarray


def quantise(
    model: ov.Model,
    tiles: Sequence[np.ndarray],
    unseen: Sequence[np.ndarray],
    *,
    light: ov.Model | None = None,
    mapped: Callable[[ov.Model], ov.Model] = lambda made: made,
) -> tuple[ov.Model, Proof]:
    """The vision part in 8 bits, calibrated on `tiles`, and its proof on `unseen` ones, all (1, 3, S, S); `model` is not changed.

    If the proof does not hold, the noisiest products stay unquantised; the last attempt is returned in any case. Ranges, and the
    features of the proof, come from `light` if it is given: the same part with int8 weights, so that a large one fits in memory.
    `mapped` stores what is made on disk before it is compiled.
    """
    with tqdm(total=len(tiles) + 2 * len(unseen), desc="Finding ranges", disable=None, leave=False) as bar:
        seen, wanted = _observed(model, light, (opset.reduce_min, opset.reduce_max), tiles, unseen, bar)
        ranges = [_Range(low.min(axis=0), high.max(axis=0)) for low, high in seen]
        kept: list[int] = []
        for share in SPARED:
            if share:
                kept = kept or _noisiest_first(model, light, ranges, tiles[:SAMPLED], bar)
            made = mapped(_in_8_bits(model, ranges, {*kept[: int(share * len(kept))]}))
            run = _compiled(made, {})
            proof = Proof(*_cosines(wanted, np.concatenate([_rows(run([tile])[0], bar) for tile in unseen])))
            if proof.holds:
                break
        return made, proof


def _compiled(model: ov.Model, properties: dict[str, str]) -> ov.CompiledModel:
    return ov.Core().compile_model(open_attention(model.clone()), "CPU", properties)


def _rows(features: np.ndarray, bar: tqdm) -> np.ndarray:
    """Features (1, P, D) -> a copy of their rows (P, D)."""
    bar.update()
    return np.array(features).reshape(-1, features.shape[-1])


def _cosines(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Cosine of all values of two sets of rows (N, D), and the 1st percentile of rows."""
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    products, lengths = (a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1))
    whole = products.sum() / np.sqrt((a * a).sum() * (b * b).sum())
    return float(whole), float(np.quantile(products / lengths, 0.01))


def _products(model: ov.Model) -> list[ov.Node]:
    """Every product with a constant matrix, in topological order."""
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return [node for node in found if _matrix(node).get_type_name() == "Constant" and len(_matrix(node).get_output_shape(0)) == 2]


def _matrix(product: ov.Node) -> ov.Node:
    node = product.input_value(1).get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node


def _observed(
    model: ov.Model,
    light: ov.Model | None,
    reductions: Sequence[Callable[[ov.Output, ov.Node], ov.Node]],
    tiles: Sequence[np.ndarray],
    unseen: Sequence[np.ndarray],
    bar: tqdm,
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """The reductions of every product's inputs, (tiles, K) each, and the features (N, D) of the unseen tiles."""
    watched, own = (light or model).clone(), len(model.outputs)
    nodes = {node.get_friendly_name(): node for node in watched.get_ops()}
    ends = []
    for product in _products(model):
        given = nodes[product.get_friendly_name()].input_value(0)
        axes = opset.constant(np.arange(len(given.get_partial_shape()) - 1))
        ends += [opset.result(reduce(given, axes)) for reduce in reductions]
    watched.add_results(ends)
    run = _compiled(watched, WITHOUT_8_BIT_INPUTS)
    stored = [np.asarray(_matrix(product).data) for product in _products(model)]

    def let_go() -> None:
        for matrix in stored:
            page_out(matrix)

    found: list[list[np.ndarray]] = []
    for tile in tiles:
        with nullcontext() if found else leaving(let_go):  # the first run packs the weights
            given = run([tile])
        found.append([np.array(given[place]) for place in range(own, own + len(ends))])
        bar.update()
    each = [np.stack(ends) for ends in zip(*found, strict=True)]
    features = [_rows(run([tile])[0], bar) for tile in unseen]
    of_products = [each[start : start + len(reductions)] for start in range(0, len(each), len(reductions))]
    return of_products, np.concatenate(features) if features else np.zeros((0, 0), np.float32)


def _noisiest_first(
    model: ov.Model, light: ov.Model | None, ranges: list[_Range], tiles: Sequence[np.ndarray], bar: tqdm
) -> list[int]:
    """The products, ranked by their relative rounding noise, if errors and inputs are independent."""

    def square(given: ov.Output, axes: ov.Node) -> ov.Node:
        return opset.reduce_mean(opset.multiply(given, given), axes)

    noises = []
    observed, _ = _observed(model, light, (square,), tiles, (), bar)
    for product, seen, (squares,) in zip(_products(model), ranges, observed, strict=True):
        weights, each = _weights(product), squares.mean(axis=0)
        scale = _smoothing(seen, weights)
        low, high = _levels(seen, scale)
        of_inputs = ((high - low) / (LEVELS - 1)) ** 2 * np.square(weights * scale).sum()
        of_weights = np.square(_steps(weights * scale)).sum() * (each / scale**2).sum()
        noises.append((of_inputs + of_weights) / max((each * np.square(weights).sum(0)).sum(), TINY))
    return np.argsort(noises)[::-1].tolist()


def _in_8_bits(model: ov.Model, ranges: list[_Range], kept: set[int]) -> ov.Model:
    """`model` with 8-bit products, except those whose numbers are in `kept`."""
    made = model.clone()
    for number, (product, seen) in enumerate(zip(_products(made), ranges, strict=True)):
        if number not in kept:
            _to_8_bits(product, seen)
    made.validate_nodes_and_infer_types()
    return made


def _to_8_bits(product: ov.Node, seen: _Range) -> None:
    """Replace a product by one with quantised inputs and weights."""
    weights = _weights(product)
    scale = _smoothing(seen, weights)
    given = product.input_value(0)
    rank = len(given.get_partial_shape())
    low, high = (np.full([1] * rank, value, np.float32) for value in _levels(seen, scale))
    smoothed = opset.multiply(given, opset.constant((1 / scale).reshape([1] * (rank - 1) + [-1])))
    rounded = opset.fake_quantize(smoothed, low, high, low, high, LEVELS)
    weights = weights * scale
    steps = _steps(weights)
    values = opset.constant(np.rint(weights / steps).astype(np.int8), name=_matrix(product).get_friendly_name())
    matrix = opset.multiply(opset.convert(values, np.float32), opset.constant(steps))
    new = opset.matmul(rounded, matrix, transpose_a=False, transpose_b=True)
    new.set_friendly_name(product.get_friendly_name())
    product.output(0).replace(new.output(0))
    page_out(np.asarray(_matrix(product).data))


def _weights(product: ov.Node) -> np.ndarray:
    """The constant matrix of a product, (N, K) float32."""
    stored = _matrix(product).get_data(dtype=np.float32)
    return stored if product.get_attributes()["transpose_b"] else stored.T


def _smoothing(seen: _Range, weights: np.ndarray) -> np.ndarray:
    """The smoothing divisor of each input channel (K,); its geometric mean is 1."""
    inputs = np.maximum(np.maximum(np.abs(seen.low), np.abs(seen.high)), TINY)
    scale = inputs**SMOOTHING / np.maximum(np.abs(weights).max(0), TINY) ** (1 - SMOOTHING)
    return (scale / np.exp(np.log(scale).mean())).astype(np.float32)


def _steps(weights: np.ndarray) -> np.ndarray:
    """The scale of each row's weights, (N, 1)."""
    return np.maximum(np.abs(weights).max(1, keepdims=True) / MOST, np.finfo(np.float32).tiny).astype(np.float32)


def _levels(seen: _Range, scale: np.ndarray) -> tuple[float, float]:
    """The range of a layer's input after smoothing, widened so that one level is exactly 0."""
    low, high = min(float((seen.low / scale).min()), 0.0), max(float((seen.high / scale).max()), TINY)
    zero = round(-low * (LEVELS - 1) / (high - low))
    step = high / (LEVELS - 1 - zero) if zero < LEVELS - 1 else 0.0
    step = max(step, -low / zero) if zero else step
    return -zero * step, (LEVELS - 1 - zero) * step
