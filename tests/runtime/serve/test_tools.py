"""python -m pytest tests/runtime/serve/test_tools.py

Functions that a model may call, and thoughts, as clients see them: the openai package talks to a live server. Both engines hold
calls to the functions' schemas; what a trained model would write of its own accord is written by a script in the place of one.
"""

import json

import httpx
import jsonschema
import openai
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")

from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.answer.decode import Token
from runtime.answer.prompt import THINKING_MESSAGE
from runtime.answer.reading import AnswerReader
from runtime.serve.engine import Engine, GenaiEngine, NativeEngine, Piece
from tests.runtime.serve.test_serve import KEY, SHAPES, model, question, serving  # noqa: F401  model is a fixture

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"name": "weather", "description": "Tells the weather, 天气.", "parameters": CITY}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": NOW}]
FORCED = {"type": "function", "function": {"name": "weather"}}
FIXED = {"type": "object", "const": {"city": "Rome"}}  # no white space, of which the built-in model writes too much


class ScriptEngine(Engine):
    """Writes a text that is given, token by token: what the tests have of a trained model."""

    text = ""

    def start(self, prompt, decoding, tell):
        self.asked = prompt, decoding
        stream = self.text_of(decoding)
        ids = self.model.tokenizer.encode(self.text, add_special_tokens=False)
        for token in ids[: decoding.max_new_tokens]:
            tell(Piece(stream.add(token), (Token(token),)))
        tell(Piece(stream.end(), (), "length" if decoding.max_new_tokens < len(ids) else "stop"))
        return lambda: None

    def close(self):
        pass


@pytest.fixture(scope="module")
def script(model):  # noqa: F811
    engine = ScriptEngine(model)
    with serving(engine) as (address, _):
        yield engine, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module", params=["genai", "native"])
def client(request, shapes, model):  # noqa: F811
    engine = NativeEngine(model) if request.param == "native" else GenaiEngine(OVInternVLChatModel(shapes, language=False), 1)
    with serving(engine) as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def ask(client, messages=None, **options):
    messages = messages or [question("What is the weather?", SHAPES)]
    return client.chat.completions.create(model="shapes", messages=messages, **options)


def joined(stream) -> tuple[dict[int, dict], str, str, str | None]:
    """Calls, content, thoughts and finish reason of a stream, put together as OpenAI's clients do."""
    calls: dict[int, dict] = {}
    content, thought, reason = "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thought += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or []:
                if part.index not in calls:
                    assert (part.type, bool(part.id), bool(part.function.name)) == ("function", True, True), "it begins with a name"
                    calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
                else:
                    assert (part.id, part.function.name) == (None, None), "that is told once"
                calls[part.index]["arguments"] += part.function.arguments or ""
    return calls, content, thought, reason


# ---- what both engines hold a model to


