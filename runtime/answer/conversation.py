"""A conversation: turns that are asked, streamed, stopped and edited, and the KV cache that holds them.

Knows turns; prompts, pictures and tokens are the chat core's, which it is started from.
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
    """A question with those of the options that are its own, and the others. Raises OptionError for `image`, a likely slip."""
    for name in options:
        close = difflib.get_close_matches(name, QUESTION_OPTIONS, 1, 0.8)
        if close and name not in QUESTION_OPTIONS:
            raise OptionError(f"{name} is not known here: is {close[0]} meant?")
    own = {name: value for name, value in options.items() if name in QUESTION_OPTIONS}
    return Question(text, **own), {name: value for name, value in options.items() if name not in own}


class Conversation:
    """The turns so far, and the KV cache that holds them. One answer at a time; several conversations may run at once.

    `turns` may be edited: what the changed prompt still has in common with the cache is kept.
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
        """Yield the answer piece by piece; `statistics` has what it took once it ends.

        `options` are the fields of Question, like images=["photo.jpg"], max_tiles=6 and locate=["the red car"], which needs no
        question, and those of Decoding, by transformers' names, like max_new_tokens=100 and temperature=0.7 (which draws).
        `progress` hears of frames, tiles and prompt tokens. Raises InternVLError kinds at once for what cannot be asked. A
        cancelled answer stays in `turns` as far as it came. Of an `answer_prefix` the turn holds all, and what is yielded is what
        the model wrote after it.
        """
        statistics, core = Statistics(), self._core
        asked, writing = question_of(question, options)
        decoding = core.decoding_of({"max_new_tokens": Decoding.max_new_tokens, **writing})
        if decoding.num_return_sequences > 1:
            raise OptionError("a turn has one answer: ask_batch gives several with num_return_sequences")
        core.rule_of(decoding)  # what is wrong with a schema is told at once
        turn = core.open_turn(asked, progress)
        statistics.tiles = sum(picture.count for picture in turn.pictures)
        prompt = core.prompt_of(self._system, [*self.turns, turn])
        core.check(prompt)
        if asked.locate and not prompt.pictures:
            raise PromptError("there is no picture to locate anything in: give one with images, or a video")
        return self._pieces(turn, prompt, decoding, statistics, progress)

    @property
    def boxes(self) -> list[Box]:
        """Those of the last answer, in pixels of the pictures as they were given; `picture` counts all of the conversation, frames
        too. None where the answer has none, or where there is no picture."""
        pictures = [picture for turn in self.turns for picture in turn.pictures]
        sizes = [picture.size for picture in pictures if picture.size is not None]
        if not pictures or len(sizes) < len(pictures):
            return []
        names, asked = picture_names(self.turns)
        return find_boxes(self._core.marked_answer(self.turns[-1]), sizes, question=asked, names=names)

    def cancel(self) -> None:
        """Stop the answer that is being written; may be called from any thread."""
        self._cancelled.set()
        self._cache.cancel()

    def reset(self) -> None:
        """Forget all turns."""
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
        except (GeneratorExit, KeyboardInterrupt):  # nobody reads on: what was said stays said
            self._keep(turn, statistics, prefix, kept)
            raise
        else:
            self._keep(turn, statistics, prefix, kept)
        finally:
            self._busy.release()

    def _keep(self, turn: Turn, statistics: Statistics, prefix: str, tokens: list[int]) -> None:
        if self._cancelled.is_set():
            statistics.finish_reason = "cancelled"
        if prefix and tokens:  # with the white space between the prefix and what follows, which is not shown
            whole = self._core.text_without_places(tokens)
            turn.answer = whole if whole.startswith(prefix) and whole.endswith(turn.answer.removeprefix(prefix)) else turn.answer
        if turn.answer != prefix:
            turn.tokens = tokens
            self.turns.append(turn)
