"""python -m pytest tests/convert/test_contrastive.py

InternVL-C and -G: the PyTorch path and its conversion against the original's numbers, and what cannot be converted.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import ConvertOptions, convert
from convert.checkpoint import ContrastiveCheckpoint
from convert.reference.contrastive_model import InternVLModel, expected_shapes
from runtime.errors import CheckpointError, OptionError, TokenizerError, UnsupportedModelError
from runtime.folder.files import PART_FILES, PARTS_OF, kind_of_folder
from tests.conftest import DATA

GOLDEN = DATA / "golden" / "internvl-14b"
NEW_TOKENS, END = 12, 2


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def reference():
    return InternVLModel.from_checkpoint(ContrastiveCheckpoint(GOLDEN))


@pytest.fixture
def changed(tmp_path):
    """A copy of the checkpoint with keys of its config.json changed."""

    def make(section=None, **keys):
        shutil.copytree(GOLDEN, tmp_path / "changed", dirs_exist_ok=True)
        file = tmp_path / "changed" / "config.json"
        raw = json.loads(file.read_text())
        (raw[section] if section else raw).update(keys)
        file.write_text(json.dumps(raw))
        return tmp_path / "changed"

    return make


@torch.no_grad()
def test_the_pytorch_path_is_the_original(golden, reference):
    def close(found, name):
        torch.testing.assert_close(found, golden[name], atol=1e-5, rtol=0)

    tokens, embeds = reference.vision(golden["pixel_values"])
    close(tokens, "vision_last_hidden_state")
    close(embeds, "image_embeds_C")
    close(reference.run_queries(tokens), "query_last_hidden_state")
    close(reference.encode_image(golden["pixel_values"], "InternVL-G"), "image_embeds_G")
    close(reference.encode_text(golden["text_ids"]), "text_embeds")
    for mode in "CG":
        per_image, per_text = reference(golden["pixel_values"], golden["text_ids"], f"InternVL-{mode}")
        close(per_image, f"logits_per_image_{mode}")
        close(per_text, f"logits_per_text_{mode}")


@torch.no_grad()
def test_the_pytorch_path_writes_the_originals_captions(golden, reference):
    tokens, _ = reference.vision(golden["pixel_values"])
    for number, prompt in enumerate(golden["prompt_ids"]):
        steps = reference.caption_steps(tokens[number : number + 1], prompt[None])
        logits = next(steps)
        torch.testing.assert_close(logits[0, 0], golden["caption_logits"][number, -1], atol=1e-5, rtol=0)
        written = []
        while len(written) < NEW_TOKENS:
            logits[..., END] = -torch.inf
            written.append(int(logits.argmax()))
            logits = steps.send(torch.tensor([[written[-1]]]))
        assert written == golden["greedy_ids"][number].tolist()


def test_a_folder_holds_its_four_parts(converted):
    folder = converted(GOLDEN, weight_format="fp32")
    assert kind_of_folder(folder) == "contrastive"
    assert all((folder / PART_FILES[part]).exists() for part in PARTS_OF["contrastive"])
    scale = load_file(GOLDEN / "model.safetensors")["logit_scale"]
    assert json.loads((folder / "config.json").read_text())["logit_scale"] == float(scale)


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path, capsys):
    convert(str(GOLDEN), tmp_path / "made", ConvertOptions(weight_format="fp16"))
    assert "no tokenizer.model: the folder will take texts as token ids only" in capsys.readouterr().out


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_each_weight_format_is_proven(weight_format, tmp_path, changed):
    report = convert(str(GOLDEN), tmp_path / "made", ConvertOptions(weight_format=weight_format, group_size=16)).report
    assert [row.part for row in report.rows] == [*PARTS_OF["contrastive"]]
    assert not any(row.drifted for row in report.rows)
    rows = {row.part: row.weight_format for row in report.rows}
    assert rows["qllama"] == weight_format
    assert rows["vision"] == {"int4": "w8a8"}.get(weight_format, weight_format)


def test_a_wrong_part_is_drift(monkeypatch, tmp_path):
    from convert import contrast
    from runtime.errors import DriftError

    right = contrast.trace_qllama
    monkeypatch.setattr(contrast, "trace_qllama", lambda part: right(part.apply(_turn_norms)))
    with pytest.raises(DriftError, match="qllama"):
        convert(str(GOLDEN), tmp_path / "made", ConvertOptions(weight_format="fp32"))
    assert not (tmp_path / "made").exists()


def _turn_norms(module):
    if hasattr(module, "input_layernorm"):
        module.input_layernorm.weight = torch.nn.Parameter(-module.input_layernorm.weight)


def test_options_of_chat_models_are_refused(tmp_path):
    for options in ({"template": "Hermes-2"}, {"adapter": "x"}, {"serving": "ovms"}):
        with pytest.raises(OptionError, match="is for chat models"):
            convert(str(GOLDEN), tmp_path / "made", ConvertOptions(**options))


def test_internvit_6b_stays_above_int4(tmp_path):
    with pytest.raises(OptionError, match="InternViT-6B loses too much in int4: use fp32, fp16, int8"):
        convert(str(GOLDEN), tmp_path / "made", ConvertOptions(vision_weight_format="int4", group_size=16))


def test_internvit_6b_in_w8a8_is_proven(tmp_path):
    options = ConvertOptions(weight_format="int8", vision_weight_format="w8a8")
    summary = convert(str(GOLDEN), tmp_path / "made", options)
    assert re.fullmatch(r"w8a8: cosine [\d.]+, 1st percentile [\d.]+", summary.proof)  # and not below a bound
    assert next(row for row in summary.report.rows if row.part == "vision").cosine > 0.99


def test_a_group_size_that_fits_no_row_is_told_first(tmp_path):
    with pytest.raises(OptionError, match="group size 128 does not divide a layer 48 wide"):
        convert(str(GOLDEN), tmp_path / "made", ConvertOptions())


def test_tensors_that_do_not_fit_are_told(changed, tmp_path):
    with pytest.raises(CheckpointError, match=r"query_tokens \[1, 6, 48\] instead of \[1, 8, 48\]"):
        convert(str(changed(num_query_token=8)), tmp_path / "made", ConvertOptions(group_size=16))
    with pytest.raises(CheckpointError, match=r"cross_attn.*|missing"):
        convert(str(changed(num_query_token=6, cross_attention_frequency=3)), tmp_path / "made", ConvertOptions(group_size=16))


@pytest.mark.parametrize(
    ("section", "keys", "error", "message"),
    [
        ("qllama_config", {"hidden_act": "relu"}, UnsupportedModelError, "only silu"),
        ("qllama_config", {"num_key_value_heads": 2}, UnsupportedModelError, "num_key_value_heads"),
        ("qllama_config", {"rope_scaling": {"factor": 2}}, UnsupportedModelError, "rope_scaling"),
        (None, {"attn_pool_num_heads": 5}, CheckpointError, "not a multiple of attn_pool_num_heads 5"),
        (None, {"force_image_size": 50}, CheckpointError, "whole number of 14-pixel patches"),
        (None, {"vision_config": None}, CheckpointError, "no vision_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configurations_that_cannot_be(changed, section, keys, error, message):
    with pytest.raises(error, match=message):
        ContrastiveCheckpoint(changed(section, **keys))


def test_a_picture_size_that_is_forced_resizes_the_position_table(changed):
    checkpoint = ContrastiveCheckpoint(changed(force_image_size=84))
    checkpoint.check(expected_shapes(checkpoint))
    tokens, _ = InternVLModel.from_checkpoint(checkpoint).vision(torch.zeros(1, 3, 84, 84))
    assert tokens.shape == (1, 37, 64)


def test_a_broken_tokenizer_is_told(changed, tmp_path):
    folder = changed()
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(TokenizerError, match="cannot be read"):
        convert(str(folder), tmp_path / "made", ConvertOptions(weight_format="fp32"))


def test_internvit_alone_converts_with_its_names(golden, tmp_path, converted):
    """A flat vision configuration, names without vision_model."""
    folder = flat_internvit(tmp_path)
    made = convert(str(folder), tmp_path / "made", ConvertOptions(weight_format="int8")).folder
    assert kind_of_folder(made) == "features"
    assert sorted(path.name for path in made.iterdir()) == [
        "config.json",
        "openvino_vision_embeddings_model.bin",
        "openvino_vision_embeddings_model.xml",
        "preprocessor_config.json",
    ]


def flat_internvit(root):
    """The golden set's vision transformer as a repository of its own."""
    folder = root / "InternViT"
    folder.mkdir()
    raw = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw["vision_config"]))
    names = {name: tensor for name, tensor in load_file(GOLDEN / "model.safetensors").items() if name.startswith("vision_model.")}
    save_file({name.removeprefix("vision_model."): tensor for name, tensor in names.items()}, folder / "model.safetensors")
    return folder
