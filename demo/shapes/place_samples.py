"""What a step of the teaching of places reads: scenes to find things in and scenes of the exam's tasks, as rows, tiles and vectors.

The options of a stage, and the samples of each step as a pure function of them. Knows nothing of weights.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from demo.shapes.branches import Row, join
from demo.shapes.extents import LENGTH, code, things, vector, windows
from demo.shapes.maker import Turn
from demo.shapes.questions import dialogue
from demo.shapes.samples import IGNORED, Encoder, even_weights
from demo.shapes.scenes import Scene, make_scene
from demo.shapes.texts import DIGITS
from runtime.media.tiles import choose_grid, cut_pixels

LEVEL = 9.0  # of the scenes of the exam's tasks: the last before scenes to find things in join
# Pictures to find things in: a tile, three of them, a band that is cut and squeezed as 4000 x 300 is, and any form.
FORMS = ((112, 112),) * 5 + ((112, 336), (336, 112)) * 3 + ((1493, 112),) * 5 + (None,) * 4
LIMITS = {"vision": (1, 1, 12), "language": (1, 1, 12), "joint": (1, 12, 12), "mend": (1, 12, 12)}  # of the tiles of a picture
DIGIT_WEIGHTS = (1.0, 1.0, 0.1)  # the third digit of a coordinate is hardly seen in a picture of 112 pixels
TEXT_WEIGHT = 0.4  # of the other tokens of an answer with boxes

RECIPE: dict[str, dict[str, Any]] = {
    "vision": {"steps": 5000, "rate": 2.5e-3, "finds": 40, "others": 12, "micro": 13},
    "language": {"steps": 2050, "rate": 1e-3, "finds": 16, "others": 14, "micro": 6, "easy": 400},
    "joint": {"steps": 1300, "rate": 5e-4, "finds": 16, "others": 14, "micro": 6},
    "mend": {"steps": 1500, "rate": 5e-4, "finds": 8, "others": 28, "micro": 6, "keep": 2.0},
}
STAGES = tuple(RECIPE)


@dataclass(frozen=True)
class PlaceOptions:
    """One stage; `of` has the recipe's numbers for each."""

    start: str  # checkpoint that can do all but boxes
    stage: str
    steps: int
    rate: float
    finds: int  # scenes to find things in, a step
    others: int  # scenes of the exam's tasks, a step
    micro: int  # scenes at once, in one thread
    seed: int = 1
    easy: int = 0  # steps whose scenes to find things in are one tile of 112 x 112
    hold: float = 0.4  # share of the steps before the rate falls to zero along a cosine
    keep: float = 0.5  # weight of the directions that context embeddings keep
    vectors: float = 0.5  # weight of vision losses in the joint stage
    looked: float = 0.5  # weight of what the token that opens a box should know
    average: float = 0.99
    measured: int = 300  # scenes whose context embeddings say which directions are used
    checked: int = 40  # scenes of each form, for the log

    @classmethod
    def of(cls, start: str, stage: str, **changes: Any) -> PlaceOptions:
        """A stage of the recipe, with changes."""
        return cls(start, stage, **RECIPE[stage] | changes)

    def rate_at(self, step: int) -> float:
        done = step / self.steps
        falling = 1.0 if done < self.hold else (1 + math.cos(math.pi * (done - self.hold) / (1 - self.hold))) / 2
        return self.rate * min(1.0, (step + 1) / 50) * falling


@dataclass(frozen=True)
class Sample:
    """A scene as the model takes it: its row, its tiles (N, S, S, 3) uint8, the vectors of their cells (N, P, LENGTH), and those of
    its things in the whole picture (K, LENGTH).

    In the vision stage, pictures to find things in have two tiles at most, the thumbnail and one of the others.
    """

    row: Row
    tiles: np.ndarray
    vectors: np.ndarray
    finds: bool
    things: np.ndarray


