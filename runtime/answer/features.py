"""Pictures -> their image features in a prompt: the cache of the features of tiles, and a key for each feature row.

Knows tiles and a function that encodes them; no parts, no prompt text and no KV cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from runtime.media.tiles import PictureTiles
from runtime.parts.part import equal_spans
from runtime.progress import Progress

FEATURE_CACHE_BYTES = 256 << 20  # 22 pictures of 13 tiles for a 1B model
NO_ROWS, NO_ROUTER = np.zeros((0, 0), np.float32), np.float32(0)


class Sized(Protocol):
    """A value of known size in memory."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


@dataclass(frozen=True)
class TileFeatures:
    """The image features of a tile: rows (P, D), one per context token.

    With a router also the few rows (P', D) that may replace them, and the probability that these suffice.
    """

    rows: np.ndarray
    few: np.ndarray = field(default_factory=lambda: NO_ROWS)
    suffice: np.float32 = NO_ROUTER

    @property
    def nbytes(self) -> int:
        """Size of the rows in bytes."""
        return self.rows.nbytes + self.few.nbytes

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return bool(np.isfinite(self.rows).all() and np.isfinite(self.few).all() and np.isfinite(self.suffice))


Kept = TypeVar("Kept", bound=Sized)


class FeatureCache(Generic[Kept]):
    """An LRU cache of values by the content of tiles, bounded in bytes.

    Blank parts of a page, frames of a still camera and unchanged corners of a screenshot are encoded once.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: bytes) -> Kept | None:
        """The cached value of a tile, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
            else:
                self.misses += 1
            return self._kept.get(key)

    def add(self, key: bytes, features: Kept) -> None:
        """Cache the value of a tile, unless it alone exceeds the limit."""
        if features.nbytes > self.limit:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = features
                self.bytes += features.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0


def encode_pictures(
    pictures: Sequence[PictureTiles],
    encode: Callable[[np.ndarray], Sequence[TileFeatures]],
    tiles_at_once: int,
    cache: FeatureCache[TileFeatures],
    progress: Progress | None = None,
    known: Mapping[bytes, TileFeatures] | None = None,
) -> tuple[dict[bytes, TileFeatures], int]:
    """Pictures -> the features of their tiles by tile key, and the number of tiles encoded.

    Each distinct tile is encoded once, unless it is `known` or in the cache.
    """
    tiles = {key: (picture, number) for picture in pictures for number, key in enumerate(picture.tile_keys)}
    found = {key: (known or {}).get(key) or cache.find(key) for key in tiles}
    missing = [key for key, features in found.items() if features is None]
    for start, end in equal_spans(len(missing), tiles_at_once):
        if progress is not None:
            progress("tiles", start, len(missing))
        now = missing[start:end]
        encoded = encode(np.stack([picture.normalised(number) for picture, number in map(tiles.__getitem__, now)]))
        for key, features in zip(now, encoded, strict=True):
            found[key] = features
            cache.add(key, features)
    return found, len(missing)  # type: ignore[return-value]


def keys_of(
    ids: np.ndarray,
    context_id: int,
    pictures: Sequence[PictureTiles],
    counts: Sequence[int] | np.ndarray,
    most: int,
    fewest: int = 0,
) -> np.ndarray:
    """A key for each token of a prompt (T,), (T,) int64: its id, or a negative number for one feature row of one picture.

    `counts` has the number of rows of each tile: `most`, or with a router `fewest`; the few rows have keys of their own.
    """
    keys, rows, left = ids.astype(np.int64), [], iter(counts)
    for picture in pictures:
        first = np.int64(int.from_bytes(picture.key[:7], "big"))
        for tile in range(picture.count):
            count = next(left)
            rows.append(first + tile * (most + fewest) + (0 if count == most else most) + np.arange(count))
    keys[ids == context_id] = -1 - np.concatenate(rows) if rows else 0
    return keys
