"""A KV cache of pages in our own memory, over the language part with paged attention: for a CPU.

The attention of the saved part becomes paged attention when the part is opened. On the 1B shape, a prompt of 3,380 tokens takes two
thirds of the time and half of the memory of OpenVINO's state. A cache that holds more than a new prompt shares is cut, and one that
holds less copies pages of another.
Pages: Kwon et al. 2023, arXiv:2309.06180; inputs as openvinotoolkit/openvino src/core/src/op/paged_attention.cpp names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import openvino as ov

from runtime.parts.kv_cache import LAST_POSITION, KVCache, head_sees_positions
from runtime.parts.part import VISUAL_MASK, infer
from runtime.progress import Progress

FIRST_PAGES = 32
FEW = 20  # prompt tokens that are read no later by decode's compilation than by prefill's (docs/experiments.md)


class PagedCache(KVCache):
    """Pages of keys and values in our own memory, and a page table per row; rows share full pages.

    Decode steps, draft tokens and prompts of up to `FEW` new tokens run on `decode`, or on `second` once it returns one, over the
    same pages: a second compilation of the part, since prefill and decode are not fastest in the same one. `guesses` returns how
    many draft tokens are free.
    """

    @staticmethod
    def adapt(model: ov.Model) -> ov.Model:
        """Turn attention into paged attention, and add the input of `head_sees_positions`."""
        from openvino._offline_transformations import paged_attention_transformation

        paged_attention_transformation(model)
        head_sees_positions(model, 0)
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
        self._uses: list[int] = []  # number of rows that use a page
        self._layouts: dict[ov.InferRequest, tuple[Any, dict[str, np.ndarray]]] = {}  # what each request was given last
        self._grow(FIRST_PAGES)
        self._join_siblings()

    @cached_property
    def _prefill(self) -> ov.InferRequest:
        """Created on first use: creation waits for a run in progress, as while weights are packed."""
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
        """The requests created so far."""
        return [each for each in (vars(self).get("_prefill"), self._decoding) if each is not None]

    def cancel(self) -> None:
        for request in self._requests():  # the cache counts pages only once they are written
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
            if length % self._page and self._uses[table[-1]] > 1:  # each row writes its next token into its own page
                copy = self._take()
                self._copy_page(table[-1], copy)
                self._release(table[-1:])
                table[-1] = copy
        self._tables, self._lengths = tables, lengths

    def _count(self) -> int:
        return self._lengths[0]

    def _cut(self, length: int) -> int:
        pages = -(-length // self._page)
        for table in self._tables[1:]:
            self._release(table)
        self._release(self._tables[0][pages:])
        self._tables, self._lengths = [self._tables[0][:pages]], [length]
        return length

    def _copy_from(self, donor: PagedCache, keys: np.ndarray) -> None:
        """Copies full pages only: all tokens of a page share its scales."""
        count = donor.shared_with(keys) // self._page
        self._cut(0)
        table = [self._take() for _ in range(count)]
        for name in self._shapes:
            theirs, ours = donor._tensors[name], self._tensors[name]
            for source, target in zip(donor._tables[0], table, strict=False):
                _pages_of(ours, target, target + 1)[:] = _pages_of(theirs, source, source + 1)
        self._tables, self._lengths = [table], [count * self._page]
        self._keys = keys[: count * self._page].copy()

    def _feed(self, embeds: np.ndarray, mask: np.ndarray, visual: np.ndarray, progress: Progress | None) -> np.ndarray:
        rows, count = mask.shape
        if self._lengths == [0] and rows > 1:
            self._tables, self._lengths = [[] for _ in range(rows)], [0] * rows
        if count == 1:
            return self._one_each(embeds[:, 0], visual)
        logits, total, done = [], int(mask.sum()), 0
        for row in range(rows):  # without padding
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
        """One token of every row (R, D) -> logits (R, 1, V)."""
        rows = range(len(embeds))
        if self._plain_length is not None and len(rows) > 1 and max(self._lengths) >= self._plain_length:
            alone = [self._step([row], embeds[row : row + 1], [1], visual[row : row + 1]).copy() for row in rows]
            return np.concatenate(alone)  # in one batch, the longest row would set the rotary positions of all
        logits = self._step(rows, embeds, [1] * len(rows), visual)
        if len(rows) == 1:
            self._remember_prompt(1)  # a prompt with only its last token new
        return logits

    def _feed_draft(self, embeds: np.ndarray) -> np.ndarray:
        count = embeds.shape[1]
        return self._step([0], embeds[0], [count], np.zeros((1, count), np.int64), True)

    def _step(
        self, rows: Sequence[int], embeds: np.ndarray, counts: list[int], visual: np.ndarray, every: bool = False
    ) -> np.ndarray:
        """Tokens (T, D) of these rows, `counts` per row -> logits (R, 1, V) of the last ones, or with `every` (T, 1, V) of all."""
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
        few = every or sum(counts) <= FEW  # draft tokens must match decode steps
        request = self._decode if few or single else self._prefill
        layout = (counts, [[*table] for table in tables], every)
        told, given = self._layouts.get(request, (None, {}))
        if told == layout and single:  # most tokens need no new page: write in place, since new inputs cost 0.2 ms
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
                inputs = {name: np.array(values, order="C") for name, values in inputs.items()}  # written in place later
            self._layouts[request] = (layout, inputs)  # the request reads these arrays until it gets others
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
                _pages_of(tensor, 0, self._pages)[:] = _pages_of(self._tensors[name], 0, self._pages)
            self._tensors[name] = tensor
            for request in self._requests():
                request.set_tensor(name, tensor)
        self._free = [*range(pages - 1, self._pages - 1, -1), *self._free]
        self._uses += [0] * (pages - self._pages)
        self._pages = pages

    def _copy_page(self, source: int, target: int) -> None:
        for name in self._shapes:
            tensor = self._tensors[name]
            _pages_of(tensor, target, target + 1)[:] = _pages_of(tensor, source, source + 1)


def page_shapes(compiled: ov.CompiledModel) -> dict[str, tuple[ov.Type, list[int]]]:
    """Type and shape of a page, for each cache input of a paged part."""
    ports = {port.get_any_name(): port for port in compiled.inputs if "_cache." in port.get_any_name()}
    return {name: (port.element_type, [side.get_length() for side in [*port.partial_shape][1:]]) for name, port in ports.items()}


def _pages_of(tensor: ov.Tensor, start: int, end: int) -> np.ndarray:
    """The bytes of some pages of a cache tensor (pages, ...), to read or write: OpenVINO has no views of numbers of 4 bits."""
    page = tensor.byte_size // tensor.shape[0]
    return tensor.data.reshape(-1).view(np.uint8)[start * page : end * page]
