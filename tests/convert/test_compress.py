"""python -m pytest tests/convert/test_compress.py

Bit widths, and that compressing a vocabulary matrix by blocks is what NNCF does to the whole.
"""

import nncf
import numpy as np
import openvino as ov
import pytest
import torch

from convert import ConvertOptions
from convert.checkpoint import Checkpoint
from convert.compress import bit_widths, compress
from convert.reference.model import load_vision
from convert.trace import trace_text_embeddings, trace_vision
from runtime.errors import OptionError
from runtime.folder.files import PART_FILES, PARTS


@pytest.fixture
def table() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1000, 64) * torch.rand(1000, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_vocabulary_matrix_by_blocks_equals_nncf_on_the_whole(table, dtype, sym, monkeypatch):
    monkeypatch.setattr("convert.compress.WEIGHTS_AT_ONCE", 64 * 300)  # four blocks, the last one smaller
    table = table.to(dtype)
    mode = nncf.CompressWeightsMode.INT8_SYM if sym else nncf.CompressWeightsMode.INT8_ASYM
    whole = nncf.compress_weights(trace_text_embeddings(table), mode=mode)
    blocks = compress(trace_text_embeddings(table), "int8", ConvertOptions(sym=sym))
    assert constants(blocks) == constants(whole)
    ids = np.arange(1000)[None]
    assert np.array_equal(ov.compile_model(blocks, "CPU")(ids)[0], ov.compile_model(whole, "CPU")(ids)[0])


def test_int4_is_byte_for_byte_what_nncf_gives_by_itself(tiny):
    """NNCF is made to reuse its small models, which it does not by itself because their results would be overwritten."""
    checkpoint = Checkpoint(tiny("tiny-qwen2"))
    plain = nncf.compress_weights(
        trace_vision(load_vision(checkpoint, None)), mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=32, ratio=1.0
    )
    ours = compress(trace_vision(load_vision(checkpoint, None)), "int4", ConvertOptions(group_size=32))
    assert len(constants(ours)) > 20
    assert constants(ours) == constants(plain)


def constants(model: ov.Model) -> list:
    """Types, shapes and values of the compressed weight, its zero points and scales."""
    return sorted(
        (str(node.get_output_element_type(0)), list(node.get_output_shape(0)), node.data.tobytes())
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_format": "fp32"}, {"text_embeddings": {"fp32"}, "vision": {"fp32"}, "language": {"fp32"}}),
        ({"weight_format": "fp16"}, {"text_embeddings": {"fp16"}, "vision": {"fp16", "fp32"}, "language": {"fp16"}}),
        ({"weight_format": "int8"}, {"text_embeddings": {"int8"}, "vision": {"int8"}, "language": {"int8"}}),
        (
            {"weight_format": "int4", "group_size": 32},
            {"text_embeddings": {"int8"}, "vision": {"int8"}, "language": {"int4", "int8"}},
        ),
        (
            {"weight_format": "int4", "group_size": 32, "vision_weight_format": "int4"},
            {"text_embeddings": {"int8"}, "vision": {"int4", "int8"}, "language": {"int4", "int8"}},
        ),
        (
            {"weight_format": "int4", "group_size": 32, "vision_weight_format": "fp16"},
            {"text_embeddings": {"int8"}, "vision": {"fp16", "fp32"}, "language": {"int4", "int8"}},
        ),
        (
            {"weight_format": "int4", "group_size": 32, "ratio": 0.5, "sym": True, "backup_precision": "int8_sym"},
            {"text_embeddings": {"int8"}, "vision": {"int8"}, "language": {"int4", "int8"}},
        ),
        (
            {"weight_format": "int4", "group_size": 32, "awq": True, "text_embeddings_weight_format": "fp16"},
            {"text_embeddings": {"fp16"}, "vision": {"int8"}, "language": {"int4", "int8"}},
        ),
    ],
    ids=["fp32", "fp16", "int8", "int4", "int4, vision int4", "int4, vision fp16", "int4_sym, ratio 0.5", "int4, awq"],
)
def test_weight_formats_give_these_types(options, expected, tiny, converted):
    folder = converted(tiny("tiny-qwen2"), **options)
    for part, kinds in expected.items():
        found = widths(folder, part)
        assert kinds <= set(found), found
        assert max(found, key=found.get) in kinds


def widths(folder, part: str) -> dict[str, float]:
    return bit_widths(ov.Core().read_model(folder / PART_FILES[part]))


def test_only_the_head_of_an_int4_language_part_is_int8(tiny, converted):
    """NNCF spares the last matrix; since ours compresses the head itself, the one before it must not be spared instead."""
    found = widths(converted(tiny("tiny-qwen2"), weight_format="int4", group_size=32), "language")
    head, layers = 320 * 64, 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert found["int8"] / found["int4"] == pytest.approx(head / layers)


def test_the_6b_vision_transformer_stays_int8():
    assert ConvertOptions().formats(PARTS, vision_is_6b=True) == {"text_embeddings": "int8", "vision": "int8", "language": "int4"}
    assert ConvertOptions().formats(PARTS, vision_is_6b=False)["vision"] == "auto"
    assert ConvertOptions(weight_format="int8").formats(PARTS, vision_is_6b=False)["vision"] == "int8"
    assert ConvertOptions(vision_weight_format="w8a8").formats(PARTS, vision_is_6b=True)["vision"] == "w8a8"
    assert ConvertOptions(vision_weight_format="int4").formats(PARTS, vision_is_6b=True)["vision"] == "int4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": "int2"}, "weight_format 'int2' is not known; known are fp32, fp16, int8, int4"),
        ({"group_size": 0}, "group size 0 is neither positive nor -1"),
        ({"ratio": 1.5}, "ratio 1.5 is not between 0 and 1"),
        ({"backup_precision": "int6"}, "backup precision 'int6' is not known"),
        ({"scale_estimation": True}, "scale estimation needs activations: give a folder of pictures with --dataset"),
        ({"dataset": "pictures", "vision_weight_format": "int8"}, "the dataset is not used"),
        ({"dataset": "pictures", "weight_format": "int8"}, "the dataset is not used"),
        ({"awq": True, "weight_format": "int8"}, "awq, scale estimation and ratio are for weight format int4, not int8"),
        ({"awq": True, "dataset": "x", "num_samples": 0}, "num samples 0 is not positive"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_used_are_told(changes, message):
    with pytest.raises(OptionError, match=message):
        ConvertOptions(**changes)
