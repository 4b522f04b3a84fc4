"""Many answers at once from one model folder: which tokens come next is somebody else's work, what they say is told as it comes.

`GenaiEngine` hands our embeddings to openvino_genai's ContinuousBatchingPipeline, so that templates, tile limits and the cache of
features are ours and paged attention over many requests is theirs. `NativeEngine` decodes itself, one answer after the other.
Knows no HTTP and no JSON.
"""

from __future__ import annotations

import itertools
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
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

DEFAULT_NEW_TOKENS = 1024  # of an answer, where neither the request nor the model bounds it
ENDED = "the process that answers has ended"
LAST_SECONDS = 5.0  # for the last words of the process that answers
SMALLEST = 1e-3  # of what single precision would make 0


def decoding_of(model: OpenedModel, most_tokens: int | None, room: int | None, wishes: Mapping[str, Any], **more: Any) -> Decoding:
    """Wishes that are not None, then generation_config.json, then the defaults of Decoding.

    `wishes` are of temperature, top_p, top_k, min_p and repetition_penalty;
    `room` is how many tokens the model can still read after the prompt; `more` are other fields of Decoding.
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
    """What came next of an answer: text, its tokens, at the end why it ended ("stop", "length")."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


class Engine(ABC):
    """Answers prompts, several at once; `tell` is called from a thread of the engine for every piece of an answer."""

    def __init__(self, model: OpenedModel):
        self.model = model
        ends = model.generation_defaults.get("eos_token_id", model.stop_id)
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.kv_cache_share: float | None = None  # how much of the KV cache is in use, 0 to 1, where there is one for all

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return True

    @abstractmethod
    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        """Begin an answer; returns what cancels it, from any thread. Raises OptionError.

        Tokens that end an answer are the engine's to know. The last piece has a finish reason or an error; after cancelling there
        may be none.
        """

    @abstractmethod
    def close(self) -> None:
        """End all answers and the engine's threads."""


class NativeEngine(Engine):
    """Our own decoding, one answer after the other in the order in which they were asked."""

    def __init__(self, model: OpenedModel):
        super().__init__(model)
        model.wait_until_packed()  # who says that he serves can
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        self.model.rule_of(decoding)  # what is wrong with a schema is told at once
        cancelled = threading.Event()
        decoding = replace(decoding, eos_token_ids=tuple(self.ends))

        def check(*_: Any) -> None:
            if cancelled.is_set():
                raise Cancelled

        def run() -> None:
            text, reason = TextStream(self.model.tokenizer, self.model.conv_template, decoding.stop_strings), "length"
            try:
                check()
                with closing(self.model.tokens(prompt, decoding, progress=check)) as tokens:  # type: ignore[type-var]
                    for token in tokens:
                        check()
                        if token.id in self.ends and not decoding.ignore_eos:
                            reason = "stop"
                            break
                        tell(Piece(text.add(token.id), (token,)))
                        if text.stopped:
                            reason = "stop"
                            break
                tell(Piece(text.end(), finish_reason=reason))
            except Cancelled:
                pass
            except Exception as error:  # carried to the one who asked
                tell(Piece("", error=error))

        self._worker.submit(run)
        return cancelled.set

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the process that answers end: its standard input does."""
    with suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(eq=False)
class _Request:
    text: TextStream
    tell: Callable[[Piece], None]


class GenaiEngine(Engine):
    """openvino_genai's continuous batching over our embeddings, in a process of its own: many requests in every step."""

    def __init__(self, model: OpenedModel, cache_gb: int):
        """`model` is opened without its language part; `cache_gb` bounds the KV cache of all requests. Raises DeviceError."""
        super().__init__(model)
        if model.config.has_visual_experts:
            raise OptionError("openvino_genai does not feed visual experts: start the server with --engine native")
        self._check_schema = SchemaCheck(model.folder, model.config.language["vocab_size"])
        self.kv_cache_share = 0.0
        self._numbers = itertools.count()
        self._running: dict[int, _Request] = {}
        self._lock = threading.Lock()
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = False
        place = model.language_placement
        core = ov.Core()
        groups = activation_groups(core, read_part(core, model.folder, place, model.config.language["hidden_size"]), place)
        command = [sys.executable, "-m", worker.__name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        weakref.finalize(self, _end, self._process)  # also when the program just ends
        threading.Thread(target=self._write, name="prompts", daemon=True).start()
        self._outbox.put(
            worker.Setup(str(model.folder.resolve()), place.device, groups | place.properties, cache_gb, PREFILL_AT_ONCE)
        )
        answer = self._receive()
        if answer != "ready":
            said = last_line(answer) if isinstance(answer, Exception) else "its process ended"
            raise DeviceError(f"openvino_genai cannot open {model.folder} on {place.device} ({said})")
        self._thread = threading.Thread(target=self._listen, name="answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, prompt: Prompt, decoding: Decoding, tell: Callable[[Piece], None]) -> Callable[[], None]:
        if decoding.top_logprobs:
            raise OptionError("top_logprobs needs the native engine: start the server with --engine native")
        plain, length = self.model.config.plain_length, len(prompt.ids)
        if plain is not None and length + decoding.max_new_tokens > plain:
            if plain - length < 1:
                raise OptionError(
                    f"the prompt has {length} tokens; past {plain} this model turns positions in another way, which "
                    "openvino_genai does not do in pieces: start the server with --engine native"
                )
            decoding = replace(decoding, max_new_tokens=plain - length)
        request = _Request(TextStream(self.model.tokenizer, self.model.conv_template, decoding.stop_strings), tell)
        number, cancelled = next(self._numbers), threading.Event()

        def begin() -> None:
            if cancelled.is_set():
                return
            try:
                if decoding.json_schema is not None:
                    self._check_schema(decoding.json_schema)
                embeds = self.model.embeddings_of(prompt)  # (1, T, D)
                with self._lock:
                    if cancelled.is_set():  # while its pictures were looked at
                        return
                    if self._ended:
                        raise RuntimeError(ENDED)
                    self._running[number] = request
                    self._outbox.put(worker.Start(number, embeds, asdict(decoding), self.ends))
            except Exception as error:
                self._drop(number)
                tell(Piece("", error=error))

        def cancel() -> None:
            cancelled.set()
            self._give_up(number)

        self._encoder.submit(begin)
        return cancel

    def close(self) -> None:
        self._encoder.shutdown(cancel_futures=True)
        self._outbox.put(None)
        self._process.wait()
        self._thread.join(LAST_SECONDS)

    def _write(self) -> None:
        """Hand messages over, in a thread: the process takes none while it computes a step, and nobody should wait for that."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            while (message := self._outbox.get()) is not None:
                worker.send(message, self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.close()

    def _receive(self) -> Any:
        """The next message, None when there are no more."""
        try:
            return pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):  # it has ended, perhaps in the middle of a message
            return None

    def _drop(self, number: int) -> _Request | None:
        with self._lock:
            return self._running.pop(number, None)

    def _give_up(self, number: int) -> None:
        if self._drop(number) is not None:
            self._outbox.put(worker.Cancel(number))

    def _listen(self) -> None:
        while (news := self._receive()) is not None:
            self.kv_cache_share = news.cache_share
            for number in {*news.tokens, *news.over, *news.failed}:
                request = self._running.get(number)
                if request is not None:
                    self._tell(number, request, news)
            if not self._running:
                self.kv_cache_share = 0.0
        with self._lock:
            self._ended, left = True, [*self._running.values()]
            self._running.clear()
        for request in left:
            request.tell(Piece("", error=RuntimeError(ENDED)))

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
