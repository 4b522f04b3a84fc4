"""python -m runtime classify FOLDER PICTURE --labels FILE: zero-shot labels of a picture, or their accuracy.

A folder of class folders is evaluated (top-1, top-5), and so is a .tsv file of pictures and captions (recall); the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.commands.options import add_device, add_folder, add_mode, progress_of, show_line
from runtime.errors import OptionError

PAIRS = ".tsv"
SHOWN = 10  # labels
ONE, FOLDERS, FILE_OF_PAIRS = "one picture", "a folder of class folders", "a file of pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "picture",
        metavar="PICTURE",
        help="a picture; or a folder of class folders, or a .tsv file of PICTURE <tab> CAPTION lines, to evaluate on",
    )
    parser.add_argument("--labels", metavar="FILE", type=Path, help="for a picture: labels to choose from, one a line")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="for class folders: their labels, one a line, in the folders' order (default: their names)",
    )
    parser.add_argument(
        "--templates", metavar="FILE", type=Path, help='texts with {c} for the label, one a line (default: "a photo of a {c}.")'
    )
    add_mode(parser)
    add_device(parser)


def run(
    folder: Path, picture: str, labels: Path | None, classes: Path | None, templates: Path | None, mode: str, **placed: Any
) -> None:
    """Print the likeliest labels of a picture, or an evaluation. Raises InternVLError kinds."""
    from runtime.contrast import zeroshot
    from runtime.contrast.model import TEMPLATES, OpenedInternVL

    path, pairs = Path(picture), None
    kind = FOLDERS if path.is_dir() else FILE_OF_PAIRS if path.suffix.lower() == PAIRS else ONE
    if kind == ONE and labels is None:
        raise OptionError("there is nothing to choose from: give --labels FILE, one label a line")
    for given, flag, what in ((labels, "--labels", ONE), (classes, "--classes", FOLDERS)):
        if given is not None and kind != what:
            raise OptionError(f"{flag} is for {what}, and {picture} is {kind}: leave it out")
    chosen = zeroshot.read_labels(labels or classes) if labels or classes else None  # type: ignore[arg-type]
    wordings = zeroshot.read_templates(templates) if templates else list(TEMPLATES)
    if kind == FILE_OF_PAIRS:
        pairs = zeroshot.read_pairs(path)
    model, report = OpenedInternVL(folder, **placed), progress_of("reading", "pictures")
    if kind == ONE:
        assert chosen is not None
        chances = model.classify(picture, chosen, wordings, mode)
        for place in (-chances).argsort(kind="stable")[:SHOWN]:
            print(f"{chances[place]:.4f}  {chosen[place]}")
        return
    try:
        if pairs is not None:
            result = zeroshot.evaluate_retrieval(model, pairs, mode, report)
        else:
            result = zeroshot.evaluate_classes(model, path, chosen, wordings, mode, report)
    finally:
        show_line("")
    for name, value in result.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{'-' if value is None else value}")
    print(json.dumps({"folder": str(folder), "data": picture, "mode": mode, **result}, ensure_ascii=False))
