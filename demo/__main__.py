"""python -m demo [FOLDER]: the chatbot in a browser, on this machine only unless asked otherwise."""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import InternVLError, OptionError, not_installed
from runtime.folder.contrastive import CONTRASTIVE
from runtime.folder.files import kind_of_folder, user_cache
from runtime.terminal import CommandParser, ending_quietly

BUILT_IN = Path(__file__).parent / "shapes" / "checkpoint"
WEIGHT_FORMAT = "int4"
MAX_FILE_SIZE = "50mb"
PORT, PORTS = 7860, 100  # the first port, and how many are tried


def parser() -> argparse.ArgumentParser:
    p = CommandParser(
        prog="python -m demo", description="Chat with a model in a browser: without FOLDER, with the small one that comes along."
    )
    p.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="model folder, as python -m convert writes it")
    p.add_argument(
        "--checkpoint", metavar="SOURCE", help="convert this first, to FOLDER: a hub id, like OpenGVLab/InternVL2-1B, or a folder"
    )
    p.add_argument(
        "--index",
        metavar="INDEX",
        type=Path,
        help="with a folder of InternVL-C and -G: index of pictures to search, from python -m runtime embed",
    )
    p.add_argument("--device", default="CPU", help="OpenVINO device, like CPU, GPU or AUTO (default: %(default)s)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    p.add_argument("--port", type=int, metavar="N", help=f"port to listen on (default: {PORT}, or the next free one)")
    p.add_argument("--share", action="store_true", help="also open a public Gradio link, for a week")
    return p


def folder_of(folder: Path | None, checkpoint: str | None) -> Path:
    """The model folder to open: as given, or converted from `checkpoint` or the built-in one; an existing folder is reused."""
    if checkpoint is None and folder is not None:
        return folder
    if folder is None:
        folder = Path(f"{Path(checkpoint).name}-{WEIGHT_FORMAT}") if checkpoint else built_in_folder()
    if folder.exists():
        return folder
    from convert.__main__ import main as convert

    code = convert([checkpoint or str(BUILT_IN), str(folder), "--weight-format", WEIGHT_FORMAT])
    if code:
        raise SystemExit(code)
    return folder


def built_in_folder() -> Path:
    """The folder of the converted built-in model: in the user's cache, named after its weights."""
    weights = hashlib.sha1((BUILT_IN / "model.safetensors").read_bytes(), usedforsecurity=False).hexdigest()
    return user_cache() / f"shapes-{weights[:8]}-{WEIGHT_FORMAT}"


def free_port(host: str, wanted: int | None) -> int:
    """The port to listen on: the requested one, or the first free one. Raises OptionError."""
    for port in range(PORT, PORT + PORTS) if wanted is None else [wanted]:
        try:
            socket.create_server((host, port), family=socket.getaddrinfo(host, port)[0][0]).close()
            return port
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
    asked = f"port {wanted}" if wanted is not None else f"any port from {PORT} to {PORT + PORTS - 1}"
    raise OptionError(f"cannot listen on {host} {asked} ({reason}): give another --port, or leave it out for the next that is free")


def chat_page(folder: Path, device: str) -> Any:
    """The page of a chat model."""
    from demo.chatbot import make_demo
    from runtime.answer.model import OpenedModel

    return make_demo(OpenedModel(folder, device))


def search_page(folder: Path, index: Path | None, device: str) -> Any:
    """The page of InternVL-C and -G over an index. Raises OptionError without an index, or for one of another model."""
    if index is None:
        raise OptionError(f"{folder} searches pictures: write an index with python -m runtime embed, and give it with --index")
    from demo.search import make_search
    from runtime.contrast.index import Index
    from runtime.contrast.search import open_for

    found = Index.read(index)
    return make_search(open_for(found, folder, device=device), found)


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it at its import
    try:
        port = free_port(options.host, options.port)
        folder = folder_of(options.folder, options.checkpoint)
        if kind_of_folder(folder) == CONTRASTIVE:
            page = search_page(folder, options.index, options.device)
        elif options.index is not None:
            raise OptionError(f"--index is for a folder of InternVL-C and -G, and {folder} is none: leave it out")
        else:
            page = chat_page(folder, options.device)
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error, 'demo')}", file=sys.stderr)
        return 2
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    page.launch(server_name=options.host, server_port=port, share=options.share, max_file_size=MAX_FILE_SIZE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
