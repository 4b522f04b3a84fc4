"""Attention of the vision part as a CPU likes it: two products and a softmax in the place of one operation.

OpenVINO fuses them again, with the turning of heads before and after them, which it leaves outside of its own operation. The
numbers are the same but for rounding; a tile takes nine tenths of the time (docs/experiments.md). Takes and gives ov.Model.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as opset


def open_attention(model: ov.Model) -> ov.Model:
    """Replace each unmasked attention operation of `model` over heads of a known size, in place."""
    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or len(node.inputs()) != 3 or node.get_attributes()["causal"]:
            continue
        query, key, value = (node.input_value(place) for place in range(3))
        size = query.get_partial_shape()[-1]
        if size.is_static:
            scaled = opset.multiply(query, opset.constant(size.get_length() ** -0.5, query.get_element_type()))
            weights = opset.softmax(opset.matmul(scaled, key, transpose_a=False, transpose_b=True), -1)
            node.output(0).replace(opset.matmul(weights, value, transpose_a=False, transpose_b=False).output(0))
    return model
