"""Draw what the model saw of a picture: its tiles with gaps between them, the thumbnail beside them.

For display only: nothing is computed from it.
"""

from __future__ import annotations

from PIL import Image

from runtime.media.tiles import PictureTiles

GAP = 0.04  # between tiles, as a share of their side


def draw_tiles(picture: PictureTiles, side: int = 224) -> Image.Image:
    """The tiles of a picture whose grid is known, `side` pixels each, row by row as they were cut."""
    assert picture.grid is not None
    columns, rows = picture.grid
    step = side + round(GAP * side)
    thumbnail = picture.count > columns * rows
    sheet = Image.new("RGB", (step * (columns + thumbnail) + (step - side if thumbnail else 0), step * rows), "white")
    for n, pixels in enumerate(picture.pixels):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        last = n == columns * rows  # the thumbnail
        sheet.paste(tile, (step * columns + step - side, 0) if last else (n % columns * step, n // columns * step))
    return sheet


def caption(picture: PictureTiles) -> str:
    """How a picture was cut, in words."""
    assert picture.grid is not None
    columns, rows = picture.grid
    tiles = f"{columns} x {rows} tiles" if columns * rows > 1 else "1 tile"
    return tiles + (" and a thumbnail" if picture.count > columns * rows else "")
