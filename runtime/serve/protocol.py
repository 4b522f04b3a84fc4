"""Request bodies, as OpenAI and LMDeploy define them: fields that are accepted, ignored or refused, and media that may be read.

Field names and ranges: OpenAI's chat completions, and InternLM/lmdeploy@v0.6.4 lmdeploy/serve/openai/protocol.py. Knows no HTTP and
no engine. Opens media under the server's rules: data URLs always, web addresses and files only if allowed.
"""

from __future__ import annotations

import json
import tempfile
import urllib.parse
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, ValidationInfo, model_validator

from runtime.answer.prompt import thinking_system
from runtime.answer.reading import AnswerReader
from runtime.answer.tools import ANY_OBJECT, Call, CallRule, check_language, with_tools
from runtime.errors import PictureError, PromptError
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import check_text
from runtime.media.picture import is_data_url, open_picture, read_data_url
from runtime.media.video import DEFAULT_SEGMENTS, read_frames
from runtime.media.web import fetch, is_web_address

REFUSED = {  # OpenAI's fields that would otherwise be silently ignored -> the reason
    "audio": "answers are text",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "logit_bias": "openvino_genai cannot change logits",
    "moderation": "there is no moderation",
    "suffix": "the models continue a text and cannot fill a gap",
    "verbosity": "the models have no such setting: ask for it in the system message",
    "web_search_options": "there is no web search",
}
IGNORED = (  # OpenAI's fields that change no answer here
    "metadata",  # nothing is stored
    "prediction",  # it would only be faster
    "prompt_cache_key",  # caches are keyed by content
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",  # there is only one
    "store",  # nothing is stored
    "user",
)
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
NO_EFFORT = ("none", "minimal")  # the others are all the same: the models either think or do not
VIDEO_SECONDS = 20.0  # limit for reading a video's frames, for clients that are not trusted
MOST_MESSAGES, MOST_PARTS, MOST_CHOICES, MOST_STOPS, MOST_TOP_LOGPROBS, MOST_TOOLS = 1000, 64, 16, 16, 20, 128
MOST_GUESSES = 16


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):  # pydantic takes true for 1, and digits for a number
        raise ValueError("expected a number")
    return value


NUMBER = BeforeValidator(_number)


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImageUrl(BaseModel):
    url: str
    detail: Literal["auto", "low", "medium", "high"] = "auto"
    max_dynamic_patch: Annotated[int, NUMBER, Field(ge=1, le=64)] | None = None


class VideoUrl(BaseModel):
    url: str
    num_segments: Annotated[int, NUMBER, Field(ge=1, le=64)] = DEFAULT_SEGMENTS


class TextPart(BaseModel):
    type: Literal["text"] = "text"
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The text of the refusal."""
        return self.refusal


class ImagePart(BaseModel):
    type: Literal["image_url"] = "image_url"
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url)]  # several clients send the URL alone


class File(BaseModel):
    file_data: str  # a data URL, or base64 alone
    filename: str | None = None


class FilePart(BaseModel):
    type: Literal["file"] = "file"
    file: File


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_url)]


Part = Annotated[TextPart | ImagePart | VideoPart | FilePart | RefusalPart, Field(discriminator="type")]
Text = TextPart | RefusalPart


class CalledFunction(BaseModel):
    name: str
    arguments: str = "{}"

    @model_validator(mode="after")
    def is_json(self) -> CalledFunction:
        """Raise ValueError unless the arguments of a call in the history are JSON."""
        try:
            json.loads(self.arguments or "{}")
        except ValueError as error:
            raise ValueError(f"the arguments of {self.name} are not JSON ({error})") from None
        return self


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def says_something(self) -> Message:
        """Only an assistant's or a tool's message may be empty; only a user's or a tool's may have pictures."""
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError(f"content: a message of role {self.role} needs one")
        if self.role not in ("user", "tool") and not all(isinstance(part, Text) for part in self.parts):
            raise ValueError(f"content: a message of role {self.role} has texts alone; pictures are a user's or a tool's")
        return self

    @property
    def parts(self) -> list[Any]:
        """The parts of the content; a plain text is one part."""
        return [TextPart(text=self.content)] if isinstance(self.content, str) else list(self.content or [])

    @property
    def text(self) -> str:
        """All text of the message."""
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))


class Function(BaseModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer as text; None if the answer is free."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


def _refuse(value: Any, info: ValidationInfo) -> Any:
    if value:
        raise ValueError(f"not supported here: {REFUSED[str(info.field_name)]}")
    return value


Nothing = Annotated[Any, AfterValidator(_refuse)]  # a field of REFUSED


def message_of(reader: AnswerReader) -> dict[str, Any]:
    """An answer in OpenAI's form; `content` is None if the answer is only calls."""
    made: dict[str, Any] = {"role": "assistant", "content": None if reader.calls and not reader.content else reader.content}
    if reader.thought:
        made["reasoning_content"] = reader.thought
    if reader.calls:
        made["tool_calls"] = [told_call(call) for call in reader.calls]
    return made


