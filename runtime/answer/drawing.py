"""Boxes drawn into a picture for display: outlines and labels, readable on light and dark pictures of any size.

Uses Pillow and its font, and system fonts for letters it lacks. Nothing is computed from the result.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from runtime.answer.boxes import Box
from runtime.media.picture import Source, open_picture

COLOURS = ("#ffd400", "#00c2ff", "#ff5ea8", "#57e389", "#ff8c1a", "#c79bff", "#ffffff", "#5ef0d8")  # all light: labels are black
SMALLEST_TEXT = 10  # pixels
MOST_LETTERS = 200  # of a label; longer ones are truncated
WIDEST = 0.5  # share of the picture's width, for a label wider than its box
MOST_FONTS = 400  # system fonts tried for a label
FONT_FOLDERS = {
    "win32": ("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
}
UNIX_FONT_FOLDERS = ("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")
BROAD = ("noto", "unifont", "arial", "dejavu", "msyh", "malgun", "meiryo", "pingfang", "hiragino", "droidsansfallback", "wqy")
NO_LETTER = "\U0010ffff"  # a code point that no font has: draws the glyph of missing letters

Rectangle = tuple[float, float, float, float]


def draw_boxes(picture: Source, boxes: Sequence[Box]) -> Image.Image:
    """A copy of a picture, RGB and upright, with these boxes and their labels; ignores the boxes' picture index.

    Equal labels share a colour. A label wider than its box and half of the picture is truncated. A label is omitted where no font
    has its letters, or where its script needs shaping or right-to-left layout and Pillow lacks Raqm. Raises PictureError.
    """
    drawn = open_picture(picture).copy()
    pen = ImageDraw.Draw(drawn)
    size = max(SMALLEST_TEXT, round((drawn.width * drawn.height) ** 0.5 / 40))
    line = max(1, round(size / 8))
    labels = [*dict.fromkeys(box.label for box in boxes)]
    placed: list[Rectangle] = []
    for box in boxes:
        edges = _within(box, drawn.size)
        if edges is not None:
            colour = COLOURS[labels.index(box.label) % len(COLOURS)]
            _outline(pen, edges, line, colour)
    for box in boxes:  # on top of all outlines
        edges = _within(box, drawn.size)
        if edges is not None:
            colour = COLOURS[labels.index(box.label) % len(COLOURS)]
            _tag(pen, edges, _shown(box.label), size, line, colour, drawn.size, placed)
    return drawn


def _within(box: Box, size: tuple[int, int]) -> Rectangle | None:
    """The edges of a box clipped to the picture; None where it lies outside."""
    edges = (box.x1, box.y1, box.x2, box.y2)
    if not all(map(math.isfinite, edges)):
        return None
    x1, y1, x2, y2 = (min(max(float(value), 0.0), float(size[n % 2] - 1)) for n, value in enumerate(edges))
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def _outline(pen: ImageDraw.ImageDraw, edges: Rectangle, line: int, colour: str) -> None:
    """A coloured line between two black ones: one of them stands out on any background."""
    x1, y1, x2, y2 = edges
    for grown, width, fill in ((line, 3 * line, "black"), (0, line, colour)):
        pen.rectangle((x1 - grown, y1 - grown, x2 + grown, y2 + grown), outline=fill, width=width)


def _tag(
    pen: ImageDraw.ImageDraw,
    edges: Rectangle,
    label: str,
    size: int,
    line: int,
    colour: str,
    picture: tuple[int, int],
    placed: list[Rectangle],
) -> None:
    """A label on a filled background: above its box, else below, else inside, off other labels where possible."""
    font = _font_for(label, size) if label else None
    if font is None:
        return
    pad = max(1, size // 5)
    x1, y1, x2, y2 = edges
    text = _fitted(label, font, max(x2 - x1, picture[0] * WIDEST) - 2 * pad)
    if not text:
        return
    wide, high = font.getlength(text) + 2 * pad, size * 1.3 + 2 * pad
    if high > picture[1]:
        return
    left = min(max(0.0, x1 - line), max(0.0, picture[0] - wide))
    right = min(max(0.0, x2 + line - wide), max(0.0, picture[0] - wide))
    corners = [(left, y1 - high - line), (left, y2 + line), (left, y1 + line), (left, y2 - high - line), (right, y1 - high - line)]
    spots = [(x, y, x + wide, y + high) for x, y in corners if y >= 0 and y + high <= picture[1]]
    spots = spots or [(left, 0.0, left + wide, high)]
    spot = next((one for one in spots if not any(_overlap(one, other) for other in placed)), spots[0])
    placed.append(spot)
    pen.rectangle(spot, fill=colour, outline="black", width=max(1, line // 2))
    pen.text(((spot[0] + spot[2]) / 2, (spot[1] + spot[3]) / 2), text, fill="black", font=font, anchor="mm")


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _shown(label: str) -> str:
    """A label on one line, without invisible characters."""
    words = " ".join(label[: 4 * MOST_LETTERS].split())[:MOST_LETTERS]
    return "".join(letter for letter in words if unicodedata.category(letter) not in ("Cc", "Cs", "Co", "Cn"))


def _fitted(label: str, font: ImageFont.FreeTypeFont, wide: float) -> str:
    """As much of a label as fits; empty where not even a letter does."""
    if font.getlength(label) <= wide:
        return label
    short, long = 0, len(label)
    while short < long:
        middle = (short + long + 1) // 2
        short, long = (middle, long) if font.getlength(label[:middle] + "...") <= wide else (short, middle - 1)
    return label[:short].rstrip() + "..." if short else ""


# ---- fonts


def _font_for(label: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font with all letters of a label; None where there is none, or where letters would be in the wrong order."""
    letters = frozenset(letter for letter in label if not letter.isspace() and unicodedata.category(letter) != "Cf")
    if not letters or (not features.check("raqm") and any(map(_needs_layout, letters))):
        return None
    file = _file_with(letters)
    if file is None:
        return None
    if not file:
        made = ImageFont.load_default(size)
        return made if isinstance(made, ImageFont.FreeTypeFont) else None
    return ImageFont.truetype(file, size)


