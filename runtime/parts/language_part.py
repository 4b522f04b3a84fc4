"""The compiled language part: its weights, and the KV caches over them.

Knows embeddings and keys of tokens, nothing of who generates with it; what a cache does is in kv_cache.py, paged_cache.py and
stateful_cache.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import openvino as ov

from runtime.errors import DeviceError
from runtime.parts.device import Placement, processor_class, widened
from runtime.parts.kv_cache import KVCache
from runtime.parts.paged_cache import PagedCache, page_shapes
from runtime.parts.paged_rows import PagedRows
from runtime.parts.part import compile_part, compile_wider, leaving_file, read_part, threads_of
from runtime.parts.stateful_cache import StatefulCache, Turns

PAGES = "KV_CACHE_PRECISION"
IDLE_CACHES = 2  # KV caches kept for stateless calls
IDLE_SECONDS, GLANCE_SECONDS = 0.3, 0.05  # after which weights are packed before somebody asks, and how soon an end is seen
ANSWERS_BEFORE = 4  # single tokens are compiled apart


class LanguagePart:
    """The part as it is placed, of `width` D; with `decode` compiled a second time, for single tokens.

    `later` is compiled for them after `ANSWERS_BEFORE` answers, in a quiet moment if there is one, else before the next: it takes
    the time that some hundred tokens gain, which who asks one question would only wait for. `reuse` off computes every prompt
    anew. Several threads may use it at once, each with a cache of its own.
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
        later: Placement | None = None,
    ):
        self._cache_kind: type[PagedCache | StatefulCache] = PagedCache if placement.device == "CPU" else StatefulCache
        if self._cache_kind is PagedCache:
            placement = replace(placement, properties=_paged_properties(core, placement, decode or later))
        self._read = lambda: self._cache_kind.adapt(read_part(core, folder, placement, width))
        self._compiled = compile_part(core, folder, self._read(), placement)
        self._base: Any = self._compiled if self._cache_kind is PagedCache else Turns(self._compiled)  # of all caches
        second: dict[str, Any] = {}
        if decode is not None and self._cache_kind is PagedCache:
            second = {"decode": _compile_decode(core, folder, decode, width, self._compiled)}
        self._cache_options: dict[str, Any] = second | {
            "plain_length": plain_length,
            "window": window,
            "siblings": WeakSet() if reuse else None,
            "first_runs": self._first_runs,
        }
        self._later: Callable[[], ov.CompiledModel] | None = None
        self._second: ov.CompiledModel | None = None
        if self._cache_kind is PagedCache:
            if later is not None:
                self._later = partial(_compile_decode, core, folder, later, width, self._compiled)
            guesses = {soon: _free_guesses(core, later if soon and later else decode or placement) for soon in (False, True)}
            self._cache_options["second"] = lambda: self._second
            self._cache_options["guesses"] = lambda: guesses[self._second is not None]
        elif (wider := widened(core, placement)) is not None:
            self._cache_options["wider"] = partial(self._wider, core, folder, wider)
        self._is_wide = False  # compiled anew, after an overflow
        self._idle: list[KVCache] = []  # least recently used first
        self._lock = threading.RLock()  # a conversation may end, and give its cache back, anywhere
        self._most_idle = IDLE_CACHES if reuse else 0
        self._placed = [placed for placed in (placement, decode, later) if placed is not None]
        self._folder, self._width = folder, width
        self._runs_to_pack = 2
        self._asked = threading.Event()
        self._background: Future[None] | None = None
        self._answers = 0

    def pack(self) -> None:
        """Run a prompt and a token, unless that was done: devices pack weights when they first run."""
        if self._runs_to_pack:
            cache = self.new_cache()
            for count in (2, 1):
                cache.feed(np.zeros((1, count, self._width), np.float32), np.ones((1, count), np.int64), np.zeros(count))

    def pack_when_idle(self) -> None:
        """Pack in a thread, if nobody asks for some moments: two parts that run at once on few cores take longer than in turn."""
        self._when_idle(self.pack)

    def rest(self) -> None:
        """An answer is over."""
        self._answers += 1
        if self._later is not None and self._answers >= ANSWERS_BEFORE:
            self._when_idle(self.take_second)

    def take_second(self) -> None:
        """Compile single tokens apart now, where that is to be."""
        with self._lock:
            later, self._later = self._later, None
        if later is None:
            return
        try:
            self._second = later()
        except DeviceError:  # single tokens go on as before
            return
        self._runs_to_pack = 2
        self.pack()

    def _when_idle(self, work: Callable[[], None]) -> None:
        """Do something in a thread, once nobody asks for some moments; not any more when the program ends."""
        self._asked.clear()
        done: Future[None] = Future()
        self._background = done

        def wait_and_work() -> None:
            try:
                quiet = all(
                    not self._asked.wait(GLANCE_SECONDS) and threading.main_thread().is_alive()
                    for _ in range(round(IDLE_SECONDS / GLANCE_SECONDS))
                )
                if quiet:
                    work()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=wait_and_work, name="idle").start()

    def settle(self) -> None:
        """Somebody asks: nothing runs in the background until the answer is over. Raises what went wrong there."""
        self._asked.set()
        if self._background is not None:
            self._background.result()
        if self._later is not None and self._answers >= ANSWERS_BEFORE:  # no quiet moment came
            self.take_second()

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

    def _wider(self, core: ov.Core, folder: Path, placement: Placement, wanting: Turns) -> Turns | None:
        """The part in float32, for all caches from now on; None where that is the one that was found wanting."""
        with self._lock:
            if wanting is self._base:
                if self._is_wide:
                    return None
                self._compiled, self._is_wide = compile_wider(core, folder, self._read(), placement), True
                self._base = Turns(self._compiled)
                self._cache_options.pop("wider")
            return self._base

    @property
    def threads(self) -> int:
        """How many it computes with."""
        return threads_of(self._compiled)

    def new_cache(self) -> KVCache:
        """An empty KV cache; it takes memory only for the tokens it comes to hold."""
        return self._cache_kind(self._base, **self._cache_options)

    def new_rows(self, limit: int) -> PagedRows | None:
        """Pages of at most `limit` bytes for many rows at once; None where OpenVINO's state holds keys and values."""
        return PagedRows(self._base, limit, **self._cache_options) if self._cache_kind is PagedCache else None

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


