"""InternVL3.5-Flash: which tiles of a prompt get few context tokens, by the probabilities of its router.

Knows probabilities and token ids; no parts and no pictures.
Rule: modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash, and InternLM/lmdeploy@1263d5c lmdeploy/pytorch/models/internvl.py
"""

from __future__ import annotations

import numpy as np

from runtime.folder.config import FlashConfig


def choose_few(probabilities: np.ndarray, flash: FlashConfig) -> np.ndarray:
    """The probabilities that few tokens suffice, for all tiles of a prompt (N,) float32 -> which tiles get few, (N,) bool."""
    if not len(probabilities):
        return np.zeros(0, bool)
    limit = quantile(probabilities, flash.relative)
    return (probabilities > limit) & (probabilities >= np.float32(flash.absolute))


def quantile(values: np.ndarray, share: float) -> np.float32:
    """torch.quantile with its rounding: the tile at the limit keeps its tokens, so the last digit matters."""
    ordered = np.sort(values.astype(np.float32))
    rank = np.float32(share) * np.float32(len(ordered) - 1)
    below, above = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    weight = rank - np.floor(rank)
    return below + weight * (above - below) if weight < 0.5 else above - (above - below) * (np.float32(1) - weight)


def cut_ids(ids: np.ndarray, context_id: int, few: np.ndarray, tokens_per_tile: int, few_per_tile: int) -> np.ndarray:
    """A prompt (T,) with all context tokens -> the prompt without the last ones of each tile that gets few."""
    kept = np.ones(len(ids), bool)
    rows = np.ones((len(few), tokens_per_tile), bool)
    rows[few, few_per_tile:] = False
    kept[ids == context_id] = rows.reshape(-1)
    return ids[kept]
