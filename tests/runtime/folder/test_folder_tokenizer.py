"""python -m pytest tests/runtime/folder/test_folder_tokenizer.py

The tokenizer as answers use it: the same ids and texts as transformers' own over the same files, and one line for what is wrong.
"""

import json
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from convert.checkpoint import Checkpoint
from runtime import OVInternVLChatModel
from runtime.errors import InternVLError, ModelFolderError, PromptError, TokenizerError
from runtime.folder import generation
from runtime.folder.generation import read_generation_config
from runtime.folder.tokenizer import Tokenizer, check_text

TEXTS = [
    "Hello there",
    " leading and trailing ",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat's here, in 12 words?",
    "<|im_start|>user\n你好 🙂<|im_end|><|im_start|>assistant\n",
    "don 't , go . now !",
    "\t\n  \u00a0x\u200d\U0001f469\u200d\U0001f680 e\u0301",
    "",
]


def check(folder):
    ours = Tokenizer.from_folder(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        stream = ours.decode_stream()
        pieces = "".join(stream.step(token) for token in ids)
        assert theirs.decode(ids, skip_special_tokens=True).startswith(pieces)
    for token in ("<IMG_CONTEXT>", "<|im_end|>", "<img>"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)
    assert ours.convert_tokens_to_ids("<never>") is None


def test_ids_and_texts_are_those_of_transformers(golden, converted):
    check(converted(golden.folder, weight_format="fp32"))


def test_real_tokenizers(real_tokenizer):
    check(real_tokenizer[0])


@pytest.fixture
def folder(tiny, converted, tmp_path):
    return shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="int8"), tmp_path / "model")


def test_tokens_that_only_the_configuration_names_are_added(folder):
    """As transformers adds them: a fine-tuned model's files may be older than its tokenizer.json."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    place = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    token = {"content": "<mine>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {str(place): token}
    file.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<mine>b", add_special_tokens=False)[1] == place
    assert tokenizer.decode([place], skip_special_tokens=True) == ""
    config["added_tokens_decoder"] = {"7": token}
    file.write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"gives <mine> the id 7, .* the files come from two tokenizers"):
        Tokenizer.from_folder(folder)


def test_a_folder_without_its_tokenizer_is_told(folder):
    file = folder / "tokenizer.json"
    text = file.read_text()
    for content, kind, message in (
        (None, TokenizerError, r"has no tokenizer\.json: convert the checkpoint again, or put"),
        ("{", TokenizerError, r"tokenizer\.json cannot be read"),
        (text.replace("<IMG_CONTEXT>", "<OTHER>"), TokenizerError, "has no <IMG_CONTEXT>, which stands for pictures"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        with pytest.raises(kind, match=message) as raised:
            OVInternVLChatModel(folder)
        assert "\n" not in str(raised.value)


def test_a_context_token_of_another_id_is_told(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"img_context_token_id": 6}))
    with pytest.raises(ModelFolderError, match="says img_context_token_id 6, the tokenizer gives <IMG_CONTEXT> the id 5"):
        OVInternVLChatModel(folder)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "x" * 10 + "\udcff"])
def test_half_of_a_character_is_told_with_its_place(text):
    with pytest.raises(PromptError, match=r"lone surrogate U\+D[0-9A-F]{3} at position \d+: remove it") as raised:
        check_text(text)
    str(raised.value).encode()  # the line itself can be printed
    check_text("\U0001f680 is whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a list, expected a JSON object"),
        ("{", "is not JSON"),
        ({"do_sample": True, "temperature": "warm"}, "temperature 'warm' is not 0"),
        ({"temperature": -1}, "temperature -1 is not 0"),
        ({"top_p": 7}, "top p 7 is not above 0 and at most 1"),
        ({"top_k": 2.5}, "top k 2.5 is not 0"),
        ({"do_sample": "perhaps"}, "do sample 'perhaps' is not true or false"),
        ({"eos_token_id": "end"}, "eos token ids .*end.* is not a token id or a list of them"),
        ({"eos_token_id": [3, None]}, "eos token ids .* is not a token id or a list"),
        ({"max_new_tokens": 0}, "max new tokens 0 is not positive"),
        ({"repetition_penalty": 0}, "repetition penalty 0 is not positive"),
        ({"num_beams": "many"}, "num beams 'many' is not positive"),
        ({"early_stopping": "sometimes"}, "early stopping 'sometimes' is not true or false"),
    ],
)
def test_a_generation_config_that_is_impossible_is_one_line(folder, content, message):
    file = folder / "generation_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InternVLError, match=rf"generation_config\.json.*{message}") as raised:
        OVInternVLChatModel(folder)
    assert "\n" not in str(raised.value)


def test_what_is_not_applied_of_a_generation_config_is_told_once(folder, monkeypatch):
    said = []
    monkeypatch.setattr(generation.logger, "warning", lambda line, *values: said.append(line % values))
    own = {"eos_token_id": [1, 2], "pad_token_id": 0, "transformers_version": "4.37.2", "_from_model_config": True}
    file = folder / "generation_config.json"
    file.write_text(json.dumps(own | {"penalty_alpha": 0.6, "temprature": 0.7, "typical_p": 1.0}))
    assert read_generation_config(file) == {"eos_token_id": [1, 2]}
    assert said == [f"{file}: penalty_alpha, temprature is ignored"]
    file.write_text(json.dumps(own))
    OVInternVLChatModel(folder)
    assert len(said) == 1
    file.unlink()
    assert OVInternVLChatModel(folder).start_conversation().ask("What?", max_new_tokens=3) is not None


def test_a_checkpoint_is_not_a_model_folder(tiny):
    assert Checkpoint(tiny("tiny-qwen2"))
    with pytest.raises(ModelFolderError, match="is a PyTorch checkpoint"):
        OVInternVLChatModel(tiny("tiny-qwen2"))
