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
    from convert.checkpoint import resolve
    from convert.serving import DEFAULT_REPOSITORY, check_repository
    from runtime.folder.files import check_target

    options = options or ConvertOptions()
    name = f"{Path(source).resolve().name}-{options.weight_format}"
    final = Path(output or name) if options.serving is None else Path(output or DEFAULT_REPOSITORY) / name
    # these mistakes are reported before NNCF and transformers are imported, which takes seconds
    check_target(final, force=options.force)
    if options.serving is not None:
        check_repository(final.parent)
    there = resolve(source, revision=options.revision, token=options.token, cache_dir=options.cache_dir)

    from convert.pipeline import run

    return run(there, source, final, options)
