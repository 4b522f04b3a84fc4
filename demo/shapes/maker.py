"""What all kinds of scene are made with: turns, the split of a description, words in the scene's language, and an empty picture.

A checksum of what a scene shows, and of every printed word, decides its split, so that nothing of one split can come up in another.
Knows nothing of models or tokens.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from PIL import Image

from demo.shapes.drawing import Canvas, Corners
from demo.shapes.texts import COLOURS, JOINT, TEXTS

SIDE = 112  # of a tile, in pixels; pictures are whole numbers of tiles, except those of `find`

SPLITS = {"train": range(2, 10), "test": range(0, 1), "held_out": range(1, 2)}  # by the checksum's remainder
CHECKSUMS = 10


@dataclass(frozen=True)
class Turn:
    """One question with its exact answer, and the boxes in it."""

    task: str
    question: str
    answer: str
    boxes: tuple[Corners, ...] = ()


Made = tuple[list[Canvas], list[list[Turn]]]  # what a kind of scene makes: pictures, and groups of turns


def in_split(text: str, split: str) -> bool:
    """Whether a word or a description belongs to this split."""
    return zlib.crc32(text.encode()) % CHECKSUMS in SPLITS[split]


class Basics:
    """Makes scenes: choices come from `rng`, words from `language`, difficulty from `level` (0 easy, 1 full)."""

    def __init__(self, rng: random.Random, split: str, language: str, level: float):
        self.rng, self.split, self.language, self.level = rng, split, language, level

    def say(self, key: str, **fields: str) -> str:
        return self.rng.choice(TEXTS[self.language][key]).format(**fields)

    def name(self, table: dict, word: str) -> str:
        """The word in the scene's language."""
        if self.language == "en":
            return word
        entry = table[word]
        return entry[0] if isinstance(entry, tuple) else entry

    def join(self, parts: list[str]) -> str:
        return JOINT[self.language].join(parts)

    def upto(self, easy: int, full: int) -> int:
        """A limit that grows with the level."""
        return round(easy + (full - easy) * min(1.0, max(0.0, self.level)))

    def canvas(self, columns: int = 1, rows: int = 1, *, width: int = 0, height: int = 0) -> Canvas:
        pale = self.rng.randint(225, 255)
        colour = tuple(min(255, pale + self.rng.randint(-12, 12)) for _ in range(3))
        return Canvas(Image.new("RGB", (width or SIDE * columns, height or SIDE * rows), colour))

    def ink(self, colour: str) -> tuple[int, ...]:
        return tuple(max(0, min(255, value + self.rng.randint(-15, 15))) for value in COLOURS[colour][1])
