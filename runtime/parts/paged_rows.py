"""Rows that join and leave one set of pages, for continuous batching: each row has its own prompt.

Rows share the full pages of a common prompt prefix. Knows embeddings, logits and keys of tokens, as a KV cache does; the caller
chooses tokens and prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import openvino as ov

from runtime.parts.paged_cache import FIRST_PAGES, PagedCache

REMEMBERED = 8  # rows that have left whose prompts are kept for reuse


class PagedRows(PagedCache):
    """A paged cache of numbered rows; `limit` bounds its pages in bytes, unless a single row takes more."""

    def __init__(self, compiled: ov.CompiledModel, limit: int, **options: Any):
        super().__init__(compiled, **options | {"siblings": None})  # no cache copies from rows
        self._tables, self._lengths = [], []
        self._most_pages = max(FIRST_PAGES, limit // _bytes_of_page(self._shapes))
        self._prompts: dict[int, np.ndarray] = {}  # keys of the prompt of each row, as far as it is prefilled
        self._left: deque[tuple[np.ndarray, list[int]]] = deque()  # of rows that have left: keys and page numbers of full pages
        self._promised: dict[int, int] = {}  # pages reserved for each row

    @property
    def plain_length(self) -> int | None:
        """Longest row in tokens, prompt and answer; None: the context length of the model."""
        return self._plain_length

    def pieces(self, past: int, count: int) -> Iterable[tuple[int, int]]:
        """Spans of the chunks of `count` prompt tokens after `past` others."""
        return self._pieces(past, count)

    def has_room(self, tokens: int) -> bool:
        """Whether another row of `tokens` tokens, prompt and answer, fits beside the others."""
        return not self._promised or sum(self._promised.values()) + self._count_of(tokens) <= self._most_pages

    def shared_now(self, keys: np.ndarray) -> int:
        """How many tokens of a prompt with these keys (T,) are in the cache."""
        return self._best(keys)[0]

    def join(self, keys: np.ndarray, tokens: int) -> tuple[int, int]:
        """Add a row for a prompt with these keys (T,), of at most `tokens` tokens -> its number, and the tokens in the cache."""
        shared, pages = self._best(keys)
        table = pages[: shared // self._page]
        for page in table:
            self._uses[page] += 1
        row = next((row for row in range(len(self._tables)) if row not in self._promised), len(self._tables))
        self._tables[row : row + 1], self._lengths[row : row + 1] = [[*table]], [shared]
        self._prompts[row], self._promised[row] = keys[:shared], self._count_of(tokens)
        return row, shared

    def read(self, rows: Sequence[int], keys: Sequence[np.ndarray], embeds: np.ndarray, visual: np.ndarray) -> np.ndarray:
        """Prefill the new tokens of these rows' prompts: keys (t,) of each, embeddings (T, D) and context token mask (T,) of all.

        Returns the logits (R, V) of the last token of each row, which are not finite where activations overflowed.
        """
        with self._first_runs():
            logits = self._step(rows, embeds, [len(each) for each in keys], visual)[:, 0]
        for row, each in zip(rows, keys, strict=True):
            self._prompts[row] = np.concatenate([self._prompts[row], each])
        return logits

    def write(self, rows: Sequence[int], embeds: np.ndarray) -> np.ndarray:
        """Decode one token (R, D) of each of these rows -> logits (R, V)."""
        with self._first_runs():
            return self._step(rows, embeds, [1] * len(rows), np.zeros(len(rows), np.int64))[:, 0]

    def leave(self, row: int) -> None:
        """Remove a row; the full pages of its prompt stay for reuse."""
        keys, table = self._prompts.pop(row), self._tables[row]
        whole = len(keys) // self._page
        self._left.append((keys[: whole * self._page], table[:whole]))
        self._release(table[whole:])
        self._tables[row], self._lengths[row] = [], 0
        del self._promised[row]
        while len(self._left) > REMEMBERED:
            self._forget_oldest()

    def _best(self, keys: np.ndarray) -> tuple[int, list[int]]:
        """The longest prefix, in full pages, that a row has in common with a prompt of these keys (T,), and that row's pages."""
        held = [(prompt, self._tables[row]) for row, prompt in self._prompts.items()]
        shared = [(_shared(keys, prompt) // self._page * self._page, table) for prompt, table in [*held, *self._left]]
        return max(shared, key=lambda one: one[0], default=(0, []))

    def _count_of(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _take(self) -> int:
        while not self._free and self._left and self._pages >= self._most_pages:
            self._forget_oldest()
        if not self._free:
            most = self._most_pages if self._pages < self._most_pages else 2 * self._pages
            self._grow(min(2 * self._pages, most))
        return super()._take()

    def _forget_oldest(self) -> None:
        self._release(self._left.popleft()[1])


def _shared(keys: np.ndarray, held: np.ndarray) -> int:
    """Length of the common prefix of two prompts' keys, of which at least one is left to compute."""
    held = held[: len(keys) - 1]
    differ = np.flatnonzero(held != keys[: len(held)])
    return int(differ[0]) if len(differ) else len(held)


def _bytes_of_page(shapes: dict[str, tuple[ov.Type, list[int]]]) -> int:
    return sum(-(-kind.bitwidth * int(np.prod(shape)) // 8) for kind, shape in shapes.values())
