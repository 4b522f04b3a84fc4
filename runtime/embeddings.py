"""From token ids and pictures to embeddings: the text and vision parts, the cache of vision features, which row is whose.

Knows the two stateless parts and what a context token stands for; knows no prompt text and no KV cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from runtime.device import Placement
from runtime.image import PictureTiles
from runtime.part import compile_part, equal_spans, infer, leave_file, read_part, threads_of
from runtime.stream import Progress

FEATURE_CACHE_BYTES = 256 << 20  # 22 pictures of 13 tiles for a 1B model


class StatelessPart:
    """One part without memory of its own, one input and one output, that several threads may call."""

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, width: int):
        self._compiled = compile_part(core, read_part(core, folder, placement, width), placement)
        self._request = self._compiled.create_infer_request()
        self._input = self._compiled.input().get_any_name()
        self._lock = threading.Lock()
        self._leave_file: Callable[[], None] | None = partial(leave_file, folder, placement)

    def __call__(self, values: Tensor) -> Tensor:
        with self._lock:
            infer(self._request, {self._input: values.numpy()})
            if self._leave_file is not None:  # the weights are packed now
                self._leave_file()
                self._leave_file = None
            return torch.from_numpy(self._request.get_output_tensor().data.copy())

    @property
    def threads(self) -> int:
        """How many it computes with."""
        return threads_of(self._compiled)

    def rest(self) -> None:
        """Give back the memory of intermediate results until the next call."""
        with self._lock:
            self._compiled.release_memory()


class FeatureCache:
    """Context embeddings of pictures by their content and tiling, least recently used out first, bounded in bytes."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: bytes) -> Tensor | None:
        """The features (n, P, D) of a picture, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
            else:
                self.misses += 1
            return self._kept.get(key)

    def add(self, key: bytes, features: Tensor) -> None:
        """Remember features (n, P, D), unless they alone pass the limit."""
        if features.nbytes > self.limit:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = features
                self.bytes += features.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0


def encode_pictures(
    pictures: Sequence[PictureTiles],
    encode: Callable[[Tensor], Tensor],
    tiles_at_once: int,
    cache: FeatureCache,
    progress: Progress | None = None,
) -> tuple[list[Tensor], int]:
    """Pictures -> their features (n, P, D) in order, and how many tiles were encoded for it; the others were in the cache."""
    found = {picture.key: cache.find(picture.key) for picture in pictures}
    missing = {picture.key: picture for picture in pictures if found[picture.key] is None}
    total = sum(picture.count for picture in missing.values())
    rows: list[Tensor] = []
    tiles = (tile for picture in missing.values() for tile in picture.normalised())
    for start, end in equal_spans(total, tiles_at_once):
        if progress is not None:
            progress("tiles", start, total)
        rows.append(encode(torch.from_numpy(np.stack(list(islice(tiles, end - start))))))
    if rows:
        split = torch.cat(rows).split([picture.count for picture in missing.values()])
        for key, features in zip(missing, split, strict=True):
            found[key] = features.clone() if len(missing) > 1 else features  # a view would keep all the others alive
            cache.add(key, found[key])  # type: ignore[arg-type]
    return [found[picture.key] for picture in pictures], total  # type: ignore[misc]


def keys_of(ids: np.ndarray, context_id: int, pictures: Sequence[PictureTiles], tokens_per_tile: int) -> np.ndarray:
    """What each token of a prompt (T,) stands for, (T,) int64: its id, or a negative number for one row of one picture."""
    keys = ids.astype(np.int64)
    rows = [np.int64(int.from_bytes(picture.key[:7], "big")) + np.arange(picture.count * tokens_per_tile) for picture in pictures]
    keys[ids == context_id] = -1 - np.concatenate(rows) if rows else 0
    return keys
