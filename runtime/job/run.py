"""A job from its requests to its file of answers: what is left of it is asked, however and wherever, and kept.

Also `batch`, the same from Python, without a file. Knows rows and answers; how rows are answered is ask.py's, or that of the
processes of workers.py and cluster.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha1
from pathlib import Path
from typing import Any

from runtime.contrast.index import fingerprint_of
from runtime.errors import OptionError
from runtime.folder.files import check_folder
from runtime.job.answers import ANSWERED, FAILED, SEEN, Answer, AnswerFile
from runtime.job.requests import Requests, Row

DEFAULT_NEW_TOKENS = 512  # of an answer
CACHE_GB = 2  # of keys and values of the rows that are being answered

AnswerRows = Callable[[Iterator[Row]], Iterator[Answer]]


@dataclass
class Progress:
    """How far a job is."""

    rows: int  # in all
    before: int = 0  # rows that had an answer, or an error, when it began
    answered: int = 0
    failed: int = 0
    pictures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    @property
    def done(self) -> int:
        """Rows with an answer or an error."""
        return self.before + self.answered + self.failed

    def note(self, answer: Answer) -> None:
        """One more."""
        self.answered += not answer.error
        self.failed += bool(answer.error)
        self.pictures += answer.pictures
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    def summary(self) -> dict[str, Any]:
        """In figures."""
        seconds = self.seconds
        told = {name: value for name, value in asdict(self).items() if name != "started"}
        rates = {"rows_a_second": (self.answered + self.failed) / seconds, "pictures_a_second": self.pictures / seconds}
        return told | {"seconds": seconds} | rates


def about(folder: Path, requests: Requests, asking: Any) -> dict[str, str]:
    """What a file of answers is of, by names that are told where another job wants to write to it. Raises ModelFolderError."""
    check_folder(folder)
    schema = "" if asking.schema is None else sha1(asking.schema.encode(), usedforsecurity=False).hexdigest()[:16]
    return {
        "request file": f"{requests.source.name} ({requests.fingerprint})",
        "model": f"{folder.resolve().name} ({fingerprint_of(folder)})",
        "question": requests.question,
        "max tiles": str(asking.max_tiles or ""),
        "max new tokens": str(asking.max_new_tokens),
        "schema": schema,
    }


def left_of(requests: Iterable[Row], file: AnswerFile) -> Iterator[Row]:
    """The rows that the file holds nothing of; one whose id came before is broken."""
    for row in requests:
        marks = file.meets(row.id)
        if marks & SEEN:
            row = Row.broken(row.number, f"the id {row.id!r} came before: an id is of one row")
            marks = file.meets(row.id)
        if not marks & (ANSWERED | FAILED):
            yield row


def run_job(
    requests: Requests, file: AnswerFile, answer: AnswerRows, *, strict: bool = False, report: Callable[[Progress], None]
) -> Progress:
    """Answer what is left, and write it as it comes. Raises OptionError for a full disk, and with `strict` at the first bad row."""
    progress = Progress(requests.count(), file.answered + file.failed)
    report(progress)
    with closing(answer(left_of(requests, file))) as found:  # type: ignore[type-var]
        for one in found:
            if strict and one.error:
                raise OptionError(f"row {one.id}: {one.error} (--strict)")
            if file.add(one):
                progress.note(one)
                report(progress)
    file.finish()
    progress.rows = progress.done  # without blank lines
    return progress


def batch(
    folder: str | Path,
    rows: Iterable[Any],
    *,
    question: str = "",
    max_tiles: int | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    schema: str | None = None,
    cache_size: float = CACHE_GB,
    **placed: Any,
) -> Iterator[Answer]:
    """The answers to rows, in the order in which they are over; `id` says to which row one belongs, `error` why there is none.

    `folder` is a model folder, or an OpenedModel that is asked again and again. Rows have the forms of Requests, read as a
    stream; pictures may be PIL's too, and a row that is no object is a picture. A row without an id has its place, from 1, as a
    text. `schema` is a JSON schema as text; `placed` is what OpenedModel takes. Raises InternVLError kinds for what concerns all.
    """
    from runtime.answer.model import OpenedModel
    from runtime.job.ask import Asking, answers

    asking = Asking(max_tiles, max_new_tokens, schema)
    model = folder if isinstance(folder, OpenedModel) else OpenedModel(folder, **placed)
    return answers(model, asking, int(cache_size * (1 << 30)), _numbered(rows, question))


def _numbered(rows: Iterable[Any], question: str) -> Iterator[Row]:
    seen: set[str] = set()
    for number, given in enumerate(rows, 1):
        row = Row.of(number, given if isinstance(given, dict) else {"image": given}, question)
        yield replace(row, error=f"the id {row.id!r} came before") if row.id in seen else row
        seen.add(row.id)
