"""python -m pytest tests/runtime/parts/test_experts_apart.py

Experts of Qwen3-MoE apart from each other: the same logits as the saved part gives in OpenVINO's own form.
"""

import numpy as np
import openvino as ov
import pytest

from convert.exact import LanguagePart
from runtime import OVInternVLChatModel
from runtime.folder.files import PART_FILES
from runtime.parts.experts import take_experts_apart

LAYERS, EXPERTS, WIDTH = 2, 6, 64
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def logits(model: ov.Model, embeds: np.ndarray) -> np.ndarray:
    length = embeds.shape[1]
    inputs = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64), "beam_idx": np.zeros(1, np.int32)}
    return ov.Core().compile_model(model, "CPU", EXACT)(inputs | {"position_ids": np.arange(length)[None]})["logits"]


def products(model: ov.Model) -> list[int]:
    """The number of axes of each matrix product's weights."""
    return [len(node.get_input_partial_shape(1)) for node in model.get_ops() if node.get_type_name() == "MatMul"]


@pytest.mark.parametrize("weight_format", ["int4", "int8", "fp32"])
def test_the_sum_is_the_same(tiny, converted, weight_format):
    options = {"group_size": 32} if weight_format == "int4" else {}
    file = converted(tiny("tiny-qwen3-moe"), weight_format=weight_format, **options) / PART_FILES["language"]
    whole, apart = ov.Core().read_model(file), ov.Core().read_model(file)
    kept = take_experts_apart(apart)
    assert len(kept) >= 3 * LAYERS
    assert products(whole).count(3) >= 3 * LAYERS
    assert products(apart).count(2) == products(whole).count(2) + 3 * LAYERS * EXPERTS
    random = np.random.default_rng(0)
    alike = np.repeat(random.standard_normal((1, 1, WIDTH)), 9, 1)  # all tokens take the same experts, the others get none
    for embeds in (random.standard_normal((1, 40, WIDTH)), random.standard_normal((1, 1, WIDTH)), alike):
        wanted, found = logits(whole, embeds.astype(np.float32)), logits(apart, embeds.astype(np.float32))
        assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["tiny-gpt-oss", "tiny-qwen2"])
def test_other_models_stay_as_they_are(tiny, converted, name):
    model = ov.Core().read_model(converted(tiny(name), group_size=32) / PART_FILES["language"])
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    assert take_experts_apart(model) == []
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def kinds(compiled: ov.CompiledModel) -> list[str]:
    return [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]


def test_an_opened_folder_reads_prompts_with_experts_apart(tiny, converted):
    folder = converted(tiny("tiny-qwen3-moe"), weight_format="fp32")
    model = OVInternVLChatModel(folder, precision="accuracy")
    assert "GatherMatmul" not in kinds(model.language_part._compiled)
    reference = LanguagePart(folder)
    ids = np.arange(20, 60)[None]
    embeds = model.embed_tokens(ids)
    wanted = reference.logits(embeds, np.ones_like(ids))[:, -1:].copy()
    found = model.new_cache().feed(embeds, np.ones_like(ids), ids[0])
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
