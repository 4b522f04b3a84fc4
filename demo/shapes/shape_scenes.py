"""Scenes of coloured shapes: in the nine cells of a picture, in a row or column, in two pictures to compare, and in short clips.

Questions ask for form, colour, count, place and motion; `find_scenes.py` asks for boxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from demo.shapes.curriculum import COUNTING, DRILL, LAST
from demo.shapes.drawing import Canvas, Mark, draw_shape
from demo.shapes.maker import SIDE, Basics, Made, Turn, in_split
from demo.shapes.texts import COLOURS, DIRECTIONS, EXERCISES, ORDINALS, PLACES, RELATIONS, SHAPES, SIZES


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


class ShapeScenes(Basics):
    """Each kind of scene returns its canvases and groups of turns."""

    # what the kinds share

    def thing(self, item: Item) -> str:
        return self.say("thing", colour=self.name(COLOURS, item.colour), shape=self.name(SHAPES, item.shape))

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

    def is_unique(self, item: Item, items: list[Item]) -> bool:
        return sum((other.shape, other.colour) == (item.shape, item.colour) for other in items) == 1

    def exercise(self, key: str, values: dict[str, str]) -> list[Turn]:
        """Names in random order, each followed at once by its value: the shortest exercise in looking a value up by its name."""
        said = EXERCISES[self.language]
        names = self.rng.sample(list(values), len(values))
        return [Turn("exercise", said[key], self.join([said["pair"].format(name=name, value=values[name]) for name in names]))]

    def count_all(self, items: list[Item]) -> Turn:
        return Turn("count", self.say("count"), str(len(items)))

    # kinds of scene

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
