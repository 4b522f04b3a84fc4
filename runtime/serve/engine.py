"""Many answers at once from one model folder: an engine generates tokens and passes their text to the caller as it comes.

`GenaiEngine` hands our embeddings to openvino_genai's ContinuousBatchingPipeline: templates, tile limits and the feature cache are
ours, paged attention over many requests is theirs. `NativeEngine` decodes itself, one answer after the other.
Knows no HTTP and no JSON.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

import openvino as ov

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding, Token
from runtime.answer.model import OpenedModel
from runtime.answer.stream import TextStream
from runtime.errors import DeviceError, OptionError
from runtime.parts.kv_cache import PREFILL_AT_ONCE
from runtime.parts.part import activation_groups, last_line, read_part
from runtime.progress import Cancelled
from runtime.serve import worker
from runtime.serve.grammar import SchemaCheck
from runtime.serve.process import Process

DEFAULT_NEW_TOKENS = 1024  # of an answer, if neither the request nor the model sets a limit
UNWELL_SECONDS = 60.0  # if the worker process ends twice within this time, /health fails for this time
MOST_STARTS = 3  # failed starts of the worker process in a row, after which the engine gives up
KEPT_SHAPES = 500  # input shapes whose compiled kernels the CPU plugin caches
SMALLEST = 1e-3  # lower bound of top_p and repetition_penalty, which float32 could round to 0
logger = logging.getLogger(__name__)


class ProcessEnded(Exception):
    """The worker process has ended, with all answers that it was writing."""

    def __init__(self) -> None:
        super().__init__("the worker process ended: ask again")


def decoding_of(model: OpenedModel, most_tokens: int | None, room: int | None, wishes: Mapping[str, Any], **more: Any) -> Decoding:
    """Decoding options: `wishes` that are not None, then generation_config.json, then the defaults of Decoding.

    `wishes` may have temperature, top_p, top_k, min_p and repetition_penalty; `room` is the number of tokens that the context has
    left after the prompt; `more` are other fields of Decoding.
    """
    defaults = model.generation_defaults
    drawn = ("temperature", "top_p", "top_k", "min_p") if defaults.get("do_sample") else ()
    own = {name: defaults[name] for name in (*drawn, "repetition_penalty") if name in defaults}
    if drawn:
        own = {"temperature": 1.0, **own}
    own |= {name: value for name, value in wishes.items() if value is not None}
    for name in {"top_p", "repetition_penalty"} & set(own):
        own[name] = max(own[name], SMALLEST)
    most = most_tokens or defaults.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    return Decoding(int(min(most, inf if room is None else room)), **own, **more)


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer: text, its tokens and, in the last one, the finish reason ("stop", "length")."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


class Engine(ABC):
    """Answers prompts, several at once; a thread of the engine calls `tell` for every piece of an answer."""

    tells_alternatives = False  # reports the likeliest tokens besides the chosen one

    def __init__(self, model: OpenedModel):
        self.model = model
        ends = model.generation_defaults.get("eos_token_id", model.stop_id)
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.kv_cache_share: float | None = None  # used share of the KV cache, 0 to 1, if all requests share one

    @property
    def alive(self) -> bool:
        """Whether the engine can answer."""
        return True

    def text_of(self, decoding: Decoding) -> TextStream:
        """The stream that turns the tokens of an answer into text."""
        return self.model.text_of(decoding)

    @abstractmethod
    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        """Start an answer; returns a function that cancels it, from any thread. Raises OptionError.

        The engine adds the end tokens itself. The last piece has a finish reason or an error; after cancelling it may be missing.
        """

    @abstractmethod
    def close(self) -> None:
        """End all answers and the engine's threads."""


class NativeEngine(Engine):
    """Our own decoding, one answer after the other, in the order of the requests."""

    tells_alternatives = True

    def __init__(self, model: OpenedModel):
        super().__init__(model)
        model.wait_until_packed()  # a server that reports ready can answer at once
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        self.model.rule_of(decoding)  # raises for a bad schema at once
        cancelled = threading.Event()
        decoding = replace(decoding, eos_token_ids=tuple(self.ends))

        def check(*_: Any) -> None:
            if cancelled.is_set():
                raise Cancelled

        def run() -> None:
            text, reason = self.text_of(decoding), ""
            count = 0
            try:
                check()
                with closing(self.model.tokens(prompt, decoding, progress=check)) as tokens:  # type: ignore[type-var]
                    for token in tokens:
                        check()
                        count += 1
                        if token.id in self.ends and not decoding.ignore_eos:
                            reason = "stop"
                            break
                        tell(Piece(text.add(token.id), (token,)))
                        if text.stopped:
                            reason = "stop"
                            break
                reason = reason or ("length" if count >= decoding.max_new_tokens else "stop")  # or a complete schema
                tell(Piece(text.end(), finish_reason=reason))
            except Cancelled:
                pass
            except Exception as error:  # passed to the caller
                tell(Piece("", error=error))

        self._worker.submit(run)
        return cancelled.set

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


@dataclass(eq=False)
class _Request:
    text: TextStream
    tell: Callable[[Piece], None]


