"""A checkpoint as published: a local folder or a hub id -> config.json and strict, memory-mapped weights.

Only json, safetensors and tokenizer files are ever fetched or opened; Python files of a checkpoint are not looked at. Knows
where tensors lie and what they are called, not what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert.adapter import Adapter
from convert.native import is_native, published_config, published_names, renamed
from runtime.answer.prompt import old_system_message
from runtime.errors import CheckpointError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE, PREPROCESSOR_CONFIG_FILE

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FETCHED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]  # never *.py, never pickles
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NAMES_SHOWN = 3

Shapes = dict[str, tuple[int, ...]]


def resolve(source: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None) -> Path:
    """Return the local folder of `source`: a folder as it is, a hub id after fetching what is missing of it.

    Raises CheckpointError for a folder that is not there, an unknown or gated repository, or a network that fails.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file: give the checkpoint's folder or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise CheckpointError(f"{source} is neither a folder nor a hub id like OpenGVLab/InternVL2-1B")
    return _fetch(source, revision, token, cache_dir)


def _fetch(repo: str, revision: str | None, token: str | None, cache_dir: str | None) -> Path:
    """Download a repository's json, safetensors and tokenizer files into the hub cache; finished and partial files are reused."""
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=FETCHED))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on its hub page, then log in (hf auth login) or pass --token"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is not on the hub, or is private: check the id; for a private one log in (hf auth login) or pass --token"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is not in the cache and the hub cannot be reached: check the network and try again"
        ) from None
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"fetching {repo} broke off ({reason}): run the same command again, it resumes") from None


class Checkpoint:
    """A checkpoint folder: its configuration and the tensors of its safetensors files.

    Opening reads headers only. `tensors()` maps a group of tensors into memory; pages are read when they are used and can be
    dropped by the system again. `name` is what the checkpoint is called, if its folder does not tell; `template` and
    `system_message` take the place of its own; `adapter` is merged into the tensors it is for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        template: str | None = None,
        system_message: str | None = None,
        adapter: Path | None = None,
    ):
        self.folder = folder
        self.raw_config: dict[str, Any] = read_config(folder / CONFIG_FILE)
        native = is_native(self.raw_config)
        if native:
            self.raw_config = published_config(self.raw_config, self._processor())
        if template is not None:
            self.raw_config = self.raw_config | {"template": template}
        if system_message is None:  # what the file says of it is ignored, as upstream does
            system_message = old_system_message(name or folder.name, str(self.raw_config.get("template")))
        self.raw_config = self.raw_config | {"system_message": system_message}
        self.config = InternVLConfig.from_dict(self.raw_config)
        self.adapter = Adapter(adapter) if adapter is not None else None
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        self._stored: dict[str, list[str]] = {}  # published name -> tensors of the files that it is made of, row by row
        for path in self._weight_files():
            self._read_header(path)
        self._name_tensors(native)

    def _processor(self) -> dict[str, Any]:
        """The picture settings of a transformers-native checkpoint, where there are any."""
        old, new = self.folder / PREPROCESSOR_CONFIG_FILE, self.folder / "processor_config.json"  # new: transformers 5
        if old.exists():
            return read_config(old)
        return read_config(new).get("image_processor", {}) if new.exists() else {}

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.exists():
            listed = read_config(index).get("weight_map")
            if not isinstance(listed, dict):
                raise CheckpointError(f"{index} has no weight_map: fetch the checkpoint again")
            paths = [self.folder / name for name in sorted(set(listed.values()))]
            absent = [path.name for path in paths if not path.exists()]
            if absent:
                raise CheckpointError(
                    f"{self.folder} lacks {len(absent)} of {len(paths)} weight files: {_some(absent)}; fetch the checkpoint again"
                )
            return paths
        if (self.folder / WEIGHTS_FILE).exists():
            return [self.folder / WEIGHTS_FILE]
        if any(path for pattern in PICKLES for path in self.folder.glob(pattern)):
            raise CheckpointError(
                f"{self.folder} holds pickled weights (.bin) and no safetensors: opening a pickle can run any code, so it is "
                "refused; save the model again as safetensors"
            )
        raise CheckpointError(f"{self.folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}: fetch the checkpoint again")

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                    if name in self.shapes:
                        raise CheckpointError(f"tensor {name} stands in {self._file_of[name].name} and in {path.name}")
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()
                    self._file_of[name] = path
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}; {path.stat().st_size:,} bytes): fetch it again"
            ) from None

    def _name_tensors(self, native: bool) -> None:
        """Give the tensors of the files their published names."""
        stored_shapes, stored_types = self.shapes, self.dtypes
        if self.adapter is not None:
            self.adapter.fit(stored_shapes, renamed if native else str)
        self._stored = published_names(list(stored_shapes)) if native else {name: [name] for name in stored_shapes}
        self.shapes, self.dtypes = {}, {}
        for name, parts in self._stored.items():
            missing = [part for part in parts if part not in stored_shapes]
            if missing:
                raise CheckpointError(f"{self.folder} has {parts[0]} and not {_some(missing)}: fetch the checkpoint again")
            first = stored_shapes[parts[0]]
            self.shapes[name] = first if len(parts) == 1 else (sum(stored_shapes[part][0] for part in parts), *first[1:])
            self.dtypes[name] = stored_types[parts[0]]

    def check(self, expected: Shapes) -> None:
        """Require exactly the tensors `expected`, each with its shape; raises CheckpointError with counts and first names."""
        missing = [name for name in expected if name not in self.shapes]
        extra = [name for name in self.shapes if name not in expected]
        misshapen = [
            f"{name} {list(self.shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        strange = sorted({f"{dtype} in {name}" for name, dtype in self.dtypes.items() if dtype not in ("F32", "F16", "BF16")})
        found = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", extra),
                ("of another shape", misshapen),
                ("of a type other than F32, F16, BF16", strange),
            )
            if names
        ]
        if found:
            raise CheckpointError(f"the tensors of {self.folder} do not fit its config.json: {'; '.join(found)}")

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Map the named tensors, in the type they are stored in; a file's mapping ends when its last tensor is dropped.

        Those that an adapter changes, or that are stored in parts, are copies in memory.
        """
        wanted = set(names)
        stored = {name: self._stored[name] for name in self.shapes if name in wanted}
        opened = {path: safe_open(path, "pt") for path in {self._file_of[part] for parts in stored.values() for part in parts}}

        def mapped(part: str) -> torch.Tensor:
            tensor = opened[self._file_of[part]].get_tensor(part)
            return tensor if self.adapter is None else self.adapter.merge(part, tensor)

        return {name: mapped(parts[0]) if len(parts) == 1 else torch.cat([*map(mapped, parts)]) for name, parts in stored.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