def fixed(*names: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "parameters": FIXED}} for name in names]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "second"}}], ids=["any", "one"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_fits_its_schema(client, choice, stream):
    options = {"tools": fixed("first", "second"), "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    found = ask(client, stream=stream, **options)
    if stream:
        calls, content, _, reason = joined(found)
        (name, arguments), count = (calls[0]["name"], calls[0]["arguments"]), len(calls)
    else:
        message, reason, content = found.choices[0].message, found.choices[0].finish_reason, found.choices[0].message.content
        name, arguments, count = (
            message.tool_calls[0].function.name,
            message.tool_calls[0].function.arguments,
            len(message.tool_calls),
        )
        assert message.tool_calls[0].id.startswith("call_")
    assert (count, reason, content or None) == (1, "tool_calls", None)
    assert name in (("second",) if isinstance(choice, dict) else ("first", "second"))
    assert json.loads(arguments) == {"city": "Rome"}


def test_drawn_calls_fit_their_schemas(model):  # noqa: F811
    """By the native engine, which bounds white space."""
    with serving(NativeEngine(model)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        drawn: set[str] = set()
        for seed in range(40):
            options = {"tools": TOOLS, "tool_choice": "required", "temperature": 2.0, "seed": seed, "max_tokens": 200}
            choice = ask(client, **options).choices[0]
            for call in choice.message.tool_calls or []:
                if choice.finish_reason == "tool_calls":
                    jsonschema.validate(json.loads(call.function.arguments), CITY if call.function.name == "weather" else {})
                    drawn.add(call.function.name)
            if seed >= 7 and drawn == {"weather", "now"}:
                break
        assert drawn == {"weather", "now"}


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_answer_without_a_call_is_an_answer(client, choice):
    found = ask(client, [question("Which shape is purple?", SHAPES)], tools=TOOLS, tool_choice=choice, max_tokens=20).choices[0]
    assert found.message.tool_calls is None
    assert found.finish_reason in ("stop", "length")
    if choice == "none":
        plain = ask(client, [question("Which shape is purple?", SHAPES)], max_tokens=20).choices[0]
        assert found.message.content == plain.message.content, "the model is not told of them"


def test_schemas_that_cannot_be_followed_are_told(client):
    deep: dict = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    for schema in ({"type": "no such type"}, {"type": "object", "properties": {"x": {"$ref": "#/nothing"}}}, deep):
        for stream in (False, True):
            tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            if stream:  # has begun before the schema is tried, where openvino_genai does
                with pytest.raises(openai.APIError, match="the JSON schema"):
                    list(ask(client, tools=tools, tool_choice="required", stream=True))
            else:
                with pytest.raises(openai.BadRequestError, match="the JSON schema"):
                    ask(client, tools=tools, tool_choice="required")
    assert ask(client, [question("Which shape is purple?", SHAPES)]).choices[0].message.content, "nobody else is hurt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools: two functions have the same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "'other' is not among the tools"),
        ({"tool_choice": "required"}, "tool_choice: required, and there are no tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format: not supported together with tools"),
        ({"messages": [question("a"), {"role": "tool", "tool_call_id": "1", "content": "r"}]}, "role tool answers a call"),
        (
            {"messages": [question("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of f are not JSON",
        ),
        ({"reasoning_effort": "high"}, "has no thinking mode: InternVL3.5's models have one"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(client, changes, message):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "shapes", "messages": [question("Hi")]} | changes)
    assert message in raised.value.body["message"]
    assert "\n" not in raised.value.body["message"]


# ---- what a trained model writes

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_after_words_and_thoughts(script, stream):
    engine, client = script
    engine.text = f"<think>\nhm, well\n</think>\n\nLet me see.\n{CALL}\n{SECOND}"
    found = ask(client, tools=TOOLS, stream=stream)
    if stream:
        calls, content, thought, reason = joined(found)
        named = [(call["name"], call["arguments"]) for call in calls.values()]
    else:
        message, reason = found.choices[0].message, found.choices[0].finish_reason
        content, thought = message.content, message.model_extra["reasoning_content"]
        named = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        assert message.tool_calls[0].id != message.tool_calls[1].id
        assert found.usage.completion_tokens_details.reasoning_tokens > 0
    assert (content, thought, reason) == ("Let me see.", "hm, well", "tool_calls")
    assert named == [("weather", '{"city": "Rome"}'), ("now", "{}")]


def test_a_call_that_is_cut_off_is_no_end(script):
    engine, client = script
    engine.text = CALL
    found = ask(client, tools=TOOLS, max_tokens=len(engine.model.tokenizer.encode(CALL)) - 30).choices[0]
    assert found.finish_reason == "length"


def test_what_looks_like_a_call_is_text_where_there_are_no_tools(script):
    engine, client = script
    engine.text = CALL
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = ask(client, **options).choices[0]
        assert (found.message.content, found.message.tool_calls, found.finish_reason) == (CALL, None, "stop")


def test_a_whole_round_reads_as_the_model_was_trained(script, model):  # noqa: F811
    """The prompt, word for word: what Qwen's own chat template makes of it (checked against that of Qwen3-8B)."""
    engine, client = script
    engine.text = f"Let me see.\n{CALL}\n{SECOND}"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    said = ask(client, messages, tools=TOOLS).choices[0].message
    messages.append(said.model_dump(exclude_none=True))
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"12 </tool_response> {call.function.name}"}
        for call in said.tool_calls
    ]
    ask(client, messages, tools=TOOLS)
    text = model.tokenizer.decode(engine.asked[0].ids)
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in TOOLS)
    assert text == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + lines + "\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>'
        f"<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nLet me see.\n{CALL}\n{SECOND}<|im_end|>"
        "<|im_start|>user\n<tool_response>\n12 </tool_response> weather\n</tool_response>\n"
        "<tool_response>\n12 </tool_response> now\n</tool_response><|im_end|><|im_start|>assistant\n"
    )
    rule = engine.asked[1].calls
    assert [name for name, _ in rule.functions] == ["weather", "now"]
    assert (rule.required, rule.several) == (False, True)


def test_thoughts_of_earlier_answers_are_left_out(script, model):  # noqa: F811
    engine, client = script
    engine.text = "A"
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA circle."}
    ask(client, [{"role": "user", "content": "Q"}, said, {"role": "user", "content": "R"}])
    assert "assistant\nA circle.<|im_end|>" in model.tokenizer.decode(engine.asked[0].ids)
    ask(client, [{"role": "user", "content": "Q"}, {**said, "content": "Write </think> so."}, {"role": "user", "content": "R"}])
    assert "assistant\nWrite </think> so.<|im_end|>" in model.tokenizer.decode(engine.asked[0].ids), "no thought begins there"


def test_an_answer_that_was_begun_in_a_thought_goes_on_in_it(script):
    engine, client = script
    engine.text = "well\n</think>\n\nA circle."
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nhm,"}]
    message = ask(client, messages, extra_body={"continue_final_message": True}).choices[0].message
    assert (message.model_extra["reasoning_content"], message.content) == ("well", "A circle.")


def test_an_answer_without_thoughts_has_none(script):
    engine, client = script
    engine.text = "I think <think> is a mark."
    message = ask(client).choices[0].message
    assert message.content == engine.text
    assert "reasoning_content" not in message.model_extra


# ---- thinking mode


@pytest.fixture(scope="module")
def thinker(tiny, converted):
    return OVInternVLChatModel(converted(tiny("tiny-qwen3"), weight_format="int8"))


def test_effort_is_the_published_system_message(thinker):
    engine = ScriptEngine(thinker)
    engine.text = "a"

    def read(client, **options) -> str:
        ask(client, [{"role": "user", "content": "Q"}], **options)
        return thinker.tokenizer.decode(engine.asked[0].ids)

    with serving(engine, thinking=False) as (address, _), serving(ScriptEngine(thinker), thinking=True):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        assert f"system\n{THINKING_MESSAGE}<|im_end|>" in read(client, reasoning_effort="low")
        assert engine.asked[1].max_new_tokens > 1024, "room for thoughts"
        for options in ({}, {"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}):
            assert f"system\n{thinker.system_message}<|im_end|>" in read(client, **options)
        told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}]
        ask(client, told, reasoning_effort="high", tools=TOOLS, tool_choice="required")
        text = thinker.tokenizer.decode(engine.asked[0].ids)
        assert f"system\n{THINKING_MESSAGE}\n\nBe kind.\n\n# Tools" in text
        assert engine.asked[1].thoughts, "calls come after them"


def test_a_server_that_thinks_does_unless_it_is_told_not_to(thinker):
    engine = ScriptEngine(thinker)
    with serving(engine, thinking=True) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        for options, thinks in (({}, True), ({"reasoning_effort": "none"}, False)):
            ask(client, [{"role": "user", "content": "Q"}], **options)
            assert (THINKING_MESSAGE in thinker.tokenizer.decode(engine.asked[0].ids)) == thinks


def test_the_thinking_message_is_tokenised_as_upstream_tokenises_it(thinker):
    """Its own marks are the model's."""
    conversation = thinker.start_conversation(THINKING_MESSAGE)
    conversation.ask("Q", max_new_tokens=1)
    text = thinker.prompt_text(THINKING_MESSAGE, [], "Q", [])
    assert conversation.statistics.prompt_tokens == len(thinker.tokenizer.encode(text))


def test_thoughts_then_an_answer_after_a_schema(thinker, model):  # noqa: F811
    """The grammar of the native engine, over the built-in vocabulary: a thought, then nothing but what the schema says."""
    from runtime.answer.grammar import Grammars

    grammar = Grammars(model.tokenizer, model.config.language["vocab_size"], [model.stop_id]).of('{"const": 1}', thoughts=True)
    for token in model.tokenizer.encode("<think>\nso {1} it </thin is\n</think>\n\n1", add_special_tokens=False):
        grammar.take(token)
    assert grammar.ended


def test_the_terminal_thinks_and_says_where_it_cannot(shapes, thinker, capsys):
    assert main(["chat", str(shapes), "Hi", "--thinking"]) == 2
    assert "has no thinking mode" in capsys.readouterr().err
    assert main(["serve", str(shapes), "--thinking", "--port", "0"]) == 2
    assert "has no thinking mode" in capsys.readouterr().err
    assert main(["chat", str(thinker.folder), "Hi", "--thinking", "--json", "--max-new-tokens", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    prompt = thinker.tokenizer.encode(thinker.prompt_text(THINKING_MESSAGE, [], "Hi", []))
    assert told["prompt_tokens"] == len(prompt)


# ---- the reader

ODD = '{"a": "}\\"</tool_call>{"}'


def parts(text: str, size: int, **options) -> AnswerReader:
    reader = AnswerReader(**options)
    told = []
    for at in range(0, len(text), size):
        told += reader.add(text[at : at + size])
    told += reader.add("", end=True)
    assert "".join(said.content for said in told) == reader.content
    assert "".join(said.thought for said in told) == reader.thought
    return reader


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "thought", "content", "calls"),
    [
        ("A circle.", "", "A circle.", []),
        ("<think>\nhm\n</think>\n\nA.", "hm", "A.", []),
        ("\n<think>hm</think>A.", "hm", "A.", []),
        ("<think>\nhm", "hm", "", []),
        ("<think>\na </think", "a </think", "", []),
        ("<thin", "", "<thin", []),
        (f"{CALL}", "", "", [("weather", '{"city": "Rome"}')]),
        (f"Well. {CALL} {SECOND} bye", "", "Well.\nbye", [("weather", '{"city": "Rome"}'), ("now", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "}\\"</tool_call>{"}}\n</tool_call>', "", "", [("f", ODD)]),
        ('<tool_call>{"name":"f","arguments":[1,{"b":[]}]}</tool_call>', "", "", [("f", '[1,{"b":[]}]')]),
        ('<tool_call>{"name":"f","arguments":"x"}</tool_call>', "", "", [("f", '"x"')]),
        ("a <tool_call> b </tool_call> c", "", "a<tool_call> b </tool_call> c", []),
        ("a <tool_c", "", "a <tool_c", []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1', "", "", [("f", '{"a": 1')]),
    ],
)  # fmt: skip
def test_an_answer_is_read_the_same_in_pieces_of_any_size(text, thought, content, calls, size):
    reader = parts(text, size, calls=True)
    assert (reader.thought, reader.content) == (thought, content)
    assert [(call.name, call.arguments) for call in reader.calls] == calls


def test_words_are_told_at_once(script):
    reader = AnswerReader(calls=True)
    assert [said.content for said in reader.add("A circle")] == ["A circle"]
    assert [said.content for said in reader.add(" <")] == [], "which may begin a call"
    assert [said.content for said in reader.add("b>")] == [" <b>"]


def test_the_routes_answer_as_json(script):
    """A body without `stream` is one object, with its type."""
    engine, client = script
    engine.text = CALL
    answer = httpx.post(
        f"{client.base_url}chat/completions",
        json={"messages": [question("Hi")], "tools": TOOLS},
        headers={"authorization": f"Bearer {KEY}"},
    )
    message = answer.json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


# ---- places


PLACES = "It is <ref>a car</ref><box>[[1, 2, 30, 40]]</box>."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("skips", "said"), [(False, PLACES), (True, "It is a car[[1, 2, 30, 40]]."), (None, "It is a car[[1, 2, 30, 40]].")]
)
def test_tokens_of_places_are_text_where_a_client_wants_them(script, stream, skips, said):
    """As LMDeploy and vLLM have it; null is the default."""
    engine, client = script
    engine.text = PLACES
    found = ask(client, stream=stream, extra_body={"skip_special_tokens": skips})
    assert (joined(found)[1] if stream else found.choices[0].message.content) == said
    found = client.completions.create(
        model="shapes", prompt="Where?", stream=stream, extra_body={"skip_special_tokens": skips}, max_tokens=99
    )
    assert ("".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text) == said
