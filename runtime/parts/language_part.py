"""The compiled language part: its weights, and the KV caches over them.

Knows embeddings and keys of tokens, nothing of generation; the caches are in kv_cache.py, paged_cache.py and
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
from runtime.parts import memory
from runtime.parts.device import Placement, processor_class, widened
from runtime.parts.experts import take_experts_apart
from runtime.parts.kv_cache import KVCache
from runtime.parts.paged_cache import FEW, PagedCache, page_shapes
from runtime.parts.paged_rows import PagedRows
from runtime.parts.part import compile_part, compile_wider, leaving_file, read_part, threads_of
from runtime.parts.stateful_cache import StatefulCache, Turns

PAGES = "KV_CACHE_PRECISION"
TOKENS_FOR_ALL = 256  # of a prompt that packs experts: with 8 of 128 a token, one in 16 million is left out
IDLE_CACHES = 2  # KV caches kept for stateless calls
IDLE_SECONDS, GLANCE_SECONDS = 0.3, 0.05  # idle time before weights are packed, and how often it is checked
ANSWERS_BEFORE = 4  # decode is compiled apart
FREE_FOR_SECOND = 2  # times the weights' size: available memory without which it is not, for it keeps weights of its own


class LanguagePart:
    """The part as it is placed, of `width` D; with `decode`, compiled a second time for decode.

    `later` is compiled for decode after `ANSWERS_BEFORE` answers, while idle if possible, else before the next answer: compiling
    takes the time that some hundred tokens gain, which a single question would not win back. On a CPU, experts are taken apart in
    the first compilation (experts.py): a token takes longer in it, so `later` follows the first answer. `reuse` off computes every
    prompt anew. Several threads may use it at once, each with a cache of its own.
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
        model = self._read()
        self._apart = take_experts_apart(model) if self._cache_kind is PagedCache else []  # memory of the compiled part
        if self._apart and decode is None:
            later = later or placement  # experts that are apart take longer for single tokens
        self._compiled = compile_part(core, folder, model, placement)
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
        self._is_wide = False  # compiled again, after an overflow
        self._idle: list[KVCache] = []  # least recently used first
        self._lock = threading.RLock()  # a conversation may end, and return its cache, in any thread
        self._most_idle = IDLE_CACHES if reuse else 0
        self._placed = [placed for placed in (placement, decode, later) if placed is not None]
        self._folder, self._width = folder, width
        self._runs_to_pack = 2
        self._asked = threading.Event()
        self._background: Future[None] | None = None
        self._answers = ANSWERS_BEFORE - 1 if self._apart else 0

    def pack(self) -> None:
        """Run a prompt and a token, unless that is done: devices pack weights on their first runs."""
        if self._runs_to_pack:
            cache, prompt = self.new_cache(), np.zeros((1, FEW + 1, self._width), np.float32)
            if self._apart:  # different tokens, for all experts of a layer
                prompt = np.random.default_rng(0).standard_normal((1, TOKENS_FOR_ALL, self._width), np.float32)
            for embeds in (prompt, prompt[:, :1]):
                cache.feed(embeds, np.ones(embeds.shape[:2], np.int64), np.zeros(embeds.shape[1]))

    def pack_when_idle(self) -> None:
        """Pack in a thread once there is no request for a moment: two parts at once on few cores take longer than in turn."""
        self._when_idle(self.pack)

    def rest(self) -> None:
        """Called at the end of an answer."""
        self._answers += 1
        if self._later is not None and self._answers >= ANSWERS_BEFORE:
            self._when_idle(self.take_second)

    def take_second(self) -> None:
        """Compile `later` now, if there is one that is not compiled yet and memory for it."""
        with self._lock:
            later, self._later = self._later, None
        if later is None:
            return
        weights = (self._folder / self._placed[0].file).with_suffix(".bin").stat().st_size
        if FREE_FOR_SECOND * weights > memory.of_machine()[1]:
            return
        try:
            self._second = later()
        except DeviceError:  # decode goes on as before
            return
        self._runs_to_pack = 1  # a prompt is read as before
        self.new_cache().feed(np.zeros((1, 1, self._width), np.float32), np.ones((1, 1), np.int64), np.zeros(1))

    def _when_idle(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread once there is no request for `IDLE_SECONDS`; not when the program ends before."""
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
        """Called before an answer: end background work and raise its error, then compile `later` if it is due."""
        self._asked.set()
        if self._background is not None:
            self._background.result()
        if self._later is not None and self._answers >= ANSWERS_BEFORE:  # no quiet moment came
            self.take_second()

    def _first_runs(self) -> AbstractContextManager[None]:
        """The context of a cache's runs: the first prompt and the first token pack the weights, while their file leaves memory."""
        return self._packing() if self._runs_to_pack else nullcontext()

    @contextmanager
    def _packing(self) -> Iterator[None]:
        with ExitStack() as files:
            for each in self._placed:
                files.enter_context(leaving_file(self._folder, each))
            yield
        self._runs_to_pack = max(0, self._runs_to_pack - 1)

    def _wider(self, core: ov.Core, folder: Path, placement: Placement, wanting: Turns) -> Turns | None:
        """The part in float32, for all caches from now on; None where that one overflowed."""
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
        """Number of threads it computes with."""
        return threads_of(self._compiled)

    def new_cache(self) -> KVCache:
        """An empty KV cache, whose memory grows with its tokens."""
        return self._cache_kind(self._base, **self._cache_options)

    def new_rows(self, limit: int) -> PagedRows | None:
        """Pages of at most `limit` bytes for a batch of rows; None where keys and values are in OpenVINO's state."""
        return PagedRows(self._base, limit, **self._cache_options) if self._cache_kind is PagedCache else None

    @contextmanager
    def lend_cache(self, keys: np.ndarray) -> Iterator[KVCache]:
        """A cache for one stateless call: the idle one that shares most with a prompt of these keys, or an empty one."""
        with self._lock:
            cache = max(self._idle, key=lambda cache: cache.shared_with(keys), default=None)
            if cache is not None and 2 * cache.shared_with(keys) < len(cache):  # another conversation's: leave it if there is room
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
        """Return a cache to the idle ones, whose prompts may come again."""
        with self._lock:
            if len(cache) and self._most_idle:
                self._idle = [*self._idle, cache][-self._most_idle :]

    def forget(self) -> None:
        """Delete the idle caches."""
        with self._lock:
            self._idle.clear()


def _paged_properties(core: ov.Core, placement: Placement, decode: Placement | None) -> dict[str, Any]:
    """Properties of the part with paged attention.

    The processor class sets the precision of keys and values: 16 bits, which OpenVINO makes bfloat16 where it computes in that.
    OpenVINO's default, 8 bits, is the only one that compilations of two precisions can both read. The compiled part is not cached
    on the disk: OpenVINO cannot read one with paged attention back, and would write it each time.
    """
    properties = {name: value for name, value in placement.properties.items() if name != "CACHE_DIR"}
    known = None if placement.accurate else processor_class(core)
    if known is None:
        return properties
    hints = {each.properties.get("INFERENCE_PRECISION_HINT") for each in (placement, decode or placement)}
    return {PAGES: known.pages if len(hints) == 1 else "u8"} | properties


def _free_guesses(core: ov.Core, tokens: Placement) -> int:
    """How many draft tokens are free in a decode step as compiled: none in bfloat16, where each costs a tenth of a step."""
    known = processor_class(core)
    in_float32 = "f32" in (tokens.properties.get("INFERENCE_PRECISION_HINT"), core.get_property("CPU", "INFERENCE_PRECISION_HINT"))
    return known.guesses if known is not None and in_float32 else 0


def _compile_decode(core: ov.Core, folder: Path, placement: Placement, width: int, prefill: ov.CompiledModel) -> ov.CompiledModel:
    """The paged part for decode, over pages laid out as those of `prefill`. Raises DeviceError."""
    model = PagedCache.adapt(read_part(core, folder, placement, width))
    pages = {PAGES: prefill.get_property(PAGES)}
    compiled = compile_part(core, folder, model, replace(placement, properties=_paged_properties(core, placement, None) | pages))
    if page_shapes(compiled) != page_shapes(prefill):
        raise DeviceError(
            "the language part for decode needs another page layout: delete it with python -m runtime tune FOLDER --reset"
        )
    return compiled
