"""python -m demo FOLDER: the chatbot in a browser, on this machine only unless asked otherwise."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InternVLError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m demo", description="Chat with a model folder in a browser.")
    p.add_argument("folder", metavar="FOLDER", type=Path, help="model folder, as python -m convert writes it")
    p.add_argument("--device", default="CPU", help="OpenVINO device, like CPU, GPU or AUTO (default: %(default)s)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    p.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it at its import
    try:
        from demo.chatbot import make_demo
        from runtime.model import OVInternVLChatModel

        model = OVInternVLChatModel(options.folder, options.device)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; run  pip install -e '.[demo]'", file=sys.stderr)
        return 2
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    make_demo(model).launch(server_name=options.host, server_port=options.port, share=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
