"""Batches of prompts from Python, without a server: `pipeline(folder_or_id)`, called like LMDeploy's pipeline.

Names, prompts and answers: InternLM/lmdeploy@v0.6.4 lmdeploy/api.py, lmdeploy/messages.py. This file reads prompts and collects
answers; the engine generates them. Knows no HTTP.
"""

from __future__ import annotations

import base64
import io
import queue
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding
from runtime.answer.model import OpenedModel
from runtime.answer.prompt import IMAGE_MARK
from runtime.answer.stream import WAKE_SECONDS
from runtime.answer.turn import Question, Turn
from runtime.errors import ModelFolderError, OptionError, PromptError
from runtime.folder.files import HUB_ID, user_cache
from runtime.folder.tokenizer import check_text
from runtime.serve.engine import Engine, GenaiEngine, NativeEngine, Piece
from runtime.serve.protocol import MediaRules, Message, ResponseFormat, check_texts
from runtime.serve.turns import turns_of

IMAGE_TOKEN = "<IMAGE_TOKEN>"  # LMDeploy's mark of a picture
AT_ONCE = 32  # prompts in the engine; the pictures of later ones are not opened yet
WEIGHT_FORMAT = "int4"


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated. Names and defaults are LMDeploy's; do_sample off or top_k 1 decodes greedily."""

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    random_seed: int | None = None  # answer n of a list is sampled with this seed plus n
    stop_words: Sequence[str] | None = None  # answers are cut before the first of them
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # in the text of the answer
    logprobs: bool = False  # of the tokens of the answer
    response_format: dict[str, Any] | None = None  # OpenAI's, of type json_schema or json_object

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "positive"),
            "temperature": (0 <= self.temperature <= 2, "between 0 and 2"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or positive"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
        }
        for name, (holds, what) in bounds.items():
            if not holds:
                raise OptionError(f"{name} {getattr(self, name)} is not {what}")
        try:
            self._schema()
        except ValidationError as error:
            raise OptionError(f"response_format {_first(error)}") from None

    def decoding(self, room: int | None, seed: int) -> Decoding:
        """The engine's form, for a prompt that leaves `room` tokens of the context (None: no limit)."""
        drawn = self.do_sample and self.top_k != 1 and self.temperature > 0
        return Decoding(
            min(self.max_new_tokens, room) if room else self.max_new_tokens,
            temperature=self.temperature if drawn else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop_strings=tuple(stop for stop in self.stop_words or () if stop),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
            json_schema=self._schema(),
        )

    def _schema(self) -> str | None:
        return ResponseFormat.model_validate(self.response_format).schema_text if self.response_format else None


@dataclass
class Response:
    """One answer, or the next piece of it."""

    text: str = ""
    generate_token_len: int = 0  # so far
    input_token_len: int = 0
    finish_reason: str | None = None  # stop or length
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None  # of each token, if requested
    index: int = 0  # of the prompt in its list


@dataclass
class Session:
    """A conversation: its turns and the last answer."""

    turns: list[Turn] = field(default_factory=list)
    response: Response = field(default_factory=Response)


@dataclass
class _Asked:
    """A prompt in the engine's form, and its turn."""

    prompt: Prompt
    turn: Turn


class Pipeline:
    """Answers prompts, alone or in lists; made by `pipeline`."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(self, prompts: Any, gen_config: GenerationConfig | None = None) -> Any:
        """Prompts -> a Response, or a list of them for a list.

        A prompt is a text; a pair of a text and a picture or a list of pictures, as runtime.media.picture.open_picture takes them;
        or a list of OpenAI's messages. Pictures stand at the `<image>` marks (or LMDeploy's) of the text, or before it.
        Raises InternVLError kinds.
        """
        one = _is_one(prompts)
        batch = [prompts] if one else list(prompts)
        answers = [Response(index=number) for number in range(len(batch))]
        for new in self.stream_infer(batch, gen_config):
            _add(answers[new.index], new)
        return answers[0] if one else answers

    batch_infer = __call__

    def stream_infer(self, prompts: Any, gen_config: GenerationConfig | None = None) -> Iterator[Response]:
        """Yield pieces of answers as they are generated; `index` is the number of the prompt.

        Closing the generator cancels unfinished answers.
        """
        batch = [prompts] if _is_one(prompts) else list(prompts)
        return self._stream([partial(self._read, prompt) for prompt in batch], gen_config)

    def chat(self, prompt: Any, session: Session | None = None, gen_config: GenerationConfig | None = None) -> Session:
        """Continue a conversation, or begin one: `session.response.text` is the answer. `prompt` is a text or a pair."""
        if not _is_one(prompt) or isinstance(prompt, list):
            raise PromptError("chat takes one text, or a text and its pictures; messages and lists go to pipe(...)")
        past = [] if session is None else session.turns
        asked, response = self._read(prompt, past), Response()
        for new in self._stream([lambda: asked], gen_config):
            _add(response, new)
        turn = asked.turn
        turn.answer, turn.tokens = response.text, response.token_ids
        return Session([*past, turn], response)

    def close(self) -> None:
        """End the engine's threads."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, prompt: Any, past: Sequence[Turn] = ()) -> _Asked:
        model, system, turns = self.engine.model, None, [*past]
        if isinstance(prompt, list):
            system, turns = turns_of(_messages(prompt), model.config, MediaRules(trusted=True))
        else:
            text, images = (prompt, []) if isinstance(prompt, str) else prompt
            check_text(text)
            shown = not isinstance(images, list | tuple) or len(images) > 0  # without pictures the mark is text
            turns.append(Question(text.replace(IMAGE_TOKEN, IMAGE_MARK) if shown else text, images=images).open(model.config))
        made = model.prompt_of(model.system_message if system is None else system, turns)
        model.check(made)
        return _Asked(model.route(made), turns[-1])

    def _stream(self, prompts: list[Callable[[], _Asked]], gen_config: GenerationConfig | None) -> Iterator[Response]:
        config, context = gen_config or GenerationConfig(), self.engine.model.config.context_length
        told: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        waiting = iter(enumerate(prompts))
        running: dict[int, Callable[[], None]] = {}
        lengths, counts = [0] * len(prompts), [0] * len(prompts)
        seed = secrets.randbits(32) if config.random_seed is None else config.random_seed
        try:
            while True:
                while len(running) < AT_ONCE and (following := next(waiting, None)) is not None:
                    number, read = following
                    asked = read()
                    lengths[number] = len(asked.prompt.ids)
                    decoding = config.decoding(context and context - lengths[number], seed + number)
                    running[number] = self.engine.start(asked.prompt, decoding, _teller(told, number))
                if not running:
                    return
                with suppress(queue.Empty):
                    number, piece = told.get(timeout=WAKE_SECONDS)
                    if piece.error is not None:
                        raise piece.error
                    counts[number] += len(piece.tokens)
                    if piece.finish_reason is not None:
                        del running[number]
                    logprobs = [{token.id: token.logprob} for token in piece.tokens] if config.logprobs else None
                    ids = [token.id for token in piece.tokens]
                    yield Response(piece.text, counts[number], lengths[number], piece.finish_reason, ids, logprobs, number)
        finally:
            for cancel in running.values():
                cancel()


