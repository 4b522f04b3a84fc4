"""A conversation: turns that are asked, streamed, stopped and edited, and the KV cache that holds them.

Knows turns; leaves prompts, pictures and tokens to the chat core.
"""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from typing import Any

from runtime.answer.boxes import Box, find_boxes
from runtime.answer.chat_core import ChatCore, Prompt
from runtime.answer.decode import Decoding
from runtime.answer.stream import Statistics, TextStream, stream_text
from runtime.answer.turn import Question, Turn, picture_names
from runtime.errors import OptionError, PromptError
from runtime.progress import Progress

QUESTION_OPTIONS = tuple(field.name for field in fields(Question) if field.name != "text")


def question_of(text: str, options: Mapping[str, Any]) -> tuple[Question, dict[str, Any]]:
    """A Question with the options that are its fields, and the other options. Raises OptionError for typos like `image`."""
    for name in options:
        close = difflib.get_close_matches(name, QUESTION_OPTIONS, 1, 0.8)
        if close and name not in QUESTION_OPTIONS:
            raise OptionError(f"there is no option {name}: did you mean {close[0]}?")
    own = {name: value for name, value in options.items() if name in QUESTION_OPTIONS}
    return Question(text, **own), {name: value for name, value in options.items() if name not in own}


class Conversation:
    """The turns so far, and the KV cache that holds them. One answer at a time; several conversations may run at once.

    `turns` may be edited: the common prefix of the changed prompt and the cache is reused.
    """

    def __init__(self, core: ChatCore, system: str):
        self.turns: list[Turn] = []
        self.statistics: Statistics | None = None  # of the last answer
        self._core, self._system, self._cache = core, system, core.new_cache()
        weakref.finalize(self, core.give_back, self._cache).atexit = False
        self._busy = threading.Lock()
        self._cancelled = threading.Event()

    def ask(self, question: str = "", **options: Any) -> str:
        """The whole answer; arguments are those of `stream`."""
        return "".join(self.stream(question, **options))

    def stream(self, question: str = "", *, progress: Progress | None = None, **options: Any) -> Iterator[str]:
        """Yield the answer piece by piece; `statistics` is complete when it ends.

        `options` are the fields of Question, like images=["photo.jpg"], max_tiles=6 and locate=["the red car"], which needs no
        question, and those of Decoding, by transformers' names, like max_new_tokens=100 and temperature=0.7 (which turns sampling
        on). `progress` reports frames, tiles and prompt tokens. Raises subclasses of InternVLError at once for an invalid question.
        A cancelled answer stays in `turns` as far as it came. With an `answer_prefix`, the turn holds prefix and answer, and only
        the text after the prefix is yielded.
        """
        statistics, core = Statistics(), self._core
        asked, writing = question_of(question, options)
        decoding = core.decoding_of({"max_new_tokens": Decoding.max_new_tokens, **writing})
        if decoding.num_return_sequences > 1:
            raise OptionError("a turn has one answer: ask_batch gives several with num_return_sequences")
        core.rule_of(decoding)  # a bad schema raises here, before any work
        turn = core.open_turn(asked, progress)
        statistics.tiles = sum(picture.count for picture in turn.pictures)
        prompt = core.prompt_of(self._system, [*self.turns, turn])
        core.check(prompt)
        if asked.locate and not prompt.pictures:
            raise PromptError("there is no picture to locate anything in: give one with images, or a video")
        return self._pieces(turn, prompt, decoding, statistics, progress)

    @property
    def boxes(self) -> list[Box]:
        """The boxes in the last answer, in pixels of the pictures as given; `picture` counts all pictures and frames of the
        conversation. Empty without boxes or pictures, or where the size of a picture is unknown."""
        pictures = [picture for turn in self.turns for picture in turn.pictures]
        sizes = [picture.size for picture in pictures if picture.size is not None]
        if not pictures or len(sizes) < len(pictures):
            return []
        names, asked = picture_names(self.turns)
        return find_boxes(self._core.marked_answer(self.turns[-1]), sizes, question=asked, names=names)

    def cancel(self) -> None:
        """Stop the current answer; may be called from any thread."""
        self._cancelled.set()
        self._cache.cancel()

    def reset(self) -> None:
        """Remove all turns."""
        self.turns = []

    def _pieces(
        self, turn: Turn, prompt: Prompt, decoding: Decoding, statistics: Statistics, progress: Progress | None
    ) -> Generator[str, None, None]:
        core = self._core
        if not self._busy.acquire(blocking=False):
            raise PromptError("this conversation is answering already: wait for it, cancel it, or start another one")
        prefix, kept = turn.answer, core.prefix_tokens(prompt, turn)
        try:
            self._cancelled.clear()
            self.statistics = statistics
            text = stream_text(
                lambda check: core.tokens(prompt, decoding, self._cache, statistics, check),
                TextStream(
                    core.tokenizer,
                    core.conv_template,
                    decoding.stop_strings,
                    skip_special_tokens=decoding.skip_special_tokens,
                ),
                decoding,
                statistics,
                kept,
                cancelled=self._cancelled,
                cancel=self.cancel,
                progress=progress,
            )
            with closing(text) as pieces:
                for piece in pieces:
                    turn.answer += piece
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):  # the caller stops reading: keep what was yielded
            self._keep(turn, statistics, prefix, kept)
            raise
        else:
            self._keep(turn, statistics, prefix, kept)
        finally:
            self._busy.release()

    def _keep(self, turn: Turn, statistics: Statistics, prefix: str, tokens: list[int]) -> None:
        if self._cancelled.is_set():
            statistics.finish_reason = "cancelled"
        if prefix and tokens:  # with the white space after the prefix, which is not yielded
            whole = self._core.text_without_places(tokens)
            turn.answer = whole if whole.startswith(prefix) and whole.endswith(turn.answer.removeprefix(prefix)) else turn.answer
        if turn.answer != prefix:
            turn.tokens = tokens
            self.turns.append(turn)
