"""A checkpoint as published or as training leaves it: a folder or a hub id -> config.json and strict, memory-mapped weights.

Python files of a checkpoint are neither fetched nor read. Knows the names of tensors and what is merged into them, not what they
compute; weight_files.py opens the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convert.adapter import Adapter
from convert.four_bits import Matrices, Ready
from convert.lora import UNCOPIED, UPSTREAM_SCALE, Later, Update, check_fit, ranks, unwrap
from convert.native import is_native, published_config, published_names, renamed
from convert.packed import find_mxfp4, find_packed, read_recipe
from convert.reference.router import TENSORS as ROUTER
from convert.reference.router import UNUSED
from convert.weight_files import Shapes, WeightFiles, some
from runtime.answer.prompt import old_system_message
from runtime.errors import CheckpointError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.contrastive import CONTRASTIVE, FEATURES, ContrastiveConfig, FeaturesConfig, kind_of
from runtime.folder.files import CONFIG_FILE, PREPROCESSOR_CONFIG_FILE

FETCHED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]  # never *.py
PICKLED = ["pytorch_model*.bin"]  # only where there are no safetensors; only tensors are read from them
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$")  # saved by older versions; computed here
TABLES = ("embed_tokens.weight", "tok_embeddings.weight", "lm_head.weight", "output.weight")  # one row per token
MOST_PADDING = 128  # rows of padding at the end of a table
LORA_KEYS = {"language": "use_llm_lora", "vision": "use_backbone_lora"}  # of config.json: ranks

VISION_PREFIX = "vision_model."

Empty = Callable[..., torch.Tensor]


def resolve(source: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | None = None) -> Path:
    """Return the local folder of `source`: a folder itself, or a hub id's folder after fetching what is missing.

    Raises CheckpointError for a missing folder, an unknown or gated repository, or a network failure.
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

    fetch = partial(snapshot_download, repo, revision=revision, token=token, cache_dir=cache_dir)
    try:
        folder = Path(fetch(allow_patterns=FETCHED))
        return folder if any(folder.glob("*.safetensors")) else Path(fetch(allow_patterns=[*FETCHED, *PICKLED]))
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


