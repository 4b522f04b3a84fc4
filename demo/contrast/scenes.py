"""Drawn scenes with a description in English and one in Chinese: one to three coloured shapes of demo/shapes.

Scene `index` of a seed is always the same; what it shows decides its split, as in demo/shapes. Knows nothing of models or tokens.
"""

# ruff: noqa: RUF001 - descriptions are in Chinese too

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from demo.shapes.shape_scenes import Item, ShapeScenes
from demo.shapes.texts import COLOURS, PLACES, SHAPES, SIZES, TEXTS

MOST_SHAPES = 3


@dataclass(frozen=True)
class Described:
    """A picture, what it shows, and its description in each language."""

    picture: Image.Image
    items: tuple[Item, ...]
    texts: dict[str, str]

    @property
    def things(self) -> list[tuple[str, str]]:
        """Colour and shape of each, sorted: what a caption must say."""
        return sorted((item.colour, item.shape) for item in self.items)


def make_described(seed: int, split: str, index: int) -> Described:
    """Scene number `index` of a split."""
    rng = random.Random(f"contrast/{seed}/{split}/{index}")
    maker = ShapeScenes(rng, split, "en", 1.0)
    items = maker.grid_items(MOST_SHAPES)
    picture = maker.draw_grid(items).picture
    said = {"en": maker.describe_grid(items)}
    maker.language = "zh"
    return Described(picture, tuple(items), said | {"zh": maker.describe_grid(items)})


@dataclass(frozen=True)
class Wanted:
    """A few search words, like "a red star" or the Chinese for a colour; an empty field fits everything."""

    text: str
    colour: str
    shape: str

    @classmethod
    def of(cls, rng: random.Random, scene: Described) -> Wanted:
        """Words for one thing of a scene."""
        item, kind = rng.choice(scene.items), rng.choice(("both", "both", "colour", "shape"))
        colour, shape = item.colour if kind != "shape" else "", item.shape if kind != "colour" else ""
        if rng.random() < 0.5:
            words = [rng.choice(["a ", "a photo of a ", ""]) if shape else "", colour, " " if kind == "both" else "", shape]
        else:
            words = [COLOURS[colour][0] if colour else "", "的" if kind == "both" else "", SHAPES[shape] if shape else ""]
        return cls("".join(words), colour, shape)

    def fits(self, scene: Described) -> bool:
        """Whether a scene shows it."""
        return any(self.colour in ("", item.colour) and self.shape in ("", item.shape) for item in scene.items)


def chinese_words() -> list[str]:
    """The words of Chinese descriptions."""
    names = [*(chinese for chinese, _ in COLOURS.values()), *SHAPES.values(), *SIZES.values(), *PLACES.values()]
    return [*dict.fromkeys([*names, "有", "的", "，", "。"])]


def unseen(seed: int, count: int, split: str = "test") -> list[Described]:
    """The first `count` different scenes of a split: each description fits one of them only."""
    found: dict[tuple[Item, ...], Described] = {}
    index = 0
    while len(found) < count:
        scene = make_described(seed, split, index)
        found.setdefault(scene.items, scene)
        index += 1
    return list(found.values())


def things_of(text: str) -> list[tuple[str, str]]:
    """Colour and shape of each thing that an English description names, sorted."""
    words = text.replace(",", " ").replace(".", " ").split()
    return sorted((a, b) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES)


def sentences() -> Iterator[str]:
    """The training text of the tokenizer: every word in its place, in both languages."""
    for language, texts in TEXTS.items():
        for colour, (chinese, _) in COLOURS.items():
            for shape, form in SHAPES.items():
                for size, large in SIZES.items():
                    for place, there in PLACES.items():
                        words = (colour, shape, size, place) if language == "en" else (chinese, form, large, there)
                        fields = dict(zip(("colour", "shape", "size", "place"), words, strict=True))
                        yield texts["part"][0].format(**fields) + {"en": ", .", "zh": "，。"}[language]
