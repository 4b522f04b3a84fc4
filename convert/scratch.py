"""Tensors and OpenVINO models on disk, so that copies of a checkpoint's weights need not fit in memory.

The system writes their pages out when memory is short and reads them back on use. Knows nothing of what they mean.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import openvino as ov
import torch

from runtime.folder.files import save_model

LEAST = 1 << 20  # bytes; smaller tensors stay in memory
ZEROS = bytes(1 << 24)
PREFIX = "scratch-"
DELETES_MAPPED = os.name != "nt"  # Windows does not


class Scratch:
    """Files in a folder, each mapped by one tensor and deleted with it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        """Like torch.empty. Raises OSError if the disk is full."""
        count = math.prod(shape)
        if count * dtype.itemsize < LEAST:
            return torch.empty(shape, dtype=dtype)
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=self._folder)
        try:
            with open(handle, "wb") as file:
                _fill(file.fileno(), count * dtype.itemsize)
            tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
        except BaseException:
            os.unlink(name)
            raise
        if DELETES_MAPPED:
            os.unlink(name)
        return tensor.view(*shape)

    def mapped(self, model: ov.Model) -> ov.Model:
        """The model with its weights in a file. Raises OSError if the disk is full."""
        handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=".xml", dir=self._folder)
        os.close(handle)
        file = Path(name)
        save_model(model, file)
        stored = ov.Core().read_model(file)
        if DELETES_MAPPED:
            file.unlink()
            file.with_suffix(".bin").unlink()
        return stored

    def clear(self) -> None:
        """Delete the remaining files, once their tensors are gone."""
        gc.collect()
        for file in self._folder.glob(f"{PREFIX}*"):
            file.unlink()


def _fill(file: int, size: int) -> None:
    """Allocate the disk space now: a mapped file that finds none later kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    while size:
        size -= os.write(file, ZEROS[: min(size, len(ZEROS))])
