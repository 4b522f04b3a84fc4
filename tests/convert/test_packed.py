"""python -m pytest tests/convert/test_packed.py

Checkpoints that are published in four bits: their numbers arrive in the model folder as they are. What is packed here is packed by
code of its own, from the layouts as they are described, number by number.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.exact import EXACT, LanguagePart
from convert.reference.model import InternVLChatModel, expected_shapes, is_tied
from runtime import OVInternVLChatModel
from runtime.errors import CheckpointError, OptionError
from runtime.folder.files import PART_FILES

GROUP = 32
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
MATRICES = {  # of a layer, by the published names of each family
    "tiny-internlm2": ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    "tiny-qwen2": [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
    "tiny-qwen3-moe": [f"self_attn.{n}_proj" for n in "qkvo"] + [f"{n}_proj" for n in ("gate", "up", "down")],
    "tiny-llama": [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
}


def pack_outputs(codes: np.ndarray, order: list[int]) -> torch.Tensor:
    """(K, N) -> int32 (K, N / 8): bits 4i and on of column c hold output 8c + order[i]."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint64)
    for i, place in enumerate(order):
        words += codes[:, place::8].astype(np.uint64) * 16**i
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def pack_inputs(codes: np.ndarray) -> torch.Tensor:
    """(K, N) -> int32 (K / 8, N): bits 4i and on of row r hold input 8r + i."""
    return pack_outputs(codes.T, [0, 1, 2, 3, 4, 5, 6, 7]).T.contiguous()


