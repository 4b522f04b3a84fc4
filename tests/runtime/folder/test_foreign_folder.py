"""python -m pytest tests/runtime/folder/test_foreign_folder.py

A folder that optimum-cli exported: our own export without what is ours, with the vision part in int8, opens and answers with the
model's own prompt.
"""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.folder.files import CONFIG_FILE, PART_FILES, PARTS
from tests.conftest import DATA

AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
OPTIONS = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def source():
    return DATA / "golden" / "qwen2"


@pytest.fixture(scope="module")
def ours(source, converted):
    return converted(source, weight_format="int4", vision_weight_format="int8", group_size=32, verify=False)


@pytest.fixture(scope="module")
def foreign(source, ours, tmp_path_factory):
    folder = shutil.copytree(ours, tmp_path_factory.mktemp("foreign") / "exported")
    config = json.loads((source / CONFIG_FILE).read_text())  # the checkpoint's own, as optimum-cli keeps it
    assert "img_context_token_id" not in config
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"auto_map": AUTO_MAP, "transformers_version": "4.57.6"}))
    for file in (PART_FILES[part] for part in PARTS):
        xml = (folder / file).read_text()
        left = re.sub(r"<rt_info>(?:(?!<rt_info>).)*</rt_info>\s*</net>", "</net>", xml, flags=re.DOTALL)
        assert "internvl_openvino" in xml
        assert "internvl_openvino" not in left
        (folder / file).write_text(left)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "eos_token_id": 2, "transformers_version": "4.57.6"})
    )
    (folder / "openvino_config.json").write_text(json.dumps({"dtype": "int4", "quantization_config": {"bits": 4}}))
    return folder


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def test_it_answers_as_our_own_folder(ours, foreign):
    answers = []
    for folder in (ours, foreign):
        conversation = OVInternVLChatModel(folder).start_conversation()
        said = [conversation.ask("What is it?", images=[picture(1, 112, 56)], **OPTIONS), conversation.ask("Why?", **OPTIONS)]
        answers.append((said, conversation.statistics.prompt_tokens))
    assert answers[0] == answers[1]


def test_its_prompt_is_the_models_own(foreign):
    model = OVInternVLChatModel(foreign)
    text = model.prompt_text(model.system_message, [], "Hello?", [])
    assert text.startswith("<|im_start|>system\n你是由上海人工智能实验室")
    assert model.img_context_token_id == 5


def test_the_command_line_opens_it(foreign, capsys):
    assert main(["chat", str(foreign), "What?", "--max-new-tokens", "3"]) == 0
    assert main(["info", str(foreign)]) == 0
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
