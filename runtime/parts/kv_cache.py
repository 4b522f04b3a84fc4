"""The interface of a KV cache of the language part, independent of where keys and values are stored.

Decides which tokens are kept, what a new prompt shares with them and with other caches, and in which chunks a prompt is fed. Keys
and values are in our own pages on a CPU (paged_cache.py), in OpenVINO's state elsewhere (stateful_cache.py). Knows embeddings,
logits and a key per token; nothing of sampling, prompts or pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from runtime.errors import NumericsError
from runtime.parts.part import VISUAL_MASK
from runtime.progress import Cancelled, Progress

PREFILL_AT_ONCE = 1024  # tokens of a chunk; bounds the memory of prefill, and the delay of a cancellation
EVEN_WIDTH = 128
LEAST_ADOPTED = 32  # tokens worth a copy: about the beginning that all prompts of a template share
_SIBLINGS = Lock()  # a set must not grow in one thread while another reads it
LAST_POSITION = "last_position"  # an input we add to the opened part: the positions that the head sees


class KVCache(ABC):
    """Keys and values of the tokens of one conversation, or of the rows of one batch.

    Each token of a single row has a key that identifies its content, to compare with a new prompt. For one thread at a time, which
    holds `busy`. `siblings` are the caches over the same weights to copy from; a new cache joins them. Each run is inside a
    `first_runs()` context.
    """

    repeatable = False  # whether decode computes as in the first answer of a process, so that a seed repeats an answer

    def __init__(
        self,
        compiled: ov.CompiledModel,
        plain_length: int | None = None,
        window: int | None = None,
        siblings: WeakSet[KVCache] | None = None,
        first_runs: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._plain_length, self._window = plain_length, window
        self._siblings: WeakSet[KVCache] = WeakSet() if siblings is None else siblings
        self.busy = Lock()
        self._compiled, self._first_runs = compiled, first_runs
        self._routed = any(VISUAL_MASK in port.get_names() for port in compiled.inputs)  # it takes a mask of context tokens
        self._keys = np.zeros(0, np.int64)
        self._coming = np.zeros(0, np.int64)  # keys of the prompt that is being fed

    def __len__(self) -> int:
        """Number of tokens of a single row."""
        return len(self._keys)

    def shared_with(self, keys: np.ndarray) -> int:
        """How many leading tokens of a prompt with these keys (T,) are in the cache; at least one is left to compute."""
        held = self._keys[: len(keys) - 1]
        differ = np.flatnonzero(held != keys[: len(held)])
        return int(differ[0]) if len(differ) else len(held)

    def keep(self, keys: np.ndarray) -> int:
        """Keep the common prefix with a prompt of these keys (T,), drop the rest, and expect the prompt's other tokens.

        Copies from an idle sibling that holds much more of the prompt. Returns the number of tokens kept.
        """
        self._adopt(keys)
        kept = self._cut(self.shared_with(keys))
        self._keys, self._coming = self._keys[:kept], keys[kept:]
        return kept

    def _adopt(self, keys: np.ndarray) -> None:
        """Copy what a sibling holds of a prompt with these keys (T,), if it is worth it."""
        with _SIBLINGS:
            others = [cache for cache in self._siblings if cache is not self and cache._compiled is self._compiled]
        for donor in sorted(others, key=lambda cache: -cache.shared_with(keys)):
            if donor.shared_with(keys) < self.shared_with(keys) + LEAST_ADOPTED:
                return
            if donor.busy.acquire(blocking=False):
                try:
                    self._copy_from(donor, keys)
                finally:
                    donor.busy.release()
                return

    def _join_siblings(self) -> None:
        """Called at the end of construction: others may copy from this cache at once."""
        with _SIBLINGS:
            self._siblings.add(self)

    def feed(
        self,
        embeds: np.ndarray,
        mask: np.ndarray,
        keys: np.ndarray | None,
        progress: Progress | None = None,
        visual: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embeddings (B, T, D) of new tokens under their mask (B, T) -> logits (B, 1, V) of the last position.

        `keys` (T,) identify the tokens of a single row; None takes those given to `keep`. `visual` (B, T) is 1 on context tokens,
        None where there are none; parts without visual experts ignore it. Raises NumericsError when the logits are not finite.
        """
        logits = self._checked(self._feed, embeds, mask, np.zeros_like(mask) if visual is None else visual, progress)
        if keys is not None:
            self._remember(keys)
        return logits

    def _checked(self, run: Callable[..., np.ndarray], *given: Any) -> np.ndarray:
        """The logits that `run` returns. Raises Cancelled, NumericsError."""
        try:
            with self._first_runs():
                logits = run(*given)
        except RuntimeError as error:
            if "Infer Request was canceled" in str(error):
                raise Cancelled from None
            raise
        while not np.isfinite(logits[..., :64]).all():  # a NaN before the head makes every logit NaN
            again = self._recompute()
            if again is not None:
                logits = again
                continue
            self._cut(0)
            self._keys = self._keys[:0]
            raise NumericsError(
                "the language part gave NaN: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return logits

    def _recompute(self) -> np.ndarray | None:
        """Recompute the logits of the last run in a wider precision; None where there is none."""
        return None

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Embeddings (1, T, D) of a token and the draft tokens after it, with their ids (T,) -> logits (T, V) after each of them.

        All of them stay in the cache until `drop` removes the rejected ones. Only with `room_for_drafts`.
        """
        logits = self._checked(self._feed_draft, embeds)
        self._remember(keys)
        return logits.reshape(len(keys), -1)

    def drop(self, count: int) -> None:
        """Remove the last `count` tokens of a single row. Only with `room_for_drafts`."""
        self._cut(self._count() - count)
        self._keys = self._keys[: len(self._keys) - count]

    @property
    def room_for_drafts(self) -> int:
        """How many tokens give the same result fed at once as one by one: none where rotary positions depend on the length."""
        return 1 << 30 if self._plain_length is None else max(0, self._plain_length - self._count())

    @property
    def free_guesses(self) -> int:
        """How many draft tokens a decode step can check in about the time of one token."""
        return 0

    @property
    def ids(self) -> np.ndarray:
        """Ids of the tokens of a single row that have keys; negative for context tokens.

        Only with `room_for_drafts`: the keys of longer prompts are not ids.
        """
        return self._keys

    def get_seq_length(self) -> int:
        """The number of tokens, by transformers' name."""
        return len(self)

    @abstractmethod
    def cancel(self) -> None:
        """End the current run, from another thread, as soon as that leaves the cache valid."""

    @abstractmethod
    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i the continuation of row `rows[i]`, as beam search needs."""

    @abstractmethod
    def _count(self) -> int:
        """Number of tokens of a single row, those without a key included."""

    @abstractmethod
    def _cut(self, length: int) -> int:
        """Keep the first `length` tokens of a single row, or none; returns how many were kept."""

    @abstractmethod
    def _copy_from(self, donor: Any, keys: np.ndarray) -> None:
        """Replace the contents by what a cache of the same part holds of a prompt with these keys (T,)."""

    @abstractmethod
    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        """As `feed`; calls `_remember_prompt` after each chunk of a prompt."""

    @abstractmethod
    def _feed_draft(self, embeds: np.ndarray) -> np.ndarray:
        """Embeddings (1, T, D) of text tokens -> logits of all of them."""

    def _pieces(self, past: int, count: int) -> Iterable[tuple[int, int]]:
        """Spans of the chunks of `count` tokens after `past` others: one span where rotary positions depend on the whole length."""
        long = self._plain_length is not None and past + count > self._plain_length
        return [(0, count)] if long else prompt_spans(count, PREFILL_AT_ONCE)

    def _remember(self, keys: np.ndarray) -> None:
        self._keys = np.concatenate([self._keys, keys])

    def _remember_prompt(self, count: int) -> None:
        """Record that the next `count` tokens of the prompt given to `keep` are in the cache."""
        self._remember(self._coming[:count])
        self._coming = self._coming[count:]


def prompt_spans(total: int, most: int) -> list[tuple[int, int]]:
    """Cut a prompt into chunks [start, end) of `most` tokens; a long last chunk is cut again, at its last multiple of `EVEN_WIDTH`.

    Such widths take a sixth less time on AMX, about a thirtieth elsewhere; below 2 * `EVEN_WIDTH` tokens a second chunk costs more
    than that (docs/experiments.md).
    """
    starts = [*range(0, total, most)]
    even = total // EVEN_WIDTH * EVEN_WIDTH
    if starts and starts[-1] + 2 * EVEN_WIDTH <= even < total:
        starts.append(even)
    return [*zip(starts, [*starts[1:], total], strict=False)]


def head_sees_positions(model: ov.Model, axis: int) -> None:
    """Add an input that names the positions, along an axis of the hidden states, for which the head computes logits.

    The logits of a whole prompt are not needed and take gigabytes.
    """
    head = head_of(model)
    positions = opset.parameter([-1], np.int32, name=LAST_POSITION)
    positions.output(0).get_tensor().set_names({LAST_POSITION})
    seen = opset.gather(head.input_value(0), positions, opset.constant(axis))
    head.input(0).replace_source_output(seen.output(0))
    model.add_parameters([positions])
    model.validate_nodes_and_infer_types()


def head_of(model: ov.Model) -> ov.Node:
    """The matrix product that computes the logits."""
    return model.get_results()[0].input_value(0).get_node()
