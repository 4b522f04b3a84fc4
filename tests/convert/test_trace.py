"""python -m pytest tests/convert/test_trace.py

The signatures that openvino_genai, optimum-intel and model server rely on, read off the saved files.
"""

import json

import openvino as ov
import pytest

from convert.compress import bit_widths
from runtime.answer.prompt import get_template
from runtime.folder.files import PART_FILES

KINDS = [
    "tiny-qwen2",
    "tiny-internlm2",
    "tiny-phi3",
    "tiny-llama",
    "tiny-qwen3",
    "tiny-qwen3-moe",
    "tiny-gpt-oss",
    "tiny-chat-v1-2",
    "tiny-resized",
]


@pytest.fixture(params=KINDS)
def folder(request, tiny, converted):
    return converted(tiny(request.param), weight_format="int4", group_size=32)


def read(folder, part: str) -> ov.Model:
    return ov.Core().read_model(folder / PART_FILES[part])


def signature(model: ov.Model) -> tuple[dict, dict]:
    inputs = {
        (port.get_any_name(), port.get_node().get_friendly_name()): f"{port.partial_shape} {port.element_type.get_type_name()}"
        for port in model.inputs
    }
    outputs = {port.get_any_name(): f"{port.partial_shape} {port.element_type.get_type_name()}" for port in model.outputs}
    return inputs, outputs


def test_text_embeddings(folder):
    assert signature(read(folder, "text_embeddings")) == ({("input", "input"): "[?,?] i64"}, {"inputs_embeds": "[?,?,64] f32"})


def test_vision(folder):
    inputs, outputs = signature(read(folder, "vision"))
    assert inputs == {("pixel_values", "pixel_values"): "[?,3,56,56] f32"}
    assert outputs == {"last_hidden_state": "[?,4,64] f32"}


def test_language(folder):
    inputs, outputs = signature(read(folder, "language"))
    experts = {("visual_token_mask", "visual_token_mask"): "[?,?] i64"} if "-mono" in str(folder) else {}
    assert inputs == experts | {
        ("attention_mask", "attention_mask"): "[?,?] i64",
        ("position_ids", "position_ids"): "[?,?] i64",
        ("inputs_embeds", "inputs_embeds"): "[?,?,64] f32",
        ("beam_idx", "beam_idx"): "[?] i32",
    }
    assert outputs == {"logits": "[?,?,320] f32"}, "all positions: openvino_genai slices by itself"


def test_states_are_keys_and_values_that_start_empty(folder):
    model = read(folder, "language")
    language = json.loads((folder / "config.json").read_text())["llm_config"]
    heads, size = language["num_key_value_heads"], language.get("head_dim", 16)
    states = {
        node.get_variable_id(): str(node.get_output_partial_shape(0))
        for node in model.get_ops()
        if node.get_type_name() == "ReadValue"
    }
    names = [f"past_key_values.{n}.{kind}present.{n}.{kind}" for n in range(2) for kind in ("key", "value")]
    assert sorted(states) == sorted(names)
    assert set(states.values()) == {f"[?,{heads},?,{size}]"}


def test_attention_is_what_paged_attention_recognises(folder):
    model = read(folder, "language")
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2
    reads = [node for node in model.get_ops() if node.get_type_name() == "ReadValue"]
    for node in reads:
        gather = next(iter(node.output(0).get_target_inputs())).get_node()
        assert gather.get_type_name() == "Gather"
        assert gather.input_value(1).get_node().get_friendly_name() == "beam_idx"
    head = model.get_results()[0].input_value(0).get_node()
    assert head.get_type_name() == "MatMul"


def test_runtime_options_and_provenance(folder, tiny, converted):
    model = read(folder, "language")
    assert model.get_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]).value == "8.0"
    assert not model.has_rt_info(["runtime_options", "KV_CACHE_PRECISION"])
    assert model.get_rt_info(["internvl_openvino", "weight_format"]).value == "int4"
    unquantised = read(converted(tiny("tiny-qwen2"), weight_format="fp16"), "language")
    assert unquantised.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).value == "f16"


@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-gpt-oss"])
def test_experts_are_compressed(tiny, converted, name):
    """Joined in one constant of three axes, which some graphs turn before they use it."""
    widths = bit_widths(read(converted(tiny(name), weight_format="int4", group_size=32), "language"))
    assert widths.get("fp32", 0) + widths.get("fp16", 0) < 0.05
    assert widths["int4"] > 0.5


def test_folder_holds_what_its_users_need(folder):
    names = {file.name for file in folder.iterdir()}
    assert "openvino_model.xml" not in names, "openvino_genai would read it instead of the language part"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["InternVLChatModel"]
    assert config["model_type"] == "internvl_chat"
    assert config["img_context_token_id"] == 5
    assert config["auto_map"] == {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    assert (folder / "configuration_internvl_chat.py").exists()
    assert not {name for name in names if name.startswith("modeling_")}
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 56}
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 1024
    tokenizer = ov.Core().read_model(folder / "openvino_tokenizer.xml")
    assert tokenizer.get_rt_info("openvino_tokenizers_version").astype(str)
    spoken = get_template(config["template"]).system_message.splitlines()[0]
    assert spoken in tokenizer.get_rt_info("chat_template").astype(str)
