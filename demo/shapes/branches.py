"""Several conversations about one picture as one row: they share their beginning, the picture in it, and cannot see each other.

A question for a box has about 50 tokens before its label, and a picture up to 208; with a mask they are computed once for all
things of a scene, and each conversation has the values it would have alone. Knows nothing of scenes or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.shapes.samples import IGNORED

BLOCKED = -1e9  # added to the score of a token that is not seen


@dataclass(frozen=True)
class Row:
    """Tokens of one picture's conversations."""

    ids: np.ndarray  # (T) int64
    labels: np.ndarray  # (T) int64
    weights: np.ndarray  # (T) float32
    looks: np.ndarray  # (T) int64, the number of the thing that a token should know, or -1
    positions: np.ndarray  # (T) int64
    sees: np.ndarray  # (T, T) bool, which token a token sees


def join(texts: Sequence[tuple[list[int], list[int], list[float], list[int]]]) -> Row:
    """Conversations (ids, labels, weights, looks) -> one row. What most of them share with the first stands once."""
    first = texts[0][0]
    common = [_common(first, ids) for ids, *_ in texts[1:]]
    asked = next((n for n, label in enumerate(texts[0][1]) if label != IGNORED), len(first))
    shared = min(asked, max(set(common), key=common.count)) if common else 0
    ids, labels, weights, looks = (list(part[:shared]) for part in texts[0])
    positions, branch, seen = [*range(shared)], [-1] * shared, [shared] * shared
    for number, text in enumerate(texts):
        start = min(shared, _common(first, text[0]))
        own = len(text[0]) - start
        for joined, part in zip((ids, labels, weights, looks), text, strict=True):
            joined.extend(part[start:])
        positions += range(start, start + own)
        branch += [number] * own
        seen += [start] * own
    of, upto, at = np.array(branch), np.array(seen), np.arange(len(ids))
    sees = (at <= at[:, None]) & ((of == of[:, None]) | ((of == -1) & (at < upto[:, None])))
    return Row(np.array(ids), np.array(labels), np.array(weights, np.float32), np.array(looks), np.array(positions), sees)


def _common(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def collate_rows(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Rows -> ids, labels, weights, looks and positions (B, T), padded on the right, and what is added to scores (B, 1, T, T)."""
    longest = max(len(row.ids) for row in rows)
    batch = {
        "ids": torch.full((len(rows), longest), pad),
        "labels": torch.full((len(rows), longest), IGNORED),
        "weights": torch.zeros(len(rows), longest),
        "looks": torch.full((len(rows), longest), -1),
        "positions": torch.zeros(len(rows), longest, dtype=torch.long),
    }
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        length = len(row.ids)
        for name, values in batch.items():
            values[number, :length] = torch.from_numpy(getattr(row, name))
        sees[number, :length, :length] = torch.from_numpy(row.sees)
    return batch | {"scores": torch.zeros(sees.shape).masked_fill(~sees, BLOCKED)[:, None]}
