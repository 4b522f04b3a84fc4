"""The stateful language part behind transformers' generate: greedy, sampling, beams, penalties and streamers are theirs.

Takes embeddings and gives logits of the last position. Each KV cache lives in an infer request of its own, over shared weights;
what a changed prompt no longer needs is masked out there instead of being moved. Knows nothing of prompts or pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.device import Placement, compile_part
from runtime.errors import NumericsError
from runtime.folder import GENERATION_CONFIG_FILE, read_part
from runtime.stream import Cancelled, Progress

PREFILL_AT_ONCE = 4096  # tokens; a longer prompt goes in pieces, since memory grows with the square of a piece
INTERRUPTIBLE = 256  # tokens of a prefill that takes long enough to be worth losing when it is cancelled
IDLE_CACHES = 2  # KV caches kept for stateless calls


def keep_last_position(model: ov.Model) -> ov.Model:
    """Let the head see the last position only, in memory; the logits of a whole prompt are not wanted and take gigabytes."""
    head = model.get_results()[0].input_value(0).get_node()
    last = opset.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


class KVCache:
    """The KV cache of one conversation, or of one batch: an infer request whose state holds one slot a token.

    Slots stay where they were written. A slot that is no longer wanted is masked out, and the tokens after it are given the
    positions they would have without it. Each slot has a key that says what stands in it, so that a new prompt can be compared.
    One thread at a time.
    """

    def __init__(self, request: ov.InferRequest):
        self._request = request
        self._interruptible = False
        self.order = np.zeros(1, np.int32)  # which row of the batch each row continues
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._request.reset_state()
        self._slots = 0
        self._mask = np.zeros((1, 256), np.int64)  # (B, room), 1 where a token stands
        self._keys = np.zeros(256, np.int64)
        self._coming = np.zeros(0, np.int64)  # keys of the prompt that is being fed

    def __len__(self) -> int:
        """Tokens of the first row."""
        return int(self._mask[0, : self._slots].sum())

    def shared_with(self, keys: np.ndarray) -> int:
        """How many tokens at the beginning of a prompt with these keys (T,) are here; at least one is left to compute."""
        held = self._keys[: self._slots][self._mask[0, : self._slots] == 1][: len(keys) - 1]
        differ = np.flatnonzero(held != keys[: len(held)])
        return int(differ[0]) if len(differ) else len(held)

    def keep(self, keys: np.ndarray) -> int:
        """Keep what a prompt with these keys (T,) begins with, mask out the rest, and expect its other tokens.

        Returns the number of tokens kept: 0 when more slots would be masked out than kept, which is dearer than to start afresh.
        """
        kept = self.shared_with(keys)
        if self._slots > 2 * kept:
            self.clear()
            kept = 0
        standing = np.flatnonzero(self._mask[0, : self._slots])
        self._mask[0, standing[kept:]] = 0
        self._coming = keys[kept:]
        return kept

    def feed(self, embeds: np.ndarray, mask: np.ndarray, keys: np.ndarray | None, progress: Progress | None = None) -> Tensor:
        """Embeddings (B, T, D) of new tokens under their mask (B, T) -> logits (B, 1, V) of the last position.

        `keys` (T,) say what the tokens are; None takes those that `keep` was told. Raises NumericsError when the logits are not
        numbers.
        """
        total = embeds.shape[1]
        for start in range(0, total, PREFILL_AT_ONCE):
            if progress is not None:
                progress("prefill", start, total)
            piece = slice(start, start + PREFILL_AT_ONCE)
            self._feed(embeds[:, piece], mask[:, piece], keys)
        logits = torch.from_numpy(self._request.get_tensor("logits").data)
        if not torch.isfinite(logits.amax(-1)).all():  # a NaN anywhere makes the largest one NaN
            self.clear()
            raise NumericsError(
                "the language part gave logits that are not numbers: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return logits

    def _feed(self, embeds: np.ndarray, mask: np.ndarray, keys: np.ndarray | None) -> None:
        rows, count = mask.shape
        end = self._slots + count
        if self._slots == 0:
            self._mask, self.order = np.zeros((rows, self._mask.shape[1]), np.int64), np.arange(rows, dtype=np.int32)
        if end > self._mask.shape[1]:
            room = max(end, 2 * self._mask.shape[1])
            self._mask = np.pad(self._mask, ((0, 0), (0, room - self._mask.shape[1])))
            self._keys = np.pad(self._keys, (0, room - len(self._keys)))
        before = self._mask[:, : self._slots].sum(1, keepdims=True)
        self._mask[:, self._slots : end] = mask
        positions = before + mask.cumsum(1) - 1
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ascontiguousarray(self._mask[:, :end]),
            "position_ids": np.maximum(positions, 0),
            "beam_idx": self.order,
        }
        self._interruptible = count >= INTERRUPTIBLE
        try:
            self._request.infer(inputs)
        except BaseException as error:
            self.clear()  # how far it came is not known
            if "Infer Request was canceled" in str(error):
                raise Cancelled from None
            raise
        finally:
            self._interruptible = False
        self.order = np.arange(rows, dtype=np.int32)
        if keys is None:
            keys, self._coming = self._coming[:count], self._coming[count:]
        if len(keys) == count:  # a batch has none
            self._keys[self._slots : end] = keys
        self._slots = end

    def cancel(self) -> None:
        """End a long prefill at once, from another thread; what the cache held is lost. Short steps are not worth it."""
        if self._interruptible:
            self._request.cancel()

    def get_seq_length(self) -> int:
        """transformers' name for the number of slots."""
        return self._slots


