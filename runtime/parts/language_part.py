"""The compiled language part: its weights, and the KV caches over them.

Knows embeddings and keys of tokens, nothing of who generates with it; what a cache does is in kv_cache.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import openvino as ov

from runtime.errors import DeviceError
from runtime.parts.device import Placement
from runtime.parts.kv_cache import KVCache, PagedCache, StatefulCache, page_shapes
from runtime.parts.part import compile_part, leaving_file, read_part, threads_of

PAGES = "KV_CACHE_PRECISION"
IDLE_CACHES = 2  # KV caches kept for stateless calls
IDLE_SECONDS = 0.3  # after which weights are packed before somebody asks


class LanguagePart:
    """The part as it is placed, of `width` D; with `decode` compiled a second time, for single tokens.

    `reuse` off computes every prompt anew. Several threads may use it at once, each with a cache of its own.
    """

    def __init__(
        self,
        folder: Path,
        core: ov.Core,
        placement: Placement,
        width: int,
        *,
        plain_length: int | None,
        window: int | None,
        reuse: bool,
        decode: Placement | None = None,
    ):
        self._cache_kind: type[PagedCache | StatefulCache] = PagedCache if placement.device == "CPU" else StatefulCache
        if self._cache_kind is PagedCache:
            placement = replace(placement, properties=_paged_properties(placement, decode))
        self._compiled = compile_part(core, self._cache_kind.adapt(read_part(core, folder, placement, width)), placement)
        second: dict[str, Any] = {}
        if decode is not None and self._cache_kind is PagedCache:
            second = {
                "decode": _compile_decode(core, PagedCache.adapt(read_part(core, folder, decode, width)), decode, self._compiled)
            }
        self._cache_options: dict[str, Any] = second | {
            "plain_length": plain_length,
            "window": window,
            "siblings": WeakSet() if reuse else None,
            "first_runs": self._first_runs,
        }
        self._idle: list[KVCache] = []  # least recently used first
        self._lock = threading.RLock()  # a conversation may end, and give its cache back, anywhere
        self._most_idle = IDLE_CACHES if reuse else 0
        self._placed = [placed for placed in (placement, decode) if placed is not None]
        self._folder, self._width = folder, width
        self._runs_to_pack = 2
        self._asked = threading.Event()
        self._background: Future[None] | None = None

    def pack(self) -> None:
        """Run a prompt and a token, unless that was done: devices pack weights when they first run."""
        if self._runs_to_pack:
            cache = self.new_cache()
            for count in (2, 1):
                cache.feed(np.zeros((1, count, self._width), np.float32), np.ones((1, count), np.int64), np.zeros(count))

    def pack_when_idle(self) -> None:
        """Pack in a thread, if nobody asks for some moments: two parts that run at once on few cores take longer than in turn."""
        beside = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._background = beside.submit(self._wait_and_pack)
        beside.shutdown(wait=False)

    def _wait_and_pack(self) -> None:
        if not self._asked.wait(IDLE_SECONDS):
            self.pack()

    def settle(self) -> None:
        """Somebody asks: nothing runs in the background from now on. Raises what went wrong there."""
        self._asked.set()
        if self._background is not None:
            self._background.result()

    def _first_runs(self) -> AbstractContextManager[None]:
        """What a cache runs in: weights are packed by a prompt and by a token, while their file leaves memory."""
        return self._packing() if self._runs_to_pack else nullcontext()

    @contextmanager
    def _packing(self) -> Iterator[None]:
        with ExitStack() as files:
            for each in self._placed:
                files.enter_context(leaving_file(self._folder, each))
            yield
        self._runs_to_pack = max(0, self._runs_to_pack - 1)

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


def _paged_properties(placement: Placement, decode: Placement | None) -> dict[str, Any]:
    """Properties of the part where its attention is paged.

    Keys and values are kept in 16 bits, which OpenVINO makes bfloat16 where it computes in that. Its own choice, 8 bits, is further
    from the original and takes longer to unpack than 16 bits to read (BENCHMARKS.md), but is all that compilations of two
    precisions can both read. A compiled part is not kept: OpenVINO cannot read one with paged attention again, and would write it
    each time.
    """
    properties = {name: value for name, value in placement.properties.items() if name != "CACHE_DIR"}
    if placement.accurate:
        return properties
    hints = {each.properties.get("INFERENCE_PRECISION_HINT") for each in (placement, decode or placement)}
    return {PAGES: "f16" if len(hints) == 1 else "u8"} | properties


def _compile_decode(core: ov.Core, model: ov.Model, placement: Placement, prefill: ov.CompiledModel) -> ov.CompiledModel:
    """The paged part for single tokens, over pages as `prefill` lays them out. Raises DeviceError."""
    pages = {PAGES: prefill.get_property(PAGES)}
    compiled = compile_part(core, model, replace(placement, properties=_paged_properties(placement, None) | pages))
    if page_shapes(compiled) != page_shapes(prefill):
        raise DeviceError("the part for single tokens wants other pages: python -m runtime tune FOLDER --reset goes without it")
    return compiled
