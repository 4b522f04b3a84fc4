"""QLLaMA, the decoder of InternVL-C and -G: texts, queries and captions over one compiled part, so that its weights are there once.

Knows embeddings, biases of attention and states of its cache; nothing of words or pictures.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openvino as ov

from runtime.parts.device import Placement
from runtime.parts.part import compile_part, infer, leaving_file, read_part, threads_of

HIDDEN = np.finfo(np.float32).min  # the bias of what is not seen


class QueryDecoder:
    """The part as it is placed: `width` D of its embeddings, `image_width` C of the pictures it looks at."""

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, width: int, image_width: int):
        self._compiled = compile_part(core, folder, read_part(core, folder, placement, width), placement)
        self._request, self._lock = self._compiled.create_infer_request(), threading.Lock()
        self._nothing = np.zeros((1, 0, image_width), np.float32)
        self._folder, self._placement, self._packed = folder, placement, False

    @property
    def threads(self) -> int:
        """How many it computes with."""
        return threads_of(self._compiled)

    def encode_texts(self, embeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Embeddings (B, T, D) of texts whose padding stands before them, mask (B, T) of tokens -> text embeddings (B, E)."""
        bias = causal_bias(mask)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        with self._lock:
            self._run(self._request, embeds, bias, positions, None, 0)
            return np.array(self._request.get_tensor("text_embeds").data)

    def encode_queries(self, embeds: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Queries (B, Q, D), which see each other, and tokens of pictures (B, N, C) -> their hidden states (B, Q, D)."""
        count = embeds.shape[1]
        bias = np.zeros((len(embeds), 1, count, count), np.float32)
        positions = np.tile(np.arange(count), (len(embeds), 1))
        with self._lock:
            self._run(self._request, embeds, bias, positions, image, count)
            return np.array(self._request.get_tensor("last_hidden_state").data)

    def new_caption(self) -> CaptionCache:
        """The cache of some captions that are written side by side."""
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
        """Feed embeddings (B, T, D), the first `looking` columns of which look at the picture; `rows` None forgets all before."""
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
        with leaving_file(self._folder, self._placement):  # weights are packed by the first run
            infer(request, inputs)
        self._packed = True


class CaptionCache:
    """What is kept of some captions: the calls that decoding needs of a KV cache."""

    room_for_drafts = free_guesses = 0
    ids = np.zeros(0, np.int64)

    def __init__(self, decoder: QueryDecoder, request: ov.InferRequest):
        self._decoder, self._request = decoder, request
        self._rows, self._length = np.zeros(0, np.int64), 0

    def begin(self, embeds: np.ndarray, queries: int, image: np.ndarray) -> np.ndarray:
        """Queries and a prompt (B, T, D), tokens of pictures (B, N, C) -> logits (B, 1, V) of what comes after the prompt.

        Each of the first `queries` columns sees all of them; the prompt sees what is before it.
        """
        count, self._length = embeds.shape[:2]
        bias = causal_bias(np.ones((count, self._length), bool))
        bias[:, :, :queries, :queries] = 0
        positions = np.tile(np.arange(self._length), (count, 1))
        self._rows = np.arange(count)
        self._decoder._run(self._request, embeds, bias, positions, image, queries)
        return self._logits()

    def reorder(self, rows: list[int]) -> None:
        """Let row i go on as row `rows[i]` did."""
        self._rows = self._rows[rows]

    def feed(self, embeds: np.ndarray, mask: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
        """Embeddings (B, 1, D) of a new token each -> logits (B, 1, V)."""
        self._length += 1
        bias = np.zeros((len(embeds), 1, 1, self._length), np.float32)
        positions = np.full((len(embeds), 1), self._length - 1)
        self._decoder._run(self._request, embeds, bias, positions, None, 0, self._rows)
        self._rows = np.arange(len(embeds))
        return self._logits()

    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Nothing is guessed here."""
        raise NotImplementedError

    def drop(self, count: int) -> None:
        """Nothing is guessed here."""
        raise NotImplementedError

    def _logits(self) -> np.ndarray:
        return np.array(self._request.get_tensor("logits").data)


def causal_bias(mask: np.ndarray) -> np.ndarray:
    """Mask of tokens (B, T) -> bias (B, 1, T, T): each sees itself, and tokens before it; padding sees itself alone."""
    count = mask.shape[1]
    seen = np.tril(np.ones((count, count), bool)) & mask.astype(bool)[:, None] | np.eye(count, dtype=bool)
    return np.where(seen, np.float32(0), HIDDEN)[:, None]