class GenaiEngine(Engine):
    """openvino_genai's continuous batching over our embeddings, in a worker process: many requests in every step."""

    def __init__(self, model: OpenedModel, cache_gb: int):
        """`model` is opened without its language part; `cache_gb` bounds the KV cache of all requests. Raises DeviceError."""
        super().__init__(model)
        if model.config.has_visual_experts:
            raise OptionError("openvino_genai cannot run visual experts: start the server with --engine native")
        self._check_schema = SchemaCheck(model.folder, model.config.language["vocab_size"])
        self.kv_cache_share = 0.0
        self._numbers = itertools.count()
        self._running: dict[int, _Request] = {}
        self._lock = threading.Lock()
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._schemas = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schemas")
        self._ended = False
        self._last_end, self._unwell_until = -inf, -inf
        place = model.language_placement
        core = ov.Core()
        groups = activation_groups(core, read_part(core, model.folder, place, model.config.language["hidden_size"]), place)
        properties = groups | place.properties
        if place.device == "CPU":
            properties = {"CPU_RUNTIME_CACHE_CAPACITY": KEPT_SHAPES} | properties
        self._setup = worker.Setup(str(model.folder.resolve()), place.device, properties, cache_gb, PREFILL_AT_ONCE)
        self._process = Process(worker.__name__, self._setup)
        answer = self._process.receive()
        if answer != "ready":
            raise DeviceError(f"openvino_genai cannot open {model.folder} on {place.device} ({_last_words(answer)})")
        self._thread = threading.Thread(target=self._listen, name="answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._ended and time.monotonic() >= self._unwell_until

    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        for name in ("top_logprobs", "prompt_lookup_num_tokens"):
            if getattr(decoding, name):
                raise OptionError(f"{name} needs the native engine: start the server with --engine native")
        plain, length = self.model.config.plain_length, len(prompt.ids)
        if plain is not None and length + decoding.max_new_tokens > plain:
            if plain - length < 1:
                raise OptionError(
                    f"the prompt has {length} tokens; past {plain} this model scales its positions, which "
                    "openvino_genai cannot do in chunks: start the server with --engine native"
                )
            decoding = replace(decoding, max_new_tokens=plain - length)
        request = _Request(self.text_of(decoding), tell)
        number, cancelled = next(self._numbers), threading.Event()

        def begin() -> None:
            if cancelled.is_set():
                return
            try:
                embeds = self.model.embeddings_of(prompt)  # (1, T, D)
                with self._lock:
                    if cancelled.is_set():  # while its pictures were encoded
                        return
                    if self._ended:
                        raise ProcessEnded
                    self._running[number] = request
                    self._process.send(worker.Start(number, embeds, asdict(decoding), self.ends))
            except Exception as error:
                self._drop(number)
                tell(Piece("", error=error))

        def check() -> None:
            try:
                if not cancelled.is_set():
                    self._check_schema(decoding)
                    self._encoder.submit(begin)
            except Exception as error:
                tell(Piece("", error=error))

        def cancel() -> None:
            cancelled.set()
            self._give_up(number)

        if decoding.json_schema is None and decoding.calls is None:
            self._encoder.submit(begin)
        else:
            self._schemas.submit(check)
        return cancel

    def close(self) -> None:
        self._schemas.shutdown(cancel_futures=True)
        self._check_schema.close()
        self._encoder.shutdown(cancel_futures=True)
        with self._lock:
            self._process.finish()
        self._thread.join()

    def _drop(self, number: int) -> _Request | None:
        with self._lock:
            return self._running.pop(number, None)

    def _give_up(self, number: int) -> None:
        if self._drop(number) is not None:
            self._process.send(worker.Cancel(number))

    def _listen(self) -> None:
        """Receive from the worker process; if it ends unexpectedly, start another for later requests."""
        failed = 0
        while not self._ended:
            self._hear()
            self._lose()
            failed = 0 if self._ended or self._process.receive() == "ready" else failed + 1
            if failed == MOST_STARTS:
                logger.error("the worker process does not start any more")
                self._process.finish()

    def _hear(self) -> None:
        """Pass on the worker's news until it ends."""
        while (news := self._process.receive()) is not None:
            self.kv_cache_share = news.cache_share
            for number in {*news.tokens, *news.over, *news.failed}:
                request = self._running.get(number)
                if request is not None:
                    self._tell(number, request, news)
            if not self._running:
                self.kv_cache_share = 0.0

    def _lose(self) -> None:
        """The worker has ended: end its answers with an error, and start another worker unless the engine is closing."""
        with self._lock:
            left = [*self._running.values()]
            self._running.clear()
            self._ended = self._process.is_to_end
            self._process.wait()
            if not self._ended:
                now = time.monotonic()
                if now - self._last_end < UNWELL_SECONDS:
                    self._unwell_until = now + UNWELL_SECONDS
                self._last_end = now
                logger.warning("the worker process ended with %d answers, and is started again", len(left))
                self._process = Process(worker.__name__, self._setup)
        self.kv_cache_share = 0.0
        for request in left:
            request.tell(Piece("", error=ProcessEnded()))

    def _tell(self, number: int, request: _Request, news: worker.News) -> None:
        if number in news.failed:
            self._drop(number)
            request.tell(Piece("", error=RuntimeError(news.failed[number])))
            return
        reason = news.over.get(number)
        if reason == "ignored":
            self._drop(number)
            error = OptionError("the prompt does not fit the KV cache: start the server with a larger --cache-size")
            request.tell(Piece("", error=error))
            return
        text, tokens = "", []  # type: str, list[Token]
        for token, logprob in news.tokens.get(number, []):
            if token not in self.ends and not request.text.stopped:
                text += request.text.add(token)
                tokens.append(Token(token, logprob))
        if reason is None and not request.text.stopped:
            request.tell(Piece(text, tuple(tokens)))
            return
        if reason is None:
            self._give_up(number)
        self._drop(number)
        text += request.text.end()
        request.tell(Piece(text, tuple(tokens), "stop" if request.text.stopped or reason is None else reason))


def _last_words(answer: Any) -> str:
    """The reason why a worker process did not become ready."""
    return last_line(answer) if isinstance(answer, Exception) else "its process ended"
