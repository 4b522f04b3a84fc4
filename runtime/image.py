"""Turn a picture into tiles (N, 3, S, S), as the InternVL training code does.

Pure Pillow and NumPy: knows nothing about prompts, tokens or devices.
Grid rule: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/train/dataset.py (dynamic_preprocess, find_closest_aspect_ratio)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.config import InternVLConfig
from runtime.errors import PictureError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut."""

    side: int  # S, of a tile in pixels
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True  # add the whole picture as a last tile when there is more than one

    @classmethod
    def of(cls, config: InternVLConfig) -> Tiling:
        """What the checkpoint was trained with; one tile where it was trained without tiles."""
        if not config.dynamic_image_size:
            return cls(config.tile_size, 1, 1, thumbnail=False)
        return cls(config.tile_size, config.min_tiles, config.max_tiles, config.use_thumbnail)


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Return (columns, rows): the grid of at most `max_tiles` whose shape is nearest to the picture's.

    Among grids of exactly the same shape the larger one wins when the picture has more than half of its pixels.
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


def cut_tiles(picture: Image.Image, tiling: Tiling) -> np.ndarray:
    """Cut an RGB picture into normalised tiles (N, 3, S, S) float32, row by row, the thumbnail last."""
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
    pixels = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / 255  # (N, S, S, 3)
    normalised = (pixels - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def open_picture(path: Path) -> Image.Image:
    """Open a picture file as RGB, turned as its EXIF orientation says.

    Upstream ignores the orientation, so that photographs lie on their side: an intended difference. Raises PictureError.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"{path} is not there") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} cannot be read as a picture ({error})") from None
