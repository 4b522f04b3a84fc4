"""The answers of a job: an append-only file of lines, and the ids in it, so that an interrupted job can resume.

Lines have the Batch API's form. Next to the file, NAME.job names its requests and its model, and is locked while a job runs. A
parquet file is written at the end, from a file of lines next to it. Knows no requests and no models.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from runtime.errors import OptionError, not_installed

FORMAT = 1
PARQUET = ".parquet"
ROWS_AT_ONCE = 1024  # of a parquet file
SEEN, ANSWERED, FAILED = 1, 2, 4  # marks of an id: it was in this run's requests; the file has its answer; the file has its error
FULLEST = 0.6  # load factor of the table of ids
AGAIN = "run the same command again, and the job resumes"


@dataclass(frozen=True)
class Answer:
    """One answer, or the reason why there is none."""

    number: int  # of its row, from 1
    id: str
    text: str = ""
    finish_reason: str = ""  # stop, length or tool_calls
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0  # frames too
    message: dict[str, Any] = field(default_factory=dict, repr=False)  # OpenAI's
    error: str = ""
    code: str = ""  # of the error

    def line(self, model: str, fingerprint: str) -> dict[str, Any]:
        """The answer's line in the Batch API's form."""
        name, failed = f"batch_req_{self.number}", {"code": self.code, "message": self.error}
        if self.error:
            return {"id": name, "custom_id": self.id, "response": None, "error": failed}
        body = {
            "id": f"chatcmpl-{self.number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            "choices": [{"index": 0, "message": self.message, "logprobs": None, "finish_reason": self.finish_reason}],
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
        }
        response = {"status_code": 200, "request_id": name, "body": body}
        return {"id": name, "custom_id": self.id, "response": response, "error": None}


class Ids:
    """Marks of ids, in 15 to 30 bytes each: a hash table of 64-bit hashes, without the ids themselves.

    With a million ids, two are confused in one of 40 million jobs.
    """

    def __init__(self) -> None:
        self._count, self._room = 0, 1 << 12
        self._hashes, self._marks = array("Q", bytes(8 * self._room)), bytearray(self._room)

    def mark(self, name: str, mark: int) -> int:
        """Add a mark to an id; returns the marks it had before."""
        place = self._place(int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little") or 1)
        had = self._marks[place]
        self._marks[place] = had | mark
        return had

    def _place(self, hashed: int) -> int:
        mask, place = self._room - 1, hashed & (self._room - 1)
        while self._hashes[place] != hashed:
            if not self._hashes[place]:
                if self._count >= FULLEST * self._room:
                    self._double()
                    return self._place(hashed)
                self._hashes[place] = hashed
                self._count += 1
                break
            place = (place + 1) & mask
        return place

    def _double(self) -> None:
        hashes, marks = self._hashes, self._marks
        self._count, self._room = 0, 2 * self._room
        self._hashes, self._marks = array("Q", bytes(8 * self._room)), bytearray(self._room)
        for hashed, mark in zip(hashes, marks, strict=True):
            if hashed:
                self._marks[self._place(hashed)] = mark


class AnswerFile:
    """A file of answers, open for one job. `about` identifies the job; its names appear in the error for another job's file.

    Raises OptionError for a file of another job, a file that another job is writing, or a place that is not writable.
    """

    def __init__(self, file: Path, about: Mapping[str, str], model: str, fingerprint: str, *, retry_failed: bool = False):
        self.file, self.answered, self.failed = file, 0, 0
        self._model, self._fingerprint = model, fingerprint
        self._lines = file.with_name(f"{file.name}.jsonl") if file.suffix.lower() == PARQUET else file
        self._ids = Ids()
        beside = file.with_name(f"{file.name}.job")
        try:
            self._job = open(beside, "a+", encoding="utf-8")  # noqa: SIM115 - open, and locked, until close()
        except OSError as error:
            raise OptionError(f"{file} cannot be written ({error.strerror}): name another file") from None
        try:
            _lock(self._job, file)
            self._check(beside, dict(about))
            if file != self._lines and file.exists() and not self._lines.exists():
                _write_lines(file, self._lines)
            self._mend()
            if retry_failed and self.failed:
                self._drop_failed()
            self._out = os.open(self._lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            self._job.close()
            raise OptionError(f"{self._lines} cannot be written ({error.strerror}): {AGAIN} once it can") from None
        except BaseException:
            self._job.close()
            raise
        self._size = os.fstat(self._out).st_size

    def _check(self, beside: Path, about: dict[str, str]) -> None:
        """Raise OptionError unless the file belongs to this job; a new file belongs to it from now on."""
        self._job.seek(0)
        told = self._job.read()
        try:
            known = json.loads(told) if told else {}
        except ValueError:  # the process ended while it wrote the file
            known = {}
        if not known:
            for file in (self.file, self._lines):
                if file.exists() and file.stat().st_size:
                    raise OptionError(f"{file} exists, and {beside.name} does not say which job wrote it: name another file")
            self._job.truncate(0)
            self._job.write(json.dumps({"format": FORMAT, **about}))
            self._job.flush()
            return
        for name, value in about.items():
            if known.get(name) != value:
                raise OptionError(
                    f"{self.file} has answers of another job: its {name} {_shown(known.get(name))}, here {_shown(value)}; "
                    "name another file"
                )

    def _mend(self) -> None:
        """Read the existing lines, and cut off an incomplete last line."""
        if not self._lines.exists():
            return
        whole = 0
        with open(self._lines, "r+b") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                name, error = _id_of(line, self._lines)
                self._note(name, failed=error is not None)
                whole += len(line)
            lines.truncate(whole)

    def _note(self, name: str, *, failed: bool) -> None:
        self._ids.mark(name, FAILED if failed else ANSWERED)
        self.failed += failed
        self.answered += not failed

    def _drop_failed(self) -> None:
        """Remove the lines of errors, all or none."""
        beside = self._lines.with_name(f".{self._lines.name}.part")
        self._ids, self.answered, self.failed = Ids(), 0, 0
        with open(self._lines, "rb") as lines, open(beside, "wb") as kept:
            for line in lines:
                name, error = _id_of(line, self._lines)
                if error is None:
                    kept.write(line)
                    self._note(name, failed=False)
        os.replace(beside, self._lines)

    def meets(self, name: str) -> int:
        """Mark an id of the requests as SEEN; returns its earlier marks, which include SEEN from the second time on."""
        return self._ids.mark(name, SEEN)

    def add(self, answer: Answer) -> bool:
        """Write an answer unless its id has a line; returns whether it was written. Raises OptionError if the disk is full."""
        if self._ids.mark(answer.id, 0) & (ANSWERED | FAILED):
            return False
        data = _written(answer.line(self._model, self._fingerprint))
        try:
            written = 0
            while written < len(data):
                written += os.write(self._out, data[written:])
        except OSError as error:
            os.ftruncate(self._out, self._size)
            raise OptionError(f"{self._lines} cannot be written ({error.strerror}): free some space; {AGAIN}") from None
        self._size += len(data)
        self._note(answer.id, failed=bool(answer.error))
        return True

    def finish(self) -> None:
        """Finish a job whose rows are all answered: write the parquet file, if it is one."""
        os.fsync(self._out)
        if self.file != self._lines:
            try:
                _write_parquet(self._lines, self.file)
            except OSError as error:
                raise OptionError(f"{self.file} cannot be written ({error}): free some space; {AGAIN}") from None
            self._lines.unlink()

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._out)
        self._job.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _written(line: dict[str, Any]) -> bytes:
    """A line as UTF-8; with a lone surrogate in it, as ASCII with escapes."""
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def _shown(value: Any) -> str:
    return "is none" if value in (None, "") else f"is {value}"


def _id_of(line: bytes, file: Path) -> tuple[str, Any]:
    """Id and error of a line. Raises OptionError."""
    try:
        read = json.loads(line)
        return read["custom_id"], read["error"]
    except (ValueError, KeyError, TypeError):
        raise OptionError(f"{file} has a line that is not an answer ({line[:60]!r}): name another file") from None


def _lock(job: Any, file: Path) -> None:
    """Lock a file until it is closed or the process ends in any way. Raises OptionError if another process holds the lock."""
    try:
        try:
            import fcntl

            fcntl.flock(job, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # Windows
            import msvcrt

            job.seek(1 << 30)  # past the text, so that the text stays readable
            msvcrt.locking(job.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        raise OptionError(f"another job writes to {file}: wait for it, or name another file") from None


def read_answers(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of answers. Raises OptionError for any other file."""
    if file.suffix.lower() == PARQUET:
        yield from _rows_of(file)
        return
    try:
        with open(file, "rb") as lines:
            for line in lines:
                _id_of(line, file)
                yield json.loads(line)
    except OSError as error:
        raise OptionError(f"{file} cannot be read ({error.strerror})") from None


