"""The language part behind transformers' generate: greedy, sampling, beams, penalties and streamers are theirs.

Takes embeddings and gives logits of the last position; what earlier tokens left behind is in a KVCache, many of them over shared
weights. Knows nothing of prompts or pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import openvino as ov
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.device import Placement
from runtime.errors import DeviceError, OptionError
from runtime.kv_cache import KVCache, PagedCache, StatefulCache, page_shapes
from runtime.part import compile_part, leave_file, read_part, threads_of
from runtime.stream import Progress

LOOKUP = "prompt_lookup_num_tokens"  # transformers' name
NO_LOOKUP = f"{LOOKUP} is for one greedy answer: leave out sampling, beams, penalties and several answers"
LOOKUP_SIZES = (3, 2)
IDLE_CACHES = 2  # KV caches kept for stateless calls


class OVLanguageModel(GenerationMixin):
    """transformers' view of the language part. Several threads may generate at once, each with a cache of its own."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = False

    def __init__(
        self,
        generation_config: GenerationConfig,
        folder: Path,
        core: ov.Core,
        placement: Placement,
        config: dict[str, Any],
        embed: Callable,
        *,
        plain_length: int | None,
        window: int | None,
        reuse: bool,
        decode: Placement | None = None,
    ):
        self._cache_kind: type[PagedCache | StatefulCache] = PagedCache if placement.device == "CPU" else StatefulCache
        width = config["hidden_size"]
        self._compiled = compile_part(core, self._cache_kind.adapt(read_part(core, folder, placement, width)), placement)
        self._embed = embed
        second: dict[str, Any] = {}
        if decode is not None and self._cache_kind is PagedCache:
            second = {
                "decode": _compile_decode(core, PagedCache.adapt(read_part(core, folder, decode, width)), decode, self._compiled)
            }
        self._cache_options: dict[str, Any] = second | {
            "plain_length": plain_length,
            "window": window,
            "siblings": WeakSet() if reuse else None,
        }
        self._idle: list[KVCache] = []  # least recently used first
        self._lock = threading.RLock()  # a conversation may end, and give its cache back, anywhere
        self._most_idle = IDLE_CACHES if reuse else 0
        self.config = PretrainedConfig(**{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")})
        self.generation_config = generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32
        # Weights are packed when a part first runs: better now than while somebody waits, and their file can leave memory.
        with_weights = [placed for placed in (placement, decode) if placed is not None]
        beside = ThreadPoolExecutor(1)  # while a picture is read and looked at
        self._packed = beside.submit(self._pack, folder, with_weights, width)
        beside.shutdown(wait=False)

    def _pack(self, folder: Path, placed: list[Placement], width: int) -> None:
        cache = self.new_cache()
        for count in (2, 1):  # a prompt and a token
            cache.feed(np.zeros((1, count, width), np.float32), np.ones((1, count), np.int64), np.zeros(count))
        for each in placed:
            leave_file(folder, each)

    def wait(self) -> None:
        """Until weights are packed; generate does. Raises what went wrong."""
        self._packed.result()

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' generate."""
        self.wait()
        return super().generate(*args, **options)  # type: ignore[misc]

    @property
    def threads(self) -> int:
        """How many it computes with."""
        return threads_of(self._compiled)

    def new_cache(self) -> KVCache:
        """An empty KV cache; it takes memory only for the tokens it comes to hold."""
        return self._cache_kind(self._compiled, **self._cache_options)

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
            self.give_back(cache)

    def give_back(self, cache: KVCache) -> None:
        """Somebody needs a cache no more: keep it among the idle ones, whose prompts may come again."""
        with self._lock:
            if len(cache) and self._most_idle:
                self._idle = [*self._idle, cache][-self._most_idle :]

    def forget(self) -> None:
        """Drop the idle caches."""
        with self._lock:
            self._idle.clear()

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
        visual_token_mask: Tensor | None = None,
        progress: Progress | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Embeddings (B, T, D) of a prompt under its masks (B, T), or ids (B, 1) after it -> logits (B, 1, V)."""
        if inputs_embeds is None:
            assert input_ids is not None
            ids = input_ids.numpy()
            logits = cache.feed(self._embed(input_ids).numpy(), np.ones_like(ids), ids[0] if len(ids) == 1 else None)
        else:
            assert attention_mask is not None
            assert visual_token_mask is not None
            logits = cache.feed(inputs_embeds.numpy(), attention_mask.numpy(), None, progress, visual_token_mask.numpy())
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=cache)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cache: KVCache,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        progress: Progress | None = None,
        lookup_tokens: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """What is new: the embeddings on the first step, the last ids after it. Positions are the cache's."""
        if past_key_values is not None:
            return {"cache": cache, "input_ids": input_ids[:, -1:]}
        return {
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "visual_token_mask": visual_token_mask,
            "progress": progress,
        }

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """transformers' loop; without its millisecond a token in the commonest case, the likeliest tokens of one row."""
        config = generation_config
        if len(input_ids) > 1 or config.do_sample or config.return_dict_in_generate or len(logits_processor):
            if inputs.get("lookup_tokens"):
                raise OptionError(NO_LOOKUP)
            return super()._sample(  # type: ignore[misc]
                input_ids,  # type: ignore[arg-type]
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **inputs,
            )
        cache = inputs["cache"]
        prompt = [inputs[name].numpy() for name in ("inputs_embeds", "attention_mask", "visual_token_mask")]
        logits = cache.feed(*prompt[:2], None, inputs.get("progress"), prompt[2])
        for token in self._likeliest(cache, logits, inputs.get("lookup_tokens") or 0):
            input_ids = torch.cat([input_ids, token], dim=1)
            if streamer is not None:
                streamer.put(token[0])
            if stopping_criteria(input_ids, None).all():
                break
        if streamer is not None:
            streamer.end()
        return input_ids

    def _likeliest(self, cache: KVCache, logits: np.ndarray, lookup_tokens: int) -> Iterator[Tensor]:
        """The likeliest token (1, 1) after these logits, then the one after that, without end.

        Up to `lookup_tokens` guesses are computed beside a token; only what would have come anyway is handed out.
        """
        one = np.ones((1, 1), np.int64)
        while True:
            token = torch.tensor([[logits.argmax()]])
            yield token
            room = min(lookup_tokens, cache.room_for_drafts - 1)
            draft = look_up(np.append(cache.ids, token), room) if room > 0 else one[:0, 0]
            if not len(draft):
                logits = cache.feed(self._embed(token).numpy(), one, token[0].numpy())
                continue
            fed = torch.cat([token, torch.from_numpy(draft)[None]], dim=1)
            after = cache.check_draft(self._embed(fed).numpy(), fed[0].numpy())  # (1 + guesses, V)
            right = int(np.cumprod(after[:-1].argmax(1) == draft).sum())
            cache.drop(len(draft) - right)
            logits = after[right].copy()
            yield from torch.from_numpy(draft[:right]).reshape(-1, 1, 1)

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: CausalLMOutputWithPast, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> dict[str, Any]:
        """Only that there is a past: the cache keeps the mask."""
        model_kwargs["past_key_values"] = outputs.past_key_values
        return model_kwargs

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """The cache is handed over from outside."""

    def _reorder_cache(self, past_key_values: KVCache, beam_idx: Tensor) -> KVCache:
        past_key_values.reorder(beam_idx.tolist())
        return past_key_values


def _compile_decode(core: ov.Core, model: ov.Model, placement: Placement, prefill: ov.CompiledModel) -> ov.CompiledModel:
    """The paged part for single tokens, over pages as `prefill` lays them out. Raises DeviceError."""
    pages = {"KV_CACHE_PRECISION": prefill.get_property("KV_CACHE_PRECISION")}
    compiled = compile_part(core, model, replace(placement, properties=placement.properties | pages))
    if page_shapes(compiled) != page_shapes(prefill):
        raise DeviceError("the part for single tokens wants other pages: python -m runtime tune FOLDER --reset goes without it")
    return compiled


def look_up(ids: np.ndarray, most: int) -> np.ndarray:
    """What followed the last tokens of `ids` (T,) when they came up before: at most `most` ids, none if they did not.

    Three tokens are looked for, then two, the latest place first. Prompt lookup decoding: A. Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding@main README.md
    """
    for size in LOOKUP_SIZES:
        if len(ids) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((windows == ids[-size:]).all(1))
        if len(found):
            follows = ids[found[-1] + size :][:most]
            known = np.flatnonzero(follows < 0)  # a picture's tokens are not written
            return follows[: known[0]] if len(known) else follows
    return ids[:0]
