"""python -m runtime caption FOLDER PICTURES...: captions that InternVL-G writes for pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runtime.commands.options import add_device, add_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="picture file or URL; with several, each caption follows its name"
    )
    add_device(parser)


def run(folder: Path, pictures: list[str], **placed: Any) -> None:
    """Print a caption a line. Raises InternVLError kinds."""
    from runtime.contrast.model import OpenedInternVL

    model = OpenedInternVL(folder, **placed)
    for picture in pictures:
        caption = model.caption(picture)
        print(f"{picture}\t{caption}" if len(pictures) > 1 else caption, flush=True)