class StoredTensors:
    """The tensors of a checkpoint folder, by their published names.

    Opening reads headers only. `tensors()` maps a group of tensors into memory; the system reads pages on use and can drop them
    again. `notes` are lines about what was found and skipped.
    """

    def __init__(self, folder: Path, raw_config: dict[str, Any]):
        self.folder, self.raw_config = folder, raw_config
        self._files = WeightFiles(folder)
        self.notes = self._files.notes
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        self._stored: dict[str, list[str]] = {}  # published name -> stored tensors whose rows it joins
        self._updates: dict[str, Update] = {}  # by stored name, of packed matrices by published name
        self._cut: set[str] = set()  # tables whose last rows, padding, are dropped
        self.recipe = read_recipe(raw_config)
        self.adapter: Adapter | None = None

    def _name_tensors(self, native: bool, passed_over: re.Pattern[str] | None = None) -> None:
        """Map stored tensors to published names, and find the LoRA pairs among them."""
        shapes, dtypes = self._files.shapes, self._files.dtypes
        names = [name for name in shapes if not BUFFERS.search(name)]
        if len(names) < len(shapes):
            self.notes.append(f"ignored: {len(shapes) - len(names)} buffers that are computed, not trained")
        read = [name for name in names if passed_over is None or not passed_over.search(name)]
        if len(read) < len(names) and passed_over is ROUTER:
            self.notes.append(f"ignored: {len(names) - len(read)} tensors of the router, which flash_mode in config.json turns off")
        names = read
        pairs: dict[str, tuple[str, str]] = {}
        if native:
            self._stored = published_names(names)
        else:
            plain, pairs = unwrap(names)
            self._stored = {name: [stored] for name, stored in plain.items()}
        self._packed = find_packed(self._stored, shapes, dtypes, self.recipe)
        self._find_lora(pairs)
        for name, packed in self._packed.items():
            self.shapes[name], self.dtypes[name] = packed.shape, "F16"
        self._mxfp4 = find_mxfp4(self._stored, shapes, dtypes)
        for name, joined in self._mxfp4.items():
            self.shapes[name], self.dtypes[name] = joined.shape, "BF16"
        if self.recipe is not None:
            self.notes.append(f"packed: {len(self._packed)} matrices ({self.recipe})")
        if self._mxfp4:
            self.notes.append(f"packed: {len(self._mxfp4)} tensors of joined experts (MXFP4)")
        self._forget_recipe()
        for name, parts in self._stored.items():
            missing = [part for part in parts if part not in shapes]
            if missing:
                raise CheckpointError(f"{self.folder} has {parts[0]} and not {some(missing)}: fetch the checkpoint again")
            first = shapes[parts[0]]
            self.shapes[name] = first if len(parts) == 1 else (sum(shapes[part][0] for part in parts), *first[1:])
            self.dtypes[name] = dtypes[parts[0]]

    def _forget_recipe(self) -> None:
        """Drop quantization_config: other readers of the model folder would unpack its weights by it."""
        for raw in (self.raw_config, self.raw_config.get("llm_config") or {}):
            raw.pop("quantization_config", None)

    def _find_lora(self, pairs: dict[str, tuple[str, str]]) -> None:
        """Register the LoRA pairs that training left unmerged, as upstream's own training does. Raises CheckpointError."""
        shapes, found = self._files.shapes, ranks(self._files.shapes, pairs)
        for part, key in LORA_KEYS.items():
            said = self.raw_config.get(key) or 0
            if said and found[part] not in ([], [said]):
                raise CheckpointError(
                    f"config.json: {key} is {said}, the LoRA of the {part} model has rank {', '.join(map(str, found[part]))}: "
                    "the files come from two trainings"
                )
            if said and not found[part]:
                self.notes.append(
                    f"config.json: {key} is {said}, and there is no LoRA beside the {part} model: it was merged before"
                )
        for name, (down, up) in pairs.items():
            packed = self._packed.get(name)
            if packed is None and name not in self._stored:
                raise CheckpointError(f"{self.folder} has {down} but not {name}, which it adapts: save the checkpoint again")
            stored = name if packed is not None else self._stored[name][0]
            check_fit(name, shapes[stored] if packed is None else packed.shape, shapes[down], shapes[up])
            self._updates[stored] = Update(partial(self._open, down), partial(self._open, up), UPSTREAM_SCALE)
        if pairs:
            told = [f"{part} rank {', '.join(map(str, found[part]))}" for part in LORA_KEYS if found[part]]
            self.notes.append(f"merged LoRA: {', '.join(told) or 'rank ' + str(shapes[next(iter(pairs.values()))[0]][0])}")
            self.raw_config = self.raw_config | {key: 0 for key in LORA_KEYS.values() if key in self.raw_config}

    @property
    def packed_with_lora(self) -> list[str]:
        """The packed matrices beside which training left LoRA, which can be merged only once they are unpacked."""
        return [name for name in self._packed if name in self._updates]

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
            f"{len(names)} {what}: {some(names)}"
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
        for packed in self._packed.values():
            packed.check(self._open)

    def copies(self, name: str, *, later: bool = False) -> bool:
        """Whether loading copies a tensor, to unpack it or to merge LoRA; `later` excludes those that can be merged later."""
        if name in self._packed:  # the proof unpacks it, even if nothing else does
            return True
        if name in self._mxfp4:
            return False
        return any(self._changed(part) for part in self._stored[name]) and not (later and self._waits(name))

    def _waits(self, name: str) -> Update | None:
        """The one update of a matrix that can be traced in its file's mapping and merged later; None otherwise."""
        (first, *rest) = self._stored[name]
        if rest or not UNCOPIED.search(name) or name in self._cut:
            return None
        own, adapted = self._updates.get(first), None if self.adapter is None else self.adapter.update_alone(first)
        return adapted if own is None else own if adapted is None and not self._adapted(first) else None

    def _adapted(self, stored: str) -> bool:
        return self.adapter is not None and self.adapter.changes(stored)

    def _changed(self, stored: str) -> bool:
        return stored in self._updates or self._adapted(stored)

    def tensors(
        self,
        names: Iterable[str],
        *,
        empty: Empty = torch.empty,
        later: Later | None = None,
        ready: Ready | None = None,
        unpacked: torch.dtype = torch.float16,
    ) -> dict[str, torch.Tensor]:
        """Map the named tensors, in the type they are stored in; a file's mapping ends when its last tensor is dropped.

        Tensors with a merge are copied to memory from `empty`, or, if they can be merged later, registered in `later` unmerged.
        Tensors that are stored in pieces are copied. Packed ones are registered in `ready`, or unpacked to the type `unpacked`.
        """
        wanted = set(names)
        stored = {name: self._stored[name] for name in self.shapes if name in wanted and name in self._stored}
        opened = self._files.open(part for parts in stored.values() for part in parts)

        def found(part: str) -> torch.Tensor:
            tensor = opened.pop(part)
            if not self._changed(part):
                return tensor
            made = empty(tensor.shape, dtype=tensor.dtype)
            if part in self._updates:
                self._updates[part].merge(tensor, made)
            else:
                made.copy_(tensor)
            return made if self.adapter is None else self.adapter.merge(part, made)

        made: dict[str, torch.Tensor] = {}
        for name in [name for name in self._packed if name in wanted]:
            load = partial(self._packed[name].load, self._open)
            if ready is not None:
                made[name] = ready.placeholder(self.shapes[name], torch.float16, load)
                continue
            made[name] = load().unpack(empty(self.shapes[name], dtype=unpacked))
            if name in self._updates:
                self._updates[name].merge(made[name], made[name])
            if self.adapter is not None:
                self.adapter.merge(name, made[name])
        for name in [name for name in self._mxfp4 if name in wanted]:
            if ready is None:
                made[name] = self._mxfp4[name].load(self._open)
            else:
                made[name] = ready.read_later(self.shapes[name], partial(self.experts, name))
        for name, parts in stored.items():
            update = None if later is None else self._waits(name)
            if later is not None and update is not None:
                made[name] = opened.pop(parts[0])
                later.add(made[name], update)
            else:
                made[name] = found(parts[0]) if len(parts) == 1 else torch.cat([*map(found, parts)])
        return made | {name: made[name][: self.shapes[name][0]] for name in self._cut & set(made)}

    def experts(self, name: str) -> Matrices:
        """Joined experts (E, columns, rows) one by one, (rows, columns); MXFP4 is unpacked on access."""
        if name in self._mxfp4:
            return self._mxfp4[name].single(self._open)
        return [one.t() for one in self.tensors([name])[name]]

    def _open(self, name: str) -> torch.Tensor:
        return self._files.open([name])[name]