def text_of(line: Mapping[str, Any]) -> str | None:
    """The text of an answer's line; None if the line has no answer."""
    if line.get("response") is None:
        return None
    return line["response"]["body"]["choices"][0]["message"].get("content") or ""


def check_parquet(file: Path) -> None:
    """Raise OptionError if a file is to be parquet and pyarrow is not installed."""
    if file.suffix.lower() == PARQUET:
        _library()


def _library() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise not_installed(error, "tables", "; it reads and writes parquet files") from None
    return parquet


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    parquet = _library()
    import pyarrow as arrow

    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=["id", "custom_id", "response", "error"]):
                for row in batch.to_pylist():
                    yield row | {name: None if row[name] is None else json.loads(row[name]) for name in ("response", "error")}
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise OptionError(f"{file} cannot be read as answers ({error})") from None


def _write_lines(file: Path, lines: Path) -> None:
    """Parquet -> lines, all or none."""
    beside = lines.with_name(f".{lines.name}.part")
    with open(beside, "wb") as out:
        for row in _rows_of(file):
            out.write(_written(row))
    os.replace(beside, lines)


def _write_parquet(lines: Path, file: Path) -> None:
    """Lines -> parquet, all or none: common fields as columns, response and error as JSON."""
    parquet = _library()
    import pyarrow as arrow

    texts = ("id", "custom_id", "answer", "finish_reason")
    counts = ("prompt_tokens", "completion_tokens")
    fields = [(name, arrow.string()) for name in texts] + [(name, arrow.int64()) for name in counts]
    schema = arrow.schema([*fields, ("response", arrow.string()), ("error", arrow.string())])
    beside = file.with_name(f".{file.name}.part")
    with parquet.ParquetWriter(beside, schema) as writer:
        rows: list[dict[str, Any]] = []
        for line in read_answers(lines):
            body = (line["response"] or {}).get("body") or {}
            told = {name: None if line[name] is None else json.dumps(line[name]) for name in ("response", "error")}
            reason = body["choices"][0]["finish_reason"] if body else None
            rows.append(line | told | {"answer": text_of(line), "finish_reason": reason} | body.get("usage", {}))
            if len(rows) == ROWS_AT_ONCE:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema))
    os.replace(beside, file)
