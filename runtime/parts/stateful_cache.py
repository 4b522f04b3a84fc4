"""A KV cache in OpenVINO's state of the language part: for a GPU, and for devices that combine others.

A state is a sequence of slots in the order of writing. It is read and written whole to shorten it, to copy it, and to set it aside
while another cache runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from threading import RLock
from typing import Any
from weakref import ref

import numpy as np
import openvino as ov

from runtime.parts.kv_cache import LAST_POSITION, KVCache, head_sees_positions, prompt_spans
from runtime.parts.part import VISUAL_MASK, infer
from runtime.progress import Progress

SLOTS_AXIS = 2  # of a state (B, heads, slots, head width)
DEAD_SLOTS = 4  # a state is shortened when one slot in so many is dead: then the copy costs less than it saves


class Turns:
    """The single request over a compiled part, shared by its caches; the states of a cache are set aside for the next one.

    The GPU plugin (2026.4) treats a run with the input shapes of the run before as its continuation, even if the states were
    replaced in between, and then gives wrong results; separate requests do not help. So a short run of another length precedes a
    cache that follows another one or starts empty.
    """

    def __init__(self, compiled: ov.CompiledModel):
        self.compiled, self.lock = compiled, RLock()
        self._whose: ref[StatefulCache] | None = None
        self._last_count = 0

    @cached_property
    def _request(self) -> ov.InferRequest:
        """Created on first use: creation waits for a run in progress, as while weights are packed."""
        return self.compiled.create_infer_request()

    def run(self, cache: StatefulCache, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The logits of new tokens of a cache, computed after the tokens in its states."""
        count = inputs["inputs_embeds"].shape[1]
        with self.lock:
            before = None if self._whose is None else self._whose()
            if before is not cache or not cache.begun:
                if before is not None and before is not cache and before.begun:
                    before.aside = self._copies()
                self._between(count)
                if cache.aside:  # a GPU accepts no state right after a reset
                    for state in self._request.query_state():
                        state.state = cache.aside[state.name]
                else:
                    self._request.reset_state()
                self._whose, cache.aside = ref(cache), {}
            self._last_count = count
            infer(self._request, inputs)
            return self._request.get_tensor("logits").data.copy()

    def states_of(self, cache: StatefulCache) -> dict[str, ov.Tensor]:
        """The states of a cache, which are then set aside in it."""
        with self.lock:
            if self._whose is not None and self._whose() is cache:
                cache.aside, self._whose = self._copies(), None
            return cache.aside

    def leave(self, cache: StatefulCache) -> None:
        """Discard what the request holds of a cache."""
        with self.lock:
            if self._whose is not None and self._whose() is cache:
                self._whose = None

    def _copies(self) -> dict[str, ov.Tensor]:
        return {state.name: part_of(state.state) for state in self._request.query_state()}

    def _between(self, count: int) -> None:
        """Run dummy tokens, of a number that neither the last run had nor the next one has; their states are replaced next."""
        own = next(number for number in (2, 3, 4) if number not in (count, self._last_count))
        given = {
            "inputs_embeds": np.zeros((1, own, self.compiled.input("inputs_embeds").partial_shape[-1].get_length()), np.float32),
            "attention_mask": np.ones((1, own), np.int64),
            "position_ids": np.arange(own)[None],
            "beam_idx": np.zeros(1, np.int32),
            LAST_POSITION: np.zeros(1, np.int32),
            VISUAL_MASK: np.zeros((1, own), np.int64),
        }
        names = {name for port in self.compiled.inputs for name in port.get_names()}
        self._request.reset_state()
        infer(self._request, {name: value for name, value in given.items() if name in names})


