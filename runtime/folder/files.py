"""The file names of a model folder, and how a folder is written: whole or not at all.

Files are written to a hidden folder beside the final one, which is renamed at the end. Knows the names of the files, not what
the models in them compute. Names: huggingface/optimum-intel@e1de5bee optimum/intel/openvino/utils.py
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import CheckpointError, ModelFolderError
from runtime.folder.config import read_config
from runtime.folder.contrastive import ANSWERS, CHAT, CONTRASTIVE, FEATURES, kind_of

if TYPE_CHECKING:
    import openvino as ov

    from runtime.folder.config import InternVLConfig

PART_FILES = {
    "text_embeddings": "openvino_text_embeddings_model.xml",
    "vision": "openvino_vision_embeddings_model.xml",
    "language": "openvino_language_model.xml",
    "router": "openvino_router_model.xml",  # of InternVL3.5-Flash
    "qllama": "openvino_qllama_model.xml",
    "query_pool": "openvino_query_pool_model.xml",
}
PARTS = ("text_embeddings", "vision", "language")  # of a chat model
PARTS_OF = {CHAT: PARTS, CONTRASTIVE: ("text_embeddings", "vision", "qllama", "query_pool"), FEATURES: ("vision",)}
TOKENIZER_FILE = "openvino_tokenizer.xml"
SENTENCEPIECE_FILE = "tokenizer.model"  # of InternVL-C and -G
DETOKENIZER_FILE = "openvino_detokenizer.xml"
CONFIG_FILE = "config.json"
TOKENIZER_JSON_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
PREPROCESSOR_CONFIG_FILE = "preprocessor_config.json"
TUNED_FILE = "tuned.json"  # what python -m runtime tune found, by device
QUALITY_FILE = "quality.json"  # its loss against the checkpoint, as --verify measured it
OVERFLOWS_FILE = "overflows.json"  # which parts a device cannot compute in float16
DECODE_FILE = "tuned_decode.xml"  # a language part for decode, where tune found it worth its memory


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name on the hub
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")  # of a checkpoint


def user_cache() -> Path:
    """The folder for models that have no other place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-openvino"


def parts_of(config: InternVLConfig) -> tuple[str, ...]:
    """The parts of a model folder, in the order of their conversion."""
    return PARTS if config.flash is None else ("text_embeddings", "vision", "router", "language")


def bytes_of(folder: Path, part: str) -> int:
    """Size of a part's two files (.xml and .bin) in bytes."""
    xml = folder / PART_FILES[part]
    return xml.stat().st_size + xml.with_suffix(".bin").stat().st_size


def kind_of_folder(folder: Path) -> str:
    """Which kind of model a folder's config.json describes; chat where it cannot be read."""
    try:
        return kind_of(read_config(folder / CONFIG_FILE))
    except CheckpointError:
        return CHAT


def check_folder(folder: Path, kind: str = CHAT) -> None:
    """Raise ModelFolderError unless `folder` is of this kind and has all of its parts; for a checkpoint, say how to convert it."""
    found = kind_of_folder(folder)
    missing = [name for name in [*(PART_FILES[part] for part in PARTS_OF[found]), CONFIG_FILE] if not (folder / name).exists()]
    if not missing and found != kind:
        raise ModelFolderError(f"{folder} holds {ANSWERS[found]}; this needs {ANSWERS[kind]}: give a folder of that kind")
    if not missing:
        return
    hub_id = not folder.exists() and not folder.parent.exists() and HUB_ID.fullmatch(folder.as_posix())
    if hub_id or any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern)):
        where = " on the hub" if hub_id else ""
        ask = "" if kind != CHAT else f"  and ask what that writes:  python -m runtime chat {folder.resolve().name}-int4"
        raise ModelFolderError(f"{folder} is a PyTorch checkpoint{where}: convert it first with  python -m convert {folder}{ask}")
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} does not exist: give a model folder, as python -m convert writes it")
    raise ModelFolderError(f"{folder} is an incomplete model folder without {', '.join(missing)}: convert the checkpoint again")


def check_target(folder: Path, *, force: bool) -> None:
    """Raise ModelFolderError for a target that exists (unless `force`), or that is not a model folder to replace."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise ModelFolderError(f"{folder} exists already: choose another output folder, or replace it with --force")
    if not folder.is_dir() or folder.is_symlink():
        raise ModelFolderError(f"{folder} is not a folder: --force replaces model folders only")
    if any(folder.iterdir()) and not any((folder / PART_FILES[part]).exists() for part in ("language", "vision")):
        raise ModelFolderError(
            f"{folder} holds no {PART_FILES['language']}, so it is not a model folder: --force will not delete it; "
            "choose another output folder"
        )


@contextmanager
def new_folder(final: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write to; move it to `final` when the block ends well, remove it when it does not.

    With `force`, an existing model folder at `final` is replaced only after the new one is whole. Raises ModelFolderError when
    the target is taken or cannot be written, or when the disk is full.
    """
    check_target(final, force=force)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    except OSError as error:
        raise ModelFolderError(f"{final.parent} cannot be written ({error.strerror}): choose another output folder") from None
    try:
        yield work
        work.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would lock other users out of the finished folder
        check_target(final, force=force)  # another program may have made it meanwhile
        _move(work, final)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ModelFolderError(
            f"{final} cannot be written, its disk is full ({error}): free some or choose another folder"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise ModelFolderError when the disk of `folder` (which need not exist yet) has less than `needed` bytes free."""
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ModelFolderError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB are needed: "
            "free some space or choose another output folder"
        )


def save_model(model: ov.Model, path: Path) -> None:
    """Write an OpenVINO model as it is; raises OSError when the write fails, as Python's own writes do."""
    import openvino as ov

    try:
        ov.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        if "iostream" not in str(error):  # OpenVINO says no more when a write fails
            raise
        raise OSError(errno.ENOSPC, "the write failed", str(path)) from None


def _move(work: Path, final: Path) -> None:
    if not final.exists():
        work.rename(final)
        return
    aside = work.with_name(work.name + ".old")
    final.rename(aside)
    work.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
