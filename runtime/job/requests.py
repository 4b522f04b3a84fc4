"""The requests of a job, row by row: from JSON lines, a folder of pictures, a parquet or Arrow file, or Python.

Reads a row and checks its form; opens no pictures and knows no models. Form of JSON lines:
the Batch API's, https://platform.openai.com/docs/guides/batch, or {"id", "image" or "images" or "video", "question"}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any

from runtime.errors import OptionError, not_installed

TABLES = (".parquet", ".arrow", ".feather")
ROWS_AT_ONCE = 256  # of a table
BLOCK = 1 << 20  # bytes that are read at once to count lines
ENDS = 1 << 16  # bytes at both ends of a file that go into its fingerprint
URL = "/v1/chat/completions"


@dataclass(frozen=True)
class Row:
    """One request: its number, from 1, its id, and the question; or an error.

    `body` is a chat completion's; without one, `question` is about `images` (as runtime.media.document.open_pictures takes them)
    or `video`. Relative paths are below `base`.
    """

    number: int
    id: str
    question: str = ""
    images: tuple[Any, ...] = ()
    video: str | None = None
    body: dict[str, Any] | None = field(default=None, repr=False)
    base: str = ""
    error: str = ""

    @classmethod
    def of(cls, number: int, given: Any, question: str = "", base: str = "") -> Row:
        """A row of either form; a row without an id gets its number as id, a row without a question gets `question`."""
        if not isinstance(given, Mapping):
            return cls.broken(number, f"a request is a JSON object, this is {json.dumps(given, default=str)[:60]}")
        name = next((given[key] for key in ("custom_id", "id", "question_id") if given.get(key) is not None), number)
        if not isinstance(name, str | int):
            return cls.broken(number, f"the id is a {type(name).__name__}, expected a text")
        try:
            if "body" in given:
                return cls(number, str(name), body=_checked_body(given), base=base)
            asked = question if given.get("question") is None else given["question"]
            if not isinstance(asked, str) or not asked:
                raise ValueError("there is no question: give the row one, or all rows with --question")
            return cls(number, str(name), asked, *_media(given), base=base)
        except ValueError as error:
            return cls(number, str(name), error=str(error))

    @classmethod
    def broken(cls, number: int, error: str) -> Row:
        """A row with an error and without an id of its own."""
        return cls(number, f"#{number}", error=error)


def _checked_body(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("method", "POST") != "POST" or given.get("url", URL) != URL:
        raise ValueError(f"{given.get('method', 'POST')} {given.get('url', URL)} is not supported: use POST {URL}")
    if not isinstance(given["body"], dict):
        raise ValueError("the body is not an object: give that of a chat completion")
    return given["body"]


def _media(given: Mapping[str, Any]) -> tuple[tuple[Any, ...], str | None]:
    """Pictures and video of a row of the short form. Raises ValueError."""
    several = given.get("images") if given.get("images") is not None else given.get("image")
    listed = several if isinstance(several, list | tuple) else [] if several is None else [several]
    images = tuple(map(_plain, listed))
    video = given.get("video")
    if video is not None and not isinstance(video, str | os.PathLike):
        raise ValueError(f"the video is a {type(video).__name__}, expected a path")
    return images, None if video is None else str(video)


def _plain(image: Any) -> Any:
    """A picture as it is; from a {"bytes", "path"} of the datasets library, the one that is set."""
    if isinstance(image, Mapping):
        image = next((image[key] for key in ("bytes", "path", "url") if image.get(key) is not None), None)
    if image is None or isinstance(image, int | float):
        raise ValueError("a picture is neither a path, an address nor bytes")
    return image


class Requests:
    """A source of rows; every iteration starts at its beginning."""

    def __init__(self, source: Path, question: str = ""):
        """Raises OptionError for a source that does not exist or lacks questions."""
        self.source, self.question = source, question
        if source.is_dir() and not question:
            raise OptionError(f'{source} is a folder: say what to ask about its pictures with --question "..."')
        if not source.exists():
            raise OptionError(f"{source} does not exist: give JSON lines, a parquet or Arrow file, or a folder of pictures")
        if source.is_file() and source.suffix.lower() in TABLES:
            self._columns()

    @property
    def fingerprint(self) -> str:
        """What identifies the requests: a hash of a file's size and ends, or a folder's path."""
        if self.source.is_dir():
            return str(self.source.resolve())
        told = sha1(usedforsecurity=False)
        with open(self.source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            told.update(f"{size} ".encode() + file.read(ENDS))
            file.seek(-min(ENDS, size), os.SEEK_END)
            told.update(file.read())
        return told.hexdigest()[:16]

    def count(self) -> int:
        """How many rows there are, blank lines included."""
        if self.source.is_dir():
            return sum(1 for _ in self._pictures())
        if self.source.suffix.lower() in TABLES:
            return sum(batch.num_rows for batch in record_batches(self.source, []))
        count, last = 0, b"\n"
        with open(self.source, "rb") as file:
            while block := file.read(BLOCK):
                count, last = count + block.count(b"\n"), block
        return count + (not last.endswith(b"\n"))

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, read as a stream."""
        if self.source.is_dir():
            for number, path in enumerate(self._pictures(), 1):
                yield Row(number, path.relative_to(self.source).as_posix(), self.question, (str(path.resolve()),))
            return
        base = str(self.source.resolve().parent)
        given = self._table() if self.source.suffix.lower() in TABLES else self._lines()
        for number, one in given:
            yield one if isinstance(one, Row) else Row.of(number, one, self.question, base)

    def _pictures(self) -> Iterator[Path]:
        from runtime.contrast.embed import picture_kinds
        from runtime.contrast.index import find_pictures

        return find_pictures([self.source], picture_kinds())

    def _lines(self) -> Iterator[tuple[int, Any]]:
        with open(self.source, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, Row.broken(number, f"line {number} is not JSON ({error})")

    def _columns(self) -> list[str]:
        known = ("custom_id", "id", "question_id", "image", "images", "video", "question")
        names = self._schema().names
        found = [name for name in known if name in names]
        if not {"image", "images", "video", "question"} & {*found}:
            raise OptionError(
                f"{self.source} has the columns {', '.join(names)[:200]}: name them id, image (or images, video) and question"
            )
        return found

    def _schema(self) -> Any:
        return next(iter(record_batches(self.source))).schema

    def _table(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number, columns = 0, self._columns()
        for batch in record_batches(self.source, columns):
            for row in batch.select(columns).to_pylist():
                number += 1
                yield number, row


def record_batches(file: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """Record batches of a table, an empty one if it has no rows. Raises OptionError for any other file, or without pyarrow."""
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise not_installed(error, "tables", "; it reads parquet and Arrow files") from None
    empty = True
    try:
        if file.suffix.lower() == ".parquet":
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                    empty = False
                    yield batch
                if empty:
                    yield arrow.RecordBatch.from_pylist([], table.schema_arrow)
            return
        with arrow.memory_map(str(file)) as mapped:
            try:
                opened = ipc.open_file(mapped)
                batches: Iterable[Any] = map(opened.get_batch, range(opened.num_record_batches))
            except arrow.ArrowInvalid:  # the datasets library writes streams
                mapped.seek(0)
                batches = opened = ipc.open_stream(mapped)
            for batch in batches:
                empty = False
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE)
            if empty:
                yield arrow.RecordBatch.from_pylist([], opened.schema)
    except (arrow.ArrowException, OSError) as error:
        raise OptionError(f"{file} cannot be read as a table ({error})") from None
