"""python -m pytest tests/convert/test_recipe.py

int4 by what matrices see: GPTQ against its definition, what it saves, and that others open what it writes.
"""

import shutil
from dataclasses import replace

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from convert import ConvertOptions, convert, pipeline, questions
from convert.checkpoint import Checkpoint
from convert.compress import four_bits
from convert.gptq import DAMPINGS, HIGHEST, Inputs, gptq, scales_and_zeros
from convert.options import RECIPES
from convert.recipe import exchange
from convert.tokenizer import load_tokenizer
from runtime.errors import OptionError
from tests.conftest import DATA
from tests.convert.test_genai import generation, greedy, picture, tensor

GROUP, ROWS, COLUMNS = 16, 24, 64


def seen(columns: int = COLUMNS) -> torch.Tensor:
    """Inputs (N, K) that have much in common, some columns larger than others."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(400, 12, generator=random) @ torch.randn(12, columns, generator=random)
    return (mixed + 0.3 * torch.randn(400, columns, generator=random)) * (0.2 + torch.rand(columns, generator=random))


def matrix_and_inputs(columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor, Inputs]:
    matrix = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(2)) * 0.1
    inputs = Inputs(columns, GROUP)
    inputs.add(seen(columns))
    return matrix, seen(columns), inputs


def numbers(four) -> torch.Tensor:
    return four.unpack(torch.empty(four.codes.shape[0], 2 * four.codes.shape[1]))


def test_codes_are_those_of_the_definition():
    """Optimal brain quantisation, column by column, H^-1 updated in full, in float64: equations 2 and 3 of the paper."""
    matrix, rows, inputs = matrix_and_inputs()
    h = rows.double().T @ rows.double()
    importance = h.diagonal().float()
    scales, zeros = (np.repeat(n.double().numpy(), GROUP, 1) for n in scales_and_zeros(matrix, GROUP, importance))
    inverse = np.linalg.inv((h + DAMPINGS[0] * h.diagonal().mean() * torch.eye(COLUMNS)).numpy())
    left, codes = matrix.double().numpy().copy(), np.zeros(matrix.shape)
    waiting = np.ones(COLUMNS, bool)
    for column in importance.argsort(descending=True).tolist():
        codes[:, column] = np.clip(np.round(left[:, column] / scales[:, column]) + zeros[:, column], 0, HIGHEST)
        lost = left[:, column] - (codes[:, column] - zeros[:, column]) * scales[:, column]
        waiting[column] = False
        left[:, waiting] -= np.outer(lost / inverse[column, column], inverse[column, waiting])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    found = gptq(matrix, inputs)
    wanted = torch.from_numpy((codes - zeros) * scales).float()
    assert (numbers(found) - wanted).abs().gt(1e-4).float().mean() < 0.005  # a code at the border of two may fall to the other side


def test_it_loses_less_than_rounding_and_rows_and_spans_do_not_matter(monkeypatch):
    matrix, rows, inputs = matrix_and_inputs()

    def lost(four):
        return float(((numbers(four) - matrix) @ rows.T).square().mean())

    ours = lost(gptq(matrix, inputs))
    assert ours < 0.5 * lost(four_bits(matrix, GROUP))
    monkeypatch.setattr("convert.gptq.WEIGHTS_AT_ONCE", 5 * COLUMNS)
    assert lost(gptq(matrix, inputs)) == pytest.approx(ours, rel=0.02)
    monkeypatch.setattr("convert.gptq.WIDEST", 48)
    cut = Inputs(COLUMNS, GROUP)
    cut.add(rows)
    assert cut.sums.shape == (2, 32, 32)
    assert lost(gptq(matrix, cut)) < 0.8 * lost(four_bits(matrix, GROUP))


def test_what_nothing_is_known_of_is_rounded():
    matrix, _, _ = matrix_and_inputs()
    nothing = Inputs(COLUMNS, GROUP)
    assert nothing.factors is None
    scale = float((matrix.amax() - matrix.amin()) / HIGHEST)
    assert (numbers(gptq(matrix, nothing)) - matrix).abs().max() <= scale


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A tiny model by the recipe and by rounding, with what both lose."""
    place = tmp_path_factory.mktemp("recipes")
    return {
        recipe: convert(
            str(tiny("tiny-qwen2")),
            place / recipe,
            ConvertOptions(recipe=recipe, group_size=32, vision_weight_format="int8", reference_cache=str(place / "cache")),
        )
        for recipe in ("default", "fast")
    }


def test_the_default_spares_keys_values_and_later_attention_outputs():
    spared = [name for name in ("k", "v", "o", "q", "qkv") if RECIPES["default"].spares(f"layers.7.self_attn.{name}_proj", 24)]
    assert spared == ["k", "v"]
    spared = [name for name in ("k", "v", "o", "q", "qkv") if RECIPES["default"].spares(f"layers.8.self_attn.{name}_proj", 24)]
    assert spared == ["k", "v", "o"]
    assert not RECIPES["default"].spares("layers.23.mlp.down_proj", 24)


