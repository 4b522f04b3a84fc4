"""Many answers at once from one model folder: which tokens come next is somebody else's work, what they say is told as it comes.

`GenaiEngine` hands our embeddings to openvino_genai's ContinuousBatchingPipeline, so that templates, tile limits and the cache of
features are ours and paged attention over many requests is theirs. `NativeEngine` runs OVInternVLChatModel, one answer after the
other. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from runtime.errors import OptionError
from runtime.image import PictureTiles
from runtime.kv_cache import PREFILL_AT_ONCE
from runtime.model import OVInternVLChatModel
from runtime.prompt import Template
from runtime.serve.grammar import SchemaCheck
from runtime.stream import lead_ids

DEFAULT_NEW_TOKENS = 1024  # of an answer, where neither the request nor the model bounds it
SMALLEST = 1e-3  # of what may not be 0
IDLE_SECONDS = 0.2  # how long the stepping thread waits for work before it looks whether it should end


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


class Words:
    """Tokens of one answer -> its text as far as it is certain: no lead, no white space around it, nothing after a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, [*stops]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._lead = lead_ids(tokenizer, template)
        self._ids: list[int] = []
        self._text, self._said = "", 0
        self.stopped = False  # at a stop string

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        if self._lead:  # everything so far may be the lead; without one it comes out at the end
            if self._ids[-len(self._lead) :] == self._lead:
                self._lead, self._ids = [], []
            return ""
        self._text += self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._say(end=False)

    def end(self) -> str:
        """What was held back, once there are no more tokens."""
        if not self.stopped:
            whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
            self._text = whole if whole.startswith(self._text) else self._text
        return self._say(end=True)

    def _say(self, *, end: bool) -> str:
        text = self._text.lstrip()
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not end:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text = text[: len(text) - held]
        text = text.rstrip()
        new, self._said = text[self._said :], max(self._said, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Engine(ABC):
    """Answers prompts, several at once; `tell` is called from a thread of the engine for every piece of an answer."""

    def __init__(self, model: OVInternVLChatModel):
        self.model = model
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.kv_cache_share: float | None = None  # how much of the KV cache is in use, 0 to 1, where there is one for all

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
    handle: Any
    words: Words
    tell: Callable[[Piece], None]
    cancelled: bool = False


class GenaiEngine(Engine):
    """openvino_genai's continuous batching over our embeddings: paged attention, many requests in every step."""

    def __init__(self, model: OVInternVLChatModel, cache_gb: int):
        """`model` is opened without its language part; `cache_gb` bounds the KV cache of all requests."""
        super().__init__(model)
        import openvino_genai

        if model.config.has_visual_experts:
            raise OptionError("openvino_genai does not feed visual experts: start the server with --engine native")
        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = cache_gb, False  # it compares ids, and gets embeddings
        scheduler.max_num_batched_tokens = PREFILL_AT_ONCE
        place = model.language_placement
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model.folder), scheduler, place.device, place.properties)
        self.kv_cache_share = 0.0
        self._check_schema = SchemaCheck(model.folder, model.config.language["vocab_size"])
        self._numbers = itertools.count()
        self._running: list[_Request] = []
        self._lock, self._work, self._closed = threading.Lock(), threading.Event(), False
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._thread = threading.Thread(target=self._step_on, name="answers", daemon=True)
        self._thread.start()

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
        words = Words(self.model.tokenizer, self.model.conv_template, how.stops)
        request = _Request(None, words, tell)
        config = self._config(how)

        def begin() -> None:
            if request.cancelled:
                return
            try:
                if how.json_schema is not None:
                    self._check_schema(how.json_schema)
                embeds = self.model.embeddings_of(ids, pictures).numpy()  # (1, T, D)
                with self._lock:
                    if request.cancelled:  # while its pictures were looked at
                        return
                    request.handle = self._pipeline.add_request(next(self._numbers), _tensor(embeds), config)
                    self._running.append(request)
                self._work.set()
            except Exception as error:
                tell(Piece("", error=error))

        def cancel() -> None:
            request.cancelled = True
            with self._lock:
                if request.handle is not None:
                    request.handle.cancel()
            self._work.set()

        self._encoder.submit(begin)
        return cancel

    def close(self) -> None:
        self._encoder.shutdown(cancel_futures=True)
        self._closed = True
        self._work.set()
        self._thread.join()

    def _config(self, how: How) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = how.max_new_tokens, how.ignore_eos
        if not how.ignore_eos:
            config.eos_token_id, config.stop_token_ids = min(self.ends), set(self.ends)
        config.do_sample = how.temperature > 0
        if how.temperature > 0:
            config.temperature, config.top_p, config.rng_seed = how.temperature, how.top_p, how.seed
            if how.top_k:
                config.top_k = how.top_k
            config.min_p = how.min_p
        config.repetition_penalty = how.repetition_penalty
        config.presence_penalty, config.frequency_penalty = how.presence_penalty, how.frequency_penalty
        config.logprobs = int(how.logprobs)
        if how.json_schema is not None:
            config.structured_output_config = self._genai.StructuredOutputConfig(json_schema=how.json_schema)
        config.validate()
        return config

    def _step_on(self) -> None:
        while not self._closed:
            if not self._work.wait(IDLE_SECONDS):
                continue
            self._work.clear()
            while not self._closed and self._pipeline.has_non_finished_requests():
                try:
                    self._pipeline.step()
                except Exception as error:  # a bug below: nobody waits for ever
                    over = [*self._running]
                    for request in over:
                        request.handle.cancel()
                        request.tell(Piece("", error=error))
                    self._drop(over)
                    break
                self.kv_cache_share = self._pipeline.get_metrics().cache_usage / 100
                self._deliver()
            self.kv_cache_share = 0.0
            self._deliver()

    def _deliver(self) -> None:
        with self._lock:
            running = [*self._running]
        self._drop([request for request in running if request.cancelled or not self._read(request)])

    def _drop(self, over: list[_Request]) -> None:
        with self._lock:
            self._running = [request for request in self._running if request not in over]

    def _read(self, request: _Request) -> bool:
        """Tell what a request has to say; False when it is over."""
        reasons = self._genai.GenerationFinishReason
        while request.handle.can_read():
            for output in request.handle.read().values():
                text, tokens = "", []
                for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    if token not in self.ends and not request.words.stopped:
                        text += request.words.add(token)
                        tokens.append((token, logprob))
                over = output.finish_reason != reasons.NONE
                if over or request.words.stopped:
                    if not over:
                        request.handle.stop()
                    text += request.words.end()
                    reason = "length" if output.finish_reason == reasons.LENGTH and not request.words.stopped else "stop"
                    request.tell(Piece(text, tuple(tokens), reason))
                    return False
                request.tell(Piece(text, tuple(tokens)))
        if request.handle.get_status() == self._genai.GenerationStatus.IGNORED:
            request.tell(
                Piece("", error=OptionError("the prompt does not fit the KV cache: start the server with a larger --cache-size"))
            )
            return False
        return True


def _tensor(array: np.ndarray) -> Any:
    import openvino as ov

    return ov.Tensor(np.ascontiguousarray(array))