def pack(source: Path, target: Path, name: str, method: str = "awq", inside: bool = False, **said) -> dict[str, np.ndarray]:
    """A packed copy of a tiny checkpoint, with random numbers; returns the matrices (rows, columns) that they stand for."""
    shutil.copytree(source, target)
    dice, tensors, meant = np.random.default_rng(0), load_file(source / "model.safetensors"), {}
    for full in [name for name in tensors if ".layers." in name and name.startswith("language_model")]:
        module = full.removesuffix(".weight")
        if not full.endswith(".weight") or not module.endswith(tuple(MATRICES[name])):
            continue
        rows, columns = tensors.pop(full).shape
        groups = columns // GROUP
        codes = dice.integers(0, 16, (columns, rows))
        zeros = dice.integers(1, 16, (groups, rows))
        scales = (dice.random((groups, rows)) * 0.02 + 0.002).astype(np.float16)
        numbers = (codes - zeros.repeat(GROUP, 0)) * scales.astype(np.float64).repeat(GROUP, 0)
        meant[full] = np.ascontiguousarray(numbers.T)
        tensors[module + ".scales"] = torch.from_numpy(scales)
        if method == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            tensors[module + ".qweight"], tensors[module + ".qzeros"] = pack_outputs(codes, order), pack_outputs(zeros, order)
        else:
            tensors[module + ".qweight"] = pack_inputs(codes)
            tensors[module + ".qzeros"] = pack_outputs(zeros - 1, [0, 1, 2, 3, 4, 5, 6, 7])
            tensors[module + ".g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
    assert meant
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if name == "tiny-qwen3-moe":
        said = {"modules_to_not_convert": ["mlp.gate."]} | said
    recipe = {"quant_method": method, "bits": 4, "group_size": GROUP, "zero_point": True} | said
    if method == "awq":
        recipe = {"version": "gemm"} | recipe
    (config["llm_config"] if inside else config)["quantization_config"] = recipe
    (target / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A packed checkpoint and what it stands for, once each."""
    done = {}

    def make(name: str, method: str = "awq") -> tuple[Path, dict[str, np.ndarray]]:
        if (name, method) not in done:
            folder = tmp_path_factory.mktemp("packed") / f"{name}-{method}"
            done[name, method] = folder, pack(tiny(name), folder, name, method, inside=name == "tiny-llama")
        return done[name, method]

    return make


def unpacked(folder: Path, meant: dict[str, np.ndarray], target: Path) -> Path:
    """The same checkpoint with plain matrices in float32."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    plain |= {name: torch.from_numpy(matrix.astype(np.float32)) for name, matrix in meant.items()}
    save_file(plain, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["llm_config"].pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def last_hidden_state(folder: Path, embeds: np.ndarray) -> np.ndarray:
    """What the head of a folder's language part is given for embeddings (1, T, D)."""
    model, length = ov.Core().read_model(folder / PART_FILES["language"]), embeds.shape[1]
    head = next(node for node in model.get_ordered_ops()[::-1] if node.get_type_name() == "MatMul")
    model.add_outputs(head.input_value(0))
    request = ov.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    inputs = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64), "beam_idx": np.zeros(1, np.int32)}
    return request.infer(inputs | {"position_ids": np.arange(length)[None]})[1]


@pytest.mark.parametrize(("name", "method"), [*((name, "awq") for name in MATRICES), ("tiny-internlm2", "gptq")])
def test_published_numbers_arrive_as_they_are(packed, converted, tmp_path, name, method):
    source, meant = packed(name, method)
    folder = converted(source, verify=False, vision_weight_format="int8")
    kinds = [n.get_output_element_type(0).get_type_name() for n in ov.Core().read_model(folder / PART_FILES["language"]).get_ops()]
    others = {"tiny-internlm2": 4, "tiny-qwen3-moe": -2 * 3 * 5}  # wqkv is three, six experts are one
    assert kinds.count("u4") == 2 * (len(meant) + others.get(name, 0)), "codes and zeros of each"
    for matrix, tensor in Checkpoint(source).tensors(meant, unpacked=torch.float32).items():
        assert np.abs(tensor.numpy() - meant[matrix]).max() < 1e-7
    reference = InternVLChatModel.from_checkpoint(Checkpoint(unpacked(source, meant, tmp_path / "plain")))
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    wanted = reference.language(inputs_embeds=embeds, use_cache=False, output_hidden_states=True).hidden_states[-1]
    bound = 0.01 if name == "tiny-qwen3-moe" else 2e-4  # what chooses experts is left unpacked, and is int8
    assert float((torch.from_numpy(last_hidden_state(folder, embeds.numpy())) - wanted).abs().max()) < bound


def test_the_proof_compares_with_the_unpacked_weights(packed, tmp_path):
    source, _ = packed("tiny-qwen2")
    summary = convert(str(source), tmp_path / "out", ConvertOptions(vision_weight_format="int8"))
    language = summary.report.rows[-1]
    assert (language.part, language.weight_format) == ("language", "int4")
    assert language.cosine > 0.9999, "nothing but the head is rounded"
    assert summary.widths["language"]["int4"] > 0.5
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_openvino_genai_opens_it_and_picks_our_tokens(packed, converted):
    genai = pytest.importorskip("openvino_genai")
    folder = converted(packed("tiny-qwen2")[0], verify=False)
    pipe = genai.VLMPipeline(str(folder), "CPU", **EXACT)
    config = genai.GenerationConfig(max_new_tokens=6, ignore_eos=True, do_sample=False)
    theirs = pipe.generate("What is this?", generation_config=config).texts[0]
    ours = OVInternVLChatModel(folder, precision="accuracy").start_conversation()
    assert ours.ask("What is this?", max_new_tokens=6, ignore_eos=True, do_sample=False).strip() == theirs.strip()


@pytest.mark.parametrize("weight_format", ["int8", "fp16"])
def test_other_formats_unpack(packed, converted, weight_format):
    source, _ = packed("tiny-llama")
    four, other = (LanguagePart(converted(source, verify=False, weight_format=kind)) for kind in ("int4", weight_format))
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0)).numpy()
    a, b = (np.array(part.logits(embeds, np.ones((1, 9), np.int64))).ravel() for part in (four, other))
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.999


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight_format": "fp32"}, "int8 and fp16 unpack them, fp32"),
        ({"group_size": 64}, "leave out --group-size"),
        ({"sym": True, "awq": True}, "leave out --sym, --awq"),
        ({"adapter": "somewhere"}, "somewhere"),
    ],
)
def test_what_cannot_be_done_to_packed_numbers_is_told(packed, tmp_path, options, told):
    with pytest.raises((OptionError, CheckpointError), match=told):
        convert(str(packed("tiny-qwen2")[0]), tmp_path / "out", ConvertOptions(**options))