def told_call(call: Call) -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {"id": new_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def new_call_id() -> str:
    """A new id of a call, to which the client's tool result refers."""
    return f"call_{uuid.uuid4().hex[:24]}"


def check_texts(body: Any) -> Any:
    """Raise ValueError for a lone surrogate anywhere in a body: even in a key it would break the error message."""
    level = [body]
    while level:
        for text in level:
            if isinstance(text, str) and not text.isascii():
                try:
                    check_text(text)
                except PromptError as error:
                    raise ValueError(str(error)) from None
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [one for each in inner for one in ([*each, *each.values()] if isinstance(each, dict) else each)]
    return body


class Request(BaseModel):
    """The check of every request body."""

    @model_validator(mode="before")
    @classmethod
    def whole(cls, body: Any) -> Any:
        """Check that every text is valid Unicode."""
        return check_texts(body)


class Writing(Request):
    """Decoding options of a request; None leaves the choice to generation_config.json."""

    model: str = ""
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, NUMBER, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Annotated[int, NUMBER, Field(ge=1)] | None = None
    temperature: Annotated[float, NUMBER, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, NUMBER, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, NUMBER, Field(ge=0)] | None = None
    min_p: Annotated[float, NUMBER, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, NUMBER, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, NUMBER, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, NUMBER, Field(ge=-2, le=2)] | None = 0.0
    seed: Annotated[int, NUMBER, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool | None = True  # in the text of the answer
    prompt_lookup_num_tokens: Annotated[int, NUMBER, Field(ge=0, le=MOST_GUESSES)] | None = None
    logit_bias: Nothing = None

    @property
    def count(self) -> int:
        """The number of answers per prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The stop strings; empty ones are dropped."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [one for one in given if one]


class ChatRequest(Writing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, NUMBER, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[int, NUMBER, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    modalities: list[Literal["text"]] | None = None
    continue_final_message: StrictBool = False  # the last message is the assistant's; the answer continues its text
    audio: Nothing = None
    function_call: Nothing = None
    functions: Nothing = None
    moderation: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None

    @model_validator(mode="after")
    def belongs_together(self) -> ChatRequest:
        """Rules between fields."""
        names = [tool.function.name for tool in self.tools or []]
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        if len({*names}) < len(names):
            raise ValueError("tools: two functions have the same name")
        if chosen is not None and chosen not in names:
            raise ValueError(f"tool_choice: the function {chosen!r} is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required, and there are no tools")
        if self.calls is not None and self.schema_text is not None:
            raise ValueError("response_format: not supported together with tools; set tool_choice to none, or leave one out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs too")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens; max_completion_tokens, the newer name, wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer as text; None if the answer is free."""
        return None if self.response_format is None else self.response_format.schema_text

    @property
    def calls(self) -> CallRule | None:
        """The functions that the answer may call; None if it may call none."""
        if not self.tools or self.tool_choice == "none":
            return None
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        functions = tuple(
            (tool.function.name, ANY_OBJECT if tool.function.parameters is None else json.dumps(tool.function.parameters))
            for tool in self.tools
            if chosen in (None, tool.function.name)
        )
        return CallRule(
            functions, self.tool_choice == "required" or chosen is not None, self.parallel_tool_calls is not False and not chosen
        )

    def thinks(self, *, default: bool) -> bool:
        """Whether the answer begins with thoughts; `default` if the request has no reasoning_effort."""
        return default if self.reasoning_effort is None else self.reasoning_effort not in NO_EFFORT

    def system(self, given: str | None, own: str, config: InternVLConfig, *, thinking: bool) -> str:
        """The system message: `given` by the messages or the model's `own`, with thinking mode and tools.

        Raises OptionError for a model that does not think, or was not trained to call tools.
        """
        text = thinking_system(config, given) if thinking else own if given is None else given
        if not self.tools or self.tool_choice == "none":
            return text
        check_language(config)
        return with_tools(text, [tool.function.model_dump(exclude_none=True) for tool in self.tools])


class CompletionRequest(Writing):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, NUMBER, Field(ge=0, le=5)] | None = None
    echo: StrictBool = False
    suffix: Nothing = None


@dataclass(frozen=True)
class MediaRules:
    """The media that the server may read: those in the request, and those that the server's options allow.

    `trusted` is for users on their own machine: everything may be read; relative paths are below `folder`.
    """

    domains: frozenset[str] = frozenset()
    folder: Path | None = None
    trusted: bool = False

    def picture(self, url: str) -> Image.Image:
        """Open the picture of a data URL, a web address or a file. Raises PictureError."""
        if is_data_url(url) or is_web_address(url):
            return open_picture(url, allow_urls=self.trusted or self.domains)
        return open_picture(self.file(url))

    def frames(self, url: str, count: int) -> list[Image.Image]:
        """Frames of the video of a data URL, a web address or a file. Raises PictureError, VideoError."""
        if is_web_address(url):
            data = fetch(url, None if self.trusted else self.domains)
        elif is_data_url(url):
            data = read_data_url(url)
        else:
            return self._read(self.file(url), count)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "video"
            file.write_bytes(data)
            return self._read(file, count)

    def _read(self, file: Path, count: int) -> list[Image.Image]:
        return read_frames(file, count, seconds=None if self.trusted else VIDEO_SECONDS)

    def file(self, url: str) -> Path:
        """The file of a path or a file URL, if it lies in the allowed folder. Raises PictureError."""
        parts = urllib.parse.urlsplit(url) if url.startswith("file:") else None
        path = Path(urllib.parse.unquote(parts.path) if parts else url)
        try:
            if self.trusted:
                return path if self.folder is None else self.folder / path
            if self.folder is not None and path.resolve().is_relative_to(self.folder.resolve()):
                return path
        except (OSError, ValueError, RuntimeError):  # not a valid file name
            pass
        raise PictureError("this is no data URL and no file that may be read here: send data:image/png;base64,...")
