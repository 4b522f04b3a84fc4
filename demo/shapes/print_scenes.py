"""Scenes to be read: printed words and numbers, pages full of them, print too small for the thumbnail, and bar charts."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageDraw

from demo.shapes.curriculum import SURE
from demo.shapes.drawing import FONTS, Canvas, Mark, font
from demo.shapes.maker import SIDE, Basics, Made, Turn, in_split
from demo.shapes.texts import COLOURS, DIGITS, INKS, LETTERS, LINES, WORDS


@dataclass(frozen=True)
class Label:
    """One printed word or number."""

    text: str
    colour: str
    kind: str  # "word" or "number"


class PrintScenes(Basics):
    """Each kind of scene returns its canvases and groups of turns."""

    # what the kinds share

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

    def about_label(self, label: Label, colour: str) -> Turn:
        asked = [("it_colour", colour)]
        if label.kind == "word":
            asked += [("it_first", label.text[0]), ("it_last", label.text[-1]), ("it_length", str(len(label.text)))]
        else:
            asked += [("it_first_digit", label.text[0]), ("it_digits", str(len(label.text)))]
        key, answer = self.rng.choice(asked)
        return Turn("follow_up", self.say(key), answer)

    # kinds of scene

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
