"""python -m pytest -m clients tests/clients    (make clients installs what they need)

Programs that others wrote, against a live server with the built-in model: what each sends is answered as the command line answers.
"""

import asyncio
import json
import subprocess
from enum import StrEnum

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")
from pydantic import BaseModel

from runtime import OVInternVLChatModel
from tests.conftest import data_url
from tests.runtime.serve.server import ROOT, started

pytestmark = pytest.mark.clients
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
SHAPES = data_url(PICTURE)
KEY = "sesame"
QUESTION, DESCRIBE = "Which shape is purple?", "Describe the picture."
MESSAGES = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": SHAPES}}, {"type": "text", "text": QUESTION}]},
]


class Shape(StrEnum):
    CIRCLE, STAR, SQUARE = "circle", "star", "square"


class Found(BaseModel, extra="forbid"):
    shape: Shape
    filled: bool


@pytest.fixture(scope="module")
def server(shapes, tmp_path_factory):
    with started(shapes, tmp_path_factory.mktemp("server"), "--api-key", KEY) as server:
        yield server


@pytest.fixture(scope="module")
def base_url(server):
    return f"{server.address}/v1"


@pytest.fixture(scope="module")
def strict_url(shapes, tmp_path_factory):
    """A server whose answers after a schema end; openvino_genai lets a model that never saw JSON write white space for ever."""
    with started(shapes, tmp_path_factory.mktemp("strict"), "--api-key", KEY, "--engine", "native") as server:
        yield f"{server.address}/v1"


@pytest.fixture(scope="module")
def wanted(shapes):
    """What the command line answers."""
    model = OVInternVLChatModel(shapes)
    return {text: model.start_conversation().ask(text, images=[PICTURE], do_sample=False) for text in (QUESTION, DESCRIBE)}


def package(name: str):
    return pytest.importorskip(name, reason=f"{name} is not installed: make clients")


# ---- openai


def test_openai_in_python(base_url, wanted):
    openai = package("openai")
    client = openai.OpenAI(base_url=base_url, api_key=KEY)
    assert client.chat.completions.create(model="shapes", messages=MESSAGES).choices[0].message.content == wanted[QUESTION]
    with client.chat.completions.stream(model="shapes", messages=MESSAGES) as events:
        assert events.get_final_completion().choices[0].message.content == wanted[QUESTION]


def test_openai_parses_what_fits_a_class(strict_url):
    client = package("openai").OpenAI(base_url=strict_url, api_key=KEY)
    parsed = client.chat.completions.parse(model="shapes", messages=MESSAGES, response_format=Found)
    assert isinstance(parsed.choices[0].message.parsed, Found)


def test_openai_async_in_python(base_url, wanted):
    openai = package("openai")

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY) as client:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await client.chat.completions.create(model="shapes", messages=MESSAGES)
                    return answer.choices[0].message.content
                stream = await client.chat.completions.create(model="shapes", messages=MESSAGES, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(8)))

    assert asyncio.run(all_at_once()) == [wanted[QUESTION]] * 8


NODE = """
import OpenAI from "openai";
const [baseURL, apiKey, url, text] = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL, apiKey });
const content = [{ type: "image_url", image_url: { url } }, { type: "text", text }];
const ask = { model: "shapes", messages: [{ role: "user", content }] };
const whole = await client.chat.completions.create(ask);
let streamed = "";
const chunks = await client.chat.completions.create({ ...ask, stream: true });
for await (const chunk of chunks) streamed += chunk.choices[0]?.delta?.content ?? "";
let refused = null;
try {
  await client.chat.completions.create({ ...ask, temperature: 9 });
} catch (error) {
  refused = [error.status, error.constructor.name];
}
const names = [];
for await (const model of client.models.list()) names.push(model.id);
console.log(JSON.stringify([whole.choices[0].message.content, streamed, refused, names]));
"""


def test_openai_of_npm(base_url, wanted):
    folder = ROOT / "build" / "clients"
    try:
        subprocess.run(["node", "--version"], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("node is not installed")
    if not (folder / "node_modules" / "openai").exists():
        pytest.skip("the npm package openai is not installed: make clients")
    script = folder / "ask.mjs"
    script.write_text(NODE)
    given = json.dumps([base_url, KEY, SHAPES, QUESTION])
    done = subprocess.run(["node", str(script), given], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [wanted[QUESTION], wanted[QUESTION], [400, "BadRequestError"], ["shapes"]]


# ---- what stands over it


def test_langchain(base_url, wanted):
    langchain = package("langchain_openai")
    model = langchain.ChatOpenAI(base_url=base_url, api_key=KEY, model="shapes", temperature=0)
    answer = model.invoke(MESSAGES)
    assert answer.content == wanted[QUESTION]
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream(MESSAGES))
    assert "".join(chunk.content for chunk in chunks) == wanted[QUESTION]
    assert [each.content for each in model.batch([MESSAGES] * 3)] == [wanted[QUESTION]] * 3
    assert asyncio.run(model.ainvoke(MESSAGES)).content == wanted[QUESTION]


def test_langchain_with_structured_output(strict_url):
    model = package("langchain_openai").ChatOpenAI(base_url=strict_url, api_key=KEY, model="shapes")
    assert isinstance(model.with_structured_output(Found, method="json_schema").invoke(MESSAGES), Found)


def test_litellm(base_url, wanted):
    litellm = package("litellm")
    how = {"model": "openai/shapes", "api_base": base_url, "api_key": KEY, "messages": MESSAGES}
    assert litellm.completion(**how).choices[0].message.content == wanted[QUESTION]
    streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**how, stream=True)]
    assert "".join(streamed) == wanted[QUESTION]
    assert asyncio.run(litellm.acompletion(**how)).choices[0].message.content == wanted[QUESTION]
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**how, temperature=9)


def test_litellm_with_a_response_format(strict_url):
    how = {"model": "openai/shapes", "api_base": strict_url, "api_key": KEY, "messages": MESSAGES}
    answer = package("litellm").completion(**how, response_format=Found)
    assert Found.model_validate_json(answer.choices[0].message.content)


def agent(url: str, **how):
    ai = package("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    made = ai.Agent(OpenAIChatModel("shapes", provider=OpenAIProvider(base_url=url, api_key=KEY)), **how)
    return made, ai.BinaryContent(PICTURE.read_bytes(), media_type="image/png")


def test_pydantic_ai(base_url, wanted):
    made, picture = agent(base_url)
    answer = made.run_sync([QUESTION, picture])
    assert answer.output == wanted[QUESTION]
    assert made.run_sync("And the star?", message_history=answer.all_messages()).output


def test_pydantic_ai_with_native_output(strict_url):
    made, picture = agent(strict_url, output_type=package("pydantic_ai").NativeOutput(Found))
    assert isinstance(made.run_sync([picture, QUESTION]).output, Found)


def test_instructor(strict_url):
    instructor = package("instructor")
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=strict_url, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(client.chat.completions.create(model="shapes", messages=MESSAGES, response_model=Found), Found)
