"""Built-in pictures to calibrate and to prove a vision part: photographs; drawn pages, charts and windows.

The photographs come with libraries that the conversion installs. Knows pictures, but no tiles and no models.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 896  # two tiles of 448 pixels
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were "
    "all her she there would their we him been has when who will no more if out so up said what its about than into them can only "
    "time new some could these two may first then do any like my now over such our man me even most made after also well many must"
)
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#bcbd22")


def photographs() -> list[Image.Image]:
    """The sample photographs of scikit-learn and matplotlib, as far as installed: a building, a flower, a person."""
    found: list[Image.Image] = []
    try:
        import sklearn

        folder = Path(sklearn.__file__).parent / "datasets" / "images"
        found += [_opened(folder / name) for name in ("china.jpg", "flower.jpg")]
    except (ImportError, OSError):
        pass
    try:
        from matplotlib.cbook import get_sample_data

        found.append(_opened(Path(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))))
    except (ImportError, OSError):
        pass
    return found


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def page(seed: int) -> Image.Image:
    """A page of print: a heading, paragraphs in one or two columns, a table."""
    draw = random.Random(f"page {seed}")
    picture, pen = _sheet("#ffffff" if draw.random() < 0.7 else "#fbf5e6")
    size = draw.choice((16, 20, 26))
    columns = draw.choice((1, 2))
    pen.text((60, 50), _words(draw, 4).title(), fill="#111111", font=_font(size * 2))
    width = (SIDE - 120 - 40 * (columns - 1)) // columns
    for column in range(columns):
        top: float = 60 + 3 * size
        while top < SIDE - 220:
            line = ""
            while pen.textlength(line, _font(size)) < width * 0.88:
                line += _words(draw, 1) + " "
            pen.text((60 + column * (width + 40), top), line, fill="#222222", font=_font(size))
            top += size * (3 if draw.random() < 0.12 else 1.4)
    for row in range(4):
        for cell in range(4):
            left, top = 60 + cell * 190, SIDE - 190 + row * 40
            pen.rectangle((left, top, left + 190, top + 40), outline="#444444")
            text = f"{draw.uniform(0, 1000):.1f}" if row and cell else _words(draw, 1)
            pen.text((left + 10, top + 10), text, fill="#000000", font=_font(18))
    return picture


def chart(seed: int) -> Image.Image:
    """A chart of bars, lines or slices, with axes, numbers and a legend."""
    draw = random.Random(f"chart {seed}")
    picture, pen = _sheet("#ffffff" if draw.random() < 0.7 else "#20232a")
    ink = "#111111" if picture.getpixel((0, 0)) != (0x20, 0x23, 0x2A) else "#eeeeee"
    small = _font(18)
    pen.text((250, 40), _words(draw, 3).title(), fill=ink, font=_font(34))
    kind, series = draw.choice(("bars", "lines", "slices")), draw.randint(2, 4)
    if kind == "slices":
        start = 0.0
        shares = [draw.random() + 0.2 for _ in range(series + 2)]
        for number, share in enumerate(shares):
            end = start + 360 * share / sum(shares)
            pen.pieslice((180, 150, 720, 690), start, end, fill=COLOURS[number], outline=ink)
            start = end
    else:
        pen.line((110, 130, 110, 740, 840, 740), fill=ink, width=3)
        unit = draw.choice((5, 20, 100))
        for step in range(6):
            pen.text((50, 730 - step * 115), str(step * unit), fill=ink, font=small)
            pen.line((110, 740 - step * 115, 840, 740 - step * 115), fill="#888888")
        places = draw.randint(5, 9)
        for number in range(series):
            heights = [draw.uniform(20, 580) for _ in range(places)]
            lefts = [130 + place * 700 // places for place in range(places)]
            if kind == "bars":
                wide = 560 // places // series
                for left, height in zip(lefts, heights, strict=True):
                    corner = left + number * wide
                    pen.rectangle((corner, 740 - height, corner + wide - 2, 740), fill=COLOURS[number])
            else:
                pen.line([(left, 740 - height) for left, height in zip(lefts, heights, strict=True)], COLOURS[number], 5)
    for number in range(series):
        pen.rectangle((120 + number * 190, 800, 145 + number * 190, 825), fill=COLOURS[number])
        pen.text((155 + number * 190, 803), _words(draw, 1), fill=ink, font=small)
    return picture


def window(seed: int) -> Image.Image:
    """A screenshot in a dark or a light theme: a title bar, a list at the side, text, buttons."""
    draw = random.Random(f"window {seed}")
    dark = draw.random() < 0.5
    ground, ink, line = ("#1e1e1e", "#d4d4d4", "#3c3c3c") if dark else ("#f3f3f3", "#1a1a1a", "#c8c8c8")
    picture, pen = _sheet(ground)
    font = _font(20)
    pen.rectangle((0, 0, SIDE, 48), fill=draw.choice(COLOURS))
    pen.text((20, 12), _words(draw, 2).title(), fill="#ffffff", font=font)
    for number, colour in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        pen.ellipse((SIDE - 110 + number * 34, 14, SIDE - 90 + number * 34, 34), fill=colour)
    pen.rectangle((0, 48, 230, SIDE), fill=line)
    for row in range(14):
        pen.rounded_rectangle((16, 70 + row * 56, 44, 98 + row * 56), 6, fill=draw.choice(COLOURS))
        pen.text((58, 74 + row * 56), _words(draw, 2), fill=ink, font=font)
    for row in range(20):
        indent = 250 + 30 * draw.randint(0, 3)
        colour = ink if draw.random() < 0.6 else draw.choice(COLOURS)
        pen.text((indent, 70 + row * 34), _words(draw, draw.randint(1, 5)), fill=colour, font=font)
    for number in range(3):
        left = 260 + number * 200
        pen.rounded_rectangle((left, 790, left + 170, 840), 10, fill=draw.choice(COLOURS), outline=line, width=2)
        pen.text((left + 30, 803), _words(draw, 1).title(), fill="#ffffff", font=font)
    return picture


DRAWN: tuple[Callable[[int], Image.Image], ...] = (page, chart, window)


def _sheet(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, SIDE), colour)
    return picture, ImageDraw.Draw(picture)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS.split()) for _ in range(count))
