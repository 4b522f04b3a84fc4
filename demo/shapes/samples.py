"""Scenes and turns as the model takes them: token ids, labels and tiles, exactly as chat() would send them, and batches of them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo.shapes.maker import SIDE, Turn
from demo.shapes.scenes import Scene
from demo.shapes.texts import COLOURS, DIGITS, LETTERS, SHAPES
from runtime.answer.prompt import expand_marks, get_template
from runtime.folder.config import InternVLConfig
from runtime.media.tiles import Tiling, choose_grid, cut_tiles

WHATS = [*LETTERS, *DIGITS, *SHAPES, *COLOURS]  # classes of the auxiliary head
IGNORED = -100


class Encoder:
    """Scenes and turns -> token ids, labels and tiles, exactly as chat() would send them."""

    def __init__(self, config: InternVLConfig, tokenizer: PreTrainedTokenizerFast):
        self.config, self.template = config, get_template(config.template)
        self.backend = tokenizer.backend_tokenizer
        self.tiling = Tiling.of(config)
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 20_000:
                self.known.clear()
            self.known[text] = self.backend.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def text(self, scene: Scene, turns: list[Turn], tiles: list[int], *, last_only: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the whole dialogue, and labels: the ids of the answers, their end token included, IGNORED elsewhere."""
        t = self.template
        ids = list(self.ids(t.system + t.system_message + t.sep))
        labels = [IGNORED] * len(ids)
        for n, turn in enumerate(turns):
            asked = t.user + (scene.prefix if n == 0 else "") + turn.question + t.sep + t.assistant
            question = self.ids(expand_marks(asked, tiles if n == 0 else [], self.config.tokens_per_tile))
            answer = self.ids(turn.answer + t.sep)
            counts = not last_only or n == len(turns) - 1
            ids += question + answer
            labels += [IGNORED] * len(question) + (answer if counts else [IGNORED] * len(answer))
        return ids, labels

    def tiles(self, scene: Scene) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tiles of each picture (N, 3, S, S), and what stands on their patches (N, patches, classes); -1 where not known."""
        tiling = self.tiling.at_most(scene.max_tiles)
        tiles = [cut_tiles(canvas.picture, tiling) for canvas in scene.canvases]
        looks = [self._look(canvas, tiling, len(cut)) for canvas, cut in zip(scene.canvases, tiles, strict=True)]
        return tiles, looks

    def _look(self, canvas: Any, tiling: Tiling, tiles: int) -> np.ndarray:
        side, patch = self.config.grid_side, self.config.vision.patch_size
        looks = np.full((tiles, side * side, len(WHATS)), -1, np.int8)
        columns, rows = choose_grid(*canvas.picture.size, tiling)
        scales = (columns * SIDE / canvas.picture.width, rows * SIDE / canvas.picture.height)
        whole = np.zeros((rows * side, columns * side, len(WHATS)), np.int8)
        for mark in canvas.marks:
            left, top, right, bottom = (value * scales[n % 2] / patch for n, value in enumerate(mark.box))
            if len(mark.what) > 1:  # a shape or colour: the patches whose middle it covers; a letter: the patch of its centre
                left, top = min(left + 0.5, (left + right) / 2), min(top + 0.5, (top + bottom) / 2)
                right, bottom = max(right - 0.5, left), max(bottom - 0.5, top)
            whole[max(0, int(top)) : int(bottom) + 1, max(0, int(left)) : int(right) + 1, WHATS.index(mark.what)] = 1
        for row in range(rows):
            for column in range(columns):
                cell = whole[row * side : (row + 1) * side, column * side : (column + 1) * side]
                looks[row * columns + column] = cell.reshape(side * side, -1)
        return looks


def even_weights(labels: list[int]) -> list[float]:
    """One over the square root of its answer's length for each token of an answer, 0 for the others."""
    weights: list[float] = []
    for known, run in groupby(labels, lambda label: label != IGNORED):
        length = len(list(run))
        weights += [length**-0.5 if known else 0.0] * length
    return weights


Batch = dict[str, Tensor]


def collate(samples: list[tuple[list[int], list[int], np.ndarray, np.ndarray]], pad: int, even: bool = False) -> Batch:
    """Pad on the right, where a causal mask hides the padding. Each token of an answer weighs 1 or, if `even`, one over the
    square root of the answer's length, so that descriptions do not outweigh short answers."""
    longest = max(len(ids) for ids, *_ in samples)
    ids = torch.full((len(samples), longest), pad)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, (own, expected, _, _) in enumerate(samples):
        ids[row, : len(own)] = torch.tensor(own)
        labels[row, : len(own)] = torch.tensor(expected)
    weights = torch.ones(labels.shape)
    if even:
        for row, (_, expected, _, _) in enumerate(samples):
            own = torch.tensor(even_weights(expected))
            weights[row, : len(expected)] = torch.where(own > 0, own, 1.0)
    tiles, looks = (torch.from_numpy(np.concatenate([sample[n] for sample in samples])) for n in (2, 3))
    return {"ids": ids, "labels": labels, "weights": weights, "tiles": tiles, "looks": looks}
