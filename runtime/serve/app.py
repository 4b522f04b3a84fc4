"""The HTTP side: OpenAI's routes, streaming, keys, limits and metrics around one engine.

Knows nothing of tokens or devices. Every mistake of a client is a 4xx with one line in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime import __version__
from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding, Token
from runtime.errors import InternVLError, PromptError
from runtime.serve.engine import Engine, Piece, decoding_of
from runtime.serve.protocol import ChatRequest, CompletionRequest, MediaRules, Writing, turns_of

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")  # that are counted by name
COMPLETION_TOKENS = 16  # OpenAI's default where a text is completed
LOOK_SECONDS = 0.5  # between looks whether a client is still there
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    requests: int = 64  # at once, waiting ones included
    seconds: float = 600.0  # of one answer
    body_bytes: int = 64 << 20


@dataclass(frozen=True)
class Rules:
    """Under which name, for whom and with what the server answers."""

    model_name: str
    api_key: str | None = None
    media: MediaRules = field(default_factory=MediaRules)
    limits: Limits = field(default_factory=Limits)


class Refused(Exception):
    """A request that is not answered: an HTTP status and a line."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Caches(Collector):
    """The counts that the caches themselves keep."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Prometheus'."""
        cache, share = self._engine.model.feature_cache, self._engine.kv_cache_share
        yield CounterMetricFamily("internvl_feature_cache_hits", "Tiles whose features were kept", value=cache.hits)
        yield CounterMetricFamily("internvl_feature_cache_misses", "Tiles that the vision part looked at", value=cache.misses)
        if share is not None:
            yield GaugeMetricFamily("internvl_kv_cache_used_ratio", "Share of the KV cache that is in use", value=share)


