"""python -m pytest tests/runtime/serve/test_responses.py

/v1/responses as the openai package uses it: the answer is that of chat completions, whole and in events, and nothing is kept.
"""

import json
import re
from pathlib import Path
from typing import get_type_hints

import openai
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from runtime import OVInternVLChatModel
from runtime.errors import OptionError
from runtime.serve.engine import GenaiEngine, NativeEngine, Piece
from runtime.serve.responses import IGNORED, REFUSED, ResponsesRequest
from tests.runtime.serve.test_serve import KEY, SHAPES, asked, model, serving  # noqa: F401  model is a fixture
from tests.runtime.serve.test_tools import CALL, FIXED, SECOND, ScriptEngine

ASK = "Which shape is purple?"
LONG = "Describe the picture."
TOOL = {"type": "function", "name": "weather", "parameters": FIXED, "strict": False}


@pytest.fixture(scope="module", params=["genai", "native"])
def client(request, shapes, model):  # noqa: F811
    engine = NativeEngine(model) if request.param == "native" else GenaiEngine(OVInternVLChatModel(shapes, language=False), 1)
    with serving(engine) as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def script(model):  # noqa: F811
    engine = ScriptEngine(model)
    with serving(engine) as (address, _):
        yield engine, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def about(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "input_image", "image_url": SHAPES}, {"type": "input_text", "text": text}]}]


def strict(response: Response) -> Response:
    """The package takes anything; this takes what its types say."""
    return Response.model_validate_json(response.model_dump_json(by_alias=True))


def test_an_answer_is_that_of_chat_completions(client, model):  # noqa: F811
    found = strict(client.responses.create(model="shapes", input=about(LONG)))
    assert found.output_text == asked(model, LONG)
    assert (found.status, found.object, found.model_extra["store"]) == ("completed", "response", False)
    assert [item.type for item in found.output] == ["message"]
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.usage.output_tokens > 10


def test_a_text_and_instructions(client, model):  # noqa: F811
    text = "How many shapes are there?"
    wanted = model.start_conversation("Be short.").ask(text, do_sample=False)
    assert client.responses.create(model="shapes", input=text, instructions="Be short.").output_text == wanted


