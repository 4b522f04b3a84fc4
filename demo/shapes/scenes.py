"""Drawn scenes with questions and answers: coloured shapes, printed words, bar charts, pairs of pictures, short clips.

Scene `index` of a seed is always the same. What a scene shows decides the split it may appear in (by a checksum of its
description, and of every word), so that no scene and no word of one split can come up in another, whatever the seed.
Needs Pillow; fonts are Pillow's own and the DejaVu family that matplotlib carries. Knows nothing of models or tokens.
"""

from __future__ import annotations

import functools
import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.shapes.texts import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    EXERCISES,
    INKS,
    JOINT,
    LETTERS,
    LINES,
    ORDINALS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTS,
    WORDS,
)
from runtime.answer.boxes import locate_question

SIDE = 112  # of a tile, in pixels; pictures are whole numbers of tiles, except those of `find`

SPLITS = {"train": range(2, 10), "test": range(0, 1), "held_out": range(1, 2)}  # by the checksum's remainder
CHECKSUMS = 10

# Share of each kind of scene in training.
KINDS = {
    **{"grid": 0.30, "row": 0.10, "text": 0.26, "chart": 0.10, "small_text": 0.09, "compare": 0.08, "motion": 0.07},
    **{"page": 0.25, "forms": 0.4, "find": 1.0},
}

LATER = 5.3  # level from which these shares change: rows and charts are learnt, tasks of two steps are not
LATER_KINDS = {"grid": 0.25, "row": 0.05, "chart": 0.04, "compare": 0.35, "motion": 0.3, "page": 0.2, "forms": 0.2}

LAST = 5.77  # level from which clips and print, the last to be learnt, have these shares, and every clip holds two shapes
LAST_KINDS = LATER_KINDS | {"text": 0.45, "small_text": 0.12, "compare": 0.15, "motion": 0.5, "page": 0.25, "forms": 0.15}

COUNTING = 7.73  # level from which scenes of many alike shapes are frequent, and questions count the most frequent kind
COUNTING_KINDS = LAST_KINDS | {"grid": 0.45, "forms": 0.3, "motion": 0.35, "page": 0.2, "small_text": 0.15}

FINDING = 9.6  # level from which half of the scenes ask for boxes; earlier tasks go on, so that they are not forgotten
FINDING_KINDS = COUNTING_KINDS | {"page": 0.05, "forms": 0.1, "find": 1.8}

CHANGES = ((FINDING, FINDING_KINDS), (COUNTING, COUNTING_KINDS), (LAST, LAST_KINDS), (LATER, LATER_KINDS))

STARTS = {
    "row": 0.1,
    "chart": 0.2,
    "small_text": 0.4,
    "compare": 0.3,
    "motion": 0.4,
    "page": 0.85,
    "forms": 3.25,
    "find": 9.6,
}  # level from which a kind is drawn

SURE = 1.4  # level from which few printed words are real ones, so that guessing from the first letter does not pay

DRILL = 4.4  # level from which scenes of shapes carry exercises

TOLD = ("describe", "exercise", "find_several")  # turns that contain the answers of others
LATE = 2.335  # level from which a description mostly comes last: answers after it can be copied without looking

# Kinds of scene that a task of the exam is asked on.
TASKS = {
    **{"shape": ("grid",), "colour": ("grid",), "count": ("grid",), "position": ("grid",), "nth": ("row",)},
    **{"word": ("text",), "number": ("text",), "chart": ("chart",), "describe": ("grid",), "small_text": ("small_text",)},
    **{"compare": ("compare",), "motion": ("motion",), "follow_up": ("grid", "text")},
    "chinese": ("grid", "grid", "row", "text", "chart", "compare", "motion"),
}


Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 of a box in pixels, the edges of what it holds

# Width and height of pictures in the exam of boxes, whose axes have different scales, and tile limits of training.
FRAMES = ((112, 112), (112, 336), (336, 112), (4000, 300))
FRAME_TILES = (1, 12)


@dataclass(frozen=True)
class Turn:
    """One question with its exact answer, and the boxes in it."""

    task: str
    question: str
    answer: str
    boxes: tuple[Corners, ...] = ()


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


