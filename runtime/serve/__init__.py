"""An OpenAI-compatible server over one model folder: `python -m runtime serve FOLDER`. Loads nothing until it is started."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import OptionError
from runtime.folder.contrastive import CONTRASTIVE
from runtime.folder.files import kind_of_folder

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

STOP_SECONDS = 30  # for answers in progress when the server is stopped
KEEP_ALIVE_SECONDS = 75  # of idle connections; a client that uses one as it closes sees an error
LAST_WORDS_SECONDS = 3  # after that, to send the errors that end them


def run(
    folder: Path,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    engine: str,
    cache_size: int,
    max_requests: int,
    timeout: float,
    max_body: int,
    allowed_media_domains: str,
    allowed_local_media_path: Path | None,
    thinking: bool = False,
    **placed: Any,
) -> None:
    """Open the folder and serve it until a signal. Raises OptionError when it cannot listen at the address."""
    for name, value in {"cache size": cache_size, "max requests": max_requests, "timeout": timeout, "max body": max_body}.items():
        if value <= 0:
            raise OptionError(f"{name} {value:g} is not positive")
    if allowed_local_media_path is not None and not allowed_local_media_path.is_dir():
        raise OptionError(f"--allowed-local-media-path {allowed_local_media_path} is not a folder")
    compares = kind_of_folder(folder) == CONTRASTIVE
    if compares and placed.pop("vision_device", None) is not None:
        raise OptionError("--vision-device is for chat models: --device places all parts of this one")
    from runtime.parts.memory import return_freed_memory
    from runtime.serve.protocol import MediaRules
    from runtime.serve.reception import Limits, Rules

    return_freed_memory()
    listening = _listen(host, port)
    rules = Rules(
        (model_name or folder.resolve().name).encode(errors="replace").decode(),  # a folder's name may not be valid Unicode
        api_key or os.environ.get("INTERNVL_API_KEY"),
        MediaRules(frozenset(filter(None, allowed_media_domains.split(","))), allowed_local_media_path),
        Limits(max_requests, timeout, max_body << 20),
        thinking,
    )
    if compares:
        from runtime.contrast.model import OpenedInternVL
        from runtime.serve.embeddings import build_app as build_embedding_app

        comparing = OpenedInternVL(folder, **placed)
        comparing.open_parts()
        app = build_embedding_app(comparing, rules)
    else:
        from runtime.answer.model import OpenedModel
        from runtime.serve.app import build_app
        from runtime.serve.engine import GenaiEngine, NativeEngine

        model = OpenedModel(folder, language=engine == "native", **placed)
        app = build_app(NativeEngine(model) if engine == "native" else GenaiEngine(model, cache_size), rules)
    where = f"http://{host}:{listening.getsockname()[1]}"
    print(f"serving {rules.model_name} at {where}/v1, documented at {where}/docs; Ctrl-C stops", flush=True)
    make_server(app).run([listening])


def make_server(app: FastAPI, stop_seconds: float = STOP_SECONDS) -> uvicorn.Server:
    """A server that gives answers in progress `stop_seconds` to finish when it is stopped, then ends them with an error."""
    import asyncio

    import uvicorn

    from runtime.serve.connections import Connection

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(stop_seconds, app.state.stop)
            await super().shutdown(sockets)

    last = math.ceil(stop_seconds) + LAST_WORDS_SECONDS
    keep = KEEP_ALIVE_SECONDS
    return Server(
        uvicorn.Config(
            app, http=Connection, ws="none", log_level="warning", timeout_graceful_shutdown=last, timeout_keep_alive=keep
        )
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before the model is opened: a port in use is reported at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise OptionError(f"cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or error})") from None
    # named as TCP: otherwise asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an acknowledgement
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
