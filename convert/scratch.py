"""Tensors on disk: what a conversion has to copy from a checkpoint need not fit in memory.

The system writes their pages out when memory gets short and reads them back when they are used. Knows nothing of models.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

LEAST = 1 << 20  # bytes; smaller tensors stay in memory
ZEROS = bytes(1 << 24)
PREFIX = "scratch-"
DELETES_MAPPED = os.name != "nt"  # Windows does not


class Scratch:
    """Files in a folder, each mapped by one tensor and gone with it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty. Raises OSError when the disk is full."""
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

    def clear(self) -> None:
        """Delete what is left of the files, once no tensor is."""
        gc.collect()
        for file in self._folder.glob(f"{PREFIX}*"):
            file.unlink()


def _fill(file: int, size: int) -> None:
    """Take the room on the disk now: a mapped file that finds none later ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    while size:
        size -= os.write(file, ZEROS[: min(size, len(ZEROS))])
