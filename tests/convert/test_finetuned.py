"""python -m pytest tests/convert/test_finetuned.py

Templates and system messages: those of the oldest models, told by their names, and those that a user gives.
"""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime.errors import UnsupportedModelError
from tests.checkpoints import make_checkpoint

INTERN_LM = "You are an AI assistant whose name is InternLM (书生·浦语)."


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("InternVL-Chat-V1-2-Plus", "tiny-chat-v1-2", "Answer the questions."),
        ("InternVL-Chat-V1-5", "tiny-internlm2", INTERN_LM),
        ("Mini-InternVL-Chat-4B-V1-5", "tiny-phi3", "You are an AI assistant whose name is Phi-3."),
        ("InternVL2-26B", "tiny-internlm2", "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型"),
        ("InternVL2-8B-finetune-V1-2", "tiny-internlm2", "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型"),
        ("InternVL2_5-1B", "tiny-resized", "你是书生·万象"),
    ],
)
def test_the_system_message_is_that_of_the_named_model(tiny, name, checkpoint, message):
    assert InternVLChatModel.from_checkpoint(Checkpoint(tiny(checkpoint), name=name)).system_message.startswith(message)


def test_a_folder_keeps_the_system_message_of_its_model(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "InternVL-Chat-V1-5", "tiny-internlm2", system_message="upstream ignores this")
    folder = convert(str(checkpoint), tmp_path / "renamed", ConvertOptions(weight_format="fp32", verify=False)).folder
    assert OVInternVLChatModel(folder).system_message == INTERN_LM
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert INTERN_LM in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_a_fine_tuned_model_says_what_it_is_told_to(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny("tiny-qwen2"), tmp_path / "tuned")
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(raw | {"template": "my-own"}))
    with pytest.raises(UnsupportedModelError, match=r"template 'my-own' is not known; known are .*: --template NAME picks one"):
        convert(str(checkpoint), tmp_path / "out")
    options = ConvertOptions(weight_format="fp32", verify=False, template="internvl2_5", system_message="")
    model = OVInternVLChatModel(convert(str(checkpoint), tmp_path / "out", options).folder)
    assert (model.conv_template.sep, model.system_message) == ("<|im_end|>\n", "")
    assert model.prompt_text(model.system_message, [], "hi", []).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi")
