"""Shared by several commands: options for devices, opening a model folder, and a progress line on a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.folder.contrastive import MODES
from runtime.parts.device import PRECISIONS

BAR = 24  # characters

if TYPE_CHECKING:
    from runtime.answer.model import OpenedModel


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The argument FOLDER."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The argument FOLDER, and the devices it runs on."""
    add_folder(parser)
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--device", default="CPU", metavar="NAME", help="CPU, GPU or auto: best for each part (default: %(default)s)"
    )
    where.add_argument("--vision-device", metavar="NAME", help="device of the vision part (default: --device)")
    _add_precision(where)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The device that all parts run on."""
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="CPU", metavar="NAME", help="OpenVINO device, like CPU or GPU (default: %(default)s)")
    _add_precision(where)


def add_mode(parser: argparse.ArgumentParser) -> None:
    """The embedding of pictures, that of InternVL-C or -G."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="InternVL-G also runs queries over pictures, which takes longer (default: %(default)s)",
    )


def progress_of(what: str, things: str) -> Callable[[int, int], None]:
    """A callback for the numbers done and in all, which shows them as a line: a bar, a rate, the time left."""
    begun: list[tuple[float, int]] = []

    def show(done: int, total: int) -> None:
        now = time.perf_counter()
        if not begun:
            begun.append((now, done))
        (started, first), filled = begun[0], BAR * done // max(1, total)
        rate = (done - first) / max(1e-9, now - started)
        left = f", {rate:.1f} {things}/s, {(total - done) / rate:.0f} s left" if done > first else ""
        show_line("" if done == total else f"{what} [{'#' * filled}{'.' * (BAR - filled)}] {done} of {total} {things}{left} ")

    return show


def _add_precision(where: argparse._ArgumentGroup) -> None:
    where.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="default",
        metavar="NAME",
        help="%(default)s, or accuracy: slower, closest to PyTorch",
    )
    where.add_argument("--cache-dir", metavar="DIR", type=Path, help="keep compiled parts there (default: on a GPU, FOLDER)")
    where.add_argument("--no-cache", dest="cache_dir", action="store_const", const=False, help="keep no compiled parts")


def add_flash(parser: argparse.ArgumentParser) -> None:
    """Whether to use the router of a model that has one."""
    parser.add_argument("--no-flash", dest="flash", action="store_false", help="InternVL3.5-Flash: all context tokens of all tiles")


def open_model(
    folder: Path,
    device: str,
    vision_device: str | None,
    precision: str,
    cache_dir: Path | Literal[False] | None,
    flash: bool = True,
    **_: Any,
) -> OpenedModel:
    """Open the model that the command line's options describe."""
    from runtime.answer.model import OpenedModel

    started = time.perf_counter()

    def show(stage: str, done: int, total: int) -> None:
        show_line(f"compiling: {done} of {total} {stage}, {time.perf_counter() - started:.0f} s ")

    try:
        model = OpenedModel(
            folder, device, vision_device=vision_device, precision=precision, cache_dir=cache_dir, flash=flash, progress=show
        )
    finally:
        show_line("")
    if model.choice is not None:
        print(f"device auto: {model.choice}", file=sys.stderr)
    return model


def check_thinking(folder: Path) -> None:
    """Raise OptionError for a folder whose model has no thinking mode."""
    from runtime.answer.prompt import thinking_system
    from runtime.folder.config import InternVLConfig, read_config
    from runtime.folder.files import CONFIG_FILE, check_folder

    check_folder(folder)
    thinking_system(InternVLConfig.from_dict(read_config(folder / CONFIG_FILE)), None)


def show_line(text: str) -> None:
    """Replace the progress line; an empty text clears it. Prints nothing without a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
