"""Scenes to find things in: shapes anywhere in a picture of any form, asked for by name and answered with boxes.

Answers are in the family's form, thousandths of the whole picture (runtime/answer/boxes.py reads them).
"""

from __future__ import annotations

import math

from demo.shapes.drawing import Corners, extent
from demo.shapes.maker import SIDE, Made, Turn, in_split
from demo.shapes.shape_scenes import Item, ShapeScenes
from demo.shapes.texts import SHAPES
from runtime.answer.boxes import locate_question

# Width and height of pictures in the exam of boxes, whose axes have different scales, and tile limits of training.
FRAMES = ((112, 112), (112, 336), (336, 112), (4000, 300))
FRAME_TILES = (1, 12)


class FindScenes(ShapeScenes):
    """The kind of scene `find`."""

    size: tuple[int, int] | None = None  # of the picture; random if None

    def find(self) -> Made:
        """One to five shapes anywhere in a picture of any form, to be answered with boxes."""
        while True:
            items = self.items(self.rng.randint(1, 5), list(range(5)))
            if in_split(repr(items), self.split):
                break
        return self.find_items(items, *(self.size or self.frame()))

    def frame(self) -> tuple[int, int]:
        """Width and height of a picture: a tile, three of them, a band, or anything between; short sides of 80 to 336 pixels."""
        form = self.rng.random()
        if form < 0.5:
            return SIDE, SIDE
        if form < 0.65:
            return self.rng.choice([(SIDE, 3 * SIDE), (3 * SIDE, SIDE)])
        if form < 0.8:
            return round(SIDE * 40 / 3), SIDE
        short, ratio = self.rng.randint(80, 336 if self.rng.random() < 0.2 else 150), math.exp(self.rng.uniform(0, 1.4))
        long = round(short * ratio)
        return (long, short) if self.rng.random() < 0.5 else (short, long)

    def find_items(self, items: list[Item], width: int, height: int) -> Made:
        """The picture of these items, whose sizes grow with its longer side, and its questions, from left to right."""
        short = min(width, height)
        unit = short / SIDE * min(2.6, (max(width, height) / short) ** 0.5)
        spots: list[tuple[Item, float, float, float]] = []
        for item in items:
            for _ in range(50):
                radius = unit * (self.rng.uniform(13.5, 16.5) if item.size == "large" else self.rng.uniform(7, 9.5))
                x, y = (self.rng.uniform(radius + 1, side - radius - 1) for side in (width, height))
                if all(math.dist((x, y), spot[1:3]) > radius + spot[3] + 2 for spot in spots):
                    spots.append((item, x, y, radius))
                    break
        spots.sort(key=lambda spot: spot[1:3])
        canvas = self.canvas(width=width, height=height)
        self.draw_shapes(canvas, spots)
        return [canvas], self.about_boxes(
            [(item, extent(item.shape, x, y, radius)) for item, x, y, radius in spots], (width, height)
        )

    def about_boxes(self, found: list[tuple[Item, Corners]], size: tuple[int, int]) -> list[list[Turn]]:
        """Questions for one thing, for all of a shape or colour, and for several things at once."""
        by_name: dict[str, list[Corners]] = {}
        sizes: dict[str, str] = {}
        for item, corners in found:
            by_name.setdefault(self.thing(item), []).append(corners)
            sizes[self.thing(item)] = item.size
        if self.rng.random() < 0.5:
            for item, corners in found:
                by_name.setdefault(self.name(SHAPES, item.shape), []).append(corners)
        the = "the " if self.language == "en" and self.rng.random() < 0.3 else ""
        groups = []
        for name, boxes in by_name.items():
            task = f"find_{sizes[name]}" if len(boxes) == 1 and name in sizes else "find_all"
            answer = box_answer({the + name: boxes}, size)
            groups.append([Turn(task, locate_question([the + name]), answer, tuple(boxes))])
        if len(by_name) > 1:
            names = self.rng.sample(list(by_name), len(by_name) if self.rng.random() < 0.7 else 2)
            told = {name: by_name[name] for name in names}
            boxes = [corners for name in names for corners in by_name[name]]
            groups.append([Turn("find_several", locate_question(names), box_answer(told, size), tuple(boxes))])
        return groups


def box_answer(told: dict[str, list[Corners]], size: tuple[int, int]) -> str:
    """Boxes as the family writes them: thousandths of the whole picture's width and height, whole numbers."""
    answer = ""
    for label, boxes in told.items():
        thousandths = [[round(1000 * value / size[n % 2]) for n, value in enumerate(corners)] for corners in boxes]
        answer += f"<ref>{label}</ref><box>{thousandths}</box>"
    return answer
