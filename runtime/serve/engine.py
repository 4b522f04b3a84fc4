"""Many answers at once from one model folder: which tokens come next is somebody else's work, what they say is told as it comes.

`GenaiEngine` hands our embeddings to openvino_genai's ContinuousBatchingPipeline, so that templates, tile limits and the cache of
features are ours and paged attention over many requests is theirs. `NativeEngine` runs OVInternVLChatModel, one answer after the
other. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import itertools
import pickle
import queue
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

import openvino as ov
import torch
from transformers import GenerationConfig, StoppingCriteria

from runtime.errors import DeviceError, OptionError
from runtime.image import PictureTiles
from runtime.kv_cache import PREFILL_AT_ONCE
from runtime.model import OVInternVLChatModel
from runtime.part import activation_groups, last_line, read_part
from runtime.serve import worker
from runtime.serve.grammar import SchemaCheck
from runtime.stream import Words

DEFAULT_NEW_TOKENS = 1024  # of an answer, where neither the request nor the model bounds it
ENDED = "the process that answers has ended"
LAST_SECONDS = 5.0  # for the last words of the process that answers
SMALLEST = 1e-3  # of what may not be 0


@dataclass(frozen=True)
class How:
    """How an answer is written. Temperature 0 takes the likeliest token, and so does one that single precision would make 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", self.temperature if self.temperature >= SMALLEST else 0.0)
        for name in ("top_p", "repetition_penalty"):
            object.__setattr__(self, name, max(getattr(self, name), SMALLEST))


def how_of(config: GenerationConfig, most_tokens: int | None, room: int | None, wishes: dict[str, Any], **more: Any) -> How:
    """Wishes that are not None, then generation_config.json, then `How`.

    `wishes` are of temperature, top_p, top_k, min_p and repetition_penalty;
    `room` is how many tokens the model can still read after the prompt; `more` are other fields of `How`.
    """
    own: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if config.do_sample:
        own |= {name: value for name in own if (value := getattr(config, name)) is not None}
    own["repetition_penalty"] = config.repetition_penalty or 1.0
    own |= {name: value for name, value in wishes.items() if value is not None}
    most = most_tokens or config.max_new_tokens or DEFAULT_NEW_TOKENS
    return How(int(min(most, inf if room is None else room)), **own, **more)


@dataclass(frozen=True)
class Piece:
    """What came next of an answer: text, its tokens with their log probabilities, at the end why it ended ("stop", "length")."""

    text: str
    tokens: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


class Engine(ABC):
    """Answers prompts, several at once; `tell` is called from a thread of the engine for every piece of an answer."""

    def __init__(self, model: OVInternVLChatModel):
        self.model = model
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.kv_cache_share: float | None = None  # how much of the KV cache is in use, 0 to 1, where there is one for all

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return True

    @abstractmethod
    def start(
        self, ids: torch.Tensor, pictures: Sequence[PictureTiles], how: How, tell: Callable[[Piece], None]
    ) -> Callable[[], None]:
        """Begin an answer to a prompt (1, T) with these pictures; returns what cancels it, from any thread. Raises OptionError.

        The last piece has a finish reason or an error; after cancelling there may be none.
        """

    @abstractmethod
    def close(self) -> None:
        """End all answers and the engine's threads."""


class NativeEngine(Engine):
    """OVInternVLChatModel, one answer after the other in the order in which they were asked."""

    def __init__(self, model: OVInternVLChatModel):
        super().__init__(model)
        model.wait_until_packed()  # who says that he serves can
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def start(
        self, ids: torch.Tensor, pictures: Sequence[PictureTiles], how: How, tell: Callable[[Piece], None]
    ) -> Callable[[], None]:
        for name in ("presence_penalty", "frequency_penalty", "ignore_eos", "logprobs", "json_schema"):
            if getattr(how, name):
                raise OptionError(f"{name} needs the genai engine: start the server with --engine genai")
        streamer = _Streamer(Words(self.model.tokenizer, self.model.conv_template, how.stops), self.ends, tell)
        options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "do_sample": how.temperature > 0}
        if how.temperature > 0:
            options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p}
        if how.repetition_penalty != 1:
            options["repetition_penalty"] = how.repetition_penalty

        def run() -> None:
            if streamer.cancelled:
                return
            try:
                if how.temperature > 0:
                    torch.manual_seed(how.seed)
                self.model.answer(ids, pictures, streamer, stopping_criteria=[streamer], **options)
            except Exception as error:  # carried to the one who asked
                tell(Piece("", error=error))

        self._worker.submit(run)
        return streamer.cancel

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


class _Streamer(StoppingCriteria):
    """transformers' streamer and stopping rule of one answer."""

    def __init__(self, words: Words, ends: frozenset[int], tell: Callable[[Piece], None]):
        self._words, self._ends, self._tell = words, ends, tell
        self._reason = "length"
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def put(self, ids: torch.Tensor) -> None:
        for token in ids.flatten().tolist():
            if token in self._ends:
                self._reason = "stop"
            elif not self._words.stopped:
                self._tell(Piece(self._words.add(token), ((token, 0.0),)))
                self._reason = "stop" if self._words.stopped else self._reason

    def end(self) -> None:
        if not self.cancelled:
            self._tell(Piece(self._words.end(), finish_reason=self._reason))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.cancelled or self._words.stopped)


@dataclass(eq=False)
class _Request:
    words: Words
    tell: Callable[[Piece], None]


class GenaiEngine(Engine):
    """openvino_genai's continuous batching over our embeddings, in a process of its own: many requests in every step."""

    def __init__(self, model: OVInternVLChatModel, cache_gb: int):
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
        groups = activation_groups(read_part(ov.Core(), model.folder, place, model.config.language["hidden_size"]), place)
        command = [sys.executable, "-m", worker.__name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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

    def start(
        self, ids: torch.Tensor, pictures: Sequence[PictureTiles], how: How, tell: Callable[[Piece], None]
    ) -> Callable[[], None]:
        plain = self.model.config.plain_length
        if plain is not None and ids.shape[1] + how.max_new_tokens > plain:
            how = replace(how, max_new_tokens=plain - ids.shape[1])
            if how.max_new_tokens < 1:
                raise OptionError(
                    f"the prompt has {ids.shape[1]} tokens; past {plain} this model turns positions in another way, which "
                    "openvino_genai does not do in pieces: start the server with --engine native"
                )
        request = _Request(Words(self.model.tokenizer, self.model.conv_template, how.stops), tell)
        number, cancelled = next(self._numbers), threading.Event()

        def begin() -> None:
            if cancelled.is_set():
                return
            try:
                if how.json_schema is not None:
                    self._check_schema(how.json_schema)
                embeds = self.model.embeddings_of(ids, pictures).numpy()  # (1, T, D)
                with self._lock:
                    if cancelled.is_set():  # while its pictures were looked at
                        return
                    if self._ended:
                        raise RuntimeError(ENDED)
                    self._running[number] = request
                    self._outbox.put(worker.Start(number, embeds, asdict(how), self.ends))
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
        text, tokens = "", []
        for token, logprob in news.tokens.get(number, []):
            if token not in self.ends and not request.words.stopped:
                text += request.words.add(token)
                tokens.append((token, logprob))
        if reason is None and not request.words.stopped:
            request.tell(Piece(text, tuple(tokens)))
            return
        if reason is None:
            self._give_up(number)
        self._drop(number)
        text += request.words.end()
        request.tell(Piece(text, tuple(tokens), "stop" if request.words.stopped or reason is None else reason))
