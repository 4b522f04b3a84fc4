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
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
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
from runtime.answer.prompt import THINKING_TOKENS
from runtime.answer.reading import AnswerReader, Said
from runtime.answer.tools import Call
from runtime.errors import InternVLError, PromptError
from runtime.media.web import is_web_address
from runtime.serve.engine import Engine, Piece, ProcessEnded, decoding_of
from runtime.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    MediaRules,
    RefusalPart,
    TextPart,
    Writing,
    message_of,
    new_call_id,
    told_call,
)
from runtime.serve.responses import ResponsesRequest, ResponseWriter
from runtime.serve.turns import prompt_of_request

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
)  # that are counted by name
COMPLETION_TOKENS = 16  # OpenAI's default where a text is completed
SLOW_AT_ONCE = 4  # requests whose media take long
LOOK_SECONDS = 0.5  # between looks whether a client is still there
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    requests: int = 64  # at once, waiting ones included
    seconds: float = 600.0  # of one answer
    body_bytes: int = 64 << 20
    body_seconds: float = 120.0  # from the head of a request to the last byte of its body


@dataclass(frozen=True)
class Rules:
    """Under which name, for whom and with what the server answers."""

    model_name: str
    api_key: str | None = None
    media: MediaRules = field(default_factory=MediaRules)
    limits: Limits = field(default_factory=Limits)
    thinking: bool = False  # where a request says nothing of it


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

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        if engine is not None:
            self.registry.register(Caches(engine))
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("internvl_requests", "Requests by route and status", ["route", "status"], **own)
        self.active = Gauge("internvl_active_requests", "Requests that are answered or wait", **own)
        self.waiting = Gauge("internvl_waiting_requests", "Requests whose first token has not come yet", **own)
        self.first_token = Histogram("internvl_first_token_seconds", "Until the first token", buckets=SECONDS, **own)
        self.token = Histogram("internvl_token_seconds", "A token after the first, mean of an answer", buckets=SECONDS, **own)
        self.prompt_tokens = Counter("internvl_prompt_tokens", "Tokens of prompts", **own)
        self.new_tokens = Counter("internvl_new_tokens", "Tokens of answers", **own)


@dataclass(frozen=True)
class Asked:
    """A chat request as the engine takes it; `thinking` where the prompt ends inside of a thought."""

    prompt: Prompt
    decoding: Decoding
    thinking: bool

    def choice(self) -> Choice:
        """An answer to it, of which nothing is written yet."""
        return Choice(AnswerReader(calls=self.decoding.calls is not None, thinking=self.thinking))


