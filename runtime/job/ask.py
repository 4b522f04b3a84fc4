"""Rows -> answers: threads open pictures ahead, the vision part encodes them in batches, and many rows decode together.

Nearby rows about the same picture are asked together, so that it is opened, encoded and prefilled once. Knows no files of requests
or answers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding
from runtime.answer.model import OpenedModel
from runtime.answer.prompt import check_question
from runtime.answer.turn import Question
from runtime.answer.writer import Writer, Writing
from runtime.errors import InternVLError, OptionError, PromptError, not_installed
from runtime.job.answers import Answer
from runtime.job.requests import Row
from runtime.media.picture import is_data_url
from runtime.media.tiles import PictureTiles
from runtime.media.web import is_web_address

WINDOW = 128  # rows within which those about the same picture are grouped
OPENED_AHEAD = 64  # rows whose pictures are opened before they are needed
LOOKED_AT_ONCE = 16  # rows whose tiles the vision part encodes together
REFUSED = {"n": (None, 1), "stream": (None, False), "logprobs": (None, False), "top_logprobs": (None, 0)}


@dataclass(frozen=True)
class Asking:
    """The defaults of rows. Decoding is greedy, unless a row sets a temperature."""

    max_tiles: int | None = None  # of a picture, None: the model's
    max_new_tokens: int = Decoding.max_new_tokens  # if a body sets none
    schema: str | None = None  # JSON schema of the answers

    def __post_init__(self) -> None:
        """Raises OptionError."""
        if self.max_tiles is not None and self.max_tiles < 1:
            raise OptionError(f"max tiles {self.max_tiles} is not positive")
        Decoding(self.max_new_tokens)


@dataclass(frozen=True)
class Prepared:
    """A row as the model takes it."""

    row: Row
    prompt: Prompt
    decoding: Decoding
    chat: Any = None  # of a body: runtime.serve.protocol.ChatRequest
    in_thought: bool = False  # the prompt ends inside a thought

    def answer(self, writing: Writing) -> Answer:
        """The row's answer, made of the written text."""
        if writing.error is not None:
            return _failed(self.row, writing.error)
        reason, message = writing.finish_reason, {"role": "assistant", "content": writing.text}
        if self.chat is not None:
            from runtime.answer.reading import AnswerReader
            from runtime.serve.protocol import message_of

            reader = AnswerReader(calls=self.decoding.calls is not None, thinking=self.in_thought)
            reader.add(writing.text, end=True)
            message = message_of(reader)
            reason = "tool_calls" if reader.calls and reason == "stop" else reason
        return Answer(
            self.row.number,
            self.row.id,
            message["content"] or "",
            reason,
            len(writing.prompt.ids),
            len(writing.tokens),
            len(writing.prompt.pictures),
            message,
        )


def _failed(row: Row, error: Exception | str) -> Answer:
    code = type(error).__name__ if isinstance(error, Exception) else "RequestError"
    told = str(error) if isinstance(error, InternVLError | str) else f"{type(error).__name__}: {error}"
    return Answer(row.number, row.id, error=told or code, code=code)


