"""An answer while it is written: text pieces, what it took, and stopping it from another thread.

Knows token ids, a tokenizer and what ends an answer; knows nothing of pictures or devices. Plug another user interface in here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from runtime.prompt import Template

WAKE_SECONDS = 0.2  # Windows lets Ctrl-C through only between waits
Progress = Callable[[str, int, int], None]  # stage, done, total; stages are frames, tiles and prefill


class Cancelled(Exception):
    """Raised inside a running answer that is not wanted any more; never reaches the caller."""


@dataclass
class Statistics:
    """What an answer took. Times in seconds, counted from the question."""

    tiles: int = 0  # of the pictures of this turn
    encoded_tiles: int = 0  # of all pictures of the prompt, went through the vision part now
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the KV cache
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    token_seconds: float | None = None  # mean of the tokens after the first
    finish_reason: str = ""  # stop, length or cancelled
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None when there was only one."""
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


class Words:
    """Tokens of one answer -> its text as far as it is certain: no lead, no white space around it, nothing after a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, stops: Sequence[str] = ()):
        self._tokenizer, self._template, self._stops = tokenizer, template, [*stops]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._lead = lead_ids(tokenizer, template)
        self._ids: list[int] = []
        self._text, self._said = "", 0
        self.stopped = False  # at a stop string

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        if self._lead:  # everything so far may be the lead; without one it comes out at the end
            if self._ids[-len(self._lead) :] == self._lead:
                self._lead, self._ids = [], []
            return ""
        self._text += self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._say(end=False)

    def end(self) -> str:
        """What was held back, once there are no more tokens."""
        if not self.stopped:
            whole = whole_answer(self._tokenizer, self._ids, self._template)
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


class _TextOf:
    """A streamer of transformers' kind: token ids in, text out and the clock read."""

    def __init__(self, tokenizer: Any, template: Template, emit: Callable[[str], None], statistics: Statistics, tokens: list[int]):
        self._emit, self._statistics, self._tokens = emit, statistics, tokens
        self._stop_ids = set(tokenizer.encode(template.stop_token, add_special_tokens=False)[:1])
        self._words = Words(tokenizer, template)

    def put(self, ids: torch.Tensor) -> None:
        for token in ids.flatten().tolist():
            now = time.perf_counter() - self._statistics.started
            before = self._statistics.new_tokens
            if not before:
                self._statistics.first_token_seconds = now
            else:
                self._statistics.token_seconds = (now - self._statistics.first_token_seconds) / before
            self._statistics.new_tokens = before + 1
            if token in self._stop_ids:
                self._statistics.finish_reason = "stop"
            else:
                self._tokens.append(token)
                self._say(self._words.add(token))

    def end(self) -> None:
        """Say what an unfinished character still owes."""
        self._say(self._words.end())

    def _say(self, text: str) -> None:
        if text:
            self._emit(text)


def whole_answer(tokenizer: PreTrainedTokenizerBase, ids: Any, template: Template) -> str:
    """New token ids -> the answer: lead and special tokens left out, cut at the stop token, without outer white space."""
    own = after_lead(list(ids), lead_ids(tokenizer, template)) if template.lead else ids
    return tokenizer.decode(own, skip_special_tokens=True).split(template.stop_token)[0].strip()  # type: ignore[union-attr]


def lead_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The tokens that a model writes before an answer; none for most."""
    return tokenizer.encode(template.lead, add_special_tokens=False) if template.lead else []


def after_lead(ids: list[int], lead: list[int]) -> list[int]:
    """The tokens behind the last lead among them, all of them where there is none."""
    starts = [n for n in range(len(ids) - len(lead) + 1) if ids[n : n + len(lead)] == lead] if lead else []
    return ids[starts[-1] + len(lead) :] if starts else ids


class _Asked(StoppingCriteria):
    """Ends the decoding once it is asked to."""

    def __init__(self, cancelled: threading.Event):
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._cancelled.is_set(), device=input_ids.device)


def stream_text(
    generate: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    statistics: Statistics,
    cancelled: threading.Event,
    cancel: Callable[[], None],
    progress: Progress | None,
    tokens: list[int],
) -> Generator[str, None, None]:
    """Run `generate(streamer=, stopping_criteria=, progress=)` in a thread and yield the text as it comes.

    Ends when the answer does or soon after `cancelled` is set; calls `cancel` when it is closed early. Errors of `generate` are
    raised here. `statistics` and `tokens`, the new token ids without the one that stops, are filled by the way.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    streamer = _TextOf(tokenizer, template, pieces.put, statistics, tokens)
    failed: list[BaseException] = []

    def check(stage: str, done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled
        if progress is not None:
            progress(stage, done, total)

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=[_Asked(cancelled)], progress=check)
        except Cancelled:
            pass
        except BaseException as error:  # carried to the thread that reads
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
