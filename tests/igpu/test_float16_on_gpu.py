"""build/igpu/run python -m pytest tests/igpu/test_float16_on_gpu.py

Float16 as the plugin computes it: a trained language model keeps its tokens, and activations beyond float16 in InternViT-6B's shape
are found and computed again. The first needs a checkpoint with a trained language part, named by INTERNVL_REAL_MODEL.
"""

import json
import os
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from safetensors.torch import load_file, save_file

from convert.exact import LanguagePart, Part
from runtime import OVInternVLChatModel, Question
from runtime.folder.files import OVERFLOWS_FILE
from runtime.parts.device import place_part
from runtime.parts.stateless_part import StatelessPart
from tests.checkpoints import CONFIGS, VIT_6B, make_checkpoint
from tests.igpu.conftest import KEPT

QUESTIONS = (
    "What causes the seasons on Earth?",
    "Write a Python function that checks whether a word is a palindrome.",
    "用Python写一个快速排序。",
    "Write a short letter of complaint about a late parcel.",
)
NEW_TOKENS = 32
LAYERS, CHANNEL, OUTLIER = 2, 7, 6e4  # fits float16 as a weight, and in a sum of two no longer


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("weight_format", ["int4", "fp16"])
def test_a_trained_language_model_keeps_its_tokens(converted, weight_format, record_property):
    """Beside the same weights in float32 on a CPU, which writes an answer that both then read."""
    source = os.environ.get("INTERNVL_REAL_MODEL")
    if not source:
        pytest.skip("INTERNVL_REAL_MODEL names no checkpoint with a trained language part")
    folder = converted(Path(source), weight_format=weight_format)
    model, oracle = OVInternVLChatModel(folder, "GPU", vision_device="CPU", cache_dir=KEPT), LanguagePart(folder)
    cosines, same = [], []
    for question in QUESTIONS:
        ids = model.prompt_of(model.system_message, [model.open_turn(Question(question))]).ids[None]
        wanted = np.array(oracle.logits(model.embed_tokens(ids), np.ones_like(ids)))
        for _ in range(NEW_TOKENS):
            ids = np.concatenate([ids, wanted[:, -1:].argmax(-1)], 1)
            wanted = np.array(oracle.logits(model.embed_tokens(ids), np.ones_like(ids)))
        found = model.new_cache()._step(model.embed_tokens(ids), np.ones_like(ids), np.zeros_like(ids), True)
        assert np.isfinite(found).all()
        cosines += [*((found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1))[0]]
        same += [*(found.argmax(-1) == wanted.argmax(-1))[0]]
    record_property("cosine", f"mean {np.mean(cosines):.5f}, least {np.min(cosines):.5f}")
    record_property("same", f"{np.sum(same)} of {len(same)}")
    assert np.mean(cosines) > 0.999
    assert np.mean(same) > 0.95
    assert not (folder / OVERFLOWS_FILE).exists()


@pytest.fixture(scope="module")
def six(tmp_path_factory, converted):
    """InternViT-6B's width in two layers, with one channel of every position beyond float16, as trained ones have a few."""
    source = tmp_path_factory.mktemp("six") / "checkpoint"
    vision = VIT_6B | {"num_hidden_layers": LAYERS, "image_size": 224}
    make_checkpoint(source, "tiny-llama", vision_config=vision, force_image_size=224)
    (file,) = source.glob("model*.safetensors")
    tensors = load_file(file)
    tensors["vision_model.embeddings.position_embedding"][..., CHANNEL] = OUTLIER
    for name in tensors:
        if name.endswith("mlp.fc2.bias"):
            tensors[name][CHANNEL] = OUTLIER
        elif name.endswith(".ls2"):
            tensors[name][CHANNEL] = 1
        elif ".norm" in name and name.endswith(".weight"):
            tensors[name][CHANNEL] = 0.01  # the other channels stay what decides
    save_file(tensors, file, metadata={"format": "pt"})
    return converted(source, weight_format="fp16")


@pytest.mark.timeout(3600)
def test_outliers_in_the_shape_of_the_6b_vision_are_computed_again(six, caplog):
    tiles = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    wanted, core = Part(six, "vision")(tiles), ov.Core()
    width = CONFIGS["tiny-llama"]["llm_config"]["hidden_size"]
    placed = place_part(core, six, "vision", "GPU", cache_dir=KEPT)  # as if nothing were known of this shape
    found = StatelessPart(six, core, placed, width)(tiles)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    said = [record.getMessage() for record in caplog.records if "overflows" in record.getMessage()]
    assert said == ["the vision part overflows in float16 on GPU: it is compiled again in float32, from now on"]
    assert json.loads((six / OVERFLOWS_FILE).read_text()) == {"GPU": ["vision"]}
    caplog.clear()
    (six / OVERFLOWS_FILE).unlink()
    found = OVInternVLChatModel(six, "CPU", vision_device="GPU", cache_dir=KEPT).encode_tiles(tiles)  # it is known to need float32
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert not [record for record in caplog.records if "overflows" in record.getMessage()]
