"""Drawn scenes with questions and answers: coloured shapes, printed words, bar charts, pairs of pictures, short clips.

Scene `index` of a seed is always the same. Knows nothing of models or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo.shapes.curriculum import kind_shares
from demo.shapes.drawing import Canvas
from demo.shapes.find_scenes import FRAME_TILES, FindScenes
from demo.shapes.maker import Made, Turn
from demo.shapes.print_scenes import PrintScenes


class Maker(FindScenes, PrintScenes):
    """All kinds of scene."""


@dataclass(frozen=True)
class Scene:
    """Pictures, the prefix that shows them, and groups of turns; the turns of a group follow each other."""

    kind: str
    language: str
    canvases: list[Canvas]
    prefix: str  # carries one <image> a picture; stands before the first question
    max_tiles: int | None  # of a picture; None: as many as the checkpoint takes; frames and pictures to compare are one tile each
    groups: list[list[Turn]]


def make_scene(
    seed: int,
    split: str,
    index: str | int,
    *,
    kind: str | None = None,
    language: str | None = None,
    level: float = 1.0,
    size: tuple[int, int] | None = None,
) -> Scene:
    """The scene number `index`; kind, language and the size of a picture to find things in are random unless given."""
    rng = random.Random(f"{seed}/{split}/{index}")
    shares = kind_shares(level)
    drawn = rng.choices(list(shares), list(shares.values()))[0]
    spoken = "zh" if rng.random() < 0.3 else "en"
    kind, language = kind or drawn, language or spoken
    maker = Maker(rng, split, language, level)
    maker.size = size
    make: Callable[[], Made] = getattr(maker, kind)
    canvases, groups = make()
    prefix = {
        "compare": "".join(f"Image-{n + 1}: <image>\n" for n in range(len(canvases))),
        "motion": "".join(f"Frame{n + 1}: <image>\n" for n in range(len(canvases))),
    }.get(kind, "<image>\n")
    max_tiles = 1 if kind in ("compare", "motion") else rng.choice(FRAME_TILES) if kind == "find" else None
    return Scene(kind, language, canvases, prefix, max_tiles, groups)
