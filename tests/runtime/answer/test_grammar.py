"""python -m pytest tests/runtime/answer/test_grammar.py

Answers after a JSON schema, from a conversation and from the terminal: what is written parses and fits, greedy and drawn. Answers
with calls: which texts their grammar takes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.answer.grammar import Grammars
from runtime.answer.tools import Call, CallRule, written_answer
from runtime.errors import OptionError
from runtime.folder.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'internvl-openvino[serve]'")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: it checks what was written")

PICTURE = Path(__file__).parents[3] / "demo" / "examples" / "shapes.png"
SCHEMAS = [
    {"enum": ["circle", "star"]},
    {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "star", "square"]}, "sure": {"type": "boolean"}},
        "required": ["shape", "sure"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 3},
]


@pytest.fixture(scope="module")
def model(shapes):
    return OVInternVLChatModel(shapes)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1}, {"repetition_penalty": 1.1}], ids=str)
@pytest.mark.parametrize("schema", SCHEMAS, ids=["enum", "object", "array"])
def test_answers_fit_their_schema(model, schema, options):
    conversation = model.start_conversation()
    for given in (schema, json.dumps(schema)):
        answer = conversation.ask("Which shape is purple?", images=[PICTURE], schema=given, max_new_tokens=400, **options)
        jsonschema.validate(json.loads(answer), schema)
        assert conversation.statistics.finish_reason == "stop"
    assert conversation.ask("Which shape is purple?", do_sample=False), "the next turn is free again"


def test_several_answers_have_a_grammar_each(model):
    found = model.ask_batch(["What?", "Why?"], schema=SCHEMAS[0], num_return_sequences=2, temperature=1.0, max_new_tokens=50)
    assert all(json.loads(one) in ("circle", "star") for one in found)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list, expected an object"),
        ({"type": "no such"}, "cannot be followed"),
        ({"type": "string", "pattern": "("}, "cannot be followed"),
        ({"enum": ["a" * 20000]}, "more than 16 KB"),
        (5, "is a int, expected an object"),
    ],
)
def test_schemas_that_cannot_be_followed_are_one_line(model, schema, message):
    with pytest.raises(OptionError, match=f"the JSON schema .*{message}") as raised:
        model.start_conversation().stream("What?", schema=schema)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_schemas_are_for_one_answer_at_a_time(model, other):
    with pytest.raises(OptionError, match="leave out"):
        model.start_conversation().stream("What?", schema=SCHEMAS[0], **other)


def test_from_the_terminal(shapes, tmp_path, capsys):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMAS[0]))
    command = ["chat", str(shapes), "Which shape is purple?", "--image", str(PICTURE), "--schema"]
    assert main([*command, str(file)]) == 0
    assert json.loads(capsys.readouterr().out) in ("circle", "star"), "words in quotes were never trained"
    file.write_text("{")
    for given, message in ((file, "the JSON schema is not JSON"), (tmp_path / "gone.json", "cannot be read (No such file")):
        assert main([*command, str(given)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


# ---- calls

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
RULE = (("f", json.dumps(NUMBER)), ("g_2", '{"type": "object", "properties": {}, "additionalProperties": false}'))
F, G = (written_answer("", [Call(name, arguments)]) for name, arguments in (("f", '{"a": 1}'), ("g_2", "{}")))
THOUGHT = "<think>\nso {1} it </thin is\n</think>\n\n"


@pytest.fixture(scope="module", params=["as text", "as tokens"])
def tokenizer(request, shapes):
    """The built-in one, and one with tokens for the marks, as Qwen2.5 and Qwen3 have."""
    made = Tokenizer.from_folder(shapes)
    if request.param == "as tokens":
        marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
        made.backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return made


def taken(tokenizer, rule: CallRule, text: str, *, thoughts: bool = False) -> str:
    """What the grammar says of a text: "no", "more" where it cannot end there, "end" where it can, "over" where it must."""
    size = tokenizer.backend.get_vocab_size()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    grammar = Grammars(tokenizer, size, [end]).of(None, rule, thoughts=thoughts)
    for token in tokenizer.encode(text, add_special_tokens=False):
        scores = np.zeros(size, np.float32)
        grammar.allow(scores)
        if scores[token]:
            return "no"
        grammar.take(token)
    if grammar.ended:
        return "over"
    scores = np.zeros(size, np.float32)
    grammar.allow(scores)
    return "more" if scores[end] else "end"


@pytest.mark.parametrize(
    ("text", "auto", "auto_one", "required", "required_one"),
    [
        ("hello there", "end", "end", "no", "no"),
        ("", "end", "end", "more", "more"),
        (F, "end", "over", "end", "over"),
        (G, "end", "over", "end", "over"),
        (f"{F}\n{G}", "end", "no", "end", "no"),
        (f"Let me see.\n{F}", "end", "over", "no", "no"),
        (f"{F}\nand", "end", "no", "no", "no"),
        (F[:-14], "more", "more", "more", "more"),
        (F.replace('"a"', '"b"'), "no", "no", "no", "no"),
        (F.replace('"f"', '"h"'), "no", "no", "no", "no"),
        ("a <tool_call> b", "no", "no", "no", "no"),
        ("<box>[[1]]</box> and <ref>a</ref>", "end", "end", "no", "no"),
        (f"<think>\nhm\n</think>\n\n{F}", "end", "over", "no", "no"),
    ],
)  # fmt: skip
def test_which_calls_an_answer_may_have(tokenizer, text, auto, auto_one, required, required_one):
    wanted = {(False, True): auto, (False, False): auto_one, (True, True): required, (True, False): required_one}
    for (must, several), said in wanted.items():
        rule = CallRule(RULE, must, several)
        assert taken(tokenizer, rule, text) == said, (must, several)
        if must:
            assert taken(tokenizer, rule, THOUGHT + text, thoughts=True) == said, "the same after a thought"
            assert taken(tokenizer, rule, F, thoughts=True) == "no", "which comes first"


def test_a_schema_of_a_tool_is_told_with_its_name(tokenizer):
    with pytest.raises(OptionError, match=r"tool f: the JSON schema has more than 16 KB"):
        taken(tokenizer, CallRule((("f", json.dumps({"enum": ["a" * 20000]})),)), "")
