"""Where things stand, as a vector for each context token of a tile: what the training of places writes into context embeddings.

A token stands for a cell of its tile. One thing owns a cell, the one with the largest share of its visible area there, so that
small things keep a cell beside large ones. The vector has the owner's form and colour, and its edges in the tile as a straight line
and as turns around circles, of which a language model reads digits; it is zero where nothing stands. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.shapes.drawing import Canvas, Corners, extent
from demo.shapes.texts import COLOURS, SHAPES

LEAST_SHARE = 0.05  # of a thing's area in a cell that it owns
LEAST_SIDE = 0.002  # of a visible thing, as a fraction of the tile
PERIODS = (0.5, 0.2, 0.1)  # of the circles, as fractions of the tile's side
NAMED, LINE, CIRCLE = 3.0, 3.0, 2.0  # amplitudes, near those of context embeddings
NAMES = 1 + len(SHAPES) + len(COLOURS)  # owned or not, forms, colours
LENGTH = NAMES + 4 * (1 + 2 * len(PERIODS))


@dataclass(frozen=True)
class Thing:
    """A drawn shape: indices of its form and colour, and its edges as fractions of the picture's width and height."""

    shape: int
    colour: int
    corners: Corners


def importances() -> np.ndarray:
    """Of each number of a vector (LENGTH), 1 on average: what is coarse is learnt first, and small circles mean nothing before."""
    circles = [weight for weight in (3.0, 1.0, 0.4) for _ in range(8)]
    weights = np.array([1.0] * NAMES + [12.0] * 4 + circles, np.float32)
    return weights / weights.mean()


def things(canvas: Canvas) -> list[Thing]:
    """The shapes on a canvas; marks of a shape and of its colour follow each other."""
    found = []
    width, height = canvas.picture.size
    for mark, following in zip(canvas.marks, canvas.marks[1:], strict=False):
        if mark.what in SHAPES and following.what in COLOURS and mark.box == following.box:
            left, top, right, bottom = mark.box
            x1, y1, x2, y2 = extent(mark.what, (left + right) / 2, (top + bottom) / 2, (right - left) / 2)
            corners = (x1 / width, y1 / height, x2 / width, y2 / height)
            found.append(Thing([*SHAPES].index(mark.what), [*COLOURS].index(following.what), corners))
    return found


def windows(columns: int, rows: int, tiles: int) -> list[Corners]:
    """What each tile of a grid shows, as fractions of the picture; the thumbnail, if there is one, all of it."""
    shown = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    return [*shown, *[(0.0, 0.0, 1.0, 1.0)] * (tiles - len(shown))]


def code(found: list[Thing], window: Corners, side: int, noise: np.random.Generator | None = None) -> np.ndarray:
    """The vectors (side * side, LENGTH) of a tile's cells, row by row; with `noise`, edges are about 4 thousandths off."""
    left, top, right, bottom = window
    seen = []
    for thing in found:
        x1, x2 = (min(1.0, max(0.0, (thing.corners[n] - left) / (right - left))) for n in (0, 2))
        y1, y2 = (min(1.0, max(0.0, (thing.corners[n] - top) / (bottom - top))) for n in (1, 3))
        if x2 - x1 > LEAST_SIDE and y2 - y1 > LEAST_SIDE:
            seen.append((thing.shape, thing.colour, x1, y1, x2, y2))
    vectors = np.zeros((side * side, LENGTH), np.float32)
    if not seen:
        return vectors
    boxes = np.array([one[2:] for one in seen])
    lines = np.linspace(0, 1, side + 1)
    wide = (np.minimum(lines[1:], boxes[:, 2:3]) - np.maximum(lines[:-1], boxes[:, 0:1])).clip(0)
    high = (np.minimum(lines[1:], boxes[:, 3:4]) - np.maximum(lines[:-1], boxes[:, 1:2])).clip(0)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    shares = (high[:, :, None] * wide[:, None] / areas[:, None, None]).reshape(len(seen), -1)
    for cell, owner in enumerate(shares.argmax(0)):
        if shares[owner, cell] > LEAST_SHARE:
            edges = boxes[owner] if noise is None else boxes[owner] + 0.004 * noise.standard_normal(4)
            vectors[cell] = vector(*seen[owner][:2], edges)
    return vectors


def vector(shape: int, colour: int, edges: np.ndarray) -> np.ndarray:
    """What tells a form, a colour and four edges, (LENGTH)."""
    made = np.zeros(LENGTH, np.float32)
    made[[0, 1 + shape, 1 + len(SHAPES) + colour]] = NAMED
    turns = [2 * np.pi * edges / period for period in PERIODS]
    circles = [CIRCLE * wave(turn) for turn in turns for wave in (np.cos, np.sin)]
    made[NAMES:] = np.concatenate([LINE * (2 * edges - 1), *circles])
    return made


def edges_of(vectors: Tensor) -> Tensor:
    """Vectors (..., LENGTH) -> the edges (..., 4) that they tell: the line's, refined by one circle after another."""
    edges = vectors[..., NAMES : NAMES + 4] / LINE / 2 + 0.5
    for n, period in enumerate(PERIODS):
        cosines, sines = vectors[..., NAMES + 4 + 8 * n : NAMES + 12 + 8 * n].split(4, dim=-1)
        turned = torch.atan2(sines, cosines) / (2 * torch.pi) * period
        edges = edges + (turned - edges + period / 2) % period - period / 2
    return edges