@dataclass(frozen=True)
class Scene:
    """Pictures, the prefix that shows them, and groups of turns; the turns of a group follow each other."""

    kind: str
    language: str
    canvases: list[Canvas]
    prefix: str  # carries one <image> a picture; stands before the first question
    max_tiles: int | None  # of a picture; None: as many as the checkpoint takes; frames and pictures to compare are one tile each
    groups: list[list[Turn]]


@dataclass(frozen=True)
class Item:
    """One drawn shape."""

    shape: str
    colour: str
    size: str
    cell: int  # of the 3 x 3 cells, row by row; in a row or column its number

    @property
    def place(self) -> str:
        return list(PLACES)[self.cell]


@dataclass(frozen=True)
class Label:
    """One printed word or number."""

    text: str
    colour: str
    kind: str  # "word" or "number"


def in_split(text: str, split: str) -> bool:
    """Whether a word or a description belongs to this split."""
    return zlib.crc32(text.encode()) % CHECKSUMS in SPLITS[split]


class Maker:
    """Makes one scene: choices come from `rng`, words from `language`, difficulty from `level` (0 easy, 1 full)."""

    size: tuple[int, int] | None = None  # of the picture to find things in; random if None

    def __init__(self, rng: random.Random, split: str, language: str, level: float):
        self.rng, self.split, self.language, self.level = rng, split, language, level

    # words

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

    def thing(self, item: Item) -> str:
        return self.say("thing", colour=self.name(COLOURS, item.colour), shape=self.name(SHAPES, item.shape))

    # choices

    def upto(self, easy: int, full: int) -> int:
        """A limit that grows with the level."""
        return round(easy + (full - easy) * min(1.0, max(0.0, self.level)))

    def items(self, count: int, cells: list[int]) -> list[Item]:
        """Shapes for the cells; often few colours or few shapes, so that there is something to count."""
        colours, shapes = list(COLOURS), list(SHAPES)
        few = 0.6 if self.level >= COUNTING else 0.4
        if self.rng.random() < few:
            colours = self.rng.sample(colours, 2)
        if self.rng.random() < few:
            shapes = self.rng.sample(shapes, 2)
        pick = self.rng.choice
        return [Item(pick(shapes), pick(colours), pick(list(SIZES)), cell) for cell in cells[:count]]

    def grid_items(self, most: int, least: int = 1) -> list[Item]:
        while True:
            cells = self.rng.sample(range(9), self.rng.randint(least, most))
            items = self.items(len(cells), sorted(cells))
            if in_split(repr(items), self.split):
                return items

    def word(self) -> str:
        known = 0.35 if self.level < SURE else 0.1
        while True:
            kind = self.rng.random()
            length = self.rng.randint(self.upto(1, 3), self.upto(3, 6))
            if kind < known and length >= 3:
                text = self.rng.choice([word for word in WORDS if len(word) == length])
            elif kind < known + 0.35 or self.split != "train":
                start = self.rng.random() < 0.7
                text = "".join(self.rng.choice("AEIOU" if (n + start) % 2 == 0 else "BCDFGHJKLMNPQRSTVWXYZ") for n in range(length))
            else:
                text = "".join(self.rng.choice(LETTERS) for _ in range(length))
            if in_split(text, self.split):
                return text

    def number(self) -> str:
        while True:
            length = self.rng.randint(self.upto(1, 2), self.upto(3, 5))
            text = self.rng.choice("123456789") + "".join(self.rng.choice(DIGITS) for _ in range(length - 1))
            if in_split(text, self.split):
                return text

    def label(self) -> Label:
        kind = "word" if self.rng.random() < 0.6 else "number"
        return Label(self.word() if kind == "word" else self.number(), self.rng.choice(INKS), kind)

    # drawing

    def canvas(self, columns: int = 1, rows: int = 1, *, width: int = 0, height: int = 0) -> Canvas:
        pale = self.rng.randint(225, 255)
        colour = tuple(min(255, pale + self.rng.randint(-12, 12)) for _ in range(3))
        return Canvas(Image.new("RGB", (width or SIDE * columns, height or SIDE * rows), colour))

    def ink(self, colour: str) -> tuple[int, ...]:
        return tuple(max(0, min(255, value + self.rng.randint(-15, 15))) for value in COLOURS[colour][1])

    def draw_shapes(self, canvas: Canvas, spots: list[tuple[Item, float, float, float]]) -> None:
        """Draw items at (x, y, radius), at twice the size and then reduced, for smooth edges."""
        picture = canvas.picture.resize((canvas.picture.width * 2, canvas.picture.height * 2), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(picture)
        for item, x, y, radius in spots:
            draw_shape(pen, item.shape, 2 * x, 2 * y, 2 * radius, self.ink(item.colour))
            box = (x - radius, y - radius, x + radius, y + radius)
            canvas.marks += [Mark(item.shape, box), Mark(item.colour, box)]
        canvas.picture = picture.reduce(2)

    def draw_grid(self, items: list[Item], columns: int = 1, rows: int = 1) -> Canvas:
        canvas = self.canvas(columns, rows)
        scale = min(columns, rows)
        wide, high = canvas.picture.width / 3, canvas.picture.height / 3
        spots = []
        for item in items:
            radius = scale * (self.rng.uniform(13.5, 16.5) if item.size == "large" else self.rng.uniform(7, 9.5))
            free_x, free_y = wide / 2 - radius - 1, high / 2 - radius - 1
            x = wide * (item.cell % 3 + 0.5) + self.rng.uniform(-free_x, free_x) * 0.8
            y = high * (item.cell // 3 + 0.5) + self.rng.uniform(-free_y, free_y) * 0.8
            spots.append((item, x, y, radius))
        self.draw_shapes(canvas, spots)
        return canvas

    def draw_text(self, canvas: Canvas, label: Label, area: tuple[float, float, float, float], sizes: tuple[int, int]) -> None:
        """Print a label somewhere in `area`, in a random size that the area allows."""
        left, top, right, bottom = area
        size, name = self.rng.randint(*sizes), self.rng.choice(FONTS)
        while True:
            used = font(name, size)
            width = used.getlength(label.text)
            if (width <= right - left and size * 1.05 <= bottom - top) or size <= 9:
                break
            size -= 1
        x = self.rng.uniform(left, max(left, right - width))
        middle = self.rng.uniform(top + size * 0.5, max(top + size * 0.5, bottom - size * 0.5))
        pen = ImageDraw.Draw(canvas.picture)
        x, middle = round(x), round(middle)
        pen.text((x, middle), label.text, fill=self.ink(label.colour), font=used, anchor="lm")
        edges = [x + used.getlength(label.text[:n]) for n in range(len(label.text) + 1)]
        for letter, start, end in zip(label.text, edges[:-1], edges[1:], strict=True):
            centre = (start + end) / 2
            canvas.marks.append(Mark(letter, (centre, middle, centre, middle)))
        canvas.marks.append(Mark(label.colour, (x, middle - size * 0.35, x + width, middle + size * 0.35)))

    # kinds of scene: each returns (canvases, groups)

    def grid(self) -> Made:
        items = self.grid_items(self.upto(1, 5), 3 if self.level >= COUNTING and self.rng.random() < 0.6 else 1)
        shape = self.rng.random() if self.level >= 0.5 else 0
        columns, rows = (1, 1) if shape < 0.9 else (2, 1) if shape < 0.94 else (1, 2) if shape < 0.98 else (2, 2)
        return [self.draw_grid(items, columns, rows)], [group for group in self.about_items(items) if group[0].answer]

    def about_items(self, items: list[Item]) -> list[list[Turn]]:
        colours, shapes = [item.colour for item in items], [item.shape for item in items]
        groups = [[Turn("describe", self.say("describe"), self.describe_grid(items))], [self.count_all(items)]]
        for item in items:
            shape, colour = self.name(SHAPES, item.shape), self.name(COLOURS, item.colour)
            place = self.name(PLACES, item.place)
            size = Turn("follow_up", self.say("it_size"), self.name(SIZES, item.size))
            where = Turn("follow_up", self.say("it_where"), place)
            if colours.count(item.colour) == 1:
                key = "shape_only" if len(items) == 1 and self.rng.random() < 0.7 else "shape_of"
                turn = Turn("shape", self.say(key, colour=colour), shape)
                groups.append([turn, *self.rng.choice([[], [where], [size]])])
            if shapes.count(item.shape) == 1:
                key = "colour_only" if len(items) == 1 and self.rng.random() < 0.7 else "colour_of"
                turn = Turn("colour", self.say(key, shape=shape), colour)
                groups.append([turn, *self.rng.choice([[], [where], [size]])])
            turn = Turn("position", self.say("what_at", place=place), self.thing(item))
            groups.append([turn, *self.rng.choice([[], [size]])])
            if self.is_unique(item, items):
                groups.append([Turn("position", self.say("where", thing=self.thing(item)), place)])
                groups += self.relations(item, items)
        for table, key, said in ((COLOURS, "count_colour", colours), (SHAPES, "count_shape", shapes)):
            field_name = key.removeprefix("count_")
            asked = self.rng.choice(said) if self.rng.random() < 0.8 else self.rng.choice(list(table))
            question = self.say(key, **{field_name: self.name(table, asked)})
            groups.append([Turn("count", question, str(said.count(asked)))])
            if self.level >= COUNTING:
                asked = max(said, key=said.count)
                question = self.say(key, **{field_name: self.name(table, asked)})
                groups.append([Turn("count", question, str(said.count(asked)))])
        if self.level >= DRILL and self.rng.random() < 0.5:
            groups.append(self.exercise("colour_counts", {self.name(COLOURS, name): str(colours.count(name)) for name in colours}))
        elif self.level >= DRILL:
            unique = [item for item in items if self.is_unique(item, items)]
            groups.append(self.exercise("places", {self.thing(item): self.name(PLACES, item.place) for item in unique}))
        return groups

    def is_unique(self, item: Item, items: list[Item]) -> bool:
        return sum((other.shape, other.colour) == (item.shape, item.colour) for other in items) == 1

    def relations(self, item: Item, items: list[Item]) -> list[list[Turn]]:
        others = [other for other in items if other != item and self.is_unique(other, items)]
        if not others:
            return []
        other = self.rng.choice(others)
        names = {"thing": self.thing(item), "other": self.thing(other)}
        groups = []
        if item.cell % 3 != other.cell % 3:
            answer = "left" if item.cell % 3 < other.cell % 3 else "right"
            groups.append([Turn("position", self.say("beside", **names), self.name(RELATIONS, answer))])
        if item.cell // 3 != other.cell // 3:
            answer = "above" if item.cell // 3 < other.cell // 3 else "below"
            groups.append([Turn("position", self.say("over", **names), self.name(RELATIONS, answer))])
        return groups

    def describe_grid(self, items: list[Item]) -> str:
        parts = []
        for item in items:
            words = {"shape": self.name(SHAPES, item.shape), "colour": self.name(COLOURS, item.colour)}
            words |= {"size": self.name(SIZES, item.size), "place": self.name(PLACES, item.place)}
            parts.append(self.say("part", **words))
        return self.join(parts) + {"en": ".", "zh": "。"}[self.language]

    def count_all(self, items: list[Item]) -> Turn:
        return Turn("count", self.say("count"), str(len(items)))

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

    def forms(self) -> Made:
        """Two to five shapes to be found by their form: questions that colours do not answer."""
        while True:
            cells = sorted(self.rng.sample(range(9), self.rng.randint(2, 5)))
            shapes = self.rng.sample(list(SHAPES), len(cells))
            if self.rng.random() < 0.4:
                shapes = [self.rng.choice(shapes[:3]) for _ in cells]
            colours = list(COLOURS)
            if self.rng.random() < 0.4:
                colours = self.rng.sample(colours, 2)
            pick = self.rng.choice
            items = [Item(shape, pick(colours), pick(list(SIZES)), cell) for shape, cell in zip(shapes, cells, strict=True)]
            if in_split(repr(items), self.split):
                break
        groups = []
        for item in items:
            if shapes.count(item.shape) == 1:
                shape, colour, place = self.name(SHAPES, item.shape), self.name(COLOURS, item.colour), self.name(PLACES, item.place)
                size = Turn("follow_up", self.say("it_size"), self.name(SIZES, item.size))
                groups.append([Turn("colour", self.say("colour_of", shape=shape), colour), *self.rng.choice([[], [size]])])
                groups.append([Turn("position", self.say("where", thing=shape), place)])
                groups += self.relations(item, items)
        single = [item for item in items if shapes.count(item.shape) == 1]
        groups.append(self.exercise("colours", {self.name(SHAPES, i.shape): self.name(COLOURS, i.colour) for i in single}))
        groups.append(self.exercise("places", {self.name(SHAPES, i.shape): self.name(PLACES, i.place) for i in single}))
        groups.append(self.exercise("counts", {self.name(SHAPES, shape): str(shapes.count(shape)) for shape in shapes}))
        for shape in self.rng.sample(list(SHAPES), len(SHAPES)):
            if shape in shapes or self.rng.random() < 0.2:
                question = self.say("count_shape", shape=self.name(SHAPES, shape))
                groups.append([Turn("count", question, str(shapes.count(shape)))])
        return [self.draw_grid(items)], [group for group in groups if group[0].answer]

    def exercise(self, key: str, values: dict[str, str]) -> list[Turn]:
        """Names in random order, each followed at once by its value: the shortest exercise in looking a value up by its name."""
        said = EXERCISES[self.language]
        names = self.rng.sample(list(values), len(values))
        return [Turn("exercise", said[key], self.join([said["pair"].format(name=name, value=values[name]) for name in names]))]

    def row(self) -> Made:
        """Two to five shapes side by side or one below another."""
        while True:
            count = self.rng.randint(2, self.upto(3, 5))
            items = self.items(count, list(range(count)))
            lying = self.rng.random() < 0.6
            if in_split(repr((items, lying)), self.split):
                break
        canvas, pitch, spots = self.canvas(), SIDE / count, []
        line = self.rng.uniform(25, SIDE - 25)
        for item in items:
            radius = min(pitch / 2 - 1.5, self.rng.uniform(10, 14) if item.size == "large" else self.rng.uniform(7.5, 9.5))
            along, across = pitch * (item.cell + 0.5), line + self.rng.uniform(-6, 6)
            spots.append((item, *((along, across) if lying else (across, along)), radius))
        self.draw_shapes(canvas, spots)
        side = "left" if lying else "top"
        parts = [self.say("row_part", colour=self.name(COLOURS, i.colour), shape=self.name(SHAPES, i.shape)).strip() for i in items]
        described = self.say("row" if lying else "column", parts=self.join(parts))
        groups = [[Turn("describe", self.say("describe"), described)], [self.count_all(items)]]
        for nth, item in zip(ORDINALS, items, strict=False):
            ordinal, shape = self.name(ORDINALS, nth), self.name(SHAPES, item.shape)
            colour = self.name(COLOURS, item.colour)
            asked = Turn("nth", self.say(f"nth_{side}", nth=ordinal), colour)
            groups.append([asked, *([Turn("follow_up", self.say("it_shape"), shape)] if self.rng.random() < 0.3 else [])])
            asked = Turn("nth", self.say(f"nth_shape_{side}", nth=ordinal), shape)
            groups.append([asked, *([Turn("follow_up", self.say("it_colour"), colour)] if self.rng.random() < 0.3 else [])])
        return [canvas], groups

    def text(self) -> Made:
        """One to three lines of words and numbers."""
        labels = [self.label() for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3]))]
        canvas = self.canvas()
        names = {1: ["middle"], 2: ["top", "bottom"], 3: list(LINES)}[len(labels)]
        high = SIDE / len(labels)
        sizes = (self.upto(20, 12), 30)
        for n, label in enumerate(labels):
            self.draw_text(canvas, label, (4, n * high + 3, SIDE - 4, (n + 1) * high - 3), sizes)
        parts, groups = [], []
        kinds = [label.kind for label in labels]
        for line, label in zip(names, labels, strict=True):
            colour = self.name(COLOURS, label.colour)
            part = self.say(f"{label.kind}_part", text=label.text, colour=colour)
            parts.append(part if len(labels) == 1 else self.say("line_part", part=part, line=self.name(LINES, line)))
            asked = []
            if kinds.count(label.kind) == 1:
                asked.append(Turn(label.kind, self.say(label.kind), label.text))
                groups.append([Turn("colour", self.say(f"colour_{label.kind}"), colour)])
            if len(labels) > 1:
                asked.append(Turn(label.kind, self.say("line", line=self.name(LINES, line)), label.text))
            for turn in asked:
                groups.append([turn, *self.rng.choice([[], [self.about_label(label, colour)]])])
        described = self.join(parts) + {"en": ".", "zh": "。"}[self.language]
        return [canvas], [[Turn("describe", self.say("describe"), described)], *groups]

    def about_label(self, label: Label, colour: str) -> Turn:
        asked = [("it_colour", colour)]
        if label.kind == "word":
            asked += [("it_first", label.text[0]), ("it_last", label.text[-1]), ("it_length", str(len(label.text)))]
        else:
            asked += [("it_first_digit", label.text[0]), ("it_digits", str(len(label.text)))]
        key, answer = self.rng.choice(asked)
        return Turn("follow_up", self.say(key), answer)

    def page(self) -> Made:
        """Three to five lines full of words and numbers, to be read from the first to the last: many letters a picture."""
        canvas, texts = self.canvas(), []
        lines = self.rng.randint(3, 5)
        for n in range(lines):
            labels = [self.label() for _ in range(self.rng.choice([1, 2, 2]))]
            wide, high = (SIDE - 6) / len(labels), SIDE / lines
            for m, label in enumerate(labels):
                area = (3 + m * wide + 1, n * high + 2, 3 + (m + 1) * wide - 3, (n + 1) * high - 2)
                self.draw_text(canvas, label, area, (12, 24))
                texts.append(label.text)
        return [canvas], [[Turn("page", self.say("page"), " ".join(texts))]]

    def chart(self) -> Made:
        """Two to five coloured bars of whole heights from 1 to 9 on a ruled background."""
        while True:
            count = self.rng.randint(2, self.upto(3, 5))
            colours = self.rng.sample(list(COLOURS), count)
            values = [self.rng.randint(1, 9) for _ in colours]
            if in_split(repr((colours, values)), self.split):
                break
        canvas = self.canvas()
        pen = ImageDraw.Draw(canvas.picture)
        base, unit, left = 106, 10, 14
        for value in range(11):
            grey = 140 if value % 5 == 0 else 205
            pen.line((left, base - unit * value, SIDE - 4, base - unit * value), fill=(grey, grey, grey))
        for value in (0, 5, 10):
            pen.text((left - 2, base - unit * value), str(value), fill=(90, 90, 90), font=font("", 9), anchor="rm")
        pitch = (SIDE - 6 - left) / count
        thick = pitch * self.rng.uniform(0.5, 0.8)
        for n, (colour, value) in enumerate(zip(colours, values, strict=True)):
            x = left + pitch * (n + 0.5)
            box = (x - thick / 2, base - unit * value, x + thick / 2, base)
            pen.rectangle(box, fill=self.ink(colour))
            canvas.marks.append(Mark(colour, box))
        names = [self.name(COLOURS, colour) for colour in colours]
        parts = [self.say("bar_part", colour=name, value=str(value)) for name, value in zip(names, values, strict=True)]
        groups = [[Turn("describe", self.say("describe"), self.say("chart", parts=self.join(parts)))]]
        groups.append([Turn("chart", self.say("bars"), str(count))])
        for name, value in zip(names, values, strict=True):
            groups.append([Turn("chart", self.say("bar", colour=name), str(value))])
        for key, most in (("highest", max(values)), ("lowest", min(values))):
            if values.count(most) == 1:
                groups.append([Turn("chart", self.say(key), names[values.index(most)])])
        return [canvas], groups

    def small_text(self) -> Made:
        """A wide or tall picture of two to four tiles with one or two words in print too small for the thumbnail."""
        tiles = self.rng.choice([2, 3, 3, 4])
        lying = self.rng.random() < 0.6
        canvas = self.canvas(*((tiles, 1) if lying else (1, tiles)))
        labels = [self.label() for _ in range(self.rng.choice([1, 2]))]
        where = sorted(self.rng.sample(range(tiles), len(labels)))
        for label, tile in zip(labels, where, strict=True):
            x, y = (SIDE * tile, 0) if lying else (0, SIDE * tile)
            self.draw_text(canvas, label, (x + 4, y + 4, x + SIDE - 4, y + SIDE - 4), (self.upto(16, 12), self.upto(20, 15)))
        groups = []
        ends = ("left", "right") if lying else ("top", "bottom")
        for n, label in enumerate(labels):
            asked = [f"text_{ends[n]}"] if len(labels) == 2 else ["small"]
            if [other.kind for other in labels].count(label.kind) == 1:
                asked.append(label.kind)
            for key in asked:
                colour = self.name(COLOURS, label.colour)
                group = [Turn("small_text", self.say(key), label.text)]
                groups.append([*group, *self.rng.choice([[], [self.about_label(label, colour)]])])
        return [canvas], groups

    def compare(self) -> Made:
        """Two pictures of one to three shapes each."""
        pair = [self.grid_items(self.upto(2, 3)) for _ in range(2)]
        groups = []
        names = [self.say("picture", n=str(n)) for n in (1, 2)]
        counts = [len(items) for items in pair]
        more = self.say("same_count") if counts[0] == counts[1] else names[counts.index(max(counts))]
        groups.append([Turn("compare", self.say("more"), more)])
        for n, items in enumerate(pair):
            other = {(i.shape, i.colour) for i in pair[1 - n]}
            groups.append([Turn("describe", self.say("describe_image", n=str(n + 1)), self.describe_grid(items))])
            groups.append([Turn("compare", self.say("count_in", n=str(n + 1)), str(counts[n]))])
            for item in items:
                shape = self.name(SHAPES, item.shape)
                if (item.shape, item.colour) not in other:
                    groups.append([Turn("compare", self.say("which", thing=self.thing(item)), names[n])])
                if [i.shape for i in items].count(item.shape) == 1:
                    question = self.say("colour_in", shape=shape, n=str(n + 1))
                    groups.append([Turn("compare", question, self.name(COLOURS, item.colour))])
        if self.level >= DRILL:
            kinds = [{(i.shape, i.colour): self.thing(i) for i in items} for items in pair]
            apart = {kinds[n][kind]: names[n] for n in (0, 1) for kind in kinds[n] if kind not in kinds[1 - n]}
            groups.append(self.exercise("pictures", apart))
        return [self.draw_grid(items) for items in pair], [group for group in groups if group[0].answer]

    def motion(self) -> Made:
        """A clip of three or four frames in which one of one or two shapes moves."""
        way, (_, (dx, dy)) = self.rng.choice(list(DIRECTIONS.items()))
        while True:
            count = self.rng.randint(2 if self.level >= LAST else 1, self.upto(1, 2))
            items = self.items(count, [0, 1])
            frames = self.rng.choice([3, 4])
            if len({(i.shape, i.colour) for i in items}) == count and in_split(repr((items, way, frames)), self.split):
                break
        step = self.rng.uniform(10, 18)
        length = step * (frames - 1)
        ground = self.canvas().picture
        radii = [self.rng.uniform(9, 13) for _ in items]
        while True:
            x, y = (self.rng.uniform(14 + max(0, -d) * length, SIDE - 14 - max(0, d) * length) for d in (dx, dy))
            still = (self.rng.uniform(14, SIDE - 14), self.rng.uniform(14, SIDE - 14))
            path = [(x + dx * step * n, y + dy * step * n) for n in range(frames)]
            if count == 1 or min(math.dist(still, spot) for spot in path) > sum(radii) + 4:
                break
        canvases = []
        state = self.rng.getstate()
        for spot in path:
            self.rng.setstate(state)  # the same ink in every frame
            canvas = Canvas(ground.copy())
            spots = [(items[0], *spot, radii[0])] + ([(items[1], *still, radii[1])] if count == 2 else [])
            self.draw_shapes(canvas, spots)
            canvases.append(canvas)
        thing, direction = self.thing(items[0]), self.name(DIRECTIONS, way)
        groups = [
            [Turn("motion", self.say("moves", thing=thing), direction)],
            [Turn("motion", self.say("what_moves"), thing), Turn("follow_up", self.say("it_moves"), direction)],
        ]
        if count == 1:
            groups.append([Turn("motion", self.say("it_moves"), direction)])
        if self.level >= DRILL:
            groups.append(self.exercise("moves", {thing: direction} | {self.thing(item): "0" for item in items[1:]}))
        for n, (x, y) in enumerate(path):
            place = list(PLACES)[min(2, int(3 * y / SIDE)) * 3 + min(2, int(3 * x / SIDE))]
            edge = min(abs(value - SIDE * third / 3) for value in (x, y) for third in (1, 2))
            if edge > 4:  # clearly inside a cell
                question = self.say("where_in", thing=thing, n=str(n + 1))
                groups.append([Turn("where_in", question, self.name(PLACES, place))])
        return canvases, groups