class Reader:
    """Rows -> prompts. Several threads may use it."""

    def __init__(self, model: OpenedModel, asking: Asking):
        """Raises OptionError for a schema that cannot be followed."""
        self._model, self._asking = model, asking
        self._plain = model.decoding_of({"do_sample": False, "max_new_tokens": asking.max_new_tokens, "schema": asking.schema})
        model.rule_of(self._plain)

    def read(self, rows: Sequence[Row]) -> list[Prepared | Answer]:
        """Rows about the same pictures -> the prompt of each, or an answer with its error."""
        cut: tuple[list[PictureTiles], list[PictureTiles]] | None = None
        made: list[Prepared | Answer] = []
        for row in rows:
            try:
                if row.error:
                    made.append(_failed(row, row.error))
                elif row.body is not None:
                    made.append(self._chat(row))
                else:
                    check_question(row.question)
                    asked = Question(row.question, [_below(row.base, one) for one in row.images], max_tiles=self._asking.max_tiles)
                    asked = asked if row.video is None else replace(asked, video=_below(row.base, row.video))
                    cut = cut or asked.cut(self._model.config)
                    made.append(self._question(row, asked, cut))
            except Exception as error:  # whatever a library raises on a picture or a text, the other rows are answered
                made.append(_failed(row, error))
        return made

    def _question(self, row: Row, asked: Question, cut: tuple[list[PictureTiles], list[PictureTiles]]) -> Prepared:
        model = self._model
        prompt = model.prompt_of(model.system_message, [asked.about(*cut)])
        model.check(prompt)
        return Prepared(row, prompt, self._bounded(self._plain, prompt))

    def _chat(self, row: Row) -> Prepared:
        try:
            from pydantic import ValidationError

            from runtime.serve.protocol import ChatRequest, MediaRules
            from runtime.serve.turns import prompt_of_request
        except ModuleNotFoundError as error:
            raise not_installed(error, "serve", "; it reads chat completions") from None
        try:
            chat = ChatRequest.model_validate(row.body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise PromptError(f"body.{place}: {first['msg'].removeprefix('Value error, ')}".replace("body.: ", "body ")) from None
        for name, holds in REFUSED.items():
            if getattr(chat, name) not in holds:
                raise PromptError(f"body.{name}: a row has one answer, whole and without log probabilities: leave it out")
        model, config = self._model, self._model.config
        if self._asking.max_tiles is not None:
            config = replace(config, max_tiles=self._asking.max_tiles, min_tiles=min(config.min_tiles, self._asking.max_tiles))
        thinking = chat.thinks(default=False)
        rules = MediaRules(folder=Path(row.base), trusted=True)
        prompt, inside = prompt_of_request(chat, model, rules, thinking=thinking, config=config)
        schema, calls = chat.schema_text or self._asking.schema, chat.calls
        wishes = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        given = {name: value for name in wishes if (value := getattr(chat, name)) is not None}
        decoding = model.decoding_of(
            given
            | {
                "do_sample": bool(chat.temperature),
                "max_new_tokens": chat.most_tokens or self._asking.max_new_tokens,
                "stop_strings": tuple(chat.stops),
                "ignore_eos": chat.ignore_eos,
                "skip_special_tokens": chat.skip_special_tokens is not False,
                "json_schema": None if calls is not None else schema,
                "calls": calls,
                "thoughts": thinking and (schema is not None or (calls is not None and calls.required)),
            }
        )
        model.rule_of(decoding)
        return Prepared(row, prompt, self._bounded(decoding, prompt), chat, inside)

    def _bounded(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        """Limit the new tokens to the model's context; its check leaves room for one."""
        context = self._model.config.context_length
        room = context - len(prompt.ids) if context else decoding.max_new_tokens
        return decoding if room >= decoding.max_new_tokens else replace(decoding, max_new_tokens=max(1, room))


def _below(base: str, image: Any) -> Any:
    """Join a relative path to the folder `base`; return anything else as it is."""
    if not base or not isinstance(image, str) or is_data_url(image) or is_web_address(image):
        return image
    return os.path.join(base, image)


def _pictures_of(row: Row) -> Hashable:
    """A key that rows about the same pictures share."""
    if row.body is not None or row.error:
        return row.number
    return row.video, *(one if isinstance(one, str | bytes) else id(one) for one in row.images)


def together(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows of the short form about the same pictures, within `WINDOW` consecutive rows."""
    rows = iter(rows)
    while window := [*islice(rows, WINDOW)]:
        groups: dict[Hashable, list[Row]] = {}
        for row in window:
            groups.setdefault(_pictures_of(row), []).append(row)
        for group in groups.values():
            yield from (group[at : at + LOOKED_AT_ONCE] for at in range(0, len(group), LOOKED_AT_ONCE))


def answers(model: OpenedModel, asking: Asking, cache_bytes: int, rows: Iterable[Row]) -> Iterator[Answer]:
    """The answers to rows, in the order in which they finish. Rows are read as a stream.

    The vision part works between two steps of the writer: in parallel, on the same cores, both take longer
    (docs/speed-throughput.md).

    Raises OptionError for a schema that cannot be followed.
    """
    reader, writer = Reader(model, asking), Writer(model, cache_bytes)
    with closing(_looked_at(model, _read(reader, rows))) as ready:
        more = True
        while more or not writer.is_idle:
            while more and writer.is_hungry:
                one = next(ready, None)
                if one is None:
                    more = False
                elif isinstance(one, Answer):
                    yield one
                else:
                    writer.add(Writing(one.prompt, one.decoding, one))
            for writing in writer.step():
                yield writing.tag.answer(writing)


def _read(reader: Reader, rows: Iterable[Row]) -> Iterator[list[Prepared | Answer]]:
    """Groups of rows -> their prompts, read by several threads, in order."""
    with ThreadPoolExecutor(os.cpu_count(), "pictures") as pool:
        waiting: deque[tuple[int, Future[list[Prepared | Answer]]]] = deque()
        count = 0
        for group in together(rows):
            waiting.append((len(group), pool.submit(reader.read, group)))
            count += len(group)
            while count > OPENED_AHEAD:
                size, future = waiting.popleft()
                count -= size
                yield future.result()
        for _, future in waiting:
            yield future.result()


def _looked_at(model: OpenedModel, groups: Iterable[list[Prepared | Answer]]) -> Generator[Prepared | Answer, None, None]:
    """Prompts with the features of their pictures, encoded together for several rows."""
    some: list[Prepared | Answer] = []
    for group in groups:
        some += group
        if len(some) >= LOOKED_AT_ONCE:
            yield from _with_features(model, some)
            some = []
    yield from _with_features(model, some)


def _with_features(model: OpenedModel, some: Sequence[Prepared | Answer]) -> Iterator[Prepared | Answer]:
    prepared = [one for one in some if isinstance(one, Prepared)]
    yield from (one for one in some if isinstance(one, Answer))
    try:
        prompts = model.with_features([one.prompt for one in prepared])
        yield from (replace(one, prompt=prompt) for one, prompt in zip(prepared, prompts, strict=True))
    except InternVLError as error:
        if len(prepared) == 1:
            yield _failed(prepared[0].row, error)
        else:
            for one in prepared:
                yield from _with_features(model, [one])
