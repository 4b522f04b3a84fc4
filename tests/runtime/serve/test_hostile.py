"""python -m pytest tests/runtime/serve/test_hostile.py

The server under requests that nobody should send: what a machine makes up of its own OpenAPI, and 2,000 that are wrong in some way.
It answers all of them, none with 500, and keeps none of their memory.
"""

import base64
import gc
import io
import json
import random
import struct
import threading
import time
import zlib
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")
import schemathesis
from hypothesis import HealthCheck, given, settings

from runtime import OVInternVLChatModel
from runtime.serve.engine import GenaiEngine
from runtime.serve.reception import Limits
from tests.runtime.serve.test_serve import KEY, PICTURE, SHAPES, question, serving

ROOT = Path(__file__).parents[3]
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
REQUESTS = 2000
MADE_UP = 40  # of each route


@pytest.fixture(scope="module")
def address(shapes):
    with serving(GenaiEngine(OVInternVLChatModel(shapes, language=False), 1), limits=Limits(body_bytes=4 << 20)) as (address, _):
        yield address


@pytest.mark.parametrize("mode", [*schemathesis.GenerationMode], ids=lambda mode: mode.value)
def test_what_its_own_schema_says_and_what_it_forbids(address, mode):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    statuses: set[int] = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == schemathesis.GenerationMode.NEGATIVE and operation.method != "post":
            continue  # a route without arguments has no wrong ones

        @settings(max_examples=MADE_UP, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            for name in ("max_tokens", "max_output_tokens") if mode == schemathesis.GenerationMode.POSITIVE else ():
                if isinstance(case.body, dict) and isinstance(case.body.get(name, 1), int):
                    case.body[name] = 4  # or made-up texts are answered at any length; a wrong number stays wrong
            answer = case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=60)
            statuses.add(answer.status_code)
            assert answer.status_code < 500, answer.text

        ask()
    assert 400 in statuses
    assert (200 in statuses) == (mode == schemathesis.GenerationMode.POSITIVE)


# ---- requests that are wrong


def chat(**changes) -> dict:
    return {"model": "shapes", "messages": [question("Hi", SHAPES)], "max_tokens": 2} | changes


