"""What a KV cache of the language part is to those who feed it, whatever holds the keys and values.

Which tokens are kept, what a new prompt shares with them and with other caches, in which pieces a prompt is fed. Pages of our own
(paged_cache.py) hold them on a CPU, OpenVINO's state (stateful_cache.py) elsewhere. Knows embeddings, logits and the key of each
token; nothing of sampling, prompts or pictures.
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

PREFILL_AT_ONCE = 1024  # tokens; bounds the memory of a prompt, and how long a cancelled one goes on
EVEN_WIDTH = 128
LEAST_ADOPTED = 32  # tokens that are worth the copy: the beginning that all prompts of a template share is about so long
_SIBLINGS = Lock()  # a set must not grow in one thread while another one reads it
LAST_POSITION = "last_position"  # our input of the opened part: which tokens the head sees


class KVCache(ABC):
    """What the tokens of one conversation, or of the rows of one batch, have left behind.

    Each token of a single row has a key that says what it stands for, so that a new prompt can be compared. One thread at a time,
    the one that holds `busy`. `siblings` are the caches over the same weights that can be copied from, this one too when made.
    Runs are inside `first_runs()`, which may watch them.
    """

    repeatable = False  # whether single tokens are computed as in the first answer of a process, so that a seed repeats one

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
        self._routed = any(VISUAL_MASK in port.get_names() for port in compiled.inputs)  # it wants to know context tokens
        self._keys = np.zeros(0, np.int64)
        self._coming = np.zeros(0, np.int64)  # keys of the prompt that is being fed

    def __len__(self) -> int:
        """Tokens of a single row."""
        return len(self._keys)

    def shared_with(self, keys: np.ndarray) -> int:
        """How many tokens at the beginning of a prompt with these keys (T,) are here; at least one is left to compute."""
        held = self._keys[: len(keys) - 1]
        differ = np.flatnonzero(held != keys[: len(held)])
        return int(differ[0]) if len(differ) else len(held)

    def keep(self, keys: np.ndarray) -> int:
        """Keep what a prompt with these keys (T,) begins with, forget the rest, and expect its other tokens.

        Where an idle sibling holds much more of the prompt, that is copied. Returns the number of tokens kept.
        """
        self._adopt(keys)
        kept = self._cut(self.shared_with(keys))
        self._keys, self._coming = self._keys[:kept], keys[kept:]
        return kept

    def _adopt(self, keys: np.ndarray) -> None:
        """Take over what a sibling holds of a prompt with these keys (T,), if it is worth it."""
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
        """Now that it is whole: others may ask it at once."""
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

        `keys` (T,) say what the tokens of a single row are; None takes those that `keep` was told. `visual` (B, T) is 1 on context
        tokens, None where there are none; parts without visual experts do not ask. Raises NumericsError when the logits are not
        numbers.
        """
        logits = self._checked(self._feed, embeds, mask, np.zeros_like(mask) if visual is None else visual, progress)
        if keys is not None:
            self._remember(keys)
        return logits

    def _checked(self, run: Callable[..., np.ndarray], *given: Any) -> np.ndarray:
        """The logits that `run` gives. Raises Cancelled, NumericsError."""
        try:
            with self._first_runs():
                logits = run(*given)
        except RuntimeError as error:
            if "Infer Request was canceled" in str(error):
                raise Cancelled from None
            raise
        while not np.isfinite(logits[..., :64]).all():  # what is no number before the head makes no logit one
            again = self._recompute()
            if again is not None:
                logits = again
                continue
            self._cut(0)
            self._keys = self._keys[:0]
            raise NumericsError(
                "the language part gave logits that are not numbers: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return logits

    def _recompute(self) -> np.ndarray | None:
        """The logits of the last run again, in a wider precision; None where there is none."""
        return None

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Embeddings (1, T, D) of a token and of guesses what follows, with their ids (T,) -> logits (T, V) after each of them.

        All of them count as here until `drop` says how many were wrong. Only with `room_for_drafts`.
        """
        logits = self._checked(self._feed_draft, embeds)
        self._remember(keys)
        return logits.reshape(len(keys), -1)

    def drop(self, count: int) -> None:
        """Forget the last `count` tokens of a single row. Only with `room_for_drafts`."""
        self._cut(self._count() - count)
        self._keys = self._keys[: len(self._keys) - count]

    @property
    def room_for_drafts(self) -> int:
        """How many tokens may be fed at once as if one by one: none where positions depend on the length."""
        return 1 << 30 if self._plain_length is None else max(0, self._plain_length - self._count())

    @property
    def free_guesses(self) -> int:
        """How many guessed tokens are computed beside a token in about its time."""
        return 0

    @property
    def ids(self) -> np.ndarray:
        """Ids of the tokens of a single row, as far as `keep` was told; negative where one stands for a picture.

        Only with `room_for_drafts`: the keys of longer prompts are no ids.
        """
        return self._keys

    def get_seq_length(self) -> int:
        """transformers' name for how many tokens are here."""
        return len(self)

    @abstractmethod
    def cancel(self) -> None:
        """End what is being fed, from another thread, as soon as nothing is lost by it."""

    @abstractmethod
    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on as row `rows[i]` did: beams."""

    @abstractmethod
    def _count(self) -> int:
        """Tokens of a single row, those without a key too."""

    @abstractmethod
    def _cut(self, length: int) -> int:
        """Forget all but the first tokens of a single row, or all; returns how many were kept."""

    @abstractmethod
    def _copy_from(self, donor: Any, keys: np.ndarray) -> None:
        """Forget what is here, and copy what a cache of the same part holds of a prompt with these keys (T,)."""

    @abstractmethod
    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        """As `feed`, and calls `_remember_prompt` after each piece of a prompt."""

    @abstractmethod
    def _feed_draft(self, embeds: np.ndarray) -> np.ndarray:
        """Embeddings (1, T, D) of single tokens of text -> logits of all of them."""

    def _pieces(self, past: int, count: int) -> Iterable[tuple[int, int]]:
        """Spans in which `count` tokens are fed after `past` others: one, where rotary positions depend on the whole length."""
        long = self._plain_length is not None and past + count > self._plain_length
        return [(0, count)] if long else prompt_spans(count, PREFILL_AT_ONCE)

    def _remember(self, keys: np.ndarray) -> None:
        self._keys = np.concatenate([self._keys, keys])

    def _remember_prompt(self, count: int) -> None:
        """The next `count` tokens of the prompt that `keep` was told are here now."""
        self._remember(self._coming[:count])
        self._coming = self._coming[count:]


def prompt_spans(total: int, most: int) -> list[tuple[int, int]]:
    """Cut a prompt into spans [start, end) of `most` tokens and a rest, of which a multiple of `EVEN_WIDTH` is a span of its own.

    On AMX such widths take a sixth less time, elsewhere about a thirtieth; a second, short span costs more than that where the
    rest is short (docs/experiments.md).
    """
    starts = [*range(0, total, most)]
    even = total // EVEN_WIDTH * EVEN_WIDTH
    if starts and starts[-1] + 2 * EVEN_WIDTH <= even < total:
        starts.append(even)
    return [*zip(starts, [*starts[1:], total], strict=False)]


def head_sees_positions(model: ov.Model, axis: int) -> None:
    """Let the head see only the positions, along an axis of the hidden states, that one more input names.

    The logits of a whole prompt are not wanted and take gigabytes.
    """
    head = head_of(model)
    positions = opset.parameter([-1], np.int32, name=LAST_POSITION)
    positions.output(0).get_tensor().set_names({LAST_POSITION})
    seen = opset.gather(head.input_value(0), positions, opset.constant(axis))
    head.input(0).replace_source_output(seen.output(0))
    model.add_parameters([positions])
    model.validate_nodes_and_infer_types()


def head_of(model: ov.Model) -> ov.Node:
    """The matrix multiplication that gives the logits."""
    return model.get_results()[0].input_value(0).get_node()
