"""python -m pytest tests/convert/test_adapter.py

A LoRA adapter merged at conversion: the merged model computes what the model with the adapter beside its matrices does.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart
from convert.reference.model import InternVLChatModel
from runtime.errors import CheckpointError, UnsupportedModelError
from tests.checkpoints import make_checkpoint
from tests.conftest import DATA, embeddings

RANK, ALPHA = 4, 8
TARGETS = {  # module of the published model -> rows, columns
    "language_model.model.layers.0.self_attn.q_proj": (64, 64),
    "language_model.model.layers.1.mlp.down_proj": (64, 192),
    "vision_model.encoder.layers.2.mlp.fc1": (128, 64),
    "mlp1.1": (64, 256),
}
EXACT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}


def write_adapter(folder, targets=TARGETS, strip: str = "", **settings):
    """An adapter as PEFT saves it; `strip` is what an adapter of the language model alone leaves out of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in targets.items():
        module = f"base_model.model.{name.removeprefix(strip)}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(EXACT | settings))
    return folder, tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In float32, where merging rounds nothing."""
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", "tiny-qwen2", dtype="float32")


def answers(model: InternVLChatModel) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.extract_feature(torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)))
    return features, model.logits(embeddings(model, torch.tensor([[40, 5, 5, 5, 5, 41, 42]]), features))


def beside(model: InternVLChatModel, tensors, scale: float) -> InternVLChatModel:
    """The same model with every adapter as two more matrices, as it is trained."""
    modules = {
        **{f"language_model.{name}": module for name, module in model.language.named_modules()},
        **dict(model.vision.named_modules()),
    }
    for name in TARGETS:
        down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        modules[name].register_forward_hook(lambda _, given, out, down=down, up=up: out + scale * (given[0] @ down.T) @ up.T)
    return model


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)], ids=["lora", "rslora"]
)
def test_merged_is_beside(checkpoint, tmp_path, settings, scale):
    folder, tensors = write_adapter(tmp_path / "adapter", **settings)
    merged = answers(InternVLChatModel.from_checkpoint(Checkpoint(checkpoint, adapter=folder)))
    wanted = answers(beside(InternVLChatModel.from_checkpoint(Checkpoint(checkpoint)), tensors, scale))
    without = answers(InternVLChatModel.from_checkpoint(Checkpoint(checkpoint)))
    for found, expected, plain in zip(merged, wanted, without, strict=True):
        assert (found - expected).abs().max() < 2e-5
        assert (found - plain).abs().max() > 0.05


def test_an_adapter_of_the_language_model_alone_finds_its_tensors(checkpoint, tmp_path):
    language = {name: shape for name, shape in TARGETS.items() if name.startswith("language_model.")}
    whole, _ = write_adapter(tmp_path / "whole", language)
    alone, _ = write_adapter(tmp_path / "alone", language, strip="language_model.")
    found = [answers(InternVLChatModel.from_checkpoint(Checkpoint(checkpoint, adapter=folder)))[1] for folder in (whole, alone)]
    assert torch.equal(*found)


def test_an_adapter_in_transformers_names_fits_a_native_checkpoint(tmp_path):
    """Its query matrix is a third of the published one."""
    native = DATA / "golden" / "hf-native"
    names = {
        "model.vision_tower.encoder.layer.0.attention.k_proj": (64, 64),
        "model.language_model.layers.1.mlp.up_proj": (192, 64),
    }
    folder, tensors = write_adapter(tmp_path / "adapter", names)
    plain, merged = Checkpoint(native), Checkpoint(native, adapter=folder)
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    change = merged.tensors([name])[name] - plain.tensors([name])[name]
    down, up = (tensors[f"base_model.model.{next(iter(names))}.lora_{which}.weight"] for which in "AB")
    assert torch.allclose(change[64:128], ALPHA / RANK * up @ down, atol=1e-6)
    assert not change[:64].any()
    assert not change[128:].any()


def test_the_folder_holds_the_merged_weights(checkpoint, tmp_path):
    folder, _ = write_adapter(tmp_path / "adapter")
    options = ConvertOptions(weight_format="fp32", adapter=str(folder), verify=False)
    output = convert(str(checkpoint), tmp_path / "out", options).folder
    model = InternVLChatModel.from_checkpoint(Checkpoint(checkpoint, adapter=folder))
    embeds = embeddings(model, torch.tensor([[40, 41, 42]]))
    found = LanguagePart(output).logits(embeds.numpy(), np.ones((1, 3), np.int64))
    assert np.abs(found - model.logits(embeds).numpy()).max() < 2e-4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedModelError, "peft_type is 'IA3'; only LORA can be merged"),
        (
            {"fan_in_fan_out": True, "lora_bias": True},
            UnsupportedModelError,
            r"asks for fan_in_fan_out \(its matrices are tr.*, lora_bias \(.*, which cannot be merged here: merge it with PEFT",
        ),
        (
            {"init_lora_weights": "pissa"},
            UnsupportedModelError,
            r"asks for init_lora_weights pissa \(it changed the model's own weights.*, which cannot be merged here",
        ),
        ({"targets": {"lm_tail": (4, 4)}}, CheckpointError, r"adapts lm_tail.weight \[4, 4\], no such tensor: .* another model"),
        (
            {"targets": {"mlp1.1": (64, 99)}},
            CheckpointError,
            r"adapts mlp1.1.weight \[64, 99\], \[64, 256\] there: .* another model",
        ),
    ],
)
def test_what_cannot_be_merged_is_told(checkpoint, tmp_path, settings, error, message):
    folder, _ = write_adapter(tmp_path / "adapter", settings.pop("targets", TARGETS), **settings)
    with pytest.raises(error, match=message):
        Checkpoint(checkpoint, adapter=folder)


def test_broken_adapters_are_told(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json: give the folder of a LoRA adapter"):
        Checkpoint(checkpoint, adapter=tmp_path)
    folder, tensors = write_adapter(tmp_path / "adapter")
    tensors["base_model.model.lm_head.lora_embedding_A"] = torch.zeros(3)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"holds base_model.model.lm_head.lora_embedding_A, which cannot be merged"):
        Checkpoint(checkpoint, adapter=folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read .*: fetch the adapter again"):
        Checkpoint(checkpoint, adapter=folder)