@dataclass
class Choice:
    """One answer as far as it is written, and what it means where somebody reads that."""

    reader: AnswerReader | None = None
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    thought_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> list[Said]:
        """Take what came next; returns what it means."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        if self.reader is None:
            return []
        thinking = self.reader.thinking
        told = self.reader.add(piece.text, end=piece.finish_reason is not None)
        self.thought_tokens += len(piece.tokens) if thinking or self.reader.thinking else 0
        if self.reader.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return told


class Reception:
    """What every server of a folder has: rules, metrics, places."""

    def __init__(self, rules: Rules, metrics: Metrics):
        self.rules, self.metrics = rules, metrics
        self.created, self.active = int(time.time()), 0

    def check_model(self, name: str) -> None:
        """Raise Refused for a model of another name; none is this one."""
        if name and name != self.rules.model_name:
            raise Refused(404, f"the model {name!r} is not here: {self.rules.model_name!r} is", "model_not_found")

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


class Server(Reception):
    """The common work of the routes that write answers."""

    def __init__(self, engine: Engine, rules: Rules):
        super().__init__(rules, Metrics(engine))
        self.engine = engine
        self._slow = ThreadPoolExecutor(SLOW_AT_ONCE, "media")
        self._told: set[asyncio.Queue[tuple[int, Piece]]] = set()  # of the answers that are being written

    def stop(self) -> None:
        """End all answers with an error: the server must go. From the thread of the loop."""
        for told in self._told:
            told.put_nowait((0, Piece("", error=Refused(503, "the server is being stopped", "stopping"))))

    def close(self) -> None:
        """Begin with no more media."""
        self._slow.shutdown(wait=False, cancel_futures=True)

    # what is asked

    async def asked(self, ask: ChatRequest) -> Asked:
        """Open the pictures and tokenise, in a thread. Raises InternVLError kinds."""
        model, thinking = self.engine.model, ask.thinks(default=self.rules.thinking)

        def prepare() -> tuple[Prompt, bool]:
            prompt, inside = prompt_of_request(ask, model, self.rules.media, thinking=thinking)
            return model.route(prompt), inside

        where = self._slow if takes_long(ask) else None
        prompt, inside = await asyncio.get_running_loop().run_in_executor(where, prepare)
        schema, calls = ask.schema_text, ask.calls
        decoding = self.decoding(
            ask,
            prompt,
            ask.most_tokens or (THINKING_TOKENS if thinking else None),
            logprobs=bool(ask.logprobs),
            top_logprobs=ask.top_logprobs or 0,
            json_schema=schema,
            calls=calls,
            thoughts=thinking and (schema is not None or (calls is not None and calls.required)),
        )
        return Asked(prompt, decoding, inside)

    async def plain_prompt(self, text: str) -> Prompt:
        """A prompt of text alone, as it is."""
        ids = await asyncio.to_thread(self.engine.model.tokenizer.encode, text)
        if not ids:
            raise PromptError("the prompt is empty: write one")
        return Prompt(np.array(ids, np.int64), [])

    def decoding(self, ask: Writing, prompt: Prompt, most_tokens: int | None, **more: Any) -> Decoding:
        """The request's wishes, then generation_config.json, then the defaults of Decoding."""
        model = self.engine.model
        model.check(prompt)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return decoding_of(
            model,
            most_tokens,
            model.config.context_length and model.config.context_length - len(prompt.ids),
            {name: getattr(ask, name) for name in names},
            presence_penalty=ask.presence_penalty or 0.0,
            frequency_penalty=ask.frequency_penalty or 0.0,
            seed=secrets.randbits(32) if ask.seed is None else ask.seed,
            stop_strings=tuple(ask.stops),
            ignore_eos=ask.ignore_eos,
            skip_special_tokens=ask.skip_special_tokens is not False,
            prompt_lookup_num_tokens=ask.prompt_lookup_num_tokens,
            **more,
        )

    # what is answered

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
                    if isinstance(piece.error, ProcessEnded):
                        raise Refused(503, str(piece.error), "process_ended", {"Retry-After": "1"})
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

    async def whole(
        self, request: Request, prompts: list[Prompt], decoding: Decoding, count: int, take: Callable[[int, Piece], Any]
    ) -> None:
        """Write `count` answers to each prompt to their end, and `take` their pieces; given up when the client is gone."""

        async def collect() -> None:
            async for number, piece in self.pieces(prompts, decoding, count):
                take(number, piece)

        work = asyncio.create_task(collect())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK_SECONDS)
                if not work.done() and await request.is_disconnected():
                    raise Refused(499, "the client is gone", "gone")
            work.result()
        finally:
            work.cancel()

    def word(self, token: int) -> str:
        """The text of one token."""
        return self.engine.model.tokenizer.decode([token])

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """Tokens and log probabilities in the form of chat completions."""

        def one(token: int, value: float) -> dict[str, Any]:
            word = self.word(token)
            return {"token": word, "logprob": value, "bytes": [*word.encode()]}

        return {"content": [one(t.id, t.logprob) | {"top_logprobs": [one(*other) for other in t.top]} for t in tokens]}

    def alternatives(self, count: int) -> int:
        """How many of the likeliest tokens are told beside each; one of them is the chosen one, which every engine tells."""
        return count if count > 1 or self.engine.tells_alternatives else 0

    def old_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """The same in the form of completions."""
        words = [self.word(token.id) for token in tokens]
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.word(i): value for i, value in token.top} for token in tokens]
            if any(t.top for t in tokens)
            else None,
            "text_offset": [*accumulate(map(len, words), initial=0)][:-1],
        }


def takes_long(ask: ChatRequest) -> bool:
    """Whether others decide how long its media take: what is fetched, videos, documents. They wait for each other alone."""
    parts = [part for message in ask.messages if isinstance(message.content, list) for part in message.content]
    return any(
        is_web_address(part.image_url.url) if isinstance(part, ImagePart) else not isinstance(part, TextPart | RefusalPart)
        for part in parts
    )


def usage(prompts: list[Prompt], choices: list[Choice]) -> dict[str, Any]:
    """Tokens read and written."""
    read, written = sum(len(prompt.ids) for prompt in prompts), sum(len(choice.tokens) for choice in choices)
    thought = sum(choice.thought_tokens for choice in choices)
    details = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


