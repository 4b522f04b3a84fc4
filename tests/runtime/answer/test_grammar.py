"""python -m pytest tests/runtime/answer/test_grammar.py

Answers after a JSON schema, from a conversation and from the terminal: what is written parses and fits, greedy and drawn.
"""

import json
from pathlib import Path

import pytest

from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.errors import OptionError

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
