"""The common base of all servers: rules, API key, limits, the count of active requests, metrics, errors in OpenAI's form.

Every mistake of a client is a 4xx with one line. Knows no answers: answering.py prepares and generates them, app.py has the routes.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime import __version__
from runtime.errors import InternVLError
from runtime.serve.engine import Engine
from runtime.serve.protocol import MediaRules

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
)  # routes that the metrics count by name
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    requests: int = 64  # at once, including waiting ones
    seconds: float = 600.0  # per answer
    body_bytes: int = 64 << 20
    body_seconds: float = 120.0  # from the head of a request to the last byte of its body


@dataclass(frozen=True)
class Rules:
    """The settings of one server: model name, API key, media, limits, thinking."""

    model_name: str
    api_key: str | None = None
    media: MediaRules = field(default_factory=MediaRules)
    limits: Limits = field(default_factory=Limits)
    thinking: bool = False  # default for requests without reasoning_effort


class Refused(Exception):
    """A request that is refused, with an HTTP status and one line."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Caches(Collector):
    """Prometheus metrics of the counts that the caches keep."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Prometheus' interface: the current counts."""
        cache, share = self._engine.model.feature_cache, self._engine.kv_cache_share
        yield CounterMetricFamily("internvl_feature_cache_hits", "Tiles whose features were in the cache", value=cache.hits)
        yield CounterMetricFamily("internvl_feature_cache_misses", "Tiles that the vision part encoded", value=cache.misses)
        if share is not None:
            yield GaugeMetricFamily("internvl_kv_cache_used_ratio", "Share of the KV cache that is in use", value=share)


class Metrics:
    """The Prometheus metrics of a server."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        if engine is not None:
            self.registry.register(Caches(engine))
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("internvl_requests", "Requests by route and status", ["route", "status"], **own)
        self.active = Gauge("internvl_active_requests", "Requests being answered or waiting", **own)
        self.waiting = Gauge("internvl_waiting_requests", "Requests whose first token has not come yet", **own)
        self.first_token = Histogram("internvl_first_token_seconds", "Seconds to the first token", buckets=SECONDS, **own)
        self.token = Histogram(
            "internvl_token_seconds", "Seconds per token after the first, mean of an answer", buckets=SECONDS, **own
        )
        self.prompt_tokens = Counter("internvl_prompt_tokens", "Tokens of prompts", **own)
        self.new_tokens = Counter("internvl_new_tokens", "Tokens of answers", **own)


class Reception:
    """The base of every server: rules, metrics, the count of active requests."""

    def __init__(self, rules: Rules, metrics: Metrics):
        self.rules, self.metrics = rules, metrics
        self.created, self.active = int(time.time()), 0

    def check_model(self, name: str) -> None:
        """Raise Refused for another model's name; an empty name means this model."""
        if name and name != self.rules.model_name:
            raise Refused(404, f"there is no model {name!r}: use {self.rules.model_name!r}", "model_not_found")

    @asynccontextmanager
    async def place(self, *, sure: bool = False) -> AsyncIterator[None]:
        """Hold one of the `limits.requests` places. Raises Refused if none is free; `sure` skips that check."""
        if not sure and self.active >= self.rules.limits.requests:
            raise Refused(429, f"{self.active} requests are being answered: try again", "queue_full", {"Retry-After": "1"})
        self.active += 1
        self.metrics.active.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)


def problem(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error response of one line, in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def base_app(
    reception: Reception, life: Callable[[FastAPI], AbstractAsyncContextManager[None]], alive: Callable[[], bool]
) -> FastAPI:
    """An application with the common parts: Door, errors in OpenAI's form, /v1/models, /health, /metrics."""
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
        own = first["type"] == "value_error" and not where  # about the whole body; the message names the field
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


class Door:
    """Middleware of every request: checks the key, limits the body before it is in memory, and counts responses by status.

    Plain ASGI: Starlette's BaseHTTPMiddleware would keep the routes from noticing that a client has disconnected.
    """

    def __init__(self, app: ASGIApp, server: Reception):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's interface."""
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
            if read > most:  # chunked, without a Content-Length
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