class PlaceSteps(Dataset):
    """Item `step` is the scenes of one step, by the length of their rows."""

    def __init__(self, options: PlaceOptions, encoder: Encoder):
        self.options, self.encoder = options, encoder
        (self.opening,) = encoder.ids("<box>")

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> list[Sample]:
        o = self.options
        samples = [self.find(step * o.finds + n) for n in range(o.finds)]
        samples += [self.other(step * o.others + n) for n in range(o.others)]
        return sorted(samples, key=lambda sample: (sample.finds, len(sample.row.ids)))

    def find(self, index: int) -> Sample:
        """A scene to find things in; each of its questions is asked alone."""
        rng = random.Random(f"places/{self.options.seed}/{index}")
        size, level = rng.choice(FORMS), rng.choice((1.0, LEVEL))
        limit = rng.choice(LIMITS[self.options.stage])
        if index < self.options.easy * self.options.finds:
            size, limit = FORMS[0], 1
        scene = make_scene(self.options.seed, "train", f"places/{index}", kind="find", level=level, size=size)
        tiles, vectors = self._pictures(scene, limit, index)
        if self.options.stage == "vision" and len(tiles) > 1:
            chosen = [rng.randrange(len(tiles) - 1), -1]
            tiles, vectors = tiles[chosen], vectors[chosen]
        turns = [turn for (turn,) in scene.groups]
        if rng.random() < 0.75:
            turns = [turn for turn in turns if turn.task != "find_several"]
        return self._asked(scene, turns, tiles, vectors)

    def _asked(self, scene: Scene, turns: list[Turn], tiles: np.ndarray, vectors: np.ndarray) -> Sample:
        """Each turn is asked alone. Where an answer with one box opens it, the box is looked up."""
        canvas = scene.canvases[0]
        found, (width, height) = things(canvas), canvas.picture.size
        texts = []
        for turn in turns:
            ids, labels = self.encoder.text(scene, [turn], [len(tiles)])
            looks = [-1] * len(ids)
            if len(turn.boxes) == 1:
                corners = np.array(turn.boxes[0]) / (width, height, width, height)
                asked = min(range(len(found)), key=lambda n: np.abs(corners - found[n].corners).max())
                looks = [asked if label == self.opening else -1 for label in labels]
            texts.append((ids, labels, self.weights(labels), looks))
        told = np.stack([vector(one.shape, one.colour, np.array(one.corners)) for one in found])
        return Sample(join(texts), tiles, vectors, True, told)

    def single(self, index: int, size: tuple[int, int], limit: int) -> Sample | None:
        """One question for one box of a held-out scene; None where no thing has a name of its own."""
        scene = make_scene(99, "held_out", index, kind="find", language="en", size=size)
        turns = [turn for (turn,) in scene.groups if turn.task in ("find_small", "find_large")]
        if not turns:
            return None
        tiles, vectors = self._pictures(scene, limit, index)
        return self._asked(scene, turns[:1], tiles, vectors)

    def other(self, index: int) -> Sample:
        """A scene of the exam's tasks with a dialogue about it; answers weigh one over the root of their length."""
        scene = make_scene(self.options.seed, "train", f"others/{index}", level=LEVEL)
        pictures = [self._pictures(scene, scene.max_tiles, index, n) for n in range(len(scene.canvases))]
        counts = [len(tiles) for tiles, _ in pictures]
        turns = dialogue(scene, random.Random(f"others/{self.options.seed}/{index}"), 8, LEVEL)
        ids, labels = self.encoder.text(scene, turns, counts)
        tiles, vectors = (np.concatenate([picture[n] for picture in pictures]) for n in (0, 1))
        row = join([(ids, labels, even_weights(labels), [-1] * len(ids))])
        return Sample(row, tiles, vectors, False, np.zeros((0, LENGTH), np.float32))

    def weights(self, labels: list[int]) -> list[float]:
        """Of each token of an answer with boxes."""
        digits, weights, place = {self.encoder.ids(digit)[0] for digit in DIGITS}, [], 0
        for label in labels:
            place = place + 1 if label in digits else 0
            weights.append(0.0 if label == IGNORED else DIGIT_WEIGHTS[min(place, 3) - 1] if place else TEXT_WEIGHT)
        return weights

    def _pictures(self, scene: Scene, limit: int | None, index: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        canvas, tiling = scene.canvases[number], self.encoder.tiling.at_most(limit)
        tiles = cut_pixels(canvas.picture, tiling)
        shown = windows(*choose_grid(*canvas.picture.size, tiling), len(tiles))
        noise = np.random.default_rng((self.options.seed, index)) if self.options.stage == "language" else None
        side = self.encoder.config.grid_side // self.encoder.config.shuffle_factor
        return tiles, np.stack([code(things(canvas), window, side, noise) for window in shown])