def _needs_layout(letter: str) -> bool:
    """Whether a letter is written right to left, or changes shape with its neighbours."""
    return unicodedata.bidirectional(letter) in ("R", "AL", "NSM") or unicodedata.category(letter) == "Mc"


@functools.lru_cache(maxsize=256)
def _file_with(letters: frozenset[str]) -> str | None:
    """The file of the first font with these letters, "" for Pillow's own, None where there is none."""
    own = ImageFont.load_default(20)
    if isinstance(own, ImageFont.FreeTypeFont) and _has(own, letters):
        return ""
    for file in _font_files():
        try:
            font = ImageFont.truetype(file, 20)
            if _has(font, letters):
                return file
        except OSError:  # not a font that Pillow reads
            continue
    return None


def _has(font: ImageFont.FreeTypeFont, letters: frozenset[str]) -> bool:
    """Whether a font has all these letters: none may look like its missing glyph."""
    missing = bytes(font.getmask(NO_LETTER))
    return all(bytes(font.getmask(letter)) != missing for letter in letters)


@functools.cache
def _font_files() -> list[str]:
    """System fonts, those with many scripts first."""
    found: list[str] = []
    for folder in FONT_FOLDERS.get(sys.platform, UNIX_FONT_FOLDERS):
        for where, _, names in os.walk(Path(folder).expanduser()):
            found += [str(Path(where) / name) for name in sorted(names) if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def order(file: str) -> tuple[bool, bool, str]:
        name = Path(file).name.lower()
        return not name.startswith(BROAD), "regular" not in name and "sans." not in name, name

    return sorted(found, key=order)[:MOST_FONTS]
