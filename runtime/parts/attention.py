"""Faster attention of the vision part on a CPU: two matrix products and a softmax instead of one attention operation.

OpenVINO fuses them again, together with the transposes of heads around them, which its attention operation leaves out. It copies
what it splits, so one product that gives queries, keys and values becomes three. With AMX its fused products are slower for a
number of tokens that 32 does not divide, such as the 1,025 of a tile, so such tokens are padded there and no token attends to the
padding. Results differ by rounding alone (docs/experiments.md has the gains). Takes and returns an ov.Model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as opset

MOST_PADDING = 1 / 16  # of the tokens: more costs the other products too much
HIDDEN = -65504.0  # the score of padding
SHARED_TYPES = (ov.Type.f32, ov.Type.f16, ov.Type.u8, ov.Type.i8)  # constants that NumPy has types for
# Operations that compute each token by itself, if they work on its last axis.
PER_TOKEN = {"Add", "Subtract", "Multiply", "Divide", "Power", "Sqrt", "Convert", "FakeQuantize", "Gelu", "Swish", "Transpose"}
LAST_AXIS = {"MVN": 1, "ReduceMean": 1, "Split": 1, "VariadicSplit": 1}  # and the input that names the axis


def open_attention(model: ov.Model, multiple: int = 1) -> ov.Model:
    """Replace each unmasked attention operation of `model` with a static head size, in place; pad tokens to that multiple."""
    attention = [node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    attention = [node for node in attention if len(node.inputs()) == 3 and not node.get_attributes()["causal"]]
    attention = [node for node in attention if node.get_input_partial_shape(0)[-1].is_static]
    real = _pad_tokens(model, attention, multiple)
    for node in [node for node in model.get_ops() if node.get_type_name() == "VariadicSplit"] if attention else []:
        _split_product(node)
    for node in attention:
        query, key, value = (node.input_value(place) for place in range(3))
        kind = query.get_element_type()
        scaled = opset.multiply(query, opset.constant(query.get_partial_shape()[-1].get_length() ** -0.5, kind))
        scores = opset.matmul(scaled, key, transpose_a=False, transpose_b=True)
        if real is not None:  # OpenVINO adds a mask that it has to broadcast wrongly in bfloat16, and selects rightly
            scores = opset.select(opset.constant(real[None, None, None]), scores, opset.constant(HIDDEN, kind))
        node.output(0).replace(opset.matmul(opset.softmax(scores, -1), value, transpose_a=False, transpose_b=False).output(0))
    model.validate_nodes_and_infer_types()
    return model


def _split_product(split: ov.Node) -> None:
    """Replace equal thirds of x W^T + b by three products, where W and b have one of `SHARED_TYPES`."""
    total = split.input_value(0).get_node()
    product = total.input_value(0).get_node() if total.get_type_name() == "Add" else total
    whole = product.get_type_name() == "MatMul" and product.get_attributes()["transpose_b"] and len(split.outputs()) == 3
    users = [len(node.output(0).get_target_inputs()) for node in (total, product) if whole]
    widths = {str(output.get_partial_shape()[-1]) for output in split.outputs()}
    if not whole or len(widths) > 1 or any(count > 2 for count in users):  # a second user is the shape
        return
    made = []
    for third in range(3):
        matrix = _third(product.input_value(1), third, 0)
        bias = _third(total.input_value(1), third, -1) if total is not product else None
        if matrix is None or (bias is None and total is not product):
            return
        given = opset.matmul(product.input_value(0), matrix, transpose_a=False, transpose_b=True)
        made.append(given if bias is None else opset.add(given, bias))
    for output, node in zip(split.outputs(), made, strict=True):
        output.replace(node.output(0))


def _third(value: ov.Output, third: int, axis: int) -> ov.Output | None:
    """A third along one axis of what is computed from constants, over the same memory; None where it is not."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        if node.get_element_type() not in SHARED_TYPES:
            return None
        if node.data.ndim == 0 or node.data.shape[axis] == 1:  # one number for all
            return value
        if node.data.shape[axis] % 3:
            return None
        taken = np.ascontiguousarray(np.split(node.data, 3, axis)[third])
        return opset.constant(np.asarray(_Writable(taken)), node.get_element_type(), shared_memory=True).output(0)
    parts = [_third(each, third, axis) for each in node.input_values()]
    if any(part is None for part in parts):
        return None
    if kind == "Convert":
        return opset.convert(parts[0], node.get_element_type().get_type_name()).output(0)
    return getattr(opset, kind.lower())(*parts).output(0) if kind in ("Multiply", "Subtract") else None


