"""Many answers at once, each with its own prompt: one starts when there is room, and each step decodes a token of all.

Continuous batching (Yu et al. 2022, Orca) over the pages of one language part. Knows prompts, decodings and a chat core; not where
requests come from. Without pages, and past the length at which rotary positions depend on it, answers are written one after the
other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding, Sampler
from runtime.answer.model import OpenedModel
from runtime.answer.stream import TextStream
from runtime.errors import InternVLError, NumericsError
from runtime.parts.kv_cache import PREFILL_AT_ONCE

MOST_ROWS = 32  # largest batch
WORTH_WAITING = 32  # shared tokens for which a prompt waits until another prompt is prefilled
NO_NUMBERS = (
    "the language part gave NaN: its activations overflow on this device; "
    "open the model with precision accuracy (--precision accuracy)"
)


@dataclass(eq=False)
class Writing:
    """An answer: its prompt, and what is written so far. `tag` is for the caller."""

    prompt: Prompt
    decoding: Decoding
    tag: Any = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # without the one that ends the answer
    finish_reason: str = ""  # stop or length
    error: InternVLError | None = None


@dataclass(eq=False)
class _Row:
    """An answer that is being written, and its row of the cache."""

    writing: Writing
    keys: np.ndarray  # of the prompt
    number: int  # row of the cache
    read: int  # prompt tokens in the cache when it joined
    sampler: Sampler
    stream: TextStream


class Writer:
    """Writes answers: `add` queues them, `step` advances all and returns the finished ones. For one thread at a time."""

    def __init__(self, model: OpenedModel, cache_bytes: int, most: int = MOST_ROWS):
        model.wait_until_packed()
        model.language_part.take_second()  # many answers will follow
        self._model, self._most = model, most
        self._rows = model.language_part.new_rows(cache_bytes)
        self._waiting: deque[Writing] = deque()
        self._running: list[_Row] = []

    @property
    def is_hungry(self) -> bool:
        """Whether the batch has room for more answers than are queued."""
        return len(self._waiting) + len(self._running) < self._most

    @property
    def is_idle(self) -> bool:
        """Whether no answer is queued or running."""
        return not self._waiting and not self._running

    def add(self, writing: Writing) -> None:
        """Queue an answer, to start when there is room."""
        self._waiting.append(writing)

    def step(self) -> list[Writing]:
        """Start the answers that there is room for, and decode a token of every answer; returns the finished ones."""
        over = self._begin()
        if self._running:
            over += self._go_on()
        return over

    def _begin(self) -> list[Writing]:
        """Prefill queued prompts while there is room. Returns answers that end with their first token."""
        over: list[Writing] = []
        while self._waiting and len(self._running) < self._most:
            writing = self._waiting[0]
            if self._rows is None or self._is_long(writing):
                self._waiting.popleft()
                self._write_alone(writing)
                over.append(writing)
                continue
            together = self._together()
            if not together:
                break
            over += self._read(together)
        return over

    def _is_long(self, writing: Writing) -> bool:
        plain = None if self._rows is None else self._rows.plain_length
        return plain is not None and len(writing.prompt.ids) + writing.decoding.max_new_tokens > plain

    def _together(self) -> list[_Row]:
        """Prompts from the head of the queue to prefill in one run; one that shares much with another waits for the next run."""
        assert self._rows is not None
        rows: list[_Row] = []
        left = PREFILL_AT_ONCE
        for writing in [*self._waiting]:
            most = len(writing.prompt.ids) + writing.decoding.max_new_tokens
            if len(rows) + len(self._running) == self._most or not self._rows.has_room(most) or self._is_long(writing):
                break
            keys = self._model.keys(writing.prompt)
            here = self._rows.shared_now(keys)
            if any(_shared(keys, row.keys) >= here + WORTH_WAITING for row in rows):
                break
            if rows and len(keys) - here > left:
                break
            number, read = self._rows.join(keys, most)
            left -= len(keys) - read
            decoding = writing.decoding
            sampler = Sampler(decoding, rule=self._model.rule_of(decoding))
            rows.append(_Row(writing, keys, number, read, sampler, self._model.text_of(decoding)))
            self._waiting.popleft()
        return rows

    def _read(self, rows: Sequence[_Row]) -> list[Writing]:
        """Prefill the prompts of these rows, a long one in chunks, and choose their first tokens."""
        assert self._rows is not None
        model = self._model
        embeds = []
        for row in rows:
            new = row.writing.prompt.ids[None, row.read :]
            embeds.append(model.merge(new, model.rows_after(row.writing.prompt, row.read, None)[0])[0])
        lengths = [len(each) for each in embeds]
        pieces = self._rows.pieces(rows[0].read, lengths[0]) if len(rows) == 1 else [(0, None)]
        for start, end in pieces:
            keys = [row.keys[row.read :][start:end] for row in rows]
            given = np.concatenate([each[start:end] for each in embeds])
            visual = np.concatenate([model.visual(row.writing.prompt.ids[row.read :][start:end]) for row in rows])
            logits = self._rows.read([row.number for row in rows], keys, given, visual)
        self._running += rows
        return self._choose(rows, logits)

    def _go_on(self) -> list[Writing]:
        assert self._rows is not None
        rows = [*self._running]
        ids = np.array([[row.sampler.ids[-1] for row in rows]])
        logits = self._rows.write([row.number for row in rows], self._model.embed_tokens(ids)[0])
        return self._choose(rows, logits)

    def _choose(self, rows: Sequence[_Row], logits: np.ndarray) -> list[Writing]:
        """Choose the next token of each row from its logits (V,); finished rows leave."""
        over = []
        for row, scores in zip(rows, logits, strict=True):
            writing = row.writing
            if not np.isfinite(scores[:64]).all():
                writing.error = NumericsError(NO_NUMBERS)
            elif not self._take(row, row.sampler.choose(scores).id):
                continue
            self._rows.leave(row.number)  # type: ignore[union-attr]
            self._running.remove(row)
            over.append(writing)
        return over

    def _take(self, row: _Row, token: int) -> bool:
        """Add a token to an answer; returns whether the answer is finished."""
        writing, decoding = row.writing, row.writing.decoding
        if token in decoding.eos_token_ids and not decoding.ignore_eos:
            writing.finish_reason = "stop"
        else:
            writing.tokens.append(token)
            writing.text += row.stream.add(token)
            if row.stream.stopped:
                writing.finish_reason = "stop"
            elif row.sampler.ended:
                writing.finish_reason = "length" if len(row.sampler.ids) >= decoding.max_new_tokens else "stop"
        if writing.finish_reason:
            writing.text += row.stream.end()
        return bool(writing.finish_reason)

    def _write_alone(self, writing: Writing) -> None:
        """One whole answer, as a stateless call writes it."""
        model = self._model
        row = _Row(writing, np.zeros(0, np.int64), 0, 0, Sampler(writing.decoding), model.text_of(writing.decoding))
        try:
            for token in model.tokens(writing.prompt, writing.decoding):
                row.sampler.ids.append(token.id)
                if self._take(row, token.id):
                    break
            else:
                writing.finish_reason = "stop"  # the end of a schema
                writing.text += row.stream.end()
        except InternVLError as error:
            writing.error = error


def _shared(keys: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two prompts' keys."""
    count = min(len(keys), len(other))
    differ = np.flatnonzero(keys[:count] != other[:count])
    return int(differ[0]) if len(differ) else count
