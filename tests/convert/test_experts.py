"""python -m pytest tests/convert/test_experts.py

Experts are compressed one by one, before there is a graph: the bytes are NNCF's, and the proof reads them where they lie.
"""

import json
import shutil

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as TheirGptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.reference.experts import GptOssExperts, QwenExperts
from convert.reference.model import compute_in_float32, expected_shapes, is_tied, load_language
from runtime.errors import CheckpointError
from runtime.folder.files import PART_FILES

NAME = "tiny-qwen3-moe"


def by_nncf(matrices: np.ndarray, weight_format: str) -> dict[str, np.ndarray]:
    """What NNCF makes of a constant (E, rows, columns) of a graph."""
    x = opset.parameter([matrices.shape[0], -1, matrices.shape[2]], dtype=ov.Type.f32)
    model = ov.Model([opset.matmul(x, opset.constant(matrices, name="w"), False, True)], [x])
    mode = nncf.CompressWeightsMode[f"{weight_format.upper()}_ASYM"]
    options = {"group_size": 32, "all_layers": True} if weight_format == "int4" else {}
    model = nncf.compress_weights(model, mode=mode, **options)
    return constants(model, "w")


def constants(model: ov.Model, name: str) -> dict[str, np.ndarray]:
    """Codes, zeros and scales under a name, as bytes."""
    nodes = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    return {end: np.array(nodes[name + end].data).view(np.uint8).ravel() for end in ("", "/zero_point", "/scale")}


@pytest.mark.parametrize(("weight_format", "options"), [("int4", {"group_size": 32}), ("int8", {})])
def test_the_bytes_are_those_of_nncf(tiny, converted, weight_format, options):
    model = ov.Core().read_model(converted(tiny(NAME), weight_format=weight_format, **options) / PART_FILES["language"])
    tensors = load_file(tiny(NAME) / "model.safetensors")
    for layer in range(2):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            own = [tensors[f"language_model.model.layers.{layer}.mlp.experts.{e}.{matrix}.weight"].float() for e in range(6)]
            wanted = by_nncf(torch.stack(own).numpy(), weight_format)
            found = constants(model, f"self.model.layers.{layer}.mlp.experts.{matrix}")
            for end, values in wanted.items():
                assert np.array_equal(found[end], values), (layer, matrix, end)


def test_a_processor_computes_only_the_experts_that_tokens_take(tiny, converted):
    compiled = ov.Core().compile_model(converted(tiny(NAME), group_size=32, verify=False) / PART_FILES["language"], "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("GatherMatmul") == 2 * 3


def test_experts_that_stay_where_they_lie_compute_the_same(tiny):
    checkpoint = Checkpoint(tiny(NAME))
    joined, single = load_language(checkpoint, torch.float32), load_language(checkpoint, None, single=True)
    compute_in_float32(single)
    assert not [name for name, _ in single.named_parameters() if ".experts." in name]
    embeds = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    wanted, found = (model(inputs_embeds=embeds, use_cache=False).logits for model in (joined, single))
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [QwenExperts, GptOssExperts])
def test_all_experts_give_the_sum_of_those_that_are_taken(kind, tokens):
    """The form that is traced, the one that is computed with, and transformers'."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_experts_per_tok": 2}
    if kind is QwenExperts:
        config, theirs = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, **sizes), Qwen3MoeExperts
    else:
        config, theirs = GptOssConfig(num_local_experts=4, intermediate_size=16, **sizes), TheirGptOssExperts
    config._experts_implementation = "eager"
    experts, oracle = kind(config).requires_grad_(False), theirs(config).requires_grad_(False)
    for _, matrices in experts.named_parameters():
        matrices.normal_()
    for name, matrices in oracle.named_parameters():
        if kind is QwenExperts:
            wanted = torch.cat([experts.gate_proj, experts.up_proj], 1) if "gate" in name else experts.down_proj
        else:
            own = getattr(experts, name)
            wanted = own if own.ndim == 2 else own.transpose(1, 2)
        matrices.copy_(wanted)
    x, numbers = torch.randn(tokens, 8), torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2)
    wanted = oracle(x, numbers, shares)
    assert torch.allclose(experts(x, numbers, shares), wanted, atol=1e-4)
    assert torch.allclose(experts.all(x, numbers, shares).squeeze(1), wanted, atol=1e-4)


@pytest.fixture(scope="module")
def mxfp4(tiny, tmp_path_factory):
    """A GPT-OSS with experts packed as they are published, and the same one unpacked by transformers."""
    folder = tmp_path_factory.mktemp("mxfp4")
    tensors, dice = load_file(tiny("tiny-gpt-oss") / "model.safetensors"), np.random.default_rng(0)
    packed, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = packed.pop(name).shape
        blocks = torch.from_numpy(dice.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8))
        scales = torch.from_numpy(dice.integers(118, 126, (experts, rows, columns // 32)).astype(np.uint8))
        packed |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    for kind, own in (("packed", packed), ("plain", plain)):
        shutil.copytree(tiny("tiny-gpt-oss"), folder / kind)
        save_file(own, folder / kind / "model.safetensors")
    config = json.loads((folder / "packed" / "config.json").read_text())
    recipe = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": recipe}))
    return folder / "packed", folder / "plain"


def test_experts_in_mxfp4_are_unpacked_exactly(mxfp4):
    packed, plain = (Checkpoint(folder) for folder in mxfp4)
    packed.check(expected_shapes(packed.config, tied=is_tied(packed)))
    assert packed.shapes == plain.shapes
    assert any("4 tensors of joined experts (MXFP4)" in note for note in packed.notes)
    for name, tensor in plain.tensors(plain.shapes).items():
        assert torch.equal(packed.tensors([name])[name], tensor), name
    embeds = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    single, joined = load_language(packed, None, single=True), load_language(plain, torch.float32)
    compute_in_float32(single)
    wanted, found = (model(inputs_embeds=embeds, use_cache=False).logits for model in (joined, single))
    assert float((found - wanted).abs().max()) < 1e-5


def test_a_packed_gpt_oss_becomes_what_the_unpacked_one_does(mxfp4, converted):
    options = {"group_size": 32, "vision_weight_format": "int8"}
    packed, plain = (converted(folder, **options) for folder in mxfp4)
    weights = [(folder / PART_FILES["language"]).with_suffix(".bin").read_bytes() for folder in (packed, plain)]
    assert weights[0] == weights[1]
    assert "quantization_config" not in json.loads((packed / "config.json").read_text())
    compiled = ov.Core().compile_model(packed / PART_FILES["language"], "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("GatherMatmul") == 2 * 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, n: t | {n + "_scales": t[n + "_scales"][:, :1].clone()}, "are not MXFP4"),
        (lambda t, n: {name: tensor for name, tensor in t.items() if name != n + "_scales"}, "has blocks but no scales"),
        (lambda t, n: t | {n + "_blocks": t[n + "_blocks"].float()}, "F32 and scales"),
        (lambda t, n: {m: v for m, v in t.items() if m not in (n + "_scales", n + "_blocks")}, "1 missing: .*gate_up_proj"),
    ],
)
def test_mxfp4_that_does_not_fit_is_told(mxfp4, tmp_path, change, told):
    shutil.copytree(mxfp4[0], tmp_path / "p")
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.experts.gate_up_proj"
    save_file(change(tensors, name), tmp_path / "p" / "model.safetensors")
    with pytest.raises(CheckpointError, match=told):
        convert(str(tmp_path / "p"), tmp_path / "out", ConvertOptions())