@pytest.mark.parametrize(
    ("vocabulary", "last"), [(1000, 3), (170, 1), (150, 0)], ids=["a third of the layers at most", "one is paid", "none is paid"]
)
def test_a_head_in_four_bits_pays_for_the_last_layers(vocabulary, last):
    """Queries 64 x 64, three matrices 64 x 32, outputs in 8 bits at any rate: 10,240 weights a layer, or 160 rows of the head."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, num_hidden_layers=9, **sizes))
    recipe = exchange(model, RECIPES["exact"])
    assert (recipe.last_in_8_bits, recipe.exchanged) == (last, last > 0)
    spared = [n for n in range(9) if recipe.spares(f"layers.{n}.mlp.down_proj", 9)]
    assert spared == list(range(9 - last, 9))
    assert exchange(model, RECIPES["default"]) == RECIPES["default"]


def test_the_default_loses_less_than_rounding(folders):
    default, fast = (folders[recipe].report.quality.parts["language"] for recipe in ("default", "fast"))
    assert default.kl < 0.7 * fast.kl
    widths = {recipe: folders[recipe].widths["language"] for recipe in folders}
    assert widths["fast"]["int4"] > widths["default"]["int4"] > widths["fast"]["int4"] - 0.2  # keys, values, outputs


def test_planted_outliers_cost_a_third_of_what_they_cost_rounding(tmp_path):
    """Channels that the norms make thirty times larger, and matrices that take it back: the same model, and a trap for rounding."""
    source = tmp_path / "source"
    shutil.copytree(DATA / "golden" / "qwen2", source)
    (file,) = source.glob("model*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("language_model.model.layers") and name.endswith("layernorm.weight"):
            tensors[name][3::29] *= 30
            reads = ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate_proj", "up_proj")
            layer = name.rpartition(".layers.")[2].partition(".")[0]
            for other in tensors:
                if f".layers.{layer}." in other and any(f"{read}.weight" in other for read in reads) and "vision" not in other:
                    tensors[other][:, 3::29] /= 30
    save_file(tensors, file, {"format": "pt"})
    lost = {}
    for recipe in ("default", "fast"):
        options = ConvertOptions(recipe=recipe, group_size=32, vision_weight_format="int8", reference_cache=str(tmp_path / "cache"))
        lost[recipe] = convert(str(source), tmp_path / recipe, options).report.quality.parts["language"].kl
    assert lost["default"] < lost["fast"] / 3, lost


def test_a_matrix_that_sees_nothing_is_rounded_and_told(tiny, tmp_path, capsys, monkeypatch):
    """A layer that a norm of zeros has switched off; also where the checkpoint's answers are empty."""
    source = tmp_path / "source"
    shutil.copytree(tiny("tiny-qwen2"), source)
    (file,) = source.glob("model*.safetensors")
    tensors = load_file(file)
    tensors["language_model.model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(questions, "end_tokens", lambda tokenizer, *_: set(range(len(tokenizer))))
    options = ConvertOptions(group_size=32, vision_weight_format="int8", verify=False)
    convert(str(source), tmp_path / "out", options)
    told = [line for line in capsys.readouterr().out.splitlines() if "singular" in line]
    start = "language: rounded to nearest, because the Hessian of their inputs is singular: "
    assert told == [f"{start}layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("name", ["tiny-phi3", "tiny-mono"])
def test_other_decoders_take_it_too(tiny, tmp_path, name):
    """Phi-3's rope is changed by a forward and could not be traced behind it; visual experts see the tokens of pictures alone."""
    options = ConvertOptions(group_size=32, vision_weight_format="int8", verify=False)
    made = convert(str(tiny(name)), tmp_path / "out", options)
    assert made.widths["language"]["int4"] > 0.7


@pytest.mark.parametrize("exchanged", [False, True])
def test_openvino_genai_opens_the_folder_and_answers_as_we_do(tmp_path, monkeypatch, exchanged):
    """Also where the head is in four bits and the last layer in eight, which this small vocabulary would not pay for."""
    if exchanged:
        monkeypatch.setattr(pipeline, "exchange", lambda _, recipe: replace(recipe, exchanged=True, last_in_8_bits=1))
    source, folder = DATA / "golden" / "qwen2", tmp_path / "folder"
    convert(str(source), folder, ConvertOptions(vision_weight_format="int8", verify=False))
    part = ov.Core().read_model(folder / "openvino_language_model.xml")
    kinds = {op.get_friendly_name(): op.get_element_type() for op in part.get_ops() if op.get_type_name() == "Constant"}
    for name, four in (("lm_head.", exchanged), ("layers.1.mlp.down_proj.", not exchanged), ("layers.0.mlp.down_proj.", True)):
        assert {kinds[one] for one in kinds if name in one and one.endswith("weight")} == {ov.Type.u4 if four else ov.Type.u8}
    checkpoint, wide = Checkpoint(source), picture(200, 100, 1)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipe = openvino_genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="SDPA", **exact)
    answer = pipe.generate("What is it?", images=[tensor(wide)], generation_config=generation())
    tokenizer = load_tokenizer(source, checkpoint.config)
    wanted = greedy(folder, checkpoint, [wide], "What is it?")
    assert answer.texts[0] == tokenizer.decode(wanted, skip_special_tokens=True)


def test_options_of_nncf_take_nncf():
    assert ConvertOptions().by_inputs is not None
    assert ConvertOptions(group_size=32).by_inputs.group == 32
    for changes in ({"sym": True}, {"awq": True}, {"ratio": 0.5}, {"backup_precision": "none"}, {"recipe": "fast"}):
        assert ConvertOptions(**changes).by_inputs is None
    assert ConvertOptions(weight_format="int8").by_inputs is None
    with pytest.raises(OptionError, match="recipe small cannot use --awq: leave one out"):
        ConvertOptions(recipe="small", awq=True)
    with pytest.raises(OptionError, match="recipe 'best' is not known; known are default, small, exact, fast"):
        ConvertOptions(recipe="best")
