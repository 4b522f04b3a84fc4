"""Open the model of an index, and encode a query as a vector; index.py compares vectors. Knows no terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.contrast.index import About, Index, fingerprint_of
from runtime.contrast.model import OpenedInternVL, unit
from runtime.errors import OptionError
from runtime.media.picture import Source


def open_for(index: Index, folder: Path | None = None, **placed: Any) -> OpenedInternVL:
    """The model of an index, from `folder` if it has moved. Raises OptionError if it is missing, or another model."""
    there = folder or Path(index.about.model)
    if folder is None and not there.exists():
        raise OptionError(f"the index's model {there} does not exist any more: say where it is with --model")
    model = OpenedInternVL(there, **placed)
    check_model(index, model)
    return model


def check_model(index: Index, model: OpenedInternVL) -> None:
    """Raise OptionError unless the index has vectors of this model."""
    About(str(model.folder), fingerprint_of(model.folder), index.about.mode).check(index.about, "the index")


def query_of(model: OpenedInternVL, index: Index, text: str | None, picture: Source | None = None) -> np.ndarray:
    """The unit vector (E) of a text, of a picture, or of the sum of both. Raises PromptError, PictureError."""
    found = [] if text is None else [model.encode_texts(text)[0]]
    if picture is not None:
        found.append(model.encode_images([picture], index.about.mode)[0])
    return unit(np.sum(found, axis=0))