def problem(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """One line, in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def base_app(
    reception: Reception, life: Callable[[FastAPI], AbstractAsyncContextManager[None]], alive: Callable[[], bool]
) -> FastAPI:
    """An application with what all have: the door, errors in OpenAI's form, the model's name, health, metrics."""
    app = FastAPI(title="InternVL on OpenVINO", version=__version__, lifespan=life)
    app.add_middleware(Door, server=reception)

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
        where, said = ".".join(str(part) for part in first["loc"][1:]), first["msg"].removeprefix("Value error, ")
        own = first["type"] == "value_error" and not where  # of the whole body, and says of what
        return problem(400, said if own else f"{where or 'the body'}: {said}", "invalid_value")

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), "http_error", error.headers)  # type: ignore[arg-type]

    own = {"id": reception.rules.model_name, "object": "model", "created": reception.created, "owned_by": "internvl-openvino"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [own]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        reception.check_model(name)
        return own

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if alive() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(reception.metrics.registry), media_type="text/plain; version=0.0.4")

    return app


def build_app(engine: Engine, rules: Rules) -> FastAPI:
    """The application over an engine, which it closes at its end. `app.state.stop()` ends all answers."""
    server = Server(engine, rules)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()
        await asyncio.to_thread(engine.close)

    app = base_app(server, life, lambda: engine.alive)
    app.state.stop = server.stop
    check_model = server.check_model

    @app.post("/v1/chat/completions")
    async def chat(ask: ChatRequest, request: Request) -> Any:
        check_model(ask.model)
        async with server.place():
            asked = await server.asked(ask)
            frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": rules.model_name}
            if not ask.stream:
                choices = [asked.choice() for _ in range(ask.count)]
                await server.whole(request, [asked.prompt], asked.decoding, ask.count, partial(_take, choices))
                said = [
                    {
                        "index": number,
                        "message": message_of(choice.reader),  # type: ignore[arg-type]
                        "logprobs": server.logprobs(choice.tokens) if ask.logprobs else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                return {**frame, "object": "chat.completion", "choices": said, "usage": usage([asked.prompt], choices)}
        events = _chat_events(server, ask, asked, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    @app.post("/v1/responses")
    async def respond(ask: ResponsesRequest, request: Request) -> Any:
        check_model(ask.model)
        chat = ask.as_chat()
        async with server.place():
            asked = await server.asked(chat)
            choice, writer = asked.choice(), ResponseWriter(ask, rules.model_name, new_call_id)

            def take(_: int, piece: Piece) -> list[str]:
                return writer.add(choice.add(piece), server.logprobs([*piece.tokens])["content"] if chat.logprobs else [])

            if not ask.stream:
                await server.whole(request, [asked.prompt], asked.decoding, 1, take)
                writer.end(choice.finish_reason, usage([asked.prompt], [choice]))
                return writer.response

        async def events() -> AsyncIterator[str]:
            for event in writer.begin():
                yield event
            async for number, piece in server.pieces([asked.prompt], asked.decoding, 1):
                for event in take(number, piece):
                    yield event
            for event in writer.end(choice.finish_reason, usage([asked.prompt], [choice])):
                yield event

        return StreamingResponse(_told(server, events(), writer.fail, end=""), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def complete(ask: CompletionRequest, request: Request) -> Any:
        check_model(ask.model)
        texts = [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
        async with server.place():
            prompts = [await server.plain_prompt(text) for text in texts]
            longest = max(prompts, key=lambda prompt: len(prompt.ids))
            decoding = server.decoding(
                ask,
                longest,
                ask.max_tokens or COMPLETION_TOKENS,
                logprobs=ask.logprobs is not None,
                top_logprobs=server.alternatives(ask.logprobs or 0),
            )
            frame: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": rules.model_name}
            frame["created"] = int(time.time())
            if not ask.stream:
                choices = [Choice() for _ in range(len(prompts) * ask.count)]
                await server.whole(request, prompts, decoding, ask.count, partial(_take, choices))
                said = [
                    {
                        "index": number,
                        "text": (texts[number // ask.count] if ask.echo else "") + choice.text,
                        "logprobs": server.old_logprobs(choice.tokens) if ask.logprobs is not None else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                return {**frame, "choices": said, "usage": usage(prompts, choices)}
        events = _text_events(server, ask, prompts, texts, decoding, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    return app


class Door:
    """What every request passes: the key, the limit on its body before it is in memory, and the count of answers by status.

    Plain ASGI: a middleware of Starlette's kind would keep the routes from noticing that a client is gone.
    """

    def __init__(self, app: ASGIApp, server: Reception):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits, headers, read, whole = self._server.rules.limits, dict(scope["headers"]), 0, False
        most, deadline = limits.body_bytes, asyncio.get_running_loop().time() + limits.body_seconds
        too_large = f"the body is larger than {most >> 20} MB: send smaller pictures"
        hang_up = {"Connection": "close"}

        async def counted() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout_at(None if whole else deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body took longer than {limits.body_seconds:g} s: {read} bytes of it came"
                raise HTTPException(408, late, hang_up) from None
            read, whole = read + len(message.get("body", b"")), not message.get("more_body", False)
            if read > most:  # sent in pieces, without its length
                raise HTTPException(413, too_large, hang_up)
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
        elif headers.get(b"content-encoding", b"identity").lower() != b"identity":
            app = problem(415, "the body is compressed: send it as it is", "compressed")
        await app(scope, counted, noted)

    def _knows(self, authorization: bytes) -> bool:
        key = self._server.rules.api_key
        return key is None or hmac.compare_digest(authorization.removeprefix(b"Bearer "), key.encode())


def _event(frame: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({**frame, 'choices': choices, **more}, ensure_ascii=False)}\n\n"


def _failed(message: str) -> str:
    return f"data: {json.dumps({'error': {'message': message, 'type': 'server_error', 'param': None, 'code': None}})}\n\n"


async def _told(
    server: Server, events: AsyncIterator[str], failed: Callable[[str], str] = _failed, *, end: str = "data: [DONE]\n\n"
) -> AsyncIterator[str]:
    """Events, then what went wrong, then the end: a stream that has begun cannot change its status."""
    try:
        async with server.place(sure=True):
            async for event in events:
                yield event
    except (Refused, InternVLError) as error:
        yield failed(str(error))
    if end:
        yield end


def _take(choices: list[Choice], number: int, piece: Piece) -> None:
    choices[number].add(piece)


def _delta(said: Said) -> dict[str, Any]:
    """What came next, as a chunk tells it."""
    if said.name:
        return {"tool_calls": [{"index": said.call, **told_call(Call(said.name, ""))}]}
    if said.call is not None:
        return {"tool_calls": [{"index": said.call, "function": {"arguments": said.arguments}}]}
    return {"reasoning_content": said.thought} if said.thought else {"content": said.content}


async def _chat_events(server: Server, ask: ChatRequest, asked: Asked, frame: dict[str, Any]) -> AsyncIterator[str]:
    """The chunks of a streamed chat completion."""
    frame, choices = {**frame, "object": "chat.completion.chunk"}, [asked.choice() for _ in range(ask.count)]
    for number in range(ask.count):
        yield _event(frame, [{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    async for number, piece in server.pieces([asked.prompt], asked.decoding, ask.count):
        choice = choices[number]
        deltas = [_delta(said) for said in choice.add(piece)]
        logprobs = server.logprobs([*piece.tokens]) if ask.logprobs and piece.tokens else None
        if not deltas and (logprobs or choice.finish_reason):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            reason = choice.finish_reason if place == len(deltas) - 1 else None
            chunk = {"index": number, "delta": delta, "logprobs": None if place else logprobs, "finish_reason": reason}
            yield _event(frame, [chunk])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage([asked.prompt], choices))


async def _text_events(
    server: Server, ask: CompletionRequest, prompts: list[Prompt], texts: list[str], decoding: Decoding, frame: dict[str, Any]
) -> AsyncIterator[str]:
    """The chunks of a streamed text completion."""
    choices = [Choice() for _ in range(len(prompts) * ask.count)]
    for number in range(len(prompts) * ask.count if ask.echo else 0):
        yield _event(frame, [{"index": number, "text": texts[number // ask.count], "logprobs": None, "finish_reason": None}])
    async for number, piece in server.pieces(prompts, decoding, ask.count):
        choices[number].add(piece)
        logprobs = server.old_logprobs([*piece.tokens]) if ask.logprobs is not None else None
        if piece.text or logprobs or piece.finish_reason:
            yield _event(frame, [{"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage(prompts, choices))