class Metrics:
    """What Prometheus is told."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Caches(engine))
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("internvl_requests", "Requests by route and status", ["route", "status"], **own)
        self.active = Gauge("internvl_active_requests", "Requests that are answered or wait", **own)
        self.waiting = Gauge("internvl_waiting_requests", "Requests whose first token has not come yet", **own)
        self.first_token = Histogram("internvl_first_token_seconds", "Until the first token", buckets=SECONDS, **own)
        self.token = Histogram("internvl_token_seconds", "A token after the first, mean of an answer", buckets=SECONDS, **own)
        self.prompt_tokens = Counter("internvl_prompt_tokens", "Tokens of prompts", **own)
        self.new_tokens = Counter("internvl_new_tokens", "Tokens of answers", **own)


@dataclass
class Choice:
    """One answer as far as it is written."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Server:
    """The routes' common work."""

    def __init__(self, engine: Engine, rules: Rules):
        self.engine, self.rules, self.metrics = engine, rules, Metrics(engine)
        self.created, self.active = int(time.time()), 0
        self._told: set[asyncio.Queue[tuple[int, Piece]]] = set()  # of the answers that are being written

    def stop(self) -> None:
        """End all answers with an error: the server must go. From the thread of the loop."""
        for told in self._told:
            told.put_nowait((0, Piece("", error=Refused(503, "the server is being stopped", "stopping"))))

    # what is asked

    async def prompt_of(self, ask: ChatRequest) -> Prompt:
        """Open the pictures and tokenise, in a thread. Raises InternVLError kinds."""

        def prepare() -> Prompt:
            model = self.engine.model
            system, turns = turns_of(ask.messages, model.config, self.rules.media, continue_final=ask.continue_final_message)
            return model.prompt_of(model.system_message if system is None else system, turns)

        return await asyncio.to_thread(prepare)

    async def plain_prompt(self, text: str) -> Prompt:
        """A prompt of text alone, as it is."""
        ids = await asyncio.to_thread(self.engine.model.tokenizer.encode, text)
        if not ids:
            raise PromptError("the prompt is empty: write one")
        return Prompt(np.array(ids, np.int64), [])

    def decoding(self, ask: Writing, prompt: Prompt, most_tokens: int | None, **more: Any) -> Decoding:
        """The request's wishes, then generation_config.json, then the defaults of Decoding."""
        model = self.engine.model
        model.check(prompt.ids, prompt.pictures)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return decoding_of(
            model,
            most_tokens,
            model.config.context_length and model.config.context_length - len(prompt.ids),
            {name: getattr(ask, name) for name in names},
            presence_penalty=ask.presence_penalty,
            frequency_penalty=ask.frequency_penalty,
            seed=secrets.randbits(32) if ask.seed is None else ask.seed,
            stop_strings=tuple(ask.stops),
            ignore_eos=ask.ignore_eos,
            **more,
        )

    # what is answered

    @asynccontextmanager
    async def place(self, *, sure: bool = False) -> AsyncIterator[None]:
        """A place among the requests. Raises Refused when there is none, unless one was `sure` to be had a moment ago."""
        if not sure and self.active >= self.rules.limits.requests:
            raise Refused(429, f"{self.active} requests are being answered: try again", "queue_full", {"Retry-After": "1"})
        self.active += 1
        self.metrics.active.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)

    async def pieces(self, prompts: list[Prompt], decoding: Decoding, count: int) -> AsyncIterator[tuple[int, Piece]]:
        """`count` answers to each prompt, piece by piece with their number; all are cancelled when nobody reads on."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        started, first, left = time.perf_counter(), True, len(prompts) * count

        def teller(number: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(told.put_nowait, (number, piece))

            return tell

        cancels = []
        self._told.add(told)
        self.metrics.waiting.inc()
        try:
            for number in range(left):
                prompt = prompts[number // count]
                own = replace(decoding, seed=(decoding.seed or 0) + number % count)
                cancels.append(self.engine.start(prompt, own, teller(number)))
                self.metrics.prompt_tokens.inc(len(prompt.ids) if number % count == 0 else 0)
            tokens = 0
            async with asyncio.timeout(self.rules.limits.seconds):
                while left:
                    number, piece = await told.get()
                    if piece.error is not None:
                        raise piece.error
                    if first and piece.tokens:
                        self.metrics.waiting.dec()
                        self.metrics.first_token.observe(time.perf_counter() - started)
                        first, begun = False, time.perf_counter()
                    tokens += len(piece.tokens)
                    left -= piece.finish_reason is not None
                    yield number, piece
            self.metrics.new_tokens.inc(tokens)
            if tokens > 1:
                self.metrics.token.observe((time.perf_counter() - begun) / (tokens - 1))
        except TimeoutError:
            raise Refused(504, f"the answer took longer than {self.rules.limits.seconds:g} s", "timeout") from None
        finally:
            if first:
                self.metrics.waiting.dec()
            self._told.discard(told)
            for cancel in cancels:
                cancel()

    async def whole(self, request: Request, prompts: list[Prompt], decoding: Decoding, count: int) -> list[Choice]:
        """All answers at once; given up when the client is gone."""
        choices = [Choice() for _ in range(len(prompts) * count)]

        async def collect() -> None:
            async for number, piece in self.pieces(prompts, decoding, count):
                choice = choices[number]
                choice.text += piece.text
                choice.tokens += piece.tokens
                choice.finish_reason = piece.finish_reason

        work = asyncio.create_task(collect())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK_SECONDS)
                if not work.done() and await request.is_disconnected():
                    raise Refused(499, "the client is gone", "gone")
            work.result()
        finally:
            work.cancel()
        return choices

    def word(self, token: int) -> str:
        """The text of one token."""
        return self.engine.model.tokenizer.decode([token])

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """Tokens and log probabilities in the form of chat completions."""

        def one(token: int, value: float) -> dict[str, Any]:
            word = self.word(token)
            return {"token": word, "logprob": value, "bytes": [*word.encode()]}

        return {"content": [one(t.id, t.logprob) | {"top_logprobs": [one(*other) for other in t.top]} for t in tokens]}

    def old_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """The same in the form of completions."""
        words = [self.word(token.id) for token in tokens]
        return {"tokens": words, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": None, "text_offset": []}


def usage(prompts: list[Prompt], new_tokens: int) -> dict[str, int]:
    """Tokens read and written."""
    read = sum(len(prompt.ids) for prompt in prompts)
    return {"prompt_tokens": read, "completion_tokens": new_tokens, "total_tokens": read + new_tokens}


def problem(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """One line, in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def build_app(engine: Engine, rules: Rules) -> FastAPI:
    """The application over an engine, which it closes at its end. `app.state.stop()` ends all answers."""
    server = Server(engine, rules)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="InternVL on OpenVINO", version=__version__, lifespan=life)
    app.state.stop = server.stop
    app.add_middleware(Door, server=server)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return problem(error.status, str(error), error.code, error.headers)

    @app.exception_handler(InternVLError)
    async def mistaken(_: Request, error: InternVLError) -> JSONResponse:
        return problem(400, str(error), type(error).__name__)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem(400, f"the body is not JSON ({first['ctx']['error']})", "invalid_json")
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return problem(400, f"{where}: {first['msg'].removeprefix('Value error, ')}", "invalid_value")

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), "http_error")

    def check_model(name: str) -> None:
        if name and name != rules.model_name:
            raise Refused(404, f"the model {name!r} is not here: {rules.model_name!r} is", "model_not_found")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        own = {"id": rules.model_name, "object": "model", "created": server.created, "owned_by": "internvl-openvino"}
        return {"object": "list", "data": [own]}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.post("/v1/chat/completions")
    async def chat(ask: ChatRequest, request: Request) -> Any:
        check_model(ask.model)
        async with server.place():
            prompt = await server.prompt_of(ask)
            schema = ask.response_format and ask.response_format.schema_text
            decoding = server.decoding(
                ask, prompt, ask.most_tokens, logprobs=ask.logprobs, top_logprobs=ask.top_logprobs or 0, json_schema=schema
            )
            frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": rules.model_name}
            if not ask.stream:
                choices = await server.whole(request, [prompt], decoding, ask.n)
                said = [
                    {
                        "index": number,
                        "message": {"role": "assistant", "content": choice.text},
                        "logprobs": server.logprobs(choice.tokens) if ask.logprobs else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                count = sum(len(choice.tokens) for choice in choices)
                return {**frame, "object": "chat.completion", "choices": said, "usage": usage([prompt], count)}
        events = _chat_events(server, ask, prompt, decoding, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def complete(ask: CompletionRequest, request: Request) -> Any:
        check_model(ask.model)
        texts = [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
        async with server.place():
            prompts = [await server.plain_prompt(text) for text in texts]
            longest = max(prompts, key=lambda prompt: len(prompt.ids))
            decoding = server.decoding(ask, longest, ask.max_tokens or COMPLETION_TOKENS, logprobs=ask.logprobs is not None)
            frame: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": rules.model_name}
            frame["created"] = int(time.time())
            if not ask.stream:
                choices = await server.whole(request, prompts, decoding, ask.n)
                said = [
                    {
                        "index": number,
                        "text": (texts[number // ask.n] if ask.echo else "") + choice.text,
                        "logprobs": server.old_logprobs(choice.tokens) if ask.logprobs is not None else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                return {**frame, "choices": said, "usage": usage(prompts, sum(len(choice.tokens) for choice in choices))}
        events = _text_events(server, ask, prompts, texts, decoding, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    return app


class Door:
    """What every request passes: the key, the limit on its body before it is in memory, and the count of answers by status.

    Plain ASGI: a middleware of Starlette's kind would keep the routes from noticing that a client is gone.
    """

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, read, most = dict(scope["headers"]), 0, self._server.rules.limits.body_bytes
        too_large = f"the body is larger than {most >> 20} MB: send smaller pictures"

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:  # sent in pieces, without its length
                raise HTTPException(413, too_large)
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = scope["path"] if scope["path"] in ROUTES else "other"
                self._server.metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        told = headers.get(b"content-length", b"0")
        app: ASGIApp = self._app
        if scope["path"].startswith("/v1/") and not self._knows(headers.get(b"authorization", b"")):
            app = problem(401, "the key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
        elif not told.isdigit() or int(told) > most:
            app = problem(413, too_large, "too_large")
        await app(scope, counted, noted)

    def _knows(self, authorization: bytes) -> bool:
        key = self._server.rules.api_key
        return key is None or hmac.compare_digest(authorization.removeprefix(b"Bearer "), key.encode())


def _event(frame: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({**frame, 'choices': choices, **more}, ensure_ascii=False)}\n\n"


async def _told(server: Server, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events, then what went wrong, then the end: a stream that has begun cannot change its status."""
    try:
        async with server.place(sure=True):
            async for event in events:
                yield event
    except (Refused, InternVLError) as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'param': None, 'code': None}})}\n\n"
    yield "data: [DONE]\n\n"


async def _chat_events(
    server: Server, ask: ChatRequest, prompt: Prompt, decoding: Decoding, frame: dict[str, Any]
) -> AsyncIterator[str]:
    """The chunks of a streamed chat completion."""
    frame, new = {**frame, "object": "chat.completion.chunk"}, 0
    for number in range(ask.n):
        yield _event(frame, [{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    async for number, piece in server.pieces([prompt], decoding, ask.n):
        new += len(piece.tokens)
        logprobs = server.logprobs([*piece.tokens]) if ask.logprobs else None
        if piece.text or logprobs or piece.finish_reason:
            delta = {"content": piece.text} if piece.text else {}
            yield _event(frame, [{"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage([prompt], new))


async def _text_events(
    server: Server, ask: CompletionRequest, prompts: list[Prompt], texts: list[str], decoding: Decoding, frame: dict[str, Any]
) -> AsyncIterator[str]:
    """The chunks of a streamed text completion."""
    new = 0
    for number in range(len(prompts) * ask.n if ask.echo else 0):
        yield _event(frame, [{"index": number, "text": texts[number // ask.n], "logprobs": None, "finish_reason": None}])
    async for number, piece in server.pieces(prompts, decoding, ask.n):
        new += len(piece.tokens)
        logprobs = server.old_logprobs([*piece.tokens]) if ask.logprobs is not None else None
        if piece.text or logprobs or piece.finish_reason:
            yield _event(frame, [{"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage(prompts, new))
