"""A job from its requests to its file of answers: asks the remaining rows and stores their answers.

Also `batch`, the same from Python, without a file. Knows rows and answers; ask.py answers rows, in this process or in those of
workers.py and cluster.py.
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
from runtime.job import CACHE_GB, DEFAULT_NEW_TOKENS
from runtime.job.answers import ANSWERED, FAILED, SEEN, Answer, AnswerFile
from runtime.job.requests import Requests, Row

AnswerRows = Callable[[Iterator[Row]], Iterator[Answer]]


@dataclass
class Progress:
    """The progress of a job."""

    rows: int  # in all
    before: int = 0  # rows that had an answer or an error when the job began
    answered: int = 0
    failed: int = 0
    pictures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self.started

    @property
    def done(self) -> int:
        """Rows with an answer or an error."""
        return self.before + self.answered + self.failed

    def note(self, answer: Answer) -> None:
        """Count one more answer."""
        self.answered += not answer.error
        self.failed += bool(answer.error)
        self.pictures += answer.pictures
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    def summary(self) -> dict[str, Any]:
        """The figures of the job, with rates."""
        seconds = self.seconds
        told = {name: value for name, value in asdict(self).items() if name != "started"}
        rates = {"rows_a_second": (self.answered + self.failed) / seconds, "pictures_a_second": self.pictures / seconds}
        return told | {"seconds": seconds} | rates


def about(folder: Path, requests: Requests, asking: Any) -> dict[str, str]:
    """What identifies a job, by names that appear in AnswerFile's error for another job's file. Raises ModelFolderError."""
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
    """The rows without a line in the file; a row with a repeated id becomes an error."""
    for row in requests:
        marks = file.meets(row.id)
        if marks & SEEN:
            row = Row.broken(row.number, f"the id {row.id!r} is used twice: give every row its own")
            marks = file.meets(row.id)
        if not marks & (ANSWERED | FAILED):
            yield row


def run_job(
    requests: Requests, file: AnswerFile, answer: AnswerRows, *, strict: bool = False, report: Callable[[Progress], None]
) -> Progress:
    """Answer the remaining rows and write each answer at once. Raises OptionError for a full disk; with `strict`, for an error."""
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
    """The answers to rows, in the order in which they finish; `id` names an answer's row, `error` says why there is none.

    `folder` is a model folder, or an OpenedModel to reuse. Rows have the forms of Requests, read as a stream; pictures may be
    PIL's too, and a row that is no dict is a picture. A row without an id gets its number, from 1, as text. `schema` is a JSON
    schema as text; `placed` are arguments of OpenedModel. Raises InternVLError for mistakes that concern all rows.
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
        yield replace(row, error=f"the id {row.id!r} is used twice") if row.id in seen else row
        seen.add(row.id)
