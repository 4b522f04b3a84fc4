"""python -m pytest tests/runtime/parts/test_attention.py

Attention as a CPU computes it: as OpenVINO's own operation and the PyTorch path give it, with as many tokens as a real tile has.
"""

from __future__ import annotations

import copy
import gc

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset

from convert import ConvertOptions
from convert.checkpoint import Checkpoint
from convert.compress import compress
from convert.reference.model import load_vision
from convert.trace import trace_vision
from runtime.parts.attention import open_attention
from tests.checkpoints import CONFIGS, make_checkpoint

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module", params=["tiny-qwen2", "tiny-llama"])
def whole_tile(request, tmp_path_factory):
    """A narrow InternViT-300M, a narrow 6B (RMSNorm, normalised queries and keys): PyTorch path and graph, of 1,025 tokens."""
    vision = copy.deepcopy(CONFIGS[request.param]["vision_config"]) | {"image_size": 448, "num_hidden_layers": 2}
    folder = make_checkpoint(tmp_path_factory.mktemp("tile"), request.param, vision_config=vision, force_image_size=448)
    reference = load_vision(Checkpoint(folder))
    return reference, trace_vision(reference)


def sizes(model: ov.Model) -> set[int]:
    """Numbers of tokens that the softmax of attention goes over."""
    return {node.get_output_partial_shape(0)[-1].get_length() for node in model.get_ops() if node.get_type_name() == "Softmax"}


def test_tokens_are_padded_and_nothing_sees_the_padding(whole_tile):
    reference, model = whole_tile
    tiles = np.random.default_rng(0).standard_normal((2, 3, 448, 448)).astype(np.float32)
    closed = ov.Core().compile_model(model, "CPU", EXACT)(tiles)[0].copy()
    opened = open_attention(model.clone(), 32)
    assert sizes(opened) == {1056}
    found = ov.Core().compile_model(opened, "CPU", EXACT)(tiles)[0]
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(tiles)).numpy()
    largest = np.abs(wanted).max()
    assert np.abs(found - closed).max() <= 1e-5 * largest
    assert np.abs(found - wanted).max() <= 2e-4 * largest


@pytest.mark.parametrize("weight_format", ["fp16", "int8", "int4"])
def test_what_is_split_is_computed_apart_over_the_same_memory(whole_tile, weight_format):
    """But for weights of half a byte, which stay one product."""
    _, model = whole_tile
    model = compress(model.clone(), weight_format, ConvertOptions(group_size=64))
    tiles = np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype(np.float32)
    closed = ov.Core().compile_model(model.clone(), "CPU", EXACT)(tiles)[0].copy()
    opened = open_attention(model.clone())
    splits = [node for node in opened.get_ops() if node.get_type_name() == "VariadicSplit"]
    assert len(splits) == (2 if weight_format == "int4" else 0)
    gc.collect()  # what the products share stays
    found = ov.Core().compile_model(opened, "CPU", EXACT)(tiles)[0]
    assert np.abs(found - closed).max() <= 1e-3 * np.abs(closed).max()


@pytest.mark.skipif("BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bfloat16")
def test_in_bfloat16_padding_is_not_seen_either(whole_tile):
    _, model = whole_tile
    tiles = np.random.default_rng(1).standard_normal((1, 3, 448, 448)).astype(np.float32)
    exact, closed, found = (
        ov.Core().compile_model(given, "CPU", {"INFERENCE_PRECISION_HINT": precision})(tiles)[0].astype(np.float64).ravel()
        for given, precision in ((model, "f32"), (model, "bf16"), (open_attention(model.clone(), 32), "bf16"))
    )
    cosines = [exact @ each / np.linalg.norm(exact) / np.linalg.norm(each) for each in (closed, found)]
    assert 1 - cosines[1] <= 1.2 * (1 - cosines[0])


def one_layer(count: int, ending: str) -> ov.Model:
    """Attention over `count` tokens (B, N, 32) with positions, and what becomes of them: the first one cut off, a mean, or all."""
    given = opset.parameter([-1, count, 32], np.float32)
    positions = np.random.default_rng(0).standard_normal((1, count, 32)).astype(np.float32)
    tokens = opset.add(given, opset.constant(positions))
    heads = opset.transpose(opset.reshape(tokens, opset.constant([0, count, 2, 16]), True), opset.constant([0, 2, 1, 3]))
    mixed = opset.transpose(opset.scaled_dot_product_attention(heads, heads, heads), opset.constant([0, 2, 1, 3]))
    end = opset.reshape(mixed, opset.constant([0, count, 32]), True)
    if ending == "cut":
        end = opset.slice(end, *map(opset.constant, ([1], [np.iinfo(np.int64).max], [1], [1])))
    if ending == "mean":
        end = opset.reduce_mean(end, opset.constant([1]), False)
    return ov.Model([end], [given])


@pytest.mark.parametrize(
    ("count", "ending", "size"),
    [(1025, "cut", 1056), (1025, "mean", 1025), (1025, "all", 1025), (1024, "cut", 1024), (65, "cut", 65)],
)
def test_only_tokens_that_nothing_looks_at_together_are_padded(count, ending, size):
    """Nor where padding would be long, or is not needed."""
    tokens = np.random.default_rng(2).standard_normal((3, count, 32)).astype(np.float32)
    closed = ov.Core().compile_model(one_layer(count, ending), "CPU", EXACT)(tokens)[0]
    opened = open_attention(one_layer(count, ending), 32)
    assert sizes(opened) == {size}
    found = ov.Core().compile_model(opened, "CPU", EXACT)(tokens)[0]
    assert found.shape == closed.shape
    np.testing.assert_allclose(found, closed, atol=1e-5)
