"""Compressed matrices of a language part, requantised to int8 with one scale per row.

A processor without low-precision instructions unpacks each weight before it multiplies; then groups, zero points and 4-bit values
cost more time than they save in reading. Takes and returns an ov.Model; knows nothing of folders or of who runs it.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as opset

ROWS_AT_ONCE = 1 << 12  # unpacked at once: a vocabulary matrix takes half a gigabyte in float32
MOST = 127


def to_int8_rows(model: ov.Model) -> int:
    """Replace each compressed matrix (N, K) of `model` by symmetric int8 values with one scale per row; returns how many.

    A weight changes by at most half of a 127th of the largest one in its row. Stacked matrices (experts) stay as they are.
    """
    changed = 0
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
            continue
        found = _compressed(node.input_value(1).get_node())
        if found is None:
            continue
        values, scales = _rows(*found)
        small = opset.multiply(opset.convert(opset.constant(values), np.float16), opset.constant(scales))
        node.input(1).replace_source_output(opset.convert(small, np.float32).output(0))
        changed += 1
    model.validate_nodes_and_infer_types()
    return changed


def _compressed(node: ov.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]] | None:
    """Integers, zero points and scales of a matrix, which broadcast, and its shape; None where `node` is something else."""
    shape = [*node.get_output_shape(0)]
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Multiply" or len(shape) != 2:
        return None
    inner, scale = (node.input_value(place).get_node() for place in (0, 1))
    zero = None
    if inner.get_type_name() == "Subtract":
        inner, zero = (inner.input_value(place).get_node() for place in (0, 1))
    integers, points, scales = _values(inner, np.int16), _values(zero, np.int16), _values(scale, np.float32)
    if integers is None or scales is None or (zero is not None and points is None):
        return None
    return integers, np.zeros((1,) * integers.ndim, np.int16) if points is None else points, scales, (shape[0], shape[1])


def _values(node: ov.Node | None, kind: type) -> np.ndarray | None:
    """The values of a constant, through type conversions; None where `node` is something else."""
    while node is not None and node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data(dtype=kind) if node is not None and node.get_type_name() == "Constant" else None


def _rows(integers: np.ndarray, points: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """int8 (N, K) and float16 scales (N, 1)."""
    values, found = np.empty(shape, np.int8), np.empty((shape[0], 1), np.float16)
    points, scales = (np.broadcast_to(each, (shape[0], *each.shape[1:])) for each in (points, scales))
    for start in range(0, shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        exact = ((integers[part] - points[part]) * scales[part]).reshape(-1, shape[1])
        wanted = np.maximum(np.abs(exact).max(1, keepdims=True) / MOST, np.finfo(np.float16).smallest_subnormal)
        rounded = wanted.astype(np.float16)  # rounded up, or the largest weight would be clipped
        found[part] = np.where(rounded < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded)
        values[part] = np.clip(np.rint(exact / found[part].astype(np.float32)), -MOST, MOST)
    return values, found
