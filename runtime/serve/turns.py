"""Messages of a client -> the system message and the turns of a conversation, with pictures opened and in their places.

Knows the forms of messages; the chat core renders the prompt. Tile limits of `detail`: InternLM/lmdeploy@v0.6.4
lmdeploy/vl/utils.py. Thoughts of the history: the chat template in tokenizer_config.json of Qwen/Qwen3-8B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from runtime.answer.chat_core import ChatCore, Prompt
from runtime.answer.prompt import IMAGE_MARK, THINKERS, frame_marks, picture_marks, typed
from runtime.answer.reading import THOUGHT_END, THOUGHT_START
from runtime.answer.tools import Call, check_language, written_answer, written_result
from runtime.answer.turn import Turn
from runtime.errors import PromptError
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import Typed
from runtime.media.document import open_pictures
from runtime.media.picture import is_data_url
from runtime.media.tiles import PictureTiles, Tiling
from runtime.serve.protocol import ChatRequest, FilePart, ImagePart, MediaRules, Message, Text, VideoPart

DETAILS = {"low": 6, "medium": 12, "high": 24}  # tiles per picture, LMDeploy's
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def prompt_of_request(
    ask: ChatRequest, model: ChatCore, rules: MediaRules, *, thinking: bool, config: InternVLConfig | None = None
) -> tuple[Prompt, bool]:
    """The prompt of a request, with its pictures opened, and whether it ends inside a thought.

    `config` overrides the model's for cutting tiles. Raises InternVLError kinds.
    """
    given, turns = turns_of(ask.messages, config or model.config, rules, continue_final=ask.continue_final_message)
    prompt = model.prompt_of(ask.system(given, model.system_message, model.config, thinking=thinking), turns)
    model.check(prompt)
    prefix = turns[-1].answer
    return prompt, THOUGHT_START in prefix and THOUGHT_END not in prefix


@dataclass(frozen=True)
class ResultPart:
    """The result of a function: a message of role tool."""

    text: str


def turns_of(
    messages: list[Message], config: InternVLConfig, rules: MediaRules, *, continue_final: bool = False
) -> tuple[str | None, list[Turn]]:
    """Messages -> the system message, if there is one, and the turns; the last turn has no answer, or only its prefix.

    Adjacent messages of one role are joined, system messages from any position; empty assistant messages are left out. Pictures
    stay where they were sent, or go to the `<image>` marks of their turn's texts. Raises PromptError, PictureError, VideoError,
    and OptionError if a model was not trained to call tools.
    """
    told = [message.text for message in messages if message.role in ("system", "developer")]
    spoken = [message for message in messages if message.role not in ("system", "developer")]
    last = max((n for n, message in enumerate(spoken) if message.role == "user"), default=-1)
    asked: list[list[Any]] = []  # parts of each turn's question; `said` has the texts of its answer
    said: list[list[str]] = []
    called = False
    for number, message in enumerate(spoken):
        if message.role == "assistant":
            kept = number > last and config.language_architecture in THINKERS  # thoughts of the current turn
            final = continue_final and number == len(spoken) - 1
            words = message.text if final else _answer(message, config, thoughts=kept)
            called = called or bool(message.tool_calls)
            if final and message.tool_calls:
                raise PromptError("continue_final_message: the last message has tool calls, which cannot be continued")
            if words:
                asked, said = (asked, said) if asked else ([[]], [[]])  # an assistant's message comes first
                said[-1].append(words)
            continue
        if message.role == "tool" and not called:
            raise PromptError("a message of role tool answers a call: an assistant's message with tool_calls comes before it")
        if not asked or said[-1]:
            asked, said = [*asked, []], [*said, []]
        if message.role == "tool":  # its pictures come after its text
            asked[-1] += [ResultPart(message.text), *(part for part in message.parts if not isinstance(part, Text))]
        else:
            asked[-1] += message.parts
    if not asked:
        asked, said = [[]], [[]]
    if bool(said[-1]) != continue_final:
        end = "the assistant's, and has text" if continue_final else "the user's or a tool's"
        raise PromptError(
            f"the last message must be {end} (continue_final_message is {str(continue_final).lower()}); "
            f"the roles are {', '.join(message.role for message in messages[-6:])}"
        )
    turns = [_turn(parts, "\n".join(words), config, rules) for parts, words in zip(asked, said, strict=True)]
    return "\n".join(told) if told else None, turns


def _answer(message: Message, config: InternVLConfig, *, thoughts: bool) -> str:
    """An assistant's text with its calls; without `thoughts`, leading thoughts are dropped, as Qwen3's template does."""
    calls = [Call(call.function.name, call.function.arguments or "{}") for call in message.tool_calls or []]
    if calls:
        check_language(config)
    text, thought = message.text, message.reasoning_content or ""
    if found := THOUGHT.match(text):
        text, thought = text[found.end() :], thought or found[1]
    if thoughts and thought.strip():
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    return written_answer(text, calls)


def _turn(parts: Sequence[Any], answer: str, config: InternVLConfig, rules: MediaRules) -> Turn:
    """One turn of its parts, each on its own lines: texts, pictures, the frames of a video, results of functions.

    Marks in the texts, if there are any, place the pictures. Raises PromptError if there are more or fewer marks than pictures.
    """
    opened = [(part, _opened(part, Tiling.of(config), rules)) for part in parts]
    shown = [picture for part, own in opened if _is_picture(part) for picture in own]
    marks = sum(part.text.count(IMAGE_MARK) for part in parts if isinstance(part, Text))
    marked = bool(marks and shown)
    if marked and marks != len(shown):
        raise PromptError(
            f"the question has {marks} {IMAGE_MARK} marks for {len(shown)} pictures: write one mark a picture, or none"
        )
    lines: list[list[str]] = []
    pictures: list[PictureTiles] = []
    waiting, numbered = iter(shown), 0
    for together, run in groupby(opened, key=lambda one: _is_picture(one[0])):
        if together and not marked:  # adjacent pictures get numbers
            own = [picture for _, each in run for picture in each]
            lines.append(typed(picture_marks(len(own), numbered).rstrip("\n"), marks=True))
            pictures += own
            numbered += len(own)
            continue
        for part, own in run:
            if isinstance(part, VideoPart):
                lines.append(typed(frame_marks(len(own)).rstrip("\n"), marks=True))
                pictures += own
            elif isinstance(part, ResultPart):
                lines.append(written_result(part.text))
            elif not together and (part.text or len(parts) == 1):
                lines.append(typed(part.text, marks=marked))
                pictures += islice(waiting, part.text.count(IMAGE_MARK) if marked else 0)
    return Turn.of([piece for line in lines for piece in (Typed("\n"), *line)][1:], answer, pictures)


def _is_picture(part: Any) -> bool:
    return isinstance(part, ImagePart | FilePart)


def _opened(part: Any, tiling: Tiling, rules: MediaRules) -> list[PictureTiles]:
    """The pictures of a part: one, the pages of a document, the frames of a video, or none. Raises PictureError, VideoError."""
    if isinstance(part, ImagePart):
        most = part.image_url.max_dynamic_patch or DETAILS.get(part.image_url.detail)
        return [PictureTiles.of_picture(rules.picture(part.image_url.url), tiling.at_most(most))]
    if isinstance(part, FilePart):
        data = part.file.file_data
        pages = open_pictures(data if is_data_url(data) else f"data:application/pdf;base64,{data}", tiling, allow_urls=False)
        return [PictureTiles.of_picture(page, tiling) for page in pages]
    if isinstance(part, VideoPart):
        frames = rules.frames(part.video_url.url, part.video_url.num_segments)
        return [PictureTiles.of_picture(frame, tiling.at_most(1)) for frame in frames]
    return []
