"""python -m pytest tests/runtime/upstream/test_upstream.py

Upstream's calls over the OpenVINO parts and over the reference: the original's prompts, tokens and rules.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.answer.prompt import expand_marks, get_template, render
from runtime.errors import DeviceError, ModelFolderError, PromptError
from runtime.folder.files import PART_FILES
from runtime.parts.memory import leave_mapped
from tests.conftest import DATA

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
NEW_TOKENS = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture
def model(golden, converted) -> OVInternVLChatModel:
    return OVInternVLChatModel(converted(golden.folder, weight_format="fp32"), ov_config=EXACT)


@pytest.fixture(scope="module")
def pair(tiny, converted):
    """One checkpoint as reference and as fp32 parts, with its tokenizer."""
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    reference = InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2")))
    return reference, OVInternVLChatModel(folder, ov_config=EXACT), tokenizer


def tiles(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def test_generate_gives_the_original_tokens(golden, model):
    wanted = golden["greedy_ids"]
    found = model.generate(golden["pixel_values"], golden["input_ids"], max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)
    features = model.extract_feature(golden["pixel_values"])
    again = model.generate(input_ids=golden["input_ids"], visual_features=features, max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(again, wanted)


def test_generate_gives_the_original_tokens_in_a_left_padded_batch(golden, model):
    wanted = golden["batch_greedy_ids"]
    inputs = (golden["pixel_values"][:2], golden["batch_input_ids"], golden["batch_attention_mask"])
    assert torch.equal(model.generate(*inputs, max_new_tokens=wanted.shape[1], **NEW_TOKENS), wanted)


def test_beams_are_those_of_the_reference(golden, model):
    reference = InternVLChatModel.from_checkpoint(Checkpoint(golden.folder))
    inputs = {"pixel_values": golden["pixel_values"], "input_ids": golden["input_ids"], "max_new_tokens": 8, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **NEW_TOKENS), reference.generate(**inputs, **NEW_TOKENS))


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: f"{c['template']}-{c['kind']}")
def test_prompts_are_the_originals(case, pair):
    """The prompt that chat and batch_chat hand to the tokenizer, caught there."""
    reference, _, _ = pair
    arguments, caught = case["arguments"], []

    class Caught(Exception):
        pass

    class Listener:
        def __call__(self, prompt, **_):
            caught.append(prompt)
            raise Caught

    class Model(InternVLChatModel):
        conv_template = get_template(case["template"])

    model = Model(reference.config, reference.vision, reference.language, reference.tokenizer)
    pixels = tiles(case["tiles"]) if case["tiles"] else None
    call = model.batch_chat if case["kind"] == "batch" else model.chat
    asked = arguments.get("questions") or arguments["question"]
    history = [tuple(turn) for turn in arguments["history"]] if "history" in arguments else None
    with pytest.raises(Caught):
        call(Listener(), pixels, asked, {}, num_patches_list=arguments.get("num_patches_list"), history=history)
    assert caught == [case["prompt"]]


def test_chat_is_the_same_on_both_backends_turn_by_turn(pair):
    reference, model, tokenizer = pair
    options = {"max_new_tokens": 12, "do_sample": False}
    for pixels, question in ((tiles(3), "What is it?"), (None, "Hello?")):
        first = [m.chat(tokenizer, pixels, question, options, return_history=True) for m in (reference, model)]
        assert first[0] == first[1]
        again = {"history": first[0][1], "return_history": True}
        second = [m.chat(tokenizer, pixels, "And why?", options, **again) for m in (reference, model)]
        assert second[0] == second[1]
        assert second[0][1][:1] == first[0][1]


def test_chat_changes_nothing_that_it_is_given(pair):
    _, model, tokenizer = pair
    options, history = {"max_new_tokens": 3, "do_sample": False}, [("hi", "ho")]
    side = tokenizer.padding_side
    model.chat(tokenizer, None, "What?", options, history=history, return_history=True)
    model.batch_chat(tokenizer, tiles(2), ["a", "bcd"], options, num_patches_list=[1, 1])
    assert options == {"max_new_tokens": 3, "do_sample": False}
    assert history == [("hi", "ho")]
    assert tokenizer.padding_side == side


def test_a_batch_answers_like_one_by_one(pair):
    reference, model, tokenizer = pair
    options = {"max_new_tokens": 8, "do_sample": False}
    pixels, questions = tiles(3), ["What is it?", "Why?"]
    batch = model.batch_chat(tokenizer, pixels, questions, options, num_patches_list=[1, 2])
    assert batch == reference.batch_chat(tokenizer, pixels, questions, options, num_patches_list=[1, 2])
    assert batch[0] == model.chat(tokenizer, pixels[:1], questions[0], options)


def test_pictures_that_do_not_fit_are_told(pair):
    _, model, tokenizer = pair
    with pytest.raises(PromptError, match="has 2 <image> marks for 1 pictures"):
        model.chat(tokenizer, tiles(1), "<image> <image>", {"max_new_tokens": 1})
    with pytest.raises(PromptError, match=r"num_patches_list \[2\] counts 2 tiles, pixel_values has 1"):
        model.chat(tokenizer, tiles(1), "what?", {"max_new_tokens": 1}, num_patches_list=[2])
    for ask in (model.extract_feature, lambda wrong: model.chat(tokenizer, wrong, "what?", {"max_new_tokens": 1})):
        with pytest.raises(PromptError, match=r"pixel_values is \(1, 3, 28, 56\), this model takes \(N, 3, 56, 56\)"):
            ask(tiles(1)[:, :, :28])
    with pytest.raises(PromptError, match="4 context tokens for 0 rows"):
        model.generate(input_ids=torch.full((1, 4), 5))
    with pytest.raises(PromptError, match="generate needs input_ids"):
        model.generate()
    with pytest.raises(PromptError, match="1 questions for 2 pictures"):
        model.batch_chat(tokenizer, tiles(2), ["a"], {}, num_patches_list=[1, 1])


def test_an_open_turn_and_an_empty_system_message_are_rendered_as_upstream_does():
    template = get_template("internvl2_5")
    assert render(template, "", [("a", "")], "b") == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert expand_marks("<image>", [2], 1) == "<img><IMG_CONTEXT><IMG_CONTEXT></img>"


def test_folders_that_cannot_be_opened_are_told(tiny, tmp_path, converted):
    with pytest.raises(ModelFolderError, match="is a PyTorch checkpoint: convert it first with  python -m convert"):
        OVInternVLChatModel(tiny("tiny-qwen2"))
    with pytest.raises(ModelFolderError, match="does not exist"):
        OVInternVLChatModel(tmp_path / "none")
    with pytest.raises(ModelFolderError, match=r"model folder without openvino_text_embeddings_model\.xml, openvino_vision"):
        OVInternVLChatModel(tmp_path)
    with pytest.raises(DeviceError, match="there is no device NPU9 here; there are CPU"):
        OVInternVLChatModel(converted(tiny("tiny-qwen2"), weight_format="fp32"), "NPU9")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does it by itself")
def test_a_mapped_file_leaves_memory_and_comes_back(tmp_path):
    content = np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8)
    file = tmp_path / "weights.bin"
    content.tofile(file)
    mapped = np.memmap(file, np.uint8, "r")
    assert np.array_equal(mapped, content)
    assert resident(file) == 1 << 20
    leave_mapped(tmp_path / "other.bin")
    assert resident(file) == 1 << 20
    leave_mapped(file)
    assert resident(file) == 0
    assert np.array_equal(mapped, content)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does it by itself")
def test_weights_are_not_held_twice(tiny, converted):
    """Once a part has run, its weights are packed in memory of the device, and their file is left."""
    model = OVInternVLChatModel(converted(tiny("tiny-qwen2"), weight_format="int8"))
    files = {part: (model.folder / PART_FILES[part]).with_suffix(".bin") for part in ("vision", "language")}
    model.wait_until_packed()
    assert resident(files["language"]) == 0
    model.extract_feature(tiles(1))
    assert resident(files["vision"]) == 0


def resident(file):
    """Bytes of a mapped file that are in memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            here = line.endswith(str(file))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_command_line_chat_streams_an_answer_and_its_statistics(capsys, tiny, converted, tmp_path):
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    arguments = ["chat", str(folder), "What is it?", "--image", str(tmp_path / "wide.png"), "--max-new-tokens", "5"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "3 tiles, " in captured.err
    assert main([*arguments, "--max-tiles", "1"]) == 0
    assert "1 tile, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["", "--max-new-tokens", "5"], "the question is empty"),
        (["what?", "--max-new-tokens", "0"], "max new tokens 0 is not positive"),
        (["what?", "--max-tiles", "0"], "max tiles 0 is not positive"),
        (["what?", "--image", "gone.png"], "gone.png does not exist"),
        (["what?", "--device", "NPU9"], "there is no device NPU9 here"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_command_line_mistakes_are_one_line(capsys, tiny, converted, changes, message):
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    assert main(["chat", str(folder), *changes]) == 2
    err = capsys.readouterr().err
    assert [line[: len(message) + 7] for line in err.splitlines() if line.startswith("error: ")] == [f"error: {message}"]


def test_command_line_info(capsys, tiny, converted):
    assert main(["info", str(converted(tiny("tiny-qwen2"), weight_format="fp32"))]) == 0
    out = capsys.readouterr().out
    assert "Qwen2ForCausalLM, 2 layers" in out
    assert "1 to 12 of 56 pixels, 4 tokens each" in out
