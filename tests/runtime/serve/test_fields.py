"""python -m pytest tests/runtime/serve/test_fields.py

Every field of OpenAI's chat completions: the table of docs/fields.md, the openai package and protocol.py name the same ones, and
each does what the table says of it.
"""

import re
from pathlib import Path
from typing import get_type_hints

import openai
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from runtime import OVInternVLChatModel
from runtime.serve.engine import GenaiEngine, NativeEngine
from runtime.serve.protocol import IGNORED, REFUSED, ChatRequest, CompletionRequest
from tests.runtime.serve.test_serve import KEY, SHAPES, model, question, serving  # noqa: F401  model is a fixture

PAGE = (Path(__file__).parents[3] / "docs" / "fields.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `([a-z_]+)` \| (done|ignored|refused|native)\b", PAGE, flags=re.MULTILINE))
OPENAI = set(get_type_hints(CompletionCreateParamsBase)) | {"stream"}
ASK = [question("Describe the picture.", SHAPES)]


@pytest.fixture(scope="module", params=["genai", "native"])
def client(request, shapes, model):  # noqa: F811
    native = request.param == "native"
    engine = NativeEngine(model) if native else GenaiEngine(OVInternVLChatModel(shapes, language=False), 1)
    with serving(engine) as (address, _):
        made = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        made.native = native
        yield made


def ask(client, **options):
    return client.chat.completions.create(**{"model": "shapes", "messages": ASK, "max_tokens": 12} | options)


def test_the_table_has_every_field_of_openai():
    assert {name for name in OPENAI if name not in ROWS} == set()
    assert set(ROWS) == OPENAI | set(ChatRequest.model_fields)


def test_the_table_and_the_protocol_agree():
    said = {kind: {name for name, found in ROWS.items() if found == kind} for kind in ("done", "ignored", "refused", "native")}
    assert said["ignored"] == set(IGNORED)
    assert said["refused"] == set(REFUSED) & set(ChatRequest.model_fields)
    assert said["done"] | said["native"] == set(ChatRequest.model_fields) - set(REFUSED)
    assert (
        set(REFUSED)
        == said["refused"] | {"suffix"}
        == {name for kind in (ChatRequest, CompletionRequest) for name in kind.model_fields if name in REFUSED}
    )
    for name in said["refused"]:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert REFUSED[name] in row, "with its reason"


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"suffix"}))
def test_what_is_refused_says_why(client, name):
    with pytest.raises(openai.BadRequestError, match=f"{name}: not supported here: {re.escape(REFUSED[name])}"):
        ask(client, extra_body={name: {"a": 1}})
    assert ask(client, extra_body={name: None}).choices, "nothing is said of it"


def test_what_is_ignored_changes_nothing(client):
    wanted = ask(client).choices[0].message.content
    for name in IGNORED:
        assert ask(client, extra_body={name: "x"}).choices[0].message.content == wanted, name


def test_nothing_said_is_the_default(client):
    """OpenAI's clients send null for what they leave open."""
    wanted = ask(client).choices[0].message.content
    open_ = [name for name in ROWS if name not in ("messages", "model", "ignore_eos", "continue_final_message", "max_tokens")]
    found = ask(client, stream=False, extra_body=dict.fromkeys(open_))
    assert found.choices[0].message.content == wanted


# ---- one value of each field that is done; others have tests of their own

VALUES = {
    "frequency_penalty": 1.0,
    "ignore_eos": True,
    "logprobs": True,
    "max_completion_tokens": 3,
    "max_tokens": 3,
    "min_p": 0.1,
    "modalities": ["text"],
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": 1.0,
    "reasoning_effort": "none",
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["circle"]}}},
    "seed": 1,
    "skip_special_tokens": False,
    "stop": ["never"],
    "stream_options": None,
    "temperature": 0.5,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_k": 5,
    "top_p": 0.9,
}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_what_is_done_is_taken(client, name):
    found = ask(client, extra_body={name: VALUES[name]})
    assert found.choices[0].message.content is not None
    assert len(found.choices) == (2 if name == "n" else 1)
    if name == "max_completion_tokens":
        assert found.usage.completion_tokens == 3


@pytest.mark.parametrize("wrong", [{"modalities": ["text", "audio"]}, {"modalities": "text"}, {"n": 0}, {"top_logprobs": 3}])
def test_what_cannot_be_done_is_told(client, wrong):
    with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
        ask(client, extra_body=wrong)


# ---- what the native engine has alone


@pytest.mark.parametrize(
    "options", [{"logprobs": True, "top_logprobs": 2}, {"prompt_lookup_num_tokens": 3}], ids=["top_logprobs", "prompt lookup"]
)
def test_what_the_native_engine_has_alone(client, options):
    if not client.native:
        with pytest.raises(
            openai.BadRequestError, match=f"{[*options][-1]} needs the native engine: start the server with --engine"
        ):
            ask(client, extra_body=options)
        return
    wanted = ask(client).choices[0].message.content
    found = ask(client, extra_body=options).choices[0]
    assert found.message.content == wanted, "the same greedy answer"
    if "top_logprobs" in options:
        assert all(len(token.top_logprobs) == 2 for token in found.logprobs.content)
    else:
        with pytest.raises(openai.BadRequestError, match="prompt_lookup_num_tokens is for one greedy answer"):
            ask(client, extra_body=options | {"temperature": 1.0})


def test_guesses_are_what_was_said_before(model, monkeypatch):  # noqa: F811
    """Through the server: guesses are checked where a text repeats itself, and there are none where it is said so."""
    from runtime.answer import decode

    looked: list[int] = []
    look_up = decode.look_up
    monkeypatch.setattr(decode, "look_up", lambda ids, most: (looked.append(most), look_up(ids, most))[1])
    with serving(NativeEngine(model)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        for count in (4, 0):
            looked.clear()
            ask(client, extra_body={"prompt_lookup_num_tokens": count})
            assert {*looked} == ({4} if count else set())


def test_alternatives_of_a_completion(client):
    options = {"model": "shapes", "prompt": "<|im_start|>user\nHow many?<|im_end|><|im_start|>assistant\n", "max_tokens": 4}
    plain = client.completions.create(**options, logprobs=1).choices[0]
    assert plain.logprobs.text_offset == [len("".join(plain.logprobs.tokens[:n])) for n in range(len(plain.logprobs.tokens))]
    if not client.native:
        assert plain.logprobs.top_logprobs is None
        with pytest.raises(openai.BadRequestError, match="top_logprobs needs the native engine"):
            client.completions.create(**options, logprobs=3)
        return
    found = client.completions.create(**options, logprobs=3).choices[0].logprobs
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs, "greedy"
    assert all(len(top) == 3 for top in found.top_logprobs)