def png(width: int, height: int) -> bytes:
    """A small file of a picture that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def as_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


JUNK = [None, True, -1, 0, 1e308, "x", "", [], {}, [[]], {"a": 1}, "9" * 30]


def broken_json(dice: random.Random) -> bytes:
    whole = json.dumps(chat()).encode()
    cut = whole[: dice.randrange(len(whole) - 1)]
    return dice.choice([cut, cut + b"\xff", b"\x00" + whole, whole + b"}", b"[" * dice.randrange(1, 100_000), b'{"a":' * 5000])


def wrong_type(dice: random.Random) -> bytes:
    field, wrong = dice.choice(
        [
            ("messages", dice.choice([5, "x", {}, [], [5], [[]], [{}], [{"role": "user"}], [{"role": 5, "content": "a"}]])),
            ("messages", [{"role": "user", "content": dice.choice([5, {}, [5], [{}], [{"type": "x"}], [{"type": "text"}]])}]),
            ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": dice.choice([5, {}, [], "x"])}]}]),
            ("messages", [{"role": dice.choice(["tool", "", "USER", "assistant"]), "content": "a"}]),
            ("n", dice.choice([0, -1, 17, 1e9, "x", [], 1.5])),
            ("max_tokens", dice.choice([0, -5, "x", [], {}, 1.5])),
            ("temperature", dice.choice([-1, 2.1, "x", [], 1e308])),
            ("top_p", dice.choice([0, 1.1, -1, "x"])),
            ("top_k", dice.choice([-1, "x", 0.5])),
            ("seed", dice.choice([-1, 1 << 63, "x", 10**400])),
            ("stop", dice.choice([5, {}, ["a"] * 17, [5]])),
            ("stream", dice.choice([5, "x", []])),
            ("stream_options", dice.choice([5, "x", []])),
            ("response_format", dice.choice([5, {"type": "xml"}, {"type": "json_schema", "json_schema": 5}])),
            ("top_logprobs", dice.choice([1, 20, "x"])),
            ("reasoning_effort", dice.choice(["much", 5, {}, "high"])),
            ("modalities", dice.choice(["text", ["audio"], 5])),
            ("prompt_lookup_num_tokens", dice.choice([-1, 17, "x", 3])),
            ("parallel_tool_calls", dice.choice([5, "x", []])),
            (dice.choice(["audio", "functions", "verbosity", "web_search_options"]), {"a": 1}),
            ("logit_bias", {"1": 100}),
            ("model", dice.choice(["other", "../shapes", 5, {}])),
        ]
    )
    return json.dumps(chat(**{field: wrong})).encode()


def broken_picture(dice: random.Random) -> bytes:
    whole = SHAPES
    jpeg = io.BytesIO()
    Image.open(PICTURE).convert("RGB").save(jpeg, "JPEG")
    url = dice.choice(
        [
            whole[: dice.randrange(30, 200)],
            whole[: -dice.randrange(1, len(whole) // 2)],
            whole.replace("A", "!", 3),
            as_url(jpeg.getvalue()[: dice.randrange(10, 300)]),
            as_url(bytes(dice.randrange(256) for _ in range(dice.randrange(500)))),
            as_url(PICTURE.read_bytes()[: dice.randrange(8, 60)]),
            as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
            "data:",
            "data:,",
            "data:image/png;base64",
            "",
            "/etc/passwd",
            "file:///etc/passwd",
            "ftp://127.0.0.1/a.png",
            "http://127.0.0.1:1/a.png",
            "http://[::1",
            "\ud800",
            "../../x.png",
            "a" * dice.randrange(1, 100_000),
        ]
    )
    return json.dumps(chat(messages=[question("Hi", url)])).encode()


def bomb(dice: random.Random) -> bytes:
    sizes = [(60_000, 60_000), (1 << 30, 1), (9500, 9500), (0, 5), (5, 0), (8000, 8000)]
    url = as_url(png(*dice.choice(sizes)))
    return json.dumps(chat(messages=[question("Hi", *[url] * dice.choice([1, 1, 4]))])).encode()


def huge_count(dice: random.Random) -> bytes:
    return dice.choice(
        [
            lambda: json.dumps(chat(messages=[question("Hi")] * dice.randrange(1001, 5000))),
            lambda: json.dumps(chat(messages=[question("Hi", *[SHAPES] * 65)])),
            lambda: json.dumps(chat(messages=[question("<image>" * dice.randrange(2, 5000), SHAPES)])),
            lambda: json.dumps(chat(messages=[question("red " * dice.randrange(20_000, 100_000))])),
            lambda: json.dumps(chat()).replace('"max_tokens": 2', f'"max_tokens": {"9" * 5000}'),
            lambda: json.dumps(chat()).replace('"max_tokens": 2', '"max_tokens": 1e999'),
            lambda: json.dumps(chat(stop=["x"] * 1000)),
            lambda: json.dumps(chat(response_format={"type": "json_schema", "json_schema": {"schema": nested(2000)}})),
            lambda: json.dumps(chat(messages=[question("Hi", SHAPES, max_dynamic_patch=dice.choice([0, -1, 65, 10**9]))])),
            lambda: " " * (5 << 20),
        ]
    )().encode()


def nested(depth: int) -> dict:
    schema: dict = {"type": "no such type"}
    for _ in range(depth // 10):
        schema = {"type": "array", "items": schema}
    return schema


def wrong_completion(dice: random.Random) -> bytes:
    wrong = dice.choice([{"prompt": 5}, {"prompt": []}, {"prompt": ["a"] * 17}, {"prompt": "red " * 30_000}, {"suffix": "x"}, {}])
    return json.dumps({"model": "shapes", "max_tokens": 2} | ({"prompt": "a"} if "suffix" in wrong else {}) | wrong).encode()


def tool(**changes) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}} | changes}


def wrong_tools(dice: random.Random) -> bytes:
    """Functions, what is chosen of them, and messages about calls."""
    said = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    asked, odd = question("Hi"), dice.choice(JUNK[2:])
    return json.dumps(
        chat(
            **dice.choice(
                [
                    {"tools": dice.choice([5, "x", {}, [5], [{}], [{"type": "function"}], [{"type": "custom"}], [tool()] * 200])},
                    {"tools": [tool(name=dice.choice(["", "a b", "x" * 65, 5, None, "\ud800", "\n"]))]},
                    {
                        "tools": [tool(parameters=dice.choice([5, "x", [], {"type": "no such"}, nested(1000)]))],
                        "tool_choice": "required",
                    },
                    {"tools": [tool(description=dice.choice([5, [], "\ud800"]))]},
                    {"tools": [tool(), tool()]},
                    {"tools": [tool()], "tool_choice": dice.choice([5, "f", "any", [], {}, {"type": "function"}, tool(name="g")])},
                    {"tools": [tool()], "response_format": {"type": "json_object"}},
                    {"tool_choice": dice.choice(["required", tool()])},
                    {"messages": [asked, {"role": "tool", "content": "x"}]},
                    {"messages": [asked, said | {"tool_calls": odd}, asked]} if odd != [] else {"messages": []},
                    {"messages": [asked, said | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, asked]},
                    {"messages": [asked, said, {"role": "tool", "content": [{"type": "x"}]}]},
                    {"messages": [asked, said | {"reasoning_content": 5}, asked]},
                    {"messages": [asked, said], "continue_final_message": True},
                    {"messages": [{"role": "user", "content": None}]},
                    {"messages": [{"role": "function", "name": "f", "content": "x"}]},
                ]
            )
        )
    ).encode()


def wrong_response(dice: random.Random) -> bytes:
    """What /v1/responses must not take."""
    part = dice.choice(
        [5, "x", {}, {"type": "x"}, {"type": "input_text"}, {"type": "input_image", "image_url": "x"}, {"type": "input_image"}]
    )
    return json.dumps(
        {"model": "shapes", "max_output_tokens": 2, "input": "Hi"}
        | dice.choice(
            [
                {"input": dice.choice([5, {}, [], [5], [{}], [[]], "\ud800", "red " * 30_000])},
                {"input": [{"role": "user", "content": dice.choice([5, {}, [part]])}]},
                {"input": [{"role": dice.choice(["tool", "", 5]), "content": "x"}]},
                {"input": [{"type": dice.choice(["item_reference", "computer_call", 5, ""]), "id": "x"}]},
                {"input": [{"type": "function_call_output", "call_id": "1", "output": dice.choice(["x", 5])}]},
                {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": dice.choice(["{", 5])}]},
                {"input": [question("Hi")] * 5},
                {"instructions": dice.choice([5, [], "\ud800"])},
                {"max_output_tokens": dice.choice([0, -1, "x", 1.5])},
                {
                    "tools": dice.choice(
                        [5, [5], [{"type": "web_search"}], [{"type": "function"}], [{"type": "function", "name": "a b"}]]
                    )
                },
                {"tool_choice": dice.choice(["required", 5, {"type": "function", "name": "f"}])},
                {"text": dice.choice([5, {"format": 5}, {"format": {"type": "xml"}}, {"format": {"type": "json_schema"}}])},
                {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no such"}}}},
                {"reasoning": dice.choice([5, {"effort": "much"}, {"effort": "high"}])},
                {dice.choice(["background", "previous_response_id", "conversation", "prompt"]): dice.choice([True, "x", {"a": 1}])},
                {"top_logprobs": dice.choice([3, 21, "x"])},
                {"truncation": "auto"},
                {"model": dice.choice(["other", 5])},
            ]
        )
    ).encode()


KINDS = [broken_json, wrong_type, broken_picture, bomb, huge_count, wrong_completion, wrong_tools, wrong_response]
ROUTES = {wrong_completion: "/v1/completions", wrong_response: "/v1/responses"}  # chat completions for all others


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_two_thousand_wrong_requests_are_refused_and_leave_no_memory(address):
    """After a first round, in which Python and Pillow load what they need once."""
    dice = random.Random(1)
    before = None
    with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as client:
        for number in range(REQUESTS + 300):
            if number == 300:
                before = resident()
            make = KINDS[number % len(KINDS)]
            body = make(dice)
            answer = client.post(ROUTES.get(make, "/v1/chat/completions"), content=body)
            assert 400 <= answer.status_code < 500, (make.__name__, answer.status_code, body[:300], answer.text)
            error = answer.json()["error"]
            assert error["message"], make.__name__
            assert "\n" not in error["message"]
        assert client.post("/v1/chat/completions", json=chat()).json()["choices"][0]["message"]["content"]
        grown = resident() / before
    assert grown < 1.05, f"memory is {grown:.3f} of what it was"


def test_wrong_paths_and_methods(address):
    with httpx.Client(base_url=address, headers=HEADERS) as client:
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.delete("/v1/models").status_code == 405
        assert client.post("/v1/chat/completions", content=b"a=b", headers={"content-type": "text/plain"}).status_code == 400


def test_clients_that_hang_up_early_leave_no_thread(address):
    """Half a request, then nothing."""
    import socket

    host, port = address.removeprefix("http://").split(":")
    before = threading.active_count()
    for _ in range(100):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    time.sleep(0.5)
    assert httpx.get(f"{address}/health").status_code == 200
    assert threading.active_count() <= before + 2