class _Writable:
    """The memory of an array, said to be writable: OpenVINO shares no other, though it writes to no constant."""

    def __init__(self, array: np.ndarray):
        self._array = array  # keeps the memory alive
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def _pad_tokens(model: ov.Model, attention: Sequence[ov.Node], multiple: int) -> np.ndarray | None:
    """Pad the tokens (B, N, C) behind, from their positions to where the first one is cut off -> which are real (P,), bool.

    None, and nothing changed, where a multiple is too far or anything between looks at more than one token.
    """
    sides = {side.get_length() if side.is_static else 0 for node in attention for side in [node.get_input_partial_shape(1)[-2]]}
    count = sides.pop() if len(sides) == 1 else 0
    padding = -count % multiple
    starts = [node for node in model.get_ops() if node.get_type_name() == "Add" and _adds_positions(node, count)]
    if not 0 < padding <= MOST_PADDING * count or len(starts) != 1:
        return None
    (start,) = starts
    looking = {node.get_name() for node in attention}
    reached, cuts, shapes = {start.get_name()}, [], []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        fed = [place for place, value in enumerate(node.input_values()) if value.get_node().get_name() in reached]
        if not fed or kind == "ShapeOf":
            continue
        if kind == "Slice" and _cuts_the_first(node):
            cuts.append(node)
            continue
        if kind == "Reshape":
            sides_after = [*_constant(node, 1)]
            if count in sides_after and (sides_after.index(count) != 1 or -1 in sides_after or sides_after.count(count) > 1):
                return None
            shapes += [(node, sides_after)] if count in sides_after else []
        elif not (
            kind in PER_TOKEN
            or (kind in LAST_AXIS and [*_constant(node, LAST_AXIS[kind])] in ([-1], [len(node.get_input_partial_shape(0)) - 1]))
            or (kind == "MatMul" and fed == [0])
            or node.get_name() in looking
        ):
            return None
        reached.add(node.get_name())
    if not cuts or len(shapes) < len(attention):
        return None
    users = start.output(0).get_target_inputs()
    ends = (np.zeros(3, np.int64), np.array([0, padding, 0]))
    padded = opset.pad(start, *map(opset.constant, ends), "constant", opset.constant(0, start.get_element_type()))
    for user in users:
        user.replace_source_output(padded.output(0))
    for node, sides_after in shapes:
        node.input(1).replace_source_output(opset.constant(np.array([sides_after[0], -1, *sides_after[2:]])).output(0))
    for node in cuts:
        node.input(2).replace_source_output(opset.constant(np.array([count])).output(0))
    model.validate_nodes_and_infer_types()
    return np.arange(count + padding) < count


def _adds_positions(node: ov.Node, count: int) -> bool:
    """Whether it adds a constant (1, N, C) for N tokens."""
    shape = node.get_input_partial_shape(1)
    source = node.input_value(1).get_node()
    source = source.input_value(0).get_node() if source.get_type_name() == "Convert" else source
    return source.get_type_name() == "Constant" and len(source.shape) == 3 and [*source.shape][:2] == [1, count] and shape.is_static


def _cuts_the_first(node: ov.Node) -> bool:
    """Whether it leaves out the first token alone: (B, N, C) -> (B, N - 1, C)."""
    start, end, step, axis = ([*_constant(node, place)] for place in range(1, 5))
    return (start, step, axis) == ([1], [1], [1]) and len(end) == 1 and end[0] >= node.get_input_partial_shape(0)[1].get_length()


def _constant(node: ov.Node, place: int) -> np.ndarray:
    """The numbers of a constant input; none of another one."""
    source = node.input_value(place).get_node()
    return source.data.reshape(-1) if source.get_type_name() == "Constant" else np.zeros(0, np.int64)
