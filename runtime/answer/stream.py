"""Streaming of an answer: text pieces, statistics, and cancellation from another thread.

Knows tokens, a tokenizer and what ends an answer; nothing of pictures or devices. Plug another user interface in here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.answer.decode import Decoding, Token
from runtime.answer.prompt import Template
from runtime.folder.tokenizer import Tokenizer
from runtime.progress import Cancelled, Progress

WAKE_SECONDS = 0.2  # Windows lets Ctrl-C through only between waits


@dataclass
class Statistics:
    """Statistics of an answer. Times in seconds; the first token is timed from the question."""

    tiles: int = 0  # of the pictures of this turn
    encoded_tiles: int = 0  # of all pictures of the prompt, encoded for this answer
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the KV cache
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    token_seconds: float | None = None  # time per token: mean of the tokens after the first
    finish_reason: str = ""  # stop, length or cancelled
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput of the tokens after the first; None when there was only one."""
        return 1 / self.token_seconds if self.token_seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the clock, for JSON."""
        values = asdict(self) | {"tokens_per_second": self.tokens_per_second}
        del values["started"]
        return values

    def __str__(self) -> str:
        tiles = "1 tile" if self.tiles == 1 else f"{self.tiles} tiles"
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        speed = f", {1000 * self.token_seconds:.1f} ms a token, {1 / self.token_seconds:.1f} tokens/s" if self.token_seconds else ""
        return (
            f"{tiles}, {self.prompt_tokens} prompt tokens{reused}, first token after {self.first_token_seconds:.2f} s, "
            f"{self.new_tokens} new tokens{speed}"
        )


class TextStream:
    """Tokens of one answer -> its text once it is certain, without lead, outer white space, and text from a stop string on."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, stop_strings: Sequence[str] = (), *, skip_special_tokens: bool = True
    ):
        self._tokenizer, self._template, self._stops = tokenizer, template, [stop for stop in stop_strings if stop]
        self._skips = skip_special_tokens
        self._decoder = tokenizer.decode_stream(skip_special_tokens)
        self._lead = lead_ids(tokenizer, template)
        self._ids: list[int] = []
        self._text, self._said = "", 0
        self.stopped = False  # at a stop string

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        self._ids.append(token)
        if self._lead:  # all tokens so far may be the lead; if not, end() returns them
            if self._ids[-len(self._lead) :] == self._lead:
                self._lead, self._ids = [], []
            return ""
        self._text += self._decoder.step(token)
        return self._say(end=False)

    def end(self) -> str:
        """The text that was held back, once there are no more tokens."""
        if not self.stopped:
            whole = whole_answer(self._tokenizer, self._ids, self._template, skip_special_tokens=self._skips)
            self._text = whole if whole.startswith(self._text.strip()) else self._text
        return self._say(end=True)

    def _say(self, *, end: bool) -> str:
        text = self._text.lstrip()
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not end:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text = text[: len(text) - held]
        text = text.rstrip()
        new, self._said = text[self._said :], max(self._said, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def whole_answer(tokenizer: Tokenizer, ids: Sequence[int], template: Template, *, skip_special_tokens: bool = True) -> str:
    """New token ids -> the answer: without lead and special tokens, cut at the stop token, without outer white space."""
    own = after_lead([*ids], lead_ids(tokenizer, template)) if template.lead else ids
    return tokenizer.decode(own, skip_special_tokens=skip_special_tokens).split(template.stop_token)[0].strip()


def lead_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The tokens of the template's lead; none for most models."""
    return tokenizer.encode(template.lead, add_special_tokens=False) if template.lead else []


def after_lead(ids: list[int], lead: list[int]) -> list[int]:
    """The tokens after the last lead in `ids`; all of them where there is none."""
    starts = [n for n in range(len(ids) - len(lead) + 1) if ids[n : n + len(lead)] == lead] if lead else []
    return ids[starts[-1] + len(lead) :] if starts else ids


def count_token(statistics: Statistics) -> None:
    """Update count and times for one more token."""
    now = time.perf_counter() - statistics.started
    before = statistics.new_tokens
    if not before:
        statistics.first_token_seconds = now
    else:
        statistics.token_seconds = (now - statistics.first_token_seconds) / before
    statistics.new_tokens = before + 1


def stream_text(
    tokens: Callable[[Progress], Iterator[Token]],
    text: TextStream,
    decoding: Decoding,
    statistics: Statistics,
    kept: list[int],
    *,
    cancelled: threading.Event,
    cancel: Callable[[], None],
    progress: Progress | None = None,
) -> Generator[str, None, None]:
    """Run `tokens(progress)` in a thread and yield the text as it comes.

    Ends with the answer, or soon after `cancelled` is set; calls `cancel` when it is closed early. Errors of `tokens` are raised
    here. Fills `statistics`, and `kept` with the new token ids except the one that ends the answer.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def emit(piece: str) -> None:
        if piece:
            pieces.put(piece)

    def check(stage: str, done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled
        if progress is not None:
            progress(stage, done, total)

    def read() -> str:
        """Read the tokens to their end; returns the finish reason."""
        with closing(tokens(check)) as found:  # type: ignore[type-var]
            for token in found:
                count_token(statistics)
                if token.id in decoding.eos_token_ids and not decoding.ignore_eos:
                    return "stop"
                kept.append(token.id)
                emit(text.add(token.id))
                if text.stopped:
                    return "stop"
                if cancelled.is_set():
                    break
        return "length" if statistics.new_tokens >= decoding.max_new_tokens else "stop"

    def work() -> None:
        try:
            statistics.finish_reason = read()
            emit(text.end())  # text held back, like an incomplete character
        except Cancelled:
            pass
        except BaseException as error:  # re-raised in the thread that reads
            failed.append(error)
        finally:
            pieces.put(None)

    thread = threading.Thread(target=work, name="answer", daemon=True)
    thread.start()
    try:
        while True:
            try:
                piece = pieces.get(timeout=WAKE_SECONDS)
            except queue.Empty:
                continue
            if piece is None:
                break
            yield piece
    except BaseException:
        cancel()
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
