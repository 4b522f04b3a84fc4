"""KV caches of the language part, two kinds behind one set of calls: pages of our own, and OpenVINO's state.

On a CPU the attention of the saved part is turned into paged attention when it is opened: measured on the 1B shape, a prompt of
3,380 tokens takes two thirds of the time and half of the memory, a cache that holds more than a new prompt wants is simply
shortened, and one that holds less copies pages of another one. Other devices keep the part's own state. Knows embeddings, logits
and the key of each token; nothing of sampling, prompts or pictures.
Pages: Kwon et al. 2023, arXiv:2309.06180; inputs as openvinotoolkit/openvino src/core/src/op/paged_attention.cpp names them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from runtime.errors import NumericsError
from runtime.parts.part import VISUAL_MASK, infer
from runtime.progress import Cancelled, Progress

PREFILL_AT_ONCE = 1024  # tokens; bounds the memory of a prompt, and how long a cancelled one goes on
EVEN_WIDTH = 128
FIRST_PAGES = 32
LEAST_ADOPTED = 32  # tokens that are worth the copy: the beginning that all prompts of a template share is about so long
_SIBLINGS = Lock()  # a set must not grow in one thread while another one reads it
LAST_POSITION = "last_position"  # our input of the paged part: which tokens the head sees


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

    def _adopt(self, keys: np.ndarray) -> None:  # noqa: B027  a state cannot be copied in part
        """Take over what a sibling holds of a prompt with these keys (T,), if it is worth it."""

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
        if not np.isfinite(logits[..., :64]).all():  # what is no number before the head makes no logit one
            self._cut(0)
            self._keys = self._keys[:0]
            raise NumericsError(
                "the language part gave logits that are not numbers: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return logits

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Embeddings (1, T, D) of a token and of guesses what follows, with their ids (T,) -> logits (T, V) after each of them.

        All of them count as here until `drop` says how many were wrong. Only with `room_for_drafts`.
        """
        raise NotImplementedError  # room_for_drafts is 0

    def drop(self, count: int) -> None:
        """Forget the last `count` tokens of a single row. Only with `room_for_drafts`."""
        raise NotImplementedError

    @property
    def room_for_drafts(self) -> int:
        """How many tokens may be fed at once as if one by one: none where this cache cannot, or positions depend on the length."""
        return 0

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
    def _cut(self, length: int) -> int:
        """Forget all but the first tokens of a single row, or all; returns how many were kept."""

    @abstractmethod
    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        """As `feed`, and calls `_remember_prompt` after each piece of a prompt."""

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
    rest is short (BENCHMARKS.md).
    """
    starts = [*range(0, total, most)]
    even = total // EVEN_WIDTH * EVEN_WIDTH
    if starts and starts[-1] + 2 * EVEN_WIDTH <= even < total:
        starts.append(even)
    return [*zip(starts, [*starts[1:], total], strict=False)]


def head_of(model: ov.Model) -> ov.Node:
    """The matrix multiplication that gives the logits."""
    return model.get_results()[0].input_value(0).get_node()


class StatefulCache(KVCache):
    """The state of the saved part: slots stay where they were written.

    What is no longer wanted is masked out, and the tokens after it are given the positions they would have without it.
    """

    @staticmethod
    def adapt(model: ov.Model) -> ov.Model:
        """Let the head see the last position only; the logits of a whole prompt are not wanted and take gigabytes."""
        head = head_of(model)
        last = opset.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
        head.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        return model

    def __init__(self, compiled: ov.CompiledModel, **options: Any):
        super().__init__(compiled, **options)
        self._clear()

    @cached_property
    def _request(self) -> ov.InferRequest:
        """Made when it is needed: that waits for a run which is going on, as when weights are packed."""
        return self._compiled.create_infer_request()

    def _clear(self) -> None:
        if "_request" in vars(self):
            self._request.reset_state()
        self._slots = 0
        self._mask = np.zeros((1, 256), np.int64)  # (B, room), 1 where a token stands
        self._order = np.zeros(1, np.int32)

    def cancel(self) -> None:
        """Nothing: a state that is left in the middle is lost, and the next piece or token is soon there."""

    def reorder(self, rows: Sequence[int]) -> None:
        self._order = self._order[np.asarray(rows)]
        self._mask = self._mask[np.asarray(rows)]

    def _cut(self, length: int) -> int:
        # More dead slots than living ones are dearer than to start afresh; a window counts slots, the dead ones too.
        if self._slots > (length if self._window else 2 * length):
            self._clear()
            return 0
        standing = np.flatnonzero(self._mask[0, : self._slots])
        self._mask[0, standing[length:]] = 0
        return length

    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        total = embeds.shape[1]
        for start, end in self._pieces(int(self._mask[0, : self._slots].sum()), total):
            if progress is not None:
                progress("prefill", start, total)
            self._step(embeds[:, start:end], mask[:, start:end], visual[:, start:end])
            if len(mask) == 1:
                self._remember_prompt(end - start)
        return self._request.get_tensor("logits").data

    def _step(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray) -> None:
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
        }
        if self._routed:
            inputs[VISUAL_MASK] = visual
        try:
            infer(self._request, inputs)
        except BaseException:
            self._clear()  # how far the state came is not known
            self._keys = self._keys[:0]
            raise
        self._order = np.arange(rows, dtype=np.int32)
        self._slots = end


class PagedCache(KVCache):
    """Pages of keys and values in our own memory, and a table of pages a row; rows share pages that are full.

    Where `decode` is given, or from when `second` gives one, steps of one token a row and guesses run there, over the same pages:
    the part compiled another way, since a prompt and a single token are not fastest in the same one. `guesses` says how many
    guessed tokens are free.
    """

    @staticmethod
    def adapt(model: ov.Model) -> ov.Model:
        """Turn attention into paged attention, and let the head see the positions of one more input only."""
        from openvino._offline_transformations import paged_attention_transformation

        paged_attention_transformation(model)
        head = head_of(model)
        rows = opset.parameter([-1], np.int32, name=LAST_POSITION)
        rows.output(0).get_tensor().set_names({LAST_POSITION})
        last = opset.gather(head.input_value(0), rows, opset.constant(0))
        head.input(0).replace_source_output(last.output(0))
        model.add_parameters([rows])
        model.validate_nodes_and_infer_types()
        return model

    def __init__(
        self,
        compiled: ov.CompiledModel,
        decode: ov.CompiledModel | None = None,
        second: Callable[[], ov.CompiledModel | None] = lambda: None,
        guesses: Callable[[], int] = lambda: 0,
        **options: Any,
    ):
        super().__init__(compiled, **options)
        self._guesses = guesses
        self._compiled_decode, self._second = decode, second
        self._decoding: ov.InferRequest | None = None
        self._shapes = page_shapes(compiled)
        self._tensors: dict[str, ov.Tensor] = {}  # the pages, by input
        self._page = next(shape[1] for name, (_, shape) in self._shapes.items() if name.startswith("value_cache"))  # tokens a page
        self._pages = 0
        self._tables: list[list[int]] = [[]]
        self._lengths = [0]
        self._free: list[int] = []
        self._uses: list[int] = []  # rows that a page belongs to
        self._layouts: dict[ov.InferRequest, tuple[Any, dict[str, np.ndarray]]] = {}  # what each request has been given
        self._grow(FIRST_PAGES)
        with _SIBLINGS:  # now that it is whole: others may ask it at once
            self._siblings.add(self)

    @cached_property
    def _prefill(self) -> ov.InferRequest:
        """Made when it is needed: that waits for a run which is going on, as when weights are packed."""
        return self._over_pages(self._compiled)

    @property
    def _decode(self) -> ov.InferRequest:
        compiled = self._compiled_decode or (None if self.repeatable else self._second())
        if compiled is None:
            return self._prefill
        if self._decoding is None:
            self._decoding = self._over_pages(compiled)
        return self._decoding

    @property
    def free_guesses(self) -> int:
        return 0 if self.repeatable else self._guesses()

    def _over_pages(self, compiled: ov.CompiledModel) -> ov.InferRequest:
        request = compiled.create_infer_request()
        for name, tensor in self._tensors.items():
            request.set_tensor(name, tensor)
        return request

    def _requests(self) -> list[ov.InferRequest]:
        """Those that were made."""
        return [each for each in (vars(self).get("_prefill"), self._decoding) if each is not None]

    def cancel(self) -> None:
        for request in self._requests():  # pages count only once they are written
            request.cancel()

    def reorder(self, rows: Sequence[int]) -> None:
        tables = [[*self._tables[row]] for row in rows]
        lengths = [self._lengths[row] for row in rows]
        for table in tables:
            for page in table:
                self._uses[page] += 1
        for table in self._tables:
            self._release(table)
        for table, length in zip(tables, lengths, strict=True):
            if length % self._page and self._uses[table[-1]] > 1:  # the next token is written into a page of its own
                copy = self._take()
                self._copy_page(table[-1], copy)
                self._release(table[-1:])
                table[-1] = copy
        self._tables, self._lengths = tables, lengths

    def _cut(self, length: int) -> int:
        pages = -(-length // self._page)
        for table in self._tables[1:]:
            self._release(table)
        self._release(self._tables[0][pages:])
        self._tables, self._lengths = [self._tables[0][:pages]], [length]
        return length

    def _adopt(self, keys: np.ndarray) -> None:
        """Whole pages only: a page's scales are those of all of its tokens."""
        with _SIBLINGS:
            others = [cache for cache in self._siblings if isinstance(cache, PagedCache) and cache is not self]
        for donor in sorted(others, key=lambda cache: -cache.shared_with(keys)):
            if donor.shared_with(keys) < self.shared_with(keys) + LEAST_ADOPTED:
                return
            if donor.busy.acquire(blocking=False):
                try:
                    self._copy_from(donor, keys)
                finally:
                    donor.busy.release()
                return

    def _copy_from(self, donor: PagedCache, keys: np.ndarray) -> None:
        count = donor.shared_with(keys) // self._page
        self._cut(0)
        table = [self._take() for _ in range(count)]
        for name in self._shapes:
            theirs, ours = donor._tensors[name], self._tensors[name]
            for source, target in zip(donor._tables[0], table, strict=False):
                _pages_of(theirs, source, source + 1).copy_to(_pages_of(ours, target, target + 1))
        self._tables, self._lengths = [table], [count * self._page]
        self._keys = keys[: count * self._page].copy()

    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        rows, count = mask.shape
        if self._lengths == [0] and rows > 1:
            self._tables, self._lengths = [[] for _ in range(rows)], [0] * rows
        if count == 1:
            return self._one_each(embeds[:, 0], visual)
        logits, total, done = [], int(mask.sum()), 0
        for row in range(rows):  # padding is left out
            tokens, theirs = embeds[row][mask[row] == 1], visual[row][mask[row] == 1]
            for start, end in self._pieces(self._lengths[row], len(tokens)):
                if progress is not None:
                    progress("prefill", done + start, total)
                found = self._step([row], tokens[start:end], [end - start], theirs[start:end])
                if rows == 1:
                    self._remember_prompt(end - start)
            done += len(tokens)
            logits.append(found.copy())
        return np.concatenate(logits)

    def _one_each(self, embeds: np.ndarray, visual: np.ndarray) -> np.ndarray:
        """One token (R, D) of every row -> logits (R, 1, V)."""
        rows = range(len(embeds))
        if self._plain_length is not None and len(rows) > 1 and max(self._lengths) >= self._plain_length:
            alone = [self._step([row], embeds[row : row + 1], [1], visual[row : row + 1]).copy() for row in rows]
            return np.concatenate(alone)  # together, the longest row would say how the positions of all are turned
        logits = self._step(rows, embeds, [1] * len(rows), visual)
        if len(rows) == 1:
            self._remember_prompt(1)  # a prompt of which only the last token was new
        return logits

    @property
    def room_for_drafts(self) -> int:
        return 1 << 30 if self._plain_length is None else max(0, self._plain_length - self._lengths[0])

    def drop(self, count: int) -> None:
        self._cut(self._lengths[0] - count)
        self._keys = self._keys[: len(self._keys) - count]

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        logits = self._checked(self._step, [0], embeds[0], [len(keys)], np.zeros_like(keys), True)
        self._remember(keys)
        return logits.reshape(len(keys), -1)

    def _step(
        self, rows: Sequence[int], embeds: np.ndarray, counts: list[int], visual: np.ndarray, every: bool = False
    ) -> np.ndarray:
        """Tokens (T, D) of these rows, `counts` each -> logits (R, 1, V) of each row's last, or with `every` (T, 1, V) of all."""
        past = [self._lengths[row] for row in rows]
        lengths = [length + count for length, count in zip(past, counts, strict=True)]
        tables = [self._tables[row] for row in rows]
        for table, length in zip(tables, lengths, strict=True):
            while len(table) * self._page < length:
                table.append(self._take())
        inputs = {
            "inputs_embeds": embeds,
            "position_ids": np.concatenate([np.arange(*span) for span in zip(past, lengths, strict=True)]),
            "past_lens": np.array(past, np.int32),
            "max_context_len": np.array(max(lengths), np.int32),
        }
        if self._routed:
            inputs[VISUAL_MASK] = visual.reshape(-1, 1)
        single = max(counts) == 1
        request = self._decode if every or single else self._prefill  # guesses are to be what single steps give
        layout = (counts, [[*table] for table in tables], every)
        told, given = self._layouts.get(request, (None, {}))
        if told == layout and single:  # most tokens take no new page: nothing is handed over, which would take 0.2 ms
            for name, values in inputs.items():
                given[name][...] = values
            inputs = {}
        else:
            ends = np.cumsum([0, *counts])
            inputs |= {
                "subsequence_begins": ends.astype(np.int32),
                LAST_POSITION: np.arange(ends[-1], dtype=np.int32) if every else (ends[1:] - 1).astype(np.int32),
                "block_indices": np.concatenate(tables).astype(np.int32),
                "block_indices_begins": np.cumsum([0, *map(len, tables)]).astype(np.int32),
            }
            if single:
                inputs = {name: np.array(values, order="C") for name, values in inputs.items()}  # to be written to
            self._layouts[request] = (layout, inputs)  # the request reads these arrays until it is given others
        infer(request, inputs)
        for row, length in zip(rows, lengths, strict=True):
            self._lengths[row] = length
        return request.get_tensor("logits").data

    def _take(self) -> int:
        if not self._free:
            self._grow(2 * self._pages)
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)

    def _grow(self, pages: int) -> None:
        for name, (kind, shape) in self._shapes.items():
            tensor = ov.Tensor(kind, ov.Shape([pages, *shape]))
            if self._pages:
                self._tensors[name].copy_to(_pages_of(tensor, 0, self._pages))
            self._tensors[name] = tensor
            for request in self._requests():
                request.set_tensor(name, tensor)
        self._free = [*range(pages - 1, self._pages - 1, -1), *self._free]
        self._uses += [0] * (pages - self._pages)
        self._pages = pages

    def _copy_page(self, source: int, target: int) -> None:
        for name in self._shapes:
            tensor = self._tensors[name]
            _pages_of(tensor, source, source + 1).copy_to(_pages_of(tensor, target, target + 1))


def page_shapes(compiled: ov.CompiledModel) -> dict[str, tuple[ov.Type, list[int]]]:
    """Type and shape of a page of each cache input of a paged part."""
    ports = {port.get_any_name(): port for port in compiled.inputs if "_cache." in port.get_any_name()}
    return {name: (port.element_type, [side.get_length() for side in [*port.partial_shape][1:]]) for name, port in ports.items()}


def _pages_of(tensor: ov.Tensor, start: int, end: int) -> ov.Tensor:
    """A view of some pages of a cache tensor (pages, ...)."""
    shape = [*tensor.shape]
    return ov.Tensor(tensor, ov.Coordinate([start, *[0] * (len(shape) - 1)]), ov.Coordinate([end, *shape[1:]]))
