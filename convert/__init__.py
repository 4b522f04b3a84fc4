"""Checkpoint -> model folder: trace, compress, verify.

`convert(source, output, options)` is what `python -m convert` runs; importing this package loads no heavy library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convert.options import ConvertOptions as ConvertOptions

if TYPE_CHECKING:
    from convert.pipeline import Summary


def convert(source: str, output: str | Path | None = None, options: ConvertOptions | None = None) -> Summary:
    """Convert `source` (a checkpoint folder or a hub id) to the model folder `output`.

    `output` defaults to the source's name and weight format in the current folder, like `InternVL2-1B-int4`; with `serving` to
    `models`, which then contains the model folder. Returns a summary of what was written. Raises InternVLError, and leaves no
    folder, if the source, the options or the disk are at fault; DriftError if the result differs from the PyTorch path by more
    than its weight format allows.
    """
    from convert.pipeline import run

    return run(source, output, options or ConvertOptions())