class OVLanguageModel(GenerationMixin):
    """transformers' view of the language part. Several threads may generate at once, each with a cache of its own."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = False

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, config: dict[str, Any], embed: Callable, *, reuse: bool):
        self._compiled = compile_part(core, keep_last_position(read_part(core, folder, "language")), placement)
        self._embed = embed
        self._idle: list[KVCache] = []  # least recently used first
        self._lock = threading.Lock()
        self._most_idle = IDLE_CACHES if reuse else 0
        self.config = PretrainedConfig(**{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")})
        self.generation_config = GenerationConfig.from_pretrained(folder, GENERATION_CONFIG_FILE)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def new_cache(self) -> KVCache:
        """An empty KV cache; it takes memory only for the tokens it comes to hold."""
        return KVCache(self._compiled.create_infer_request())

    @contextmanager
    def lend_cache(self, keys: np.ndarray) -> Iterator[KVCache]:
        """A cache for one stateless call: the idle one that shares most of a prompt with these keys, or an empty one."""
        with self._lock:
            cache = max(self._idle, key=lambda cache: cache.shared_with(keys), default=None)
            if cache is not None and 2 * cache.shared_with(keys) < len(cache):  # another dialogue's: leave it while there is room
                cache = self._idle[0] if len(self._idle) >= self._most_idle else None
            if cache is not None:
                self._idle.remove(cache)
        if cache is None:
            cache = self.new_cache()
        try:
            yield cache
        finally:
            with self._lock:
                self._idle = [*self._idle, cache][-self._most_idle :] if self._most_idle else []

    def can_generate(self) -> bool:
        return True

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        return self.forward(**inputs)

    def forward(
        self,
        cache: KVCache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Embeddings (B, T, D) of a prompt under its mask (B, T), or ids (B, 1) after it -> logits (B, 1, V)."""
        if inputs_embeds is None:
            assert input_ids is not None
            ids = input_ids.numpy()
            logits = cache.feed(self._embed(input_ids).numpy(), np.ones_like(ids), ids[0])
        else:
            assert attention_mask is not None
            logits = cache.feed(inputs_embeds.numpy(), attention_mask.numpy(), None, progress)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cache: KVCache,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What is new: the embeddings on the first step, the last ids after it. Positions are the cache's."""
        if past_key_values is not None:
            return {"cache": cache, "input_ids": input_ids[:, -1:]}
        return {"cache": cache, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "progress": progress}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """The cache is handed over from outside."""

    def _reorder_cache(self, past_key_values: KVCache, beam_idx: Tensor) -> KVCache:
        past_key_values.order = beam_idx.numpy().astype(np.int32)
        return past_key_values
