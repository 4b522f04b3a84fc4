"""python -m runtime serve FOLDER: an OpenAI-compatible server, until it is stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runtime.commands.options import add_flash, add_placement, check_thinking
from runtime.errors import not_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_placement(parser)
    add_flash(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=23333, help="port to listen on (default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="key that clients must send (default: $INTERNVL_API_KEY, else none)")
    parser.add_argument("--model-name", metavar="NAME", help="name of the model for clients (default: the folder's name)")
    parser.add_argument(
        "--engine",
        choices=("genai", "native"),
        default="genai",
        help="genai: requests in a batch; native: one after the other (default: %(default)s)",
    )
    parser.add_argument("--thinking", action="store_true", help="think first, unless a request sets reasoning_effort")
    allowed = parser.add_argument_group("what it takes")
    allowed.add_argument("--cache-size", type=int, default=2, metavar="GB", help="KV cache of all requests (default: %(default)s)")
    allowed.add_argument(
        "--max-requests", type=int, default=64, metavar="N", help="requests at once, waiting ones included (default: %(default)s)"
    )
    allowed.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="limit of one answer (default: %(default)g)")
    allowed.add_argument("--max-body", type=int, default=64, metavar="MB", help="limit of one request (default: %(default)s)")
    allowed.add_argument(
        "--allowed-media-domains", metavar="HOSTS", default="", help="comma-separated hosts to fetch pictures from (default: none)"
    )
    allowed.add_argument("--allowed-local-media-path", metavar="FOLDER", type=Path, help="folder of media to read (default: none)")


def run(**options: Any) -> None:
    """Answer over HTTP until it is stopped. Raises OptionError."""
    from runtime.serve import run as serve

    if options["thinking"]:
        check_thinking(options["folder"])
    try:
        serve(**options)
    except ModuleNotFoundError as error:
        raise not_installed(error, "serve") from None
