"""The weight files of a checkpoint folder: their names, their headers and their mapped tensors.

Safetensors, or torch's own files, from which only tensors are read (weights_only), so that no code in them runs. Knows the names of
files and stored tensors, not what a tensor is for.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.errors import CheckpointError
from runtime.folder.config import read_config

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
KINDS = ((WEIGHTS_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))  # single file and index, the preferred kind first
ZERO = "zero_to_fp32.py"  # DeepSpeed's script, in its checkpoint folders
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NAMES_SHOWN = 3

Shapes = dict[str, tuple[int, ...]]


def some(names: list[str]) -> str:
    """The first NAMES_SHOWN of the names, as text."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


class WeightFiles:
    """Stored tensors of a folder: `shapes` and `dtypes` by name, and `notes`, lines for the user.

    Opening reads headers only. Raises CheckpointError for files that are missing or broken, or hold more than tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: list[str] = []
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            for name, shape, dtype in _header(path):
                if name in self.shapes:
                    raise CheckpointError(f"tensor {name} stands in {self._file_of[name].name} and in {path.name}")
                self.shapes[name], self.dtypes[name], self._file_of[name] = shape, dtype, path
        empty = [name for name, shape in self.shapes.items() if 0 in shape]
        if empty:
            raise CheckpointError(
                f"{folder} holds {len(empty)} tensors of size 0 ({some(empty)}), as DeepSpeed ZeRO 3 leaves them: the weights are "
                f"elsewhere; run {ZERO}, which lies beside them, and give its output"
            )

    def open(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Map the named tensors, in the type they are stored in; a file's mapping ends when its last tensor is dropped."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    found |= {name: file.get_tensor(name) for name in wanted}
            else:
                tensors = load_pickle(path)
                found |= {name: tensors[name].contiguous() for name in wanted}
        return found

    def _files(self) -> list[Path]:
        for whole, index in KINDS:
            found = self._of_kind(whole, index)
            if found:
                return found
        if any(self.folder.glob("global_step*")) or (self.folder / ZERO).exists():
            raise CheckpointError(
                f"{self.folder} has no weights, but what DeepSpeed leaves of a training: run {ZERO}, which lies there, "
                "and give its output"
            )
        raise CheckpointError(f"{self.folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}: fetch the checkpoint again")

    def _of_kind(self, whole: str, index: str) -> list[Path]:
        shards = self._shards(whole)
        if not (self.folder / index).exists():
            return [self.folder / whole] if (self.folder / whole).exists() else shards
        listed = read_config(self.folder / index).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{self.folder / index} has no weight_map: fetch the checkpoint again")
        paths = [self.folder / name for name in sorted(set(listed.values()))]
        absent = [path.name for path in paths if not path.exists()]
        if (self.folder / whole).exists() and paths != [self.folder / whole]:
            self.notes.append(f"{index} lists other files: {whole} is read")
            return [self.folder / whole]
        if absent:
            raise CheckpointError(
                f"{self.folder} lacks {len(absent)} of {len(paths)} weight files: {some(absent)}; fetch the checkpoint again"
            )
        return paths

    def _shards(self, whole: str) -> list[Path]:
        """Numbered shards of a file, where no index lists them."""
        stem, _, kind = whole.partition(".")
        found: dict[int, Path] = {}
        counts = set()
        for path in sorted(self.folder.glob(f"{stem}-*-of-*.{kind}")):
            numbers = re.fullmatch(rf"{stem}-(\d+)-of-(\d+)\.{kind}", path.name)
            if numbers:
                found[int(numbers[1])] = path
                counts.add(int(numbers[2]))
        if not found or (self.folder / whole).exists() or (self.folder / f"{whole}.index.json").exists():
            return []
        if len(counts) > 1:
            raise CheckpointError(
                f"{self.folder} has shards of {' and of '.join(map(str, sorted(counts)))} files: remove the old ones"
            )
        absent = [number for number in range(1, counts.pop() + 1) if number not in found]
        if absent:
            raise CheckpointError(
                f"{self.folder} lacks {len(absent)} of {len(absent) + len(found)} weight files, number "
                f"{some([str(number) for number in absent])}; fetch the checkpoint again"
            )
        self.notes.append(f"{whole}.index.json is missing: {len(found)} numbered files are read")
        return [found[number] for number in sorted(found)]


def _header(path: Path) -> Iterable[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and types of a file's tensors. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        return [(name, tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype))) for name, t in load_pickle(path).items()]
    try:
        with safe_open(path, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
            return [(name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}; {path.stat().st_size:,} bytes): fetch it again"
        ) from None


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a file that torch.save wrote. Raises CheckpointError, without running code, if it holds more."""
    try:
        mapped = zipfile.is_zipfile(path)  # older files cannot be mapped
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} holds more than tensors ({reason}): opening a pickle can run any code, so it is refused; "
            "save the model again as safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a whole file of weights ({reason}): fetch it again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors: save the model again as safetensors")
    return found