class Checkpoint(StoredTensors):
    """A chat checkpoint: its configuration and its tensors.

    `name` is the checkpoint's name where it is not the folder's; `template` and `system_message` replace the checkpoint's own;
    `adapter` is merged into the tensors, and so is LoRA that training left unmerged.
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
        raw = read_config(folder / CONFIG_FILE)
        self.name = name or folder.name
        native = is_native(raw)
        if native:
            raw = published_config(raw, _processor(folder))
        if template is not None:
            raw = raw | {"template": template}
        if system_message is None:  # the file's own system message is ignored, as upstream does
            system_message = old_system_message(name or folder.name, str(raw.get("template")))
        raw = raw | {"system_message": system_message}
        self.config = InternVLConfig.from_dict(raw)
        super().__init__(folder, raw)
        self._name_tensors(native, UNUSED if self.config.flash else ROUTER)
        if adapter is not None:
            self.adapter = Adapter(adapter)
            stored = {part: self._files.shapes[part] for parts in self._stored.values() for part in parts}
            stored |= {name: packed.shape for name, packed in self._packed.items()}
            self.adapter.fit(stored, renamed if native else lambda one: next(iter(unwrap([one])[0]), one))
        self._cut_tables()

    def _cut_tables(self) -> None:
        """Drop the padding rows of the vocabulary, so that no token without a meaning can be chosen."""
        said = self.config.language.get("vocab_size")
        tables = [name for name in self.shapes if name.startswith("language_model.") and name.endswith(TABLES)]
        rows = {self.shapes[name][0] for name in tables}
        if not isinstance(said, int) or len(rows) != 1 or (count := rows.pop()) <= said:
            return
        wanted = min(count, max(said, _highest_token(self.folder) + 1))
        if count - wanted >= MOST_PADDING:
            return
        self._cut = {*tables}
        for name in tables:
            self.shapes[name] = (wanted, *self.shapes[name][1:])
        if count > wanted:
            self.notes.append(f"dropped: rows {wanted} to {count - 1} of the vocabulary, which belong to no token")
        self.raw_config = self.raw_config | {"llm_config": self.raw_config["llm_config"] | {"vocab_size": wanted}}
        self.config = InternVLConfig.from_dict(self.raw_config)


class ContrastiveCheckpoint(StoredTensors):
    """A checkpoint of InternVL-C and -G, or of InternViT alone, whose tensor names get the prefix of chat models."""

    def __init__(self, folder: Path):
        raw = read_config(folder / CONFIG_FILE)
        self.kind = kind_of(raw)
        self.config: ContrastiveConfig | FeaturesConfig
        self.config = ContrastiveConfig.from_dict(raw) if self.kind == CONTRASTIVE else FeaturesConfig.from_dict(raw)
        super().__init__(folder, raw)
        self._name_tensors(native=False)
        if self.kind == FEATURES:
            self._stored = {VISION_PREFIX + name: parts for name, parts in self._stored.items()}
            self.shapes = {VISION_PREFIX + name: shape for name, shape in self.shapes.items()}
            self.dtypes = {VISION_PREFIX + name: dtype for name, dtype in self.dtypes.items()}


def _processor(folder: Path) -> dict[str, Any]:
    """The picture settings of a transformers-native checkpoint; empty if there are none."""
    old, new = folder / PREPROCESSOR_CONFIG_FILE, folder / "processor_config.json"  # new: transformers 5
    if old.exists():
        return read_config(old)
    return read_config(new).get("image_processor", {}) if new.exists() else {}


def _highest_token(folder: Path) -> int:
    """The highest token id in the tokenizer files of a checkpoint; -1 if they name none."""
    highest = -1
    for file, ids in (
        ("tokenizer.json", lambda raw: [*raw.get("model", {}).get("vocab", {}).values(), *(t["id"] for t in raw["added_tokens"])]),
        ("added_tokens.json", lambda raw: raw.values()),
        ("tokenizer_config.json", lambda raw: map(int, raw.get("added_tokens_decoder", {}))),
    ):
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            highest = max(highest, *ids(found), -1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # load_tokenizer reports a broken file
    return highest
