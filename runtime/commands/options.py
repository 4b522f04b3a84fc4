"""What several commands share: the options of where a folder runs, opening it, and one line of progress on a terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.parts.device import PRECISIONS

if TYPE_CHECKING:
    from runtime.answer.model import OpenedModel


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The argument FOLDER."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """FOLDER, and on which device it runs."""
    add_folder(parser)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="CPU", help="OpenVINO device, like CPU, GPU or AUTO (default: %(default)s)")
    where.add_argument("--vision-device", metavar="DEVICE", help="another device for the vision part (default: --device)")
    where.add_argument(
        "--precision", choices=PRECISIONS, default="default", help="accuracy: slower, closest to PyTorch (default: %(default)s)"
    )
    where.add_argument("--cache-dir", metavar="DIR", type=Path, help="keep compiled models there (default: on a GPU, in FOLDER)")


def open_model(
    folder: Path, device: str, vision_device: str | None, precision: str, cache_dir: Path | None, **_: Any
) -> OpenedModel:
    """The model of the command line's options."""
    from runtime.answer.model import OpenedModel

    return OpenedModel(folder, device, vision_device=vision_device, precision=precision, cache_dir=cache_dir)


def show_line(text: str) -> None:
    """Replace the line of progress, on a terminal; nothing where there is none. An empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
