"""Connections with limits: a client that sends the head of a request too slowly, or one that is too long, is disconnected.

uvicorn alone waits for bytes for ever. Knows no routes; reception.py limits the time of a body.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 64 << 10  # bytes of a request's first line and headers


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits on the time and size of a request's head."""

    head_seconds = 20.0  # from the connection, or the first byte of a later request, to the end of the head
    _waiting: asyncio.TimerHandle | None = None
    _read = 0  # bytes since the last request
    _in_body = False  # also when the request was answered before its body arrived

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read += len(data)
        super().data_received(data)
        if self._waiting is None and self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()  # bytes that begin no request
        if self._waiting is not None and self._read > MOST_HEAD and not self._in_body:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()
        self._read = 0

    def on_headers_complete(self) -> None:
        self._heard()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body, self._read = False, 0
        super().on_message_complete()

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.head_seconds, self.transport.close)

    def _heard(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
