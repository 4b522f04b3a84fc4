"""QLLaMA, the decoder of InternVL-C and -G: texts, queries and captions over one compiled part, with its weights in memory once.

Knows embeddings, attention biases and the states of its cache; nothing of words or pictures.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openvino as ov

from runtime.parts.device import Placement
from runtime.parts.part import compile_part, infer, leaving_file, read_part, threads_of

HIDDEN = np.finfo(np.float32).min  # the attention bias of a masked position


class QueryDecoder:
    """The part as it is placed: `width` D of its embeddings, `image_width` C of the picture tokens it attends to."""

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, width: int, image_width: int):
        self._compiled = compile_part(core, folder, read_part(core, folder, placement, width), placement)
        self._request, self._lock = self._compiled.create_infer_request(), threading.Lock()
        self._nothing = np.zeros((1, 0, image_width), np.float32)
        self._folder, self._placement, self._packed = folder, placement, False

    @property
    def threads(self) -> int:
        """Number of threads it computes with."""
        return threads_of(self._compiled)

    def encode_texts(self, embeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Embeddings (B, T, D) of left-padded texts, mask (B, T) of tokens -> text embeddings (B, E)."""
        bias = causal_bias(mask)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        with self._lock:
            self._run(self._request, embeds, bias, positions, None, 0)
            return np.array(self._request.get_tensor("text_embeds").data)

    def encode_queries(self, embeds: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Queries (B, Q, D), which attend to each other, and picture tokens (B, N, C) -> their hidden states (B, Q, D)."""
        count = embeds.shape[1]
        bias = np.zeros((len(embeds), 1, count, count), np.float32)
        positions = np.tile(np.arange(count), (len(embeds), 1))
        with self._lock:
            self._run(self._request, embeds, bias, positions, image, count)
            return np.array(self._request.get_tensor("last_hidden_state").data)

    def new_caption(self) -> CaptionCache:
        """The KV cache of captions that are written in one batch."""
        return CaptionCache(self, self._compiled.create_infer_request())

    def _run(
        self,
        request: ov.InferRequest,
        embeds: np.ndarray,
        bias: np.ndarray,
        positions: np.ndarray,
        image: np.ndarray | None,
        looking: int,
        rows: np.ndarray | None = None,
    ) -> None:
        """Feed embeddings (B, T, D), of which the first `looking` columns attend to the picture; `rows` None resets the state."""
        if rows is None:
            request.reset_state()
        inputs = {
            "inputs_embeds": embeds,
            "attention_bias": bias,
            "position_ids": positions.astype(np.int64),
            "vision_hidden_states": np.repeat(self._nothing, len(embeds), 0) if image is None else image,
            "looking": np.arange(looking),
            "beam_idx": np.arange(len(embeds), dtype=np.int32) if rows is None else rows.astype(np.int32),
        }
        if self._packed:
            infer(request, inputs)
            return
        with leaving_file(self._folder, self._placement):  # the first run packs the weights
            infer(request, inputs)
        self._packed = True


class CaptionCache:
    """The KV cache of a batch of captions, with the calls that decoding needs."""

    room_for_drafts = free_guesses = 0
    ids = np.zeros(0, np.int64)

    def __init__(self, decoder: QueryDecoder, request: ov.InferRequest):
        self._decoder, self._request = decoder, request
        self._rows, self._length = np.zeros(0, np.int64), 0

    def begin(self, embeds: np.ndarray, queries: int, image: np.ndarray) -> np.ndarray:
        """Queries and a prompt (B, T, D), picture tokens (B, N, C) -> logits (B, 1, V) after the prompt.

        The first `queries` columns attend to each other; the prompt attends to what is before it.
        """
        count, self._length = embeds.shape[:2]
        bias = causal_bias(np.ones((count, self._length), bool))
        bias[:, :, :queries, :queries] = 0
        positions = np.tile(np.arange(self._length), (count, 1))
        self._rows = np.arange(count)
        self._decoder._run(self._request, embeds, bias, positions, image, queries)
        return self._logits()

    def reorder(self, rows: list[int]) -> None:
        """Make row i the continuation of row `rows[i]`."""
        self._rows = self._rows[rows]

    def feed(self, embeds: np.ndarray, mask: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
        """Embeddings (B, 1, D) of one new token per row -> logits (B, 1, V)."""
        self._length += 1
        bias = np.zeros((len(embeds), 1, 1, self._length), np.float32)
        positions = np.full((len(embeds), 1), self._length - 1)
        self._decoder._run(self._request, embeds, bias, positions, None, 0, self._rows)
        self._rows = np.arange(len(embeds))
        return self._logits()

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Captions have no draft tokens."""
        raise NotImplementedError

    def drop(self, count: int) -> None:
        """Captions have no draft tokens."""
        raise NotImplementedError

    def _logits(self) -> np.ndarray:
        return np.array(self._request.get_tensor("logits").data)


def causal_bias(mask: np.ndarray) -> np.ndarray:
    """Mask of tokens (B, T) -> bias (B, 1, T, T): each attends to itself and the tokens before it, left padding to itself alone."""
    count = mask.shape[1]
    seen = np.tril(np.ones((count, count), bool)) & mask.astype(bool)[:, None] | np.eye(count, dtype=bool)
    return np.where(seen, np.float32(0), HIDDEN)[:, None]