Made = tuple[list[Canvas], list[list[Turn]]]


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


def box_answer(told: dict[str, list[Corners]], size: tuple[int, int]) -> str:
    """Boxes as the family writes them: thousandths of the whole picture's width and height, whole numbers."""
    answer = ""
    for label, boxes in told.items():
        thousandths = [[round(1000 * value / size[n % 2]) for n, value in enumerate(corners)] for corners in boxes]
        answer += f"<ref>{label}</ref><box>{thousandths}</box>"
    return answer


FONTS = ["", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"]


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
    known = [name for name in KINDS if level >= STARTS.get(name, 0)]
    shares = KINDS | next((kinds for start, kinds in CHANGES if level >= start), {})
    drawn = rng.choices(known, [shares[name] for name in known])[0]
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


def dialogue(scene: Scene, rng: random.Random, most: int, level: float) -> list[Turn]:
    """Up to about `most` turns of a scene in random order, follow-ups after what they refer to; no question twice."""
    groups = list(scene.groups)
    most = min(most, 3) if scene.kind == "find" else most  # each has a long question
    rng.shuffle(groups)
    if rng.random() < 0.7:  # a description says more of the picture than any other answer
        groups.sort(key=lambda group: group[0].task not in TOLD)
    chosen: dict[str, Turn] = {}
    picked: list[list[Turn]] = []
    for group in groups:
        if len(chosen) >= most:
            break
        if not any(turn.question in chosen for turn in group):
            chosen |= {turn.question: turn for turn in group}
            picked.append(group)
    rng.shuffle(picked)
    if level >= LATE and rng.random() < 0.8:
        picked.sort(key=lambda group: group[0].task in TOLD)
    return [turn for group in picked for turn in group]


@dataclass(frozen=True)
class Question:
    """One question of the exam: the last turn counts, turns before it are asked first."""

    task: str
    scene: Scene
    turns: list[Turn]


def make_question(seed: int, split: str, index: int) -> Question:
    """Question number `index`; tasks take turns."""
    task = list(TASKS)[index % len(TASKS)]
    for attempt in range(1000):
        rng = random.Random(f"exam/{seed}/{split}/{index}/{attempt}")
        language = "zh" if task == "chinese" else "en"
        scene = make_scene(seed, split, f"exam/{index}/{attempt}", kind=rng.choice(TASKS[task]), language=language)
        if task == "follow_up":
            asked = [group for group in scene.groups if group[-1].task == "follow_up"]
        elif task == "chinese":
            asked = [group[:1] for group in scene.groups if group[0].task not in ("describe", "where_in")]
        else:
            asked = [group[:1] for group in scene.groups if group[0].task == task]
        if asked:
            return Question(task, scene, rng.choice(asked))
    raise AssertionError(f"no scene of {task} has a question")


def make_place_question(seed: int, split: str, index: int) -> tuple[Question, tuple[int, int]]:
    """Question number `index` for one box, and the size of its picture; sizes take turns, small and large things too."""
    size, task = FRAMES[index % len(FRAMES)], ("find_small", "find_large")[index // len(FRAMES) % 2]
    for attempt in range(1000):
        scene = make_scene(seed, split, f"places/{index}/{attempt}", kind="find", language="en", size=size)
        asked = [group for group in scene.groups if group[0].task == task]
        if asked:
            return Question(task, scene, random.Random(f"places/{seed}/{split}/{index}").choice(asked)), size
    raise AssertionError(f"no scene has a {task} thing")


def literals() -> Iterator[str]:
    """Every fixed piece of text that questions and answers are made of, for the training of a tokenizer."""
    tables: list[dict] = [COLOURS, SHAPES, SIZES, PLACES, LINES, RELATIONS, DIRECTIONS, ORDINALS]
    for table in tables:
        for word, entry in table.items():
            yield from (word, f" {word}", entry[0] if isinstance(entry, tuple) else entry)
    for texts in TEXTS.values():
        for wordings in texts.values():
            for wording in wordings:
                yield from _between_braces(wording)
    yield from ("Image-", "Frame", ": ", "\n", *JOINT.values())


def _between_braces(wording: str) -> Iterator[str]:
    for piece in wording.split("{"):
        yield piece.split("}")[-1]
