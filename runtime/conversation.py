"""A conversation: turns that are asked, streamed, stopped and edited, and the KV cache that holds them.

Knows turns; prompts, pictures and tokens are the chat model's, which it is started from.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteriaList

from runtime.errors import PromptError
from runtime.image import PictureTiles
from runtime.picture import Source
from runtime.stream import Progress, Statistics, stream_text
from runtime.video import DEFAULT_SEGMENTS, Bound

if TYPE_CHECKING:
    from runtime.chat import ChatModel

DEFAULT_NEW_TOKENS = 512


@dataclass
class Exchange:
    """One turn: the question with its picture marks, the answer, and the pictures of the marks in order.

    `tokens` are those that the model wrote as the answer; where the answer is edited they count no more.
    """

    question: str
    answer: str
    pictures: list[PictureTiles]
    tokens: list[int] = field(default_factory=list)


class Conversation:
    """The turns so far, and the KV cache that holds them. One answer at a time; several conversations may run at once.

    `turns` may be edited: what the changed prompt still has in common with the cache is kept.
    """

    def __init__(self, model: ChatModel, system: str):
        self.turns: list[Exchange] = []
        self.statistics: Statistics | None = None  # of the last answer
        self._model, self._system, self._cache = model, system, model.new_cache()
        weakref.finalize(self, model.give_back, self._cache).atexit = False
        self._tokenizer = model.tokenizer  # read from its file now, not when somebody waits for an answer
        self._busy = threading.Lock()
        self._cancelled = threading.Event()

    def ask(self, question: str, **options: Any) -> str:
        """The whole answer; arguments are those of `stream`."""
        return "".join(self.stream(question, **options))

    def stream(
        self,
        question: str,
        *,
        images: Source | Sequence[Source] = (),
        video: str | Path | None = None,
        max_tiles: int | None = None,
        num_segments: int = DEFAULT_SEGMENTS,
        bound: Bound | None = None,
        allow_urls: bool = True,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; `statistics` has what it took once it ends.

        The turn's own arguments are those of ChatModel.prepare. `options` are transformers' generate options, like do_sample=True,
        temperature=0.7. `progress` hears of frames, tiles and prompt tokens. Raises InternVLError kinds at once for what cannot be
        asked. A cancelled answer stays in `turns` as far as it came.
        """
        statistics, model = Statistics(), self._model
        turn = model.prepare(
            question,
            images=images,
            video=video,
            max_tiles=max_tiles,
            num_segments=num_segments,
            bound=bound,
            allow_urls=allow_urls,
            progress=progress,
        )
        statistics.tiles = sum(picture.count for picture in turn.pictures)
        options |= {"max_new_tokens": max_new_tokens}
        pictures = [picture for past in [*self.turns, turn] for picture in past.pictures]
        ids = model.ids_of(self._system, self.turns, turn.question, pictures)
        model.check(ids, pictures, options)
        criteria = options.pop("stopping_criteria", None) or []

        def generate(stopping_criteria: list[Any], **hooks: Any) -> None:
            hooks["stopping_criteria"] = StoppingCriteriaList([*stopping_criteria, *criteria])
            model.answer(ids, pictures, cache=self._cache, statistics=statistics, **hooks, **options)
            if not statistics.finish_reason:
                statistics.finish_reason = "length" if statistics.new_tokens >= max_new_tokens else "stop"

        return self._pieces(turn, generate, statistics, progress)

    def cancel(self) -> None:
        """Stop the answer that is being written; may be called from any thread."""
        self._cancelled.set()
        if self._cache is not None:
            self._cache.cancel()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def _pieces(
        self, turn: Exchange, generate: Callable[..., None], statistics: Statistics, progress: Progress | None
    ) -> Iterator[str]:
        tokenizer, template = self._tokenizer, self._model.conv_template
        if not self._busy.acquire(blocking=False):
            raise PromptError("this conversation is answering already: wait for it, cancel it, or start another one")
        try:
            self._cancelled.clear()
            self.statistics = statistics
            told = stream_text(generate, tokenizer, template, statistics, self._cancelled, self.cancel, progress, turn.tokens)
            with closing(told) as pieces:
                for piece in pieces:
                    turn.answer += piece
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):  # nobody reads on: what was said stays said
            self._keep(turn, statistics)
            raise
        else:
            self._keep(turn, statistics)
        finally:
            self._busy.release()

    def _keep(self, turn: Exchange, statistics: Statistics) -> None:
        if self._cancelled.is_set():
            statistics.finish_reason = "cancelled"
        if turn.answer:
            self.turns.append(turn)
