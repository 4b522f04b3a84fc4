"""python -m pytest tests/convert/test_native.py

The transformers-native layout: the names that transformers writes today, what its config.json lacks, what is told.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from convert.checkpoint import Checkpoint
from convert.native import published_config
from convert.reference.model import InternVLChatModel, expected_shapes, is_tied
from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.media.tiles import Tiling
from tests.conftest import DATA, embeddings

GOLDEN = DATA / "golden" / "hf-native"


@pytest.fixture(scope="module")
def saved_today(tmp_path_factory):
    """The golden checkpoint opened and saved again by the installed transformers, under the names its modules have there."""
    folder = tmp_path_factory.mktemp("native") / "InternVL-hf"
    model = InternVLForConditionalGeneration.from_pretrained(GOLDEN)
    model.save_pretrained(folder)  # keeps the names of the file that was opened
    save_file(model.state_dict(), folder / "model.safetensors")
    for file in GOLDEN.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def test_todays_names_and_configuration_are_read(saved_today):
    names = load_file(saved_today / "model.safetensors")
    assert any(name.startswith("model.language_model.layers.") for name in names), "not the layout this test is about"
    checkpoint = Checkpoint(saved_today)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    golden = load_file(GOLDEN / "golden.safetensors")
    model = InternVLChatModel.from_checkpoint(checkpoint)
    features = model.extract_feature(golden["pixel_values"])
    assert (features - golden["image_features"]).abs().max() < 1e-5
    assert (model.logits(embeddings(model, golden["input_ids"], features)) - golden["logits"]).abs().max() < 1e-5


def test_a_tied_head_is_the_embedding_table(saved_today, tmp_path):
    folder = shutil.copytree(saved_today, tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.language_model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    assert torch.equal(InternVLChatModel.from_checkpoint(checkpoint).language.lm_head.weight, table)


def test_tiles_are_those_of_the_processor(saved_today, tmp_path):
    assert Tiling.of(Checkpoint(saved_today).config) == Tiling(56, 1, 12, thumbnail=True)
    folder = shutil.copytree(saved_today, tmp_path / "fewer")
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_to_patches": True, "max_patches": 4}))
    assert Checkpoint(folder).config.max_tiles == 4
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"max_patches": 6}}))  # as transformers 5 saves it
    assert Checkpoint(folder).config.max_tiles == 6


def test_the_default_configuration_of_transformers_is_read():
    """A file may leave out what is the default there."""
    from runtime.folder.config import InternVLConfig as Ours

    config = Ours.from_dict(published_config(InternVLConfig().to_dict(), {}))
    assert (config.vision.num_hidden_layers, config.tokens_per_tile, config.template) == (24, 256, "internvl2_5")
    assert config.language_architecture == "Qwen2ForCausalLM"


def test_the_template_goes_by_the_language_model():
    raw = InternVLConfig().to_dict()
    assert published_config(raw, {})["template"] == "internvl2_5"
    assert published_config(raw | {"text_config": {"model_type": "gpt_oss"}}, {})["template"] == "internvl3_5_gpt_oss"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vision_config": None}, CheckpointError, "has no vision_config"),
        ({"vision": {"use_mean_pooling": False}}, UnsupportedModelError, "use_mean_pooling is False; only True is supported"),
        ({"vision": {"hidden_size": ...}}, CheckpointError, "vision_config lacks hidden_size"),
        ({"vision": {"image_size": [56, 112]}}, UnsupportedModelError, r"of \[56, 112\] pixels are not square"),
        ({"text": {"architectures": None, "model_type": "odd"}}, UnsupportedModelError, "text_config.model_type is 'odd'"),
    ],
)
def test_what_cannot_be_read_is_told(saved_today, tmp_path, changes, error, message):
    folder = shutil.copytree(saved_today, tmp_path / "other")
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] |= changes.pop("vision", {})
    raw["vision_config"] = {key: value for key, value in raw["vision_config"].items() if value is not ...}
    raw["text_config"] |= changes.pop("text", {})
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(error, match=message):
        Checkpoint(folder)


def test_a_query_matrix_without_its_key_matrix_is_told(saved_today, tmp_path):
    folder = shutil.copytree(saved_today, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.vision_tower.encoder.layer.1.attention.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight and not .*layer.1.attention.k_proj.weight"):
        Checkpoint(folder)
