"""The index of a picture collection: unit vectors and paths in one .npz file, and the journal that it is built from.

The file, readable with numpy.load alone: `vectors` (N, E) float32 of length 1, `paths` (N) absolute, and `about`, JSON text with
`format` (1), `model` (the model folder), `fingerprint` (of its weights), `mode`, and `skipped` (paths, and why they were not read).
While pictures are read, the vectors are in a journal beside it, NAME.npz.journal/: a process that is killed, even by kill -9,
loses at most its last batch, and the next one resumes after it. Knows vectors, not how they are made.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path

import numpy as np

from runtime.errors import OptionError
from runtime.folder.files import PART_FILES, PARTS_OF, kind_of_folder

FORMAT = 1
ROWS_AT_ONCE = 1 << 16  # of vectors in one matrix product
VECTORS_FILE, LINES_FILE, ABOUT_FILE = "vectors.f32", "lines.jsonl", "about.json"


@dataclass(frozen=True)
class About:
    """The origin of vectors: model folder, fingerprint of its weights, mode."""

    model: str
    fingerprint: str
    mode: str

    def check(self, other: About, name: str) -> None:
        """Raise OptionError unless the vectors of `name`, which `other` describes, can be compared with these."""
        if (self.fingerprint, self.mode) != (other.fingerprint, other.mode):
            raise OptionError(
                f"{name} has vectors of {other.model} ({other.mode}), not of {self.model} ({self.mode}): "
                "they cannot be compared; write another index"
            )


@dataclass(frozen=True)
class Index:
    """Vectors (N, E) of length 1 and the paths (N) of their pictures."""

    about: About
    vectors: np.ndarray = field(repr=False)
    paths: list[str] = field(repr=False)
    skipped: dict[str, str] = field(default_factory=dict, repr=False)  # path -> why it could not be read

    @classmethod
    def read(cls, file: Path) -> Index:
        """Read an index. Raises OptionError for any other file."""
        if file.is_dir():
            raise OptionError(
                f"{file} is a folder, not an index: python -m runtime embed FOLDER PICTURES --out {file.name}.npz writes one"
            )
        try:
            with np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                vectors, paths = stored["vectors"], stored["paths"].tolist()
        except FileNotFoundError:
            unfinished = (
                ": python -m runtime embed, which was ended, goes on when it is asked again" if _journal(file).exists() else ""
            )
            raise OptionError(f"{file} does not exist{unfinished}") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise OptionError(f"{file} is not an index ({error}): python -m runtime embed writes one") from None
        if about.get("format") != FORMAT or vectors.ndim != 2 or len(vectors) != len(paths):
            raise OptionError(f"{file} is not an index of this version: write it again with python -m runtime embed")
        return cls(About(about["model"], about["fingerprint"], about["mode"]), vectors, paths, about.get("skipped", {}))

    def write(self, file: Path) -> None:
        """Write the index, whole or not at all. Raises OptionError when it cannot be written."""
        about = {"format": FORMAT, **vars(self.about), "skipped": self.skipped}
        beside = file.with_name(f".{file.name}.part")
        try:
            with open(beside, "wb") as out:
                np.savez(out, vectors=self.vectors, paths=np.array(self.paths, dtype=str), about=np.array(json.dumps(about)))
            os.replace(beside, file)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OptionError(f"{file} cannot be written ({error.strerror}): choose another --out") from None

    def nearest(self, query: np.ndarray, count: int) -> list[tuple[float, str]]:
        """Cosine and path of the pictures nearest to a unit vector (E), best first."""
        scores = np.concatenate([self.vectors[at : at + ROWS_AT_ONCE] @ query for at in range(0, len(self.vectors), ROWS_AT_ONCE)])
        best = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        return [(float(scores[place]), self.paths[place]) for place in best]


class Journal:
    """An index under construction: rows are added in batches, and survive the end of the process.

    Vectors are written before the lines that name them; opening it removes rows without a line, and incomplete lines.
    Raises OptionError for a journal or an index of another model, or a place that cannot be written.
    """

    def __init__(self, file: Path, about: About, width: int):
        self.file, self.about, self._width = file, about, width
        self._folder = _journal(file)
        self.done: set[str] = set()  # paths, unreadable ones included
        self.skipped: dict[str, str] = {}
        self.paths: list[str] = []
        self._kept = Index.read(file) if file.exists() else None
        if self._kept is not None:
            about.check(self._kept.about, str(file))
            self.done |= {*self._kept.paths, *self._kept.skipped}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise OptionError(f"{self._folder} cannot be written ({error.strerror}): choose another --out") from None

    def _open(self) -> None:
        named = self._folder / ABOUT_FILE
        if named.exists() and named.read_text(encoding="utf-8"):
            self.about.check(About(**json.loads(named.read_text(encoding="utf-8"))), str(self._folder))
        else:
            named.write_text(json.dumps(vars(self.about)), encoding="utf-8")
        self._lines = open(self._folder / LINES_FILE, "a+b")  # noqa: SIM115 - open until finish()
        self._vectors = open(self._folder / VECTORS_FILE, "a+b")  # noqa: SIM115
        whole = 0
        self._lines.seek(0)
        self._vectors.seek(0, os.SEEK_END)
        rows = self._vectors.tell() // (4 * self._width)
        for line in self._lines:
            if not line.endswith(b"\n"):
                break
            read = json.loads(line)
            if "error" not in read and len(self.paths) == rows:  # its vector did not reach the disk
                break
            whole += len(line)
            self._note(read)
        self._lines.truncate(whole)
        self._vectors.truncate(4 * self._width * len(self.paths))

    def _note(self, read: dict[str, str]) -> None:
        self.done.add(read["path"])
        if "error" in read:
            self.skipped[read["path"]] = read["error"]
        else:
            self.paths.append(read["path"])

    def add(self, paths: Sequence[str], vectors: np.ndarray, skipped: dict[str, str]) -> None:
        """Add rows (n, E) of pictures, and pictures that could not be read."""
        self._vectors.write(np.ascontiguousarray(vectors, np.float32).tobytes())
        self._vectors.flush()
        lines = [{"path": path} for path in paths] + [{"path": path, "error": why} for path, why in skipped.items()]
        self._lines.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._lines.flush()
        for line in lines:
            self._note(line)

    def finish(self) -> Index:
        """Write the index of all rows, earlier ones included, and delete the journal."""
        for file in (self._lines, self._vectors):
            file.close()
        vectors = np.fromfile(self._folder / VECTORS_FILE, np.float32).reshape(-1, self._width)
        kept = self._kept
        made = Index(
            self.about,
            vectors if kept is None else np.concatenate([kept.vectors, vectors]),
            self.paths if kept is None else [*kept.paths, *self.paths],
            self.skipped if kept is None else kept.skipped | self.skipped,
        )
        made.write(self.file)
        shutil.rmtree(self._folder)
        return made


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of a model folder's weights: a hash of the sizes and of the first and last 64 KiB of its parts."""
    told = sha1(usedforsecurity=False)
    for part in PARTS_OF[kind_of_folder(folder)]:
        weights = (folder / PART_FILES[part]).with_suffix(".bin")
        with open(weights, "rb") as file:
            told.update(f"{part} {weights.stat().st_size}".encode() + file.read(1 << 16))
            file.seek(-min(1 << 16, weights.stat().st_size), os.SEEK_END)
            told.update(file.read())
    return told.hexdigest()[:16]


def find_pictures(given: Sequence[Path], kinds: frozenset[str]) -> Iterator[Path]:
    """The picture files among files and folders, in order; folders are searched with all below, named files are always taken."""
    for path in given:
        if not path.is_dir():
            yield path
            continue
        for root, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            yield from (Path(root, name) for name in sorted(files) if Path(name).suffix.lower() in kinds and name[0] != ".")


def _journal(file: Path) -> Path:
    return file.with_name(f"{file.name}.journal")