def test_a_stream_is_told_in_events_that_fit_together(client, model):  # noqa: F811
    events = list(client.responses.create(model="shapes", input=about(LONG), stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 5, "it comes word by word"
    assert "".join(deltas) == asked(model, LONG) == strict(events[-1].response).output_text
    done = next(event for event in events if event.type == "response.output_text.done")
    assert done.text == asked(model, LONG)
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    with client.responses.stream(model="shapes", input=about(LONG)) as stream:  # the package's own way to put it together
        assert stream.get_final_response().output_text == asked(model, LONG)


def test_a_bound_on_tokens_leaves_it_incomplete(client):
    found = client.responses.create(model="shapes", input=about(LONG), max_output_tokens=3)
    assert (found.status, found.incomplete_details.reason, found.usage.output_tokens) == ("incomplete", "max_output_tokens", 3)
    assert (
        list(client.responses.create(model="shapes", input=LONG, max_output_tokens=3, stream=True))[-1].type
        == "response.incomplete"
    )


def test_several_turns_are_sent_whole(client, model):  # noqa: F811
    conversation = model.start_conversation()
    first = conversation.ask(
        "How many shapes are there?", images=[str(Path(__file__).parents[3] / "demo/examples/shapes.png")], do_sample=False
    )
    second = conversation.ask(ASK, do_sample=False)
    given = about("How many shapes are there?")
    said = client.responses.create(model="shapes", input=given)
    assert said.output_text == first
    given += [item.model_dump(exclude_none=True) for item in said.output] + [{"role": "user", "content": ASK}]
    assert client.responses.create(model="shapes", input=given).output_text == second


def test_an_answer_after_a_schema(client):
    schema = {"type": "string", "enum": ["circle", "star"]}
    text = {"format": {"type": "json_schema", "name": "shape", "schema": schema}}
    found = strict(client.responses.create(model="shapes", input=about(ASK), text=text))
    assert json.loads(found.output_text) in ("circle", "star")
    assert found.text.format.name == "shape"


def test_log_probabilities(client):
    found = client.responses.create(model="shapes", input=about(ASK), include=["message.output_text.logprobs"])
    part = found.output[0].content[0]
    assert "".join(token.token for token in part.logprobs).strip() == part.text
    assert all(-5 < token.logprob <= 0 for token in part.logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required(client, stream):
    options = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False}
    found = client.responses.create(model="shapes", input=about("How is it?"), max_output_tokens=200, stream=stream, **options)
    if stream:
        events = list(found)
        found = events[-1].response
        written = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
        assert json.loads(written) == {"city": "Rome"}
        assert next(event for event in events if event.type == "response.function_call_arguments.done").arguments == written
    (item,) = strict(found).output
    assert (item.type, item.name, json.loads(item.arguments), item.status) == (
        "function_call",
        "weather",
        {"city": "Rome"},
        "completed",
    )


def test_thoughts_words_and_calls_are_items(script, model):  # noqa: F811
    engine, client = script
    engine.text = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}\n{SECOND}"
    given = [{"role": "user", "content": "Q"}]
    tools = [TOOL, {"type": "function", "name": "now", "parameters": None, "strict": None}]
    events = list(client.responses.create(model="shapes", input=given, tools=tools, stream=True))
    found = strict(events[-1].response)
    whole = client.responses.create(model="shapes", input=given, tools=tools)
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in whole.output] == [item.type for item in found.output]
    assert found.output[0].content[0].text == "hm"
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2, 3]
    given += [item.model_dump(exclude_none=True) for item in found.output]
    given += [{"type": "function_call_output", "call_id": item.call_id, "output": "12"} for item in found.output[2:]]
    client.responses.create(model="shapes", input=given, tools=tools)
    text = model.tokenizer.decode(engine.asked[0].ids)
    assert f"assistant\nLet me see.\n{CALL}\n{SECOND}<|im_end|>" in text
    assert text.count("<tool_response>\n12\n</tool_response>") == 2


def test_what_goes_wrong_in_a_stream_is_an_event(script):
    engine, client = script
    engine.text = "a " * 30
    start = engine.start
    engine.start = lambda prompt, decoding, tell: tell(Piece("", error=OptionError("it broke"))) or (lambda: None)
    try:
        with pytest.raises(openai.APIError):
            client.responses.create(model="shapes", input="Hi")
        events = list(client.responses.create(model="shapes", input="Hi", stream=True))
    finally:
        engine.start = start
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "it broke"


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_would_be_ignored_in_silence_is_refused(client, field):
    with pytest.raises(openai.BadRequestError, match=f"{field}: not supported here: {re.escape(REFUSED[field])}"):
        client.responses.create(model="shapes", input="Hi", max_output_tokens=2, extra_body={field: "x"})


def test_every_field_of_openai_is_taken_ignored_or_refused(client):
    fields = set(get_type_hints(ResponseCreateParamsBase)) | {"stream"}
    assert fields == set(ResponsesRequest.model_fields) | set(IGNORED)
    harmless = {"metadata": {"a": "b"}, "user": "me", "store": True, "service_tier": "auto", "prompt_cache_key": "x"}
    wanted = client.responses.create(model="shapes", input=ASK, max_output_tokens=4)
    assert client.responses.create(model="shapes", input=ASK, max_output_tokens=4, **harmless).output_text == wanted.output_text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}]},
            "no file that may be read",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "role tool answers a call"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format: a schema is missing"),
        ({"input": "Hi", "truncation": "auto"}, "truncation"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": "Hi", "tool_choice": {"type": "function", "name": "x"}}, "is not among the tools"),
        ({"input": "Hi", "reasoning": {"effort": "high"}}, "has no thinking mode"),
        ({"input": "Hi", "model": "other"}, "there is no model 'other'"),
    ],
)
def test_mistakes_are_one_line(client, body, message):
    with pytest.raises(openai.APIStatusError) as raised:
        client.responses.create(**{"model": "shapes"} | body)
    assert raised.value.status_code in (400, 404)
    assert message in raised.value.body["message"]
    assert "\n" not in raised.value.body["message"]
