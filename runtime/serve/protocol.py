"""What clients send, as OpenAI and LMDeploy define it, and what is made of it: the turns of a dialogue and how to write.

Field names and ranges: OpenAI's chat completions, and InternLM/lmdeploy@v0.6.4 lmdeploy/serve/openai/protocol.py. Knows no HTTP and
no engine. Media are opened here, under the server's rules: data URLs always, web addresses and files only where they were allowed.
"""

from __future__ import annotations

import json
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, Field

from runtime.answer.prompt import IMAGE_MARK, frame_marks, picture_marks
from runtime.answer.turn import Turn
from runtime.errors import PictureError, PromptError
from runtime.folder.config import InternVLConfig
from runtime.media.document import open_pictures
from runtime.media.picture import fetch, is_web_address, open_picture, read_data_url
from runtime.media.tiles import PictureTiles, Tiling
from runtime.media.video import DEFAULT_SEGMENTS, read_frames

DETAILS = {"low": 6, "medium": 12, "high": 24}  # tiles a picture; LMDeploy's
MOST_MESSAGES, MOST_PARTS, MOST_CHOICES, MOST_STOPS, MOST_TOP_LOGPROBS = 1000, 64, 16, 16, 20


class ImageUrl(BaseModel):
    url: str
    detail: Literal["auto", "low", "medium", "high"] = "auto"
    max_dynamic_patch: Annotated[int, Field(ge=1, le=64)] | None = None


class VideoUrl(BaseModel):
    url: str
    num_segments: Annotated[int, Field(ge=1, le=64)] = DEFAULT_SEGMENTS


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class File(BaseModel):
    file_data: str  # a data URL, or base64 alone
    filename: str = ""


class FilePart(BaseModel):
    type: Literal["file"]
    file: File


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)]

    @property
    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))


class JsonSchema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """What the answer must fit, as JSON; None where it is free."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class StreamOptions(BaseModel):
    include_usage: bool = False


def _refuse(value: Any) -> Any:
    if value:
        raise ValueError("not supported here: leave it out")
    return value


Nothing = Annotated[Any, AfterValidator(_refuse)]  # of OpenAI's; what would be ignored in silence is refused


class Writing(BaseModel):
    """How to write: None leaves a choice to generation_config.json."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    logit_bias: Nothing = None

    @property
    def stops(self) -> list[str]:
        """The strings at which an answer is cut off; empty ones stop nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [one for one in given if one]


class ChatRequest(Writing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Nothing = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool = False  # the last message is of the assistant, and its text what the answer begins with

    @property
    def most_tokens(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Writing):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    suffix: Nothing = None


@dataclass(frozen=True)
class MediaRules:
    """What a client may have the server read: media it sends itself, and what the one who starts the server allows.

    `trusted` is who runs the model on his own machine: everything may be read.
    """

    domains: frozenset[str] = frozenset()
    folder: Path | None = None
    trusted: bool = False

    def picture(self, url: str) -> Image.Image:
        """Open the picture of a data URL, a web address or a file. Raises PictureError."""
        if url.startswith("data:") or is_web_address(url):
            return open_picture(url, allow_urls=self.trusted or self.domains)
        return open_picture(self.file(url))

    def frames(self, url: str, count: int) -> list[Image.Image]:
        """Frames of the video of a data URL, a web address or a file. Raises PictureError, VideoError."""
        if is_web_address(url):
            data = fetch(url, None if self.trusted else self.domains)
        elif url.startswith("data:"):
            data = read_data_url(url)
        else:
            return read_frames(self.file(url), count)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "video"
            file.write_bytes(data)
            return read_frames(file, count)

    def file(self, url: str) -> Path:
        """The file of a path or a file URL, if it lies in the folder that may be read. Raises PictureError."""
        parts = urllib.parse.urlsplit(url) if url.startswith("file:") else None
        path = Path(urllib.parse.unquote(parts.path) if parts else url)
        try:
            if self.trusted:
                return path
            if self.folder is not None and path.resolve().is_relative_to(self.folder.resolve()):
                return path
        except (OSError, ValueError, RuntimeError):  # no name of a file
            pass
        raise PictureError("this is no data URL and no file that may be read here: send data:image/png;base64,...")


def turns_of(
    messages: list[Message], config: InternVLConfig, rules: MediaRules, *, continue_final: bool = False
) -> tuple[str | None, list[Turn]]:
    """Messages -> the system message, if there is one, and the turns; the last one is without an answer, or has the prefix of it.

    Pictures stand at the `<image>` marks of their message's text, or before it. Raises PromptError, PictureError, VideoError.
    """
    system = None
    while messages and messages[0].role in ("system", "developer"):
        system = messages[0].text if system is None else f"{system}\n{messages[0].text}"
        messages = messages[1:]
    roles = [message.role for message in messages]
    last = ["user", "assistant"] if continue_final else ["user"]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)] or roles[-len(last) :] != last:
        raise PromptError(
            f"the roles are {', '.join(roles[:6]) or 'none'}: after the system message, user and assistant take turns, "
            f"the user first and the {last[-1]} last" + (" (continue_final_message)" if continue_final else "")
        )
    turns = [_turn(message, config, rules) for message in messages[::2]]
    for turn, answer in zip(turns, messages[1::2], strict=False):
        turn.answer = answer.text
    return system, turns


def _turn(message: Message, config: InternVLConfig, rules: MediaRules) -> Turn:
    tiling, lines, frames = Tiling.of(config), message.text, 0
    pictures: list[PictureTiles] = []
    for part in [] if isinstance(message.content, str) else message.content:
        if isinstance(part, ImagePart):
            one = part.image_url
            most = one.max_dynamic_patch or DETAILS.get(one.detail)
            pictures.append(PictureTiles.of_picture(rules.picture(one.url), tiling.at_most(most)))
        elif isinstance(part, FilePart):
            data = part.file.file_data
            url = data if data[:5].lower() == "data:" else f"data:application/pdf;base64,{data}"
            pictures += [PictureTiles.of_picture(page, tiling) for page in open_pictures(url, tiling, allow_urls=False)]
        elif isinstance(part, VideoPart):
            read = rules.frames(part.video_url.url, part.video_url.num_segments)
            pictures = [*(PictureTiles.of_picture(frame, tiling.at_most(1)) for frame in read), *pictures]
            frames += len(read)
    if len(pictures) > frames and IMAGE_MARK not in lines:
        lines = picture_marks(len(pictures) - frames) + lines
    return Turn(frame_marks(frames) + lines, "", pictures)
