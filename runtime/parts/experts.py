"""The experts of a layer apart from each other, each over its own tokens: how a CPU reads prompts.

OpenVINO's own operation (GatherMatmul) unpacks an expert's weights for every token; in bfloat16 on AMX it multiplies, for every
expert, as many rows as the prompt has tokens. Here tokens are sorted by expert, each expert multiplies those that it got, and the
results are sorted back: the same sum, with weights unpacked once. Knows the form in which convert/reference/experts.py is traced
for Qwen3-MoE; any other stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

UNPACKING = {"Subtract": opset.subtract, "Multiply": opset.multiply}


def take_experts_apart(model: ov.Model) -> list[ov.Node]:
    """Rewrite the layers of experts of Qwen3-MoE. Returns constants whose memory the model uses but does not own.

    They must be kept for as long as the model or what is compiled from it; there are none if the model has no such layers.
    """
    kept: list[ov.Node] = []
    for layer in [layer for node in model.get_ordered_ops() if (layer := _Layer.of(node)) is not None]:
        total = layer.apart(kept)
        for target in layer.total.output(0).get_target_inputs():
            target.replace_source_output(total)
    if kept:
        model.validate_nodes_and_infer_types()
    return kept


class _Layer:
    """The experts of a layer: tokens (T, D), the numbers of their experts and their shares (T, K), and the sum over all experts."""

    def __init__(self, total: ov.Node, tokens: ov.Output, scattered: ov.Node, products: list[ov.Node]):
        self.total, self._tokens = total, tokens
        self._numbers, self._shares = scattered.input_value(1), scattered.input_value(2)
        self._gate, self._up, self._down = products
        self._count = int(self._gate.get_input_partial_shape(1)[0].get_length())

    @classmethod
    def of(cls, total: ov.Node) -> _Layer | None:
        """The layer that ends with this node; None for any other node."""
        shared = _above(total, "Multiply") if total.get_type_name() == "ReduceSum" else None
        down = _above(shared, "Reshape", "MatMul")
        inner = _above(down, "Multiply")
        gate, up = _above(inner, "Swish", "MatMul"), _input(inner, 1, "MatMul")
        tiled = _above(gate, "Reshape", "Tile")
        scattered = None if shared is None else _climb(shared.input_value(1).get_node())
        if down is None or gate is None or up is None or tiled is None or scattered is None:
            return None
        if scattered.get_type_name() != "ScatterElementsUpdate" or len(gate.get_input_partial_shape(1)) != 3:
            return None
        return cls(total, tiled.input_value(0), scattered, [gate, up, down])

    def apart(self, kept: list[ov.Node]) -> ov.Output:
        """The sum (T, D), every expert over its own tokens; the constants that it reads are added to `kept`."""
        kept += [constant for product in (self._gate, self._up, self._down) for constant in _constants(product.input_value(1))]
        count, name = self._count, self.total.get_friendly_name()
        numbers = opset.convert(self._numbers, ov.Type.i64)
        taken = opset.one_hot(numbers, _whole(count), opset.constant(np.int32(1)), opset.constant(np.int32(0)), axis=-1)
        mask = opset.transpose(opset.reduce_sum(taken, _whole(1), False), _whole([1, 0]))  # (E, T)
        sizes = opset.convert(opset.reduce_sum(mask, _whole(1), False), ov.Type.i64)
        owners = opset.gather(opset.non_zero(mask, "i64"), _whole(1), _whole(0))  # the tokens, expert by expert
        own = opset.variadic_split(opset.gather(self._tokens, owners, _whole(0)), _whole(0), sizes)
        results = opset.concat([self._expert(number, own.output(number), name) for number in range(count)], 0)
        # where the result of each token and expert stands among them
        places = opset.cum_sum(opset.reshape(mask, _whole([-1]), False), opset.constant(np.int32(0)), exclusive=True)
        length = opset.gather(opset.shape_of(self._tokens, "i64"), _whole(0), _whole(0))
        token = opset.unsqueeze(opset.range(_whole(0), length, _whole(1), "i64"), _whole(1))
        mine = opset.gather(places, opset.add(opset.multiply(numbers, length), token), _whole(0))  # (T, K)
        shared = opset.multiply(opset.gather(results, mine, _whole(0)), opset.unsqueeze(self._shares, _whole(2)))
        return opset.reduce_sum(shared, _whole(1), False).output(0)

    def _expert(self, number: int, x: ov.Output, name: str) -> ov.Output:
        gate, up, down = (_single(product.input_value(1), number) for product in (self._gate, self._up, self._down))
        inner = opset.multiply(opset.swish(opset.matmul(x, gate, False, True)), opset.matmul(x, up, False, True))
        return opset.matmul(inner, down, False, True, name=f"{name}/{number}").output(0)


def _single(joined: ov.Output, number: int) -> ov.Output:
    """One expert's part of a matrix (E, rows, columns): of its constants and of the operations that unpack them."""
    node = joined.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return _slice(node, number).output(0)
    first = _single(node.input_value(0), number)
    if kind == "Convert":
        return opset.convert(first, node.get_output_element_type(0)).output(0)
    if kind == "Reshape":
        return opset.reshape(first, _whole(node.get_output_shape(0)[1:]), False).output(0)
    return UNPACKING[kind](first, _single(node.input_value(1), number)).output(0)


def _constants(joined: ov.Output) -> list[ov.Node]:
    """The constants that a matrix is made of."""
    node = joined.get_node()
    inputs = [found for port in node.input_values() for found in _constants(port)]
    return inputs or [node]


def _slice(constant: ov.Node, number: int) -> ov.Node:
    """One expert's part of a constant (E, ...), in the constant's memory."""
    count, *shape = constant.get_output_shape(0)
    raw = np.asarray(constant.data).reshape(-1).view(np.uint8)
    size = len(raw) // count
    part = ov.Tensor(raw[number * size : (number + 1) * size], ov.Shape(shape), constant.get_output_element_type(0))
    return ov.op.Constant(part, shared_memory=True)


def _whole(values: Any) -> ov.Node:
    return opset.constant(np.array(values, np.int64))


def _input(node: ov.Node | None, number: int, kind: str) -> ov.Node | None:
    """The node that gives input `number`, if it is of this kind."""
    found = None if node is None else node.input_value(number).get_node()
    return found if found is not None and found.get_type_name() == kind else None


def _above(node: ov.Node | None, *kinds: str) -> ov.Node | None:
    """The node reached from `node` by first inputs of these kinds."""
    for kind in kinds:
        node = _input(node, 0, kind)
    return node


def _climb(node: ov.Node | None) -> ov.Node | None:
    """What is scattered: the node above some that only change its shape."""
    while node is not None and node.get_type_name() in ("Unsqueeze", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node
