"""python -m runtime embed FOLDER PICTURES... --out INDEX.npz: encode pictures into an index, which search reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from runtime.commands.options import add_device, add_folder, add_mode, progress_of, show_line

SHOWN = 5  # of the files that could not be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("pictures", metavar="PICTURES", nargs="+", type=Path, help="picture files, or folders, read recursively")
    parser.add_argument("--out", metavar="INDEX", type=Path, required=True, help="index to write or to add to, like vectors.npz")
    add_mode(parser)
    add_device(parser)


def run(folder: Path, pictures: list[Path], out: Path, mode: str, **placed: Any) -> None:
    """Encode the pictures that the index lacks; an interrupted run is resumed. Raises InternVLError kinds."""
    from runtime.contrast.embed import embed
    from runtime.contrast.model import OpenedInternVL

    model = OpenedInternVL(folder, **placed)
    try:
        index = embed(model, pictures, out, mode, progress_of("embedding", "pictures"))
    finally:
        show_line("")
    for path, why in [*index.skipped.items()][:SHOWN]:
        print(f"skipped: {why if path in why else f'{path}: {why}'}", file=sys.stderr)
    if len(index.skipped) > SHOWN:
        print(f"skipped: {len(index.skipped) - SHOWN} more, listed in {out}", file=sys.stderr)
    told = f", {len(index.skipped)} files skipped" if index.skipped else ""
    print(f"{out}: {len(index.paths)} pictures, {index.vectors.shape[1]} numbers each, {out.stat().st_size / 1e6:.1f} MB{told}")