def test_lora_beside_packed_matrices_is_merged_where_they_are_unpacked(tiny, tmp_path):
    """As PEFT saves a model that was trained over packed matrices; alpha is twice the rank."""
    folder, wrapped, dice = tmp_path / "p", "language_model.base_model.model.", torch.Generator().manual_seed(0)
    meant = pack(tiny("tiny-qwen2"), folder, "tiny-qwen2")
    adapted = [name for name in meant if "q_proj" in name]
    tensors = {
        name.replace("language_model.", wrapped, 1): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for name in adapted:
        module, (rows, columns) = name.removesuffix(".weight").replace("language_model.", wrapped, 1), meant[name].shape
        for stored in [stored for stored in tensors if stored.startswith(module + ".")]:
            tensors[stored.replace(module, f"{module}.base_layer")] = tensors.pop(stored)
        down, up = 0.1 * torch.randn(4, columns, generator=dice), 0.1 * torch.randn(rows, 4, generator=dice)
        tensors[f"{module}.lora_A.default.weight"], tensors[f"{module}.lora_B.default.weight"] = down, up
        meant[name] = meant[name] + 2 * (up.double() @ down.double()).numpy()
    save_file(tensors, folder / "model.safetensors")
    for name, tensor in opened(folder).tensors(meant, unpacked=torch.float32).items():
        assert np.abs(tensor.numpy() - meant[name]).max() < 1e-6
    with pytest.raises(OptionError, match=f"LoRA beside {len(adapted)} packed matrices, like {adapted[0]}: int4 keeps .* int8 or"):
        convert(str(folder), tmp_path / "out")


def opened(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    return checkpoint


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"bits": 8}, "bits is 8, expected 4"),
        ({"version": "gemv"}, "version is 'gemv', expected gemm"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', expected awq and gptq"),
        ({"group_size": 64}, "do not fit AWQ, four bits, groups of 64"),
        ({"group_size": "all"}, "group_size is 'all'"),
    ],
)
def test_what_config_says_of_the_packing_is_checked(tiny, tmp_path, said, told):
    pack(tiny("tiny-qwen2"), tmp_path / "p", "tiny-qwen2", **said) if "quant_method" not in said else None
    if "quant_method" in said:
        pack(tiny("tiny-qwen2"), tmp_path / "p", "tiny-qwen2")
        config = json.loads((tmp_path / "p" / "config.json").read_text())
        config["quantization_config"] |= said
        (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        opened(tmp_path / "p")


QUERY = "language_model.model.layers.0.self_attn.q_proj"


def without(ending: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != QUERY + ending}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(".scales"), "has a qweight but no scales"),
        (lambda t: t | {QUERY + ".qzeros": t[QUERY + ".qzeros"][:1].clone()}, "do not fit AWQ"),
        (lambda t: t | {QUERY + ".qweight": t[QUERY + ".qweight"].float()}, "qweight and qzeros are F32 and I32"),
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith(QUERY)} | {QUERY + ".weight": torch.zeros(64, 64)},
            "1 matrices are not packed",
        ),
        (lambda t: {n: v for n, v in t.items() if "qweight" not in n}, "but no tensor is packed"),
    ],
)
def test_packed_files_that_do_not_fit_are_told(tiny, tmp_path, change, told):
    folder = tmp_path / "p"
    pack(tiny("tiny-qwen2"), folder, "tiny-qwen2")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=told):
        opened(folder)


def test_what_config_leaves_unpacked_may_be(tiny, tmp_path):
    folder = tmp_path / "p"
    meant = pack(tiny("tiny-qwen2"), folder, "tiny-qwen2", modules_to_not_convert=["self_attn.q_proj"])
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "q_proj.q" in name or "q_proj.scales" in name]:
        del tensors[name]
    tensors |= {name: torch.from_numpy(matrix).float() for name, matrix in meant.items() if "q_proj" in name}
    save_file(tensors, folder / "model.safetensors")
    summary = convert(str(folder), tmp_path / "out", ConvertOptions(vision_weight_format="int8"))
    assert summary.report.rows[-1].cosine > 0.999
    kinds = summary.widths["language"]
    assert [*kinds][:2] == ["int8", "int4"] or [*kinds][:2] == ["int4", "int8"], kinds  # some float32 in a scale that is small


def test_without_zeros_they_are_in_the_middle(tiny, tmp_path):
    folder = tmp_path / "p"
    pack(tiny("tiny-qwen2"), folder, "tiny-qwen2", zero_point=False)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "qzeros" not in name}, folder / "model.safetensors")
    loaded = opened(folder)._packed[QUERY + ".weight"].load(opened(folder)._open)
    assert (loaded.zeros == 8).all()


def test_gptq_in_another_order_and_zeros_past_15_are_refused(tiny, tmp_path):
    folder = tmp_path / "p"
    pack(tiny("tiny-qwen2"), folder, "tiny-qwen2", "gptq")
    tensors = load_file(folder / "model.safetensors")
    order = tensors[QUERY + ".g_idx"].flip(0).contiguous()
    save_file(tensors | {QUERY + ".g_idx": order}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="g_idx is out of order"):
        opened(folder)
    high = torch.full_like(tensors[QUERY + ".qzeros"], -1)
    save_file(tensors | {QUERY + ".qzeros": high}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="a zero point is 16"):
        opened(folder)


def test_packed_tensors_without_a_recipe_are_told(tiny, tmp_path):
    pack(tiny("tiny-qwen2"), tmp_path / "p", "tiny-qwen2")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"but config\.json has no quantization_config"):
        opened(tmp_path / "p")
