"""python -m pytest tests/convert/test_checkpoint.py

A checkpoint is read strictly and without its Python; what is wrong with it is said in one line.
"""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.checkpoint import Checkpoint, resolve
from convert.reference.model import expected_shapes, is_tied, load_language, load_text_embeddings
from convert.weight_files import WEIGHTS_FILE
from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.folder.config import InternVLConfig
from tests.checkpoints import CONFIGS, make_checkpoint, tensor_shapes


def check(folder) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    return checkpoint


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_tensors_are_the_published_ones(name):
    """tests/checkpoints.py states names and shapes from the published files, full sizes included, with no code in common."""
    unused = [f"pooling_before_gating.{what}{n}." for what in ("attn", "norm") for n in "34"]  # published, and passed over
    published = {tensor: shape for tensor, shape in tensor_shapes(CONFIGS[name]) if not tensor.startswith(tuple(unused))}
    assert expected_shapes(InternVLConfig.from_dict(CONFIGS[name]), tied=False) == published


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("InternVL2-1B", 938_158_976),  # the size of its file
        ("InternVL3_5-8B", 17_056_636_928 // 2),  # metadata.total_size of its index, in bfloat16
        ("Mono-InternVL-2B", 3_111_355_392),
    ],
)
def test_published_numbers_of_parameters(name, parameters):
    assert sum(torch.Size(shape).numel() for _, shape in tensor_shapes(CONFIGS[name])) == parameters


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    one = check(make_checkpoint(tmp_path / "one", "tiny-internlm2"))
    many = check(make_checkpoint(tmp_path / "many", "tiny-internlm2", shard_bytes=100_000))
    assert len(list(many.folder.glob("*.safetensors"))) > 5
    assert one.shapes == many.shapes
    assert torch.equal(load_text_embeddings(one), load_text_embeddings(many))


def test_head_is_tied_when_its_tensor_is_absent_whatever_the_config_says(tmp_path, tiny):
    folder = make_checkpoint(tmp_path, "tiny-qwen2")
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / WEIGHTS_FILE)
    model = load_language(check(folder))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    untied = load_language(check(tiny("tiny-qwen2")))
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_matrices_are_mapped_and_not_copied(tiny):
    checkpoint = check(tiny("tiny-qwen2"))
    table = load_text_embeddings(checkpoint, None)
    assert table.dtype == torch.bfloat16
    assert str(checkpoint.folder / WEIGHTS_FILE) in Path("/proc/self/maps").read_text()


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def drop(tensors):
    for n in range(2):
        del tensors[f"language_model.model.layers.{n}.mlp.up_proj.weight"]


def add(tensors):
    tensors["language_model.model.layers.0.more.weight"] = torch.zeros(4)


def misshape(tensors):
    tensors["mlp1.1.weight"] = torch.zeros(64, 255)


def retype(tensors):
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].to(torch.int8)


def test_a_name_of_a_repository_is_no_kind():
    raw = CONFIGS["tiny-qwen2"] | {"auto_map": {"AutoConfig": "me/my-video-hico--configuration_internvl_chat.InternVLChatConfig"}}
    assert InternVLConfig.from_dict(raw).template == "Hermes-2"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "intern_vit_6b"}, "InternViT, a vision transformer alone"),
        ({"model_type": "internvl", "qllama_config": {}, "vision_config": {}}, "InternVL-14B .* without chat"),
        (
            {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat_hico2.InternVLChatModel"}},
            "InternVideo",
        ),
        ({"model_type": "internvideo2"}, "InternVideo"),
        ({"model_type": "internvl_chat", "rope_pos_id_version": "v2pe_fix"}, "V2PE"),
        ({"model_type": "internvl_audio_chat", "audio_config": {}}, "InternOmni"),
    ],
)
def test_other_kinds_are_named(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=f"config.json: this is .*{message}.*: give an InternVL chat checkpoint$"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"2 missing: language_model.model.layers.0.mlp.up_proj.weight, language_model.model.layers.1"),
        (add, r"1 unexpected: language_model.model.layers.0.more.weight"),
        (misshape, r"1 of another shape: mlp1.1.weight \[64, 255\] instead of \[64, 256\]"),
        (retype, r"1 of a type other than F32, F16, BF16: I8 in mlp1.1.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_tensors_are_counted_and_named(tmp_path, change, message):
    folder = make_checkpoint(tmp_path, "tiny-qwen2")
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


@pytest.mark.parametrize("keep", [0, 5, 5000, -1000], ids=["empty", "no header", "in the header", "in the data"])
def test_truncated_file_is_told(tmp_path, keep):
    weights = make_checkpoint(tmp_path, "tiny-qwen2") / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file .*fetch it again"):
        check(tmp_path)


def test_missing_shard_is_named(tmp_path):
    folder = make_checkpoint(tmp_path, "tiny-qwen2", shard_bytes=100_000)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ weight files: model-00002-of-"):
        check(folder)


def test_pickles_are_refused_without_being_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    folder = make_checkpoint(tmp_path, "tiny-qwen2")
    (folder / WEIGHTS_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="opening a pickle can run any code, so it is refused"):
        check(folder)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, CheckpointError, "has no config.json: give a checkpoint folder or a hub id"),
        ("{", CheckpointError, "config.json is not JSON"),
        ("[]", CheckpointError, "config.json holds a list, expected a JSON object"),
        ('{"model_type": "llava"}', UnsupportedModelError, "model_type is 'llava', expected 'internvl_chat'"),
        ('{"model_type": "internvl_chat"}', CheckpointError, "config.json has no vision_config"),
    ],
    ids=["missing", "not JSON", "not an object", "another model", "incomplete"],
)
def test_bad_config_is_told(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_config": {"architectures": ["MambaForCausalLM"]}}, "MambaForCausalLM is not supported; supported are Qwen2For"),
        ({"ps_version": "v3"}, "ps_version is 'v3'; v1 and v2 are supported"),
        ({"select_layer": 9}, "select_layer 9 is outside a vision transformer of 3 layers"),
        ({"force_image_size": 60}, "a tile of 60 pixels is not a whole number"),
        ({"template": None}, "config.json has no template"),
        ({"vision_config": {"norm_type": "batch"}}, "norm_type is 'batch'; layer_norm and rms_norm are supported"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'; only gelu"),
        ({"vision_config": {"hidden_size": 65}}, "hidden_size 65 is not a multiple of num_attention_heads 4"),
        (
            {"llm_config": {"rope_scaling": {"type": "su"}, "architectures": ["Phi3ForCausalLM"]}},
            "llm_config cannot be read as Phi3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictory_config_is_told(tmp_path, changes, message):
    config = CONFIGS["tiny-qwen2"]
    merged = {k: config[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    folder = make_checkpoint(tmp_path, "tiny-qwen2")
    (folder / "config.json").write_text(json.dumps(config | merged))
    with pytest.raises(CheckpointError, match=message):
        check(folder)


@pytest.mark.parametrize("source", ["no such folder", "./nowhere", "a/b/c", "InternVL2-1B"])
def test_source_that_is_neither_folder_nor_hub_id_is_told(source):
    with pytest.raises(CheckpointError, match="is neither a folder nor a hub id like OpenGVLab/InternVL2-1B"):
        resolve(source)


def test_a_file_as_source_is_told(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file: give the checkpoint's folder"):
        resolve(str(file))