class StatefulCache(KVCache):
    """Slots of the state, and which of them hold tokens.

    Dropped tokens are masked out, and later tokens get the positions that they would have without them, until a copy of the state
    without the dead slots pays off. `wider` returns the part in a wider precision than the one that overflowed, or None. With
    `wider`, inputs are stored so that they can be computed again.
    """

    @staticmethod
    def adapt(model: ov.Model) -> ov.Model:
        """Add the input of `head_sees_positions`, for hidden states (B, T, D)."""
        head_sees_positions(model, 1)
        return model

    def __init__(
        self,
        turns: Turns,
        wider: Callable[[Turns], Turns | None] | None = None,
        **options: Any,
    ):
        super().__init__(turns.compiled, **options)
        self._turns, self._wider = turns, wider
        self.aside: dict[str, ov.Tensor] = {}  # states, while another cache uses the request
        self._clear()
        self._join_siblings()

    @property
    def begun(self) -> bool:
        """Whether its states hold anything."""
        return self._slots > 0

    def _clear(self) -> None:
        self.aside = {}
        self._slots = 0
        self._mask = np.zeros((1, 256), np.int64)  # (B, capacity), 1 where a slot holds a token
        self._order = np.zeros(1, np.int32)
        self._fed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # embeddings (B, T, D), visual (B, T), their row indices
        self._last = (0, False)  # slots that the last step wrote, and whether it computed the logits of all

    def cancel(self) -> None:
        """Does nothing: an interrupted run would lose the state, and the next chunk or token comes soon."""

    def reorder(self, rows: Sequence[int]) -> None:
        order = np.asarray(rows)
        self._order, self._mask = self._order[order], self._mask[order]
        self._fed = [(embeds, visual, of[order]) for embeds, visual, of in self._fed]

    def _count(self) -> int:
        return int(self._mask[0, : self._slots].sum())

    def _cut(self, length: int) -> int:
        standing = np.flatnonzero(self._mask[0, : self._slots])[:length]
        self._mask[0, : self._slots] = 0
        self._mask[0, standing] = 1
        dead = self._slots - length
        # A sliding window counts dead slots too.
        if dead and (self._window or dead * DEAD_SLOTS > self._slots):
            shortened = length > 0 and self._shorten(standing)
            if not shortened and (self._window or not length):
                self._clear()
                return 0
        return length

    def _shorten(self, slots: np.ndarray) -> bool:
        """Continue with these slots of the single row; False where the device does not expose its state."""
        try:
            self._take_over(self, slots)
        except RuntimeError:
            return False
        return True

    def _take_over(self, donor: StatefulCache, slots: np.ndarray) -> None:
        """Continue with these slots of a cache's single row, its own or another's."""
        taken = {name: part_of(state, slots) for name, state in self._turns.states_of(donor).items()}
        self._turns.leave(self)
        self.aside = taken
        self._fed, self._slots = donor._fed_in(slots), len(slots)
        self._mask = np.zeros((1, max(256, len(slots))), np.int64)
        self._mask[0, : len(slots)] = 1
        self._order = np.zeros(1, np.int32)

    def _fed_in(self, slots: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        if not self._fed:
            return []
        embeds, visual = self._all_fed()
        return [(embeds[:, slots], visual[:, slots], np.zeros(1, np.int64))]

    def _all_fed(self) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (B, slots, D) and visual (B, slots) of the present rows."""
        embeds, visual = zip(*((embeds[of], visual[of]) for embeds, visual, of in self._fed), strict=True)
        return np.concatenate(embeds, 1), np.concatenate(visual, 1)

    def _copy_from(self, donor: StatefulCache, keys: np.ndarray) -> None:
        slots = np.flatnonzero(donor._mask[0, : donor._slots])[: donor.shared_with(keys)]
        with suppress(RuntimeError):  # the device does not expose its state
            self._take_over(donor, slots)
            self._keys = keys[: len(slots)].copy()

    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        total = embeds.shape[1]
        for start, end in self._pieces(self._count(), total):
            if progress is not None:
                progress("prefill", start, total)
            logits = self._step(embeds[:, start:end], mask[:, start:end], visual[:, start:end])
            if len(mask) == 1:
                self._remember_prompt(end - start)
        return logits

    def _feed_draft(self, embeds: np.ndarray) -> np.ndarray:
        ones = np.ones(embeds.shape[:2], np.int64)
        return self._step(embeds, ones, 0 * ones, True)

    def _recompute(self) -> np.ndarray | None:
        turns = self._wider(self._turns) if self._wider is not None else None
        if turns is None:
            return None
        (embeds, visual), mask, (count, every) = self._all_fed(), self._mask[:, : self._slots], self._last
        self._turns, self._compiled = turns, turns.compiled
        self._clear()
        total = mask.shape[1]
        before = total - count
        spans = [(0, before)] if self._plain_length is not None else prompt_spans(before, max(before, 1))
        for start, end in [*(span for span in spans if before), (before, total)]:
            logits = self._step(embeds[:, start:end], mask[:, start:end], visual[:, start:end], every and end == total)
        return logits

    def _step(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, every: bool = False) -> np.ndarray:
        """Tokens (B, T, D) of all rows -> logits (B, 1, V) of the last position, or with `every` (B, T, V) of all."""
        rows, count = mask.shape
        end = self._slots + count
        if self._slots == 0:
            self._mask, self._order = np.zeros((rows, self._mask.shape[1]), np.int64), np.arange(rows, dtype=np.int32)
        if end > self._mask.shape[1]:
            self._mask = np.pad(self._mask, ((0, 0), (0, max(end, 2 * self._mask.shape[1]) - self._mask.shape[1])))
        before = self._mask[:, : self._slots].sum(1, keepdims=True)
        self._mask[:, self._slots : end] = mask
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ascontiguousarray(self._mask[:, :end]),
            "position_ids": np.maximum(before + mask.cumsum(1) - 1, 0),
            "beam_idx": self._order,
            LAST_POSITION: np.arange(0 if every else count - 1, count, dtype=np.int32),
        }
        if self._routed:
            inputs[VISUAL_MASK] = visual
        try:
            logits = self._turns.run(self, inputs)
        except BaseException:
            self._clear()  # what the state holds is unknown
            self._keys = self._keys[:0]
            raise
        if self._wider is not None:
            self._fed.append((embeds, visual, np.arange(rows)))
        self._order = np.arange(rows, dtype=np.int32)
        self._slots, self._last = end, (count, every)
        return logits


def part_of(state: ov.Tensor, slots: np.ndarray | None = None) -> ov.Tensor:
    """A copy of these slots of a state, or of all slots, for any element type."""
    shape = [*state.shape]
    slots = np.arange(shape[SLOTS_AXIS]) if slots is None else slots
    copy = ov.Tensor(state.element_type, ov.Shape([*shape[:SLOTS_AXIS], len(slots), *shape[SLOTS_AXIS + 1 :]]))
    edges = np.flatnonzero(np.diff(slots) != 1) + 1
    for run in np.split(np.arange(len(slots)), edges):
        source, target = _slots_of(state, slots[run[0]], slots[run[-1]] + 1), _slots_of(copy, run[0], run[-1] + 1)
        source.copy_to(target)
    return copy


def _slots_of(state: ov.Tensor, start: int, end: int) -> ov.Tensor:
    """A view of some slots of a state."""
    shape = [*state.shape]
    begin = [0] * len(shape)
    begin[SLOTS_AXIS], shape[SLOTS_AXIS] = int(start), int(end)
    return ov.Tensor(state, ov.Coordinate(begin), ov.Coordinate(shape))
