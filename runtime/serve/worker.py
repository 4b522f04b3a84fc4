"""python -m runtime.serve.worker: a process that runs openvino_genai, step by step, for the engine that started it.

openvino_genai holds Python's global lock during a step: in the server's own process it would block every connection. Pickled
messages come on standard input and go to standard output. Knows embeddings and token ids.
"""

from __future__ import annotations

import pickle
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from runtime.parts.memory import return_freed_memory
from runtime.serve.grammar import structured_output
from runtime.serve.process import pipes, send


@dataclass(frozen=True)
class Setup:
    """What the process opens."""

    folder: str
    device: str
    properties: dict[str, Any]
    cache_gb: int
    tokens_at_once: int


@dataclass(frozen=True)
class Start:
    """Begin an answer after these embeddings (1, T, D) float32."""

    number: int
    embeds: np.ndarray
    wish: dict[str, Any]  # fields of runtime.answer.decode.Decoding
    ends: frozenset[int]


@dataclass(frozen=True)
class Cancel:
    """Cancel an answer."""

    number: int


@dataclass
class News:
    """The result of one step: each answer's new tokens with log probabilities, and how it ended or failed."""

    tokens: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    over: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    cache_share: float = 0.0


class Worker:
    """The pipeline and its answers in progress."""

    def __init__(self, setup: Setup):
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = setup.cache_gb, False  # it compares ids, but gets embeddings
        scheduler.max_num_batched_tokens = setup.tokens_at_once
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(setup.folder, scheduler, setup.device, setup.properties)
        self._handles: dict[int, Any] = {}

    @property
    def idle(self) -> bool:
        """Whether no answer is in progress."""
        return not self._handles and not self._pipeline.has_non_finished_requests()

    def take(self, message: Start | Cancel, news: News) -> None:
        """Start or cancel an answer."""
        import openvino as ov

        if isinstance(message, Cancel):
            handle = self._handles.pop(message.number, None)
            if handle is not None:
                handle.cancel()
            return
        try:
            config = self._config(message)
            self._handles[message.number] = self._pipeline.add_request(message.number, ov.Tensor(message.embeds), config)
        except RuntimeError as error:
            news.failed[message.number] = str(error)

    def step(self, news: News) -> None:
        """Run one step: answers advance by a token, prompts by a chunk."""
        try:
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
        except RuntimeError as error:  # a bug in openvino_genai: fail all answers, so that no client waits for ever
            for number, handle in self._handles.items():
                handle.cancel()
                news.failed[number] = str(error)
            self._handles.clear()
            return
        for number, handle in [*self._handles.items()]:
            self._read(number, handle, news)
        news.cache_share = self._pipeline.get_metrics().cache_usage / 100 if self._handles else 0.0

    def close(self) -> None:
        """Cancel all answers, and let the pipeline drop them: it prints a complaint about one that it still holds."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        with suppress(RuntimeError):
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()

    def _read(self, number: int, handle: Any, news: News) -> None:
        reasons = self._genai.GenerationFinishReason
        while number in self._handles and handle.can_read():
            for output in handle.read().values():
                told = zip(output.generated_ids, output.generated_log_probs, strict=True)
                news.tokens.setdefault(number, []).extend(told)
                if output.finish_reason != reasons.NONE:
                    news.over[number] = "length" if output.finish_reason == reasons.LENGTH else "stop"
                    self._handles.pop(number, None)
        if number in self._handles and handle.get_status() == self._genai.GenerationStatus.IGNORED:
            news.over[number] = "ignored"
            del self._handles[number]

    def _config(self, message: Start) -> Any:
        how, config = message.wish, self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = how["max_new_tokens"], how["ignore_eos"]
        if not how["ignore_eos"]:
            config.eos_token_id, config.stop_token_ids = min(message.ends), set(message.ends)
        config.do_sample = how["temperature"] > 0
        if config.do_sample:
            config.temperature, config.top_p, config.rng_seed = how["temperature"], how["top_p"], how["seed"] or 0
            if how["top_k"]:
                config.top_k = how["top_k"]
            config.min_p = how["min_p"]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            setattr(config, name, how[name])
        config.logprobs = int(how["logprobs"])
        structure = structured_output(how["json_schema"], how["calls"], thoughts=how["thoughts"])
        if structure is not None:
            config.structured_output_config = structure
        config.validate()
        return config


def main() -> None:
    """Serve until standard input ends, or until nobody reads the output: then the parent has ended, which is no error."""
    with suppress(BrokenPipeError):
        serve()


def serve() -> None:
    """Read the setup, then messages; answer them."""
    return_freed_memory()
    given, out = pipes()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(pickle.load(given))
        except (EOFError, OSError):
            inbox.put(None)

    threading.Thread(target=listen, daemon=True).start()
    setup = inbox.get()
    try:
        worker = Worker(setup)
    except RuntimeError as error:
        send(error, out)
        return
    try:
        send("ready", out)
        _work(worker, inbox, out)
    finally:
        worker.close()


def _work(worker: Worker, inbox: queue.SimpleQueue[Any], out: IO[bytes]) -> None:
    while True:
        news = News()
        while worker.idle or not inbox.empty():
            message = inbox.get()
            if message is None:
                send(None, out)  # the end of the pipe is not enough: a forked process may hold it open
                return
            worker.take(message, news)
            if news.failed:
                break
        worker.step(news)
        if news.tokens or news.over or news.failed:
            send(news, out)


if __name__ == "__main__":
    from runtime.serve import worker  # by its module name, under which messages are pickled

    worker.main()