def _teller(told: queue.SimpleQueue[tuple[int, Piece]], number: int) -> Callable[[Piece], None]:
    return lambda piece: told.put((number, piece))


def pipeline(model_path: str | Path, *, engine: str = "genai", cache_size: int = 2, **placed: Any) -> Pipeline:
    """A pipeline over a model folder, or over a checkpoint's hub id, whose first use converts it to int4 in the user's cache.

    `engine` genai answers prompts in a batch with a KV cache of `cache_size` GB, native one after the other. `placed` are arguments
    of OpenedModel. Raises InternVLError kinds.
    """
    if engine not in ("genai", "native"):
        raise OptionError(f"engine {engine!r} is not known; known are genai and native")
    model = OpenedModel(_folder_of(str(model_path)), language=engine == "native", **placed)
    return Pipeline(NativeEngine(model) if engine == "native" else GenaiEngine(model, cache_size))


def _folder_of(source: str) -> Path:
    """The model folder; a hub id is converted by `python -m convert` in a process of its own, which frees its memory."""
    if Path(source).exists() or not HUB_ID.fullmatch(source):
        return Path(source)
    folder = user_cache() / f"{source.replace('/', '--')}-{WEIGHT_FORMAT}"
    if folder.exists():
        return folder
    if find_spec("convert") is None or find_spec("optimum") is None:
        raise OptionError(f"{source} must be converted first, and  pip install 'internvl-openvino[convert]'  is what is missing")
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "convert", source, str(folder), "--weight-format", WEIGHT_FORMAT])
    if done.returncode:
        raise ModelFolderError(f"{source} was not converted: the lines above say why")
    return folder


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text, a pair or messages), not a list of prompts."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, tuple):
        if len(prompts) == 2 and isinstance(prompts[0], str):
            return True
        raise PromptError("a tuple is one prompt: (text, picture) or (text, [pictures])")
    if not isinstance(prompts, list):
        raise PromptError(f"a {type(prompts).__name__} is no prompt: give a text, (text, picture), messages or a list of them")
    return bool(prompts) and all(isinstance(each, dict) for each in prompts)


def _messages(messages: list[dict[str, Any]]) -> list[Message]:
    """OpenAI's messages, with LMDeploy's `image_data` parts, which hold PIL pictures. Raises PromptError."""

    def plain(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if part.get("type") == "text":
            return part | {"text": str(part.get("text", "")).replace(IMAGE_TOKEN, IMAGE_MARK)}
        if part.get("type") != "image_data":
            return part
        rest = dict(part.get("image_data") or {})
        picture, file = rest.pop("data", None), io.BytesIO()
        if not isinstance(picture, Image.Image):
            raise PromptError(f"image_data.data is a {type(picture).__name__}, not a PIL picture")
        picture.save(file, "PNG")
        return {
            "type": "image_url",
            "image_url": rest | {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
        }

    try:
        check_texts(messages)
    except ValueError as error:
        raise PromptError(str(error)) from None
    parts = [message.get("content") for message in messages]
    made = [[plain(part) for part in each] if isinstance(each, list) else each for each in parts]
    try:
        return TypeAdapter(list[Message]).validate_python(
            [message | {"content": content} for message, content in zip(messages, made, strict=True)]
        )
    except ValidationError as error:
        raise PromptError(f"messages {_first(error)}") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].removeprefix('Value error, ')}"


def _add(whole: Response, new: Response) -> None:
    whole.text += new.text
    whole.token_ids += new.token_ids
    if new.logprobs is not None:
        whole.logprobs = [*(whole.logprobs or []), *new.logprobs]
    whole.generate_token_len, whole.input_token_len = new.generate_token_len, new.input_token_len
    whole.finish_reason = new.finish_reason