def _paged_properties(core: ov.Core, placement: Placement, decode: Placement | None) -> dict[str, Any]:
    """Properties of the part where its attention is paged.

    Keys and values are kept as the processor's class says: in 16 bits, which OpenVINO makes bfloat16 where it computes in that. Its
    own choice, 8 bits, is all that compilations of two precisions can both read. A compiled part is not kept: OpenVINO cannot read
    one with paged attention again, and would write it each time.
    """
    properties = {name: value for name, value in placement.properties.items() if name != "CACHE_DIR"}
    known = None if placement.accurate else processor_class(core)
    if known is None:
        return properties
    hints = {each.properties.get("INFERENCE_PRECISION_HINT") for each in (placement, decode or placement)}
    return {PAGES: known.pages if len(hints) == 1 else "u8"} | properties


def _free_guesses(core: ov.Core, tokens: Placement) -> int:
    """How many guessed tokens cost nothing beside a token, as it is compiled: none in bfloat16, where each costs a tenth."""
    known = processor_class(core)
    in_float32 = "f32" in (tokens.properties.get("INFERENCE_PRECISION_HINT"), core.get_property("CPU", "INFERENCE_PRECISION_HINT"))
    return known.guesses if known is not None and in_float32 else 0


def _compile_decode(core: ov.Core, folder: Path, placement: Placement, width: int, prefill: ov.CompiledModel) -> ov.CompiledModel:
    """The paged part for single tokens, over pages as `prefill` lays them out. Raises DeviceError."""
    model = PagedCache.adapt(read_part(core, folder, placement, width))
    pages = {PAGES: prefill.get_property(PAGES)}
    compiled = compile_part(core, folder, model, replace(placement, properties=_paged_properties(core, placement, None) | pages))
    if page_shapes(compiled) != page_shapes(prefill):
        raise DeviceError("the part for single tokens wants other pages: python -m runtime tune FOLDER --reset goes without it")
    return compiled
