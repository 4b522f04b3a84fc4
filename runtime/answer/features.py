"""Pictures -> the rows that stand for them in a prompt: the cache of their tiles' features, and which row is whose.

Knows tiles, and how to have them encoded; no parts, no prompt text and no KV cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from runtime.media.tiles import PictureTiles
from runtime.parts.part import equal_spans
from runtime.progress import Progress

FEATURE_CACHE_BYTES = 256 << 20  # 22 pictures of 13 tiles for a 1B model


class FeatureCache:
    """Context embeddings of tiles by their content, least recently used out first, bounded in bytes.

    Blank parts of a page, a still camera's frames and the corners of a screenshot that did not change are looked at once.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: bytes) -> np.ndarray | None:
        """The features (P, D) of a tile, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
            else:
                self.misses += 1
            return self._kept.get(key)

    def add(self, key: bytes, features: np.ndarray) -> None:
        """Remember the features (P, D) of a tile, unless they alone pass the limit."""
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
    encode: Callable[[np.ndarray], np.ndarray],
    tiles_at_once: int,
    cache: FeatureCache,
    progress: Progress | None = None,
) -> tuple[list[np.ndarray], int]:
    """Pictures -> their features (n, P, D) in order, and how many tiles were encoded for it.

    Each different tile is encoded once, if it is not in the cache.
    """
    tiles = {key: (picture, number) for picture in pictures for number, key in enumerate(picture.tile_keys)}
    found = {key: cache.find(key) for key in tiles}
    missing = [key for key, features in found.items() if features is None]
    for start, end in equal_spans(len(missing), tiles_at_once):
        if progress is not None:
            progress("tiles", start, len(missing))
        now = missing[start:end]
        encoded = encode(np.stack([picture.normalised(number) for picture, number in map(tiles.__getitem__, now)]))
        for key, features in zip(now, encoded, strict=True):
            found[key] = features.copy()  # a view would keep all of them alive
            cache.add(key, found[key])  # type: ignore[arg-type]
    return [np.stack([found[key] for key in picture.tile_keys]) for picture in pictures], len(missing)  # type: ignore[misc]


def keys_of(ids: np.ndarray, context_id: int, pictures: Sequence[PictureTiles], tokens_per_tile: int) -> np.ndarray:
    """What each token of a prompt (T,) stands for, (T,) int64: its id, or a negative number for one row of one picture."""
    keys = ids.astype(np.int64)
    rows = [np.int64(int.from_bytes(picture.key[:7], "big")) + np.arange(picture.count * tokens_per_tile) for picture in pictures]
    keys[ids == context_id] = -1 - np.concatenate(rows) if rows else 0
    return keys
