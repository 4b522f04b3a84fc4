"""Turn a picture into tiles (N, 3, S, S), as the InternVL training code does.

Pillow and NumPy: knows nothing of prompts, tokens or devices, nor of where a picture comes from.
Grid rule: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/train/dataset.py (dynamic_preprocess, find_closest_aspect_ratio)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha1

import numpy as np
from PIL import Image

from runtime.errors import OptionError
from runtime.folder.config import InternVLConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles."""

    side: int  # S, of a tile in pixels
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True  # add the whole picture as a last tile when there is more than one

    @classmethod
    def of(cls, config: InternVLConfig) -> Tiling:
        """The tiling that the checkpoint was trained with; one tile where it was trained without tiling."""
        if not config.dynamic_image_size:
            return cls(config.tile_size, 1, 1, thumbnail=False)
        return cls(config.tile_size, config.min_tiles, config.max_tiles, config.use_thumbnail)

    def at_most(self, tiles: int | None) -> Tiling:
        """The same with another limit, not counting the thumbnail; None changes nothing. Raises OptionError below 1."""
        if tiles is None:
            return self
        if tiles < 1:
            raise OptionError(f"max tiles {tiles} is not positive")
        return replace(self, max_tiles=tiles, min_tiles=min(self.min_tiles, tiles))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Return (columns, rows): the grid of at most `max_tiles` whose aspect ratio is nearest to the picture's.

    Between grids of equal distance the larger one wins when the picture has more than half of its pixels.
    """
    grids = {
        (columns, rows)
        for columns in range(1, tiling.max_tiles + 1)
        for rows in range(1, tiling.max_tiles // columns + 1)
        if columns * rows >= tiling.min_tiles
    }
    shape, best, nearest = width / height, (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(shape - columns / rows)
        large = width * height > 0.5 * tiling.side**2 * columns * rows
        if distance < nearest or (distance == nearest and large):
            best, nearest = (columns, rows), distance
    return best


def cut_pixels(picture: Image.Image, tiling: Tiling) -> np.ndarray:
    """Cut an RGB picture into tiles (N, S, S, 3) uint8, row by row, the thumbnail last."""
    side = tiling.side
    columns, rows = choose_grid(*picture.size, tiling)
    resized = picture.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((side * column, side * row, side * (column + 1), side * (row + 1)))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.thumbnail and len(tiles) > 1:
        tiles.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Tiles (N, S, S, 3) uint8 -> (N, 3, S, S) float32 as the vision part takes them."""
    normalised = (pixels.astype(np.float32) / 255 - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def cut_tiles(picture: Image.Image, tiling: Tiling) -> np.ndarray:
    """Cut an RGB picture into normalised tiles (N, 3, S, S) float32, row by row, the thumbnail last."""
    return normalise(cut_pixels(picture, tiling))


@dataclass(frozen=True)
class PictureTiles:
    """The tiles of one picture, a content hash of each, and the grid (columns, rows) they were cut in, where it is known."""

    tile_keys: tuple[bytes, ...]
    pixels: np.ndarray = field(repr=False, compare=False)  # (N, S, S, 3) uint8, or (N, 3, S, S) float32 when normalised already
    grid: tuple[int, int] | None = field(default=None, compare=False)
    size: tuple[int, int] | None = field(default=None, compare=False)  # width and height of the picture, where it is known

    @property
    def key(self) -> bytes:
        """A hash of the content of all tiles."""
        return sha1(b"".join(self.tile_keys), usedforsecurity=False).digest()

    @property
    def count(self) -> int:
        """Number of tiles N."""
        return len(self.pixels)

    @classmethod
    def of_picture(cls, picture: Image.Image, tiling: Tiling) -> PictureTiles:
        """The tiles of an RGB picture."""
        return cls.of_tiles(cut_pixels(picture, tiling), choose_grid(*picture.size, tiling), picture.size)

    @classmethod
    def of_tiles(cls, tiles: np.ndarray, grid: tuple[int, int] | None = None, size: tuple[int, int] | None = None) -> PictureTiles:
        """Tiles that are already cut."""
        keys = tuple(sha1(np.ascontiguousarray(tile).data, usedforsecurity=False).digest() for tile in tiles)
        return cls(keys, tiles, grid, size)

    def normalised(self, number: int) -> np.ndarray:
        """One tile (3, S, S) float32."""
        tile = self.pixels[number]
        return normalise(tile[None])[0] if tile.dtype == np.uint8 else tile
