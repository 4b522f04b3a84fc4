"""The drawing primitives of the scenes: shapes with their exact boxes, fonts, and a picture with marks of what was drawn on it.

Needs Pillow; fonts are Pillow's own and the DejaVu family that matplotlib carries. Knows nothing of scenes or texts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 of a box in pixels, the edges of what it holds
FONTS = ["", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"]


@dataclass(frozen=True)
class Mark:
    """What stands where in a picture: a letter, shape or colour, and its box in pixels; serves training only."""

    what: str
    box: tuple[float, float, float, float]


@dataclass
class Canvas:
    """One picture and the marks of what was drawn on it."""

    picture: Image.Image
    marks: list[Mark] = field(default_factory=list)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    """Fill one shape around (x, y); all of them reach about `radius` from there."""
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    if shape == "square":
        half = 0.86 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        return
    if shape == "cross":
        arm = 0.34 * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        return
    pen.polygon(corner_points(shape, x, y, radius), fill=fill)


def corner_points(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape with straight sides."""
    corners = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.42)}[shape]
    count, inner = corners
    points = []
    for n in range(count):
        reach = radius if n % 2 == 0 or shape != "star" else radius * inner
        angle = 2 * math.pi * n / count - math.pi / 2
        narrow = 0.8 if shape == "diamond" else 1.0
        points.append((x + reach * math.cos(angle) * narrow, y + reach * math.sin(angle)))
    return points


def extent(shape: str, x: float, y: float, radius: float) -> Corners:
    """The box of what `draw_shape` fills."""
    if shape in ("circle", "square", "cross"):
        half = 0.86 * radius if shape == "square" else radius
        return (x - half, y - half, x + half, y + half)
    across, down = zip(*corner_points(shape, x, y, radius), strict=True)
    return (min(across), min(down), max(across), max(down))


@functools.cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font for the empty name, else one of the DejaVu family, found where matplotlib keeps it."""
    if not name:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(_dejavu_folder() / f"{name}.ttf"), size)


@functools.cache
def _dejavu_folder() -> Path:
    from importlib.util import find_spec

    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "matplotlib is not installed; run  pip install matplotlib  (it carries the DejaVu fonts)", name="matplotlib"
        )
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
