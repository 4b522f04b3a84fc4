"""python -m runtime batch FOLDER REQUESTS ANSWERS: answer thousands of questions in a job that can be resumed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.commands.chat import read_schema
from runtime.commands.options import BAR, add_flash, add_placement, open_model, show_line
from runtime.errors import OptionError
from runtime.job import CACHE_GB, DEFAULT_NEW_TOKENS

if TYPE_CHECKING:
    from runtime.job.run import Progress

SHOW_SECONDS = 0.2  # between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_placement(parser)
    add_flash(parser)
    parser.add_argument(
        "requests",
        metavar="REQUESTS",
        type=Path,
        help="JSON lines (the Batch API's, or id, image and question), a parquet or Arrow file, or a folder of pictures",
    )
    parser.add_argument(
        "answers", metavar="ANSWERS", type=Path, help="file to write or to resume: JSON lines, or parquet by its name"
    )
    parser.add_argument("--question", metavar="TEXT", default="", help="question of rows without one")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles a picture (default: the model's, often 12)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=DEFAULT_NEW_TOKENS, help="tokens of an answer (default: %(default)s)"
    )
    parser.add_argument("--schema", metavar="FILE", type=Path, help="JSON schema that every answer follows")
    parser.add_argument("--retry-failed", action="store_true", help="ask failed rows again")
    parser.add_argument("--strict", action="store_true", help="end at the first bad row")
    parser.add_argument("--cache-size", type=float, metavar="GB", default=CACHE_GB, help="KV cache (default: %(default)g)")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=1, help="processes, each with its own cores (default: %(default)s)"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", nargs="?", const="auto", help="use nodes of a Ray cluster (default of ADDRESS: the local one)"
    )


def run(folder: Path, requests: Path, answers: Path, question: str, retry_failed: bool, strict: bool, **options: Any) -> None:
    """Answer the rows that the file lacks, and print a summary as a line of JSON. Raises InternVLError kinds."""
    from runtime.job.answers import AnswerFile, check_parquet
    from runtime.job.ask import Asking
    from runtime.job.requests import Requests
    from runtime.job.run import about, run_job

    if options["cache_size"] <= 0:
        raise OptionError(f"cache size {options['cache_size']:g} is not positive")
    schema = None if options["schema"] is None else read_schema(options["schema"])
    asking = Asking(options["max_tiles"], options["max_new_tokens"], schema)
    source = Requests(requests, question)
    check_parquet(answers)
    of = about(folder, source, asking)
    model, _, fingerprint = of["model"].removesuffix(")").rpartition(" (")
    with AnswerFile(answers, of, model, fingerprint, retry_failed=retry_failed) as file:
        try:
            done = run_job(source, file, _answering(folder, asking, source, options), strict=strict, report=_shown())
        finally:
            show_line("")
    print(json.dumps({"answers": str(answers), **done.summary()}))


def _answering(folder: Path, asking: Any, source: Any, options: dict[str, Any]) -> Any:
    """The function that answers: in this process, in several, or on a cluster."""
    from runtime.job import ask, cluster, workers

    cache_bytes = int(options["cache_size"] * (1 << 30))
    if options["ray"] is None and options["workers"] == 1:
        return partial(ask.answers, open_model(folder, **options), asking, cache_bytes)
    from runtime.answer.model import OpenedModel

    placed = {name: options[name] for name in ("vision_device", "precision", "cache_dir", "flash")}
    opening = partial(OpenedModel, folder.resolve(), options["device"], **placed)
    if options["ray"] is not None:
        cluster.connect(options["ray"])  # before rows are read
        return partial(cluster.answers, options["ray"], opening, asking, cache_bytes, source)
    workers.shares_of_cores(options["workers"])  # too many are reported at once
    return partial(workers.answers, options["workers"], opening, asking, cache_bytes)


def _shown() -> Callable[[Progress], None]:
    """A callback for the progress of the job, which shows it as a line: a bar, failures, rates, the time left."""
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SHOW_SECONDS:
            return
        last = now
        new, seconds = progress.answered + progress.failed, progress.seconds
        filled = BAR * progress.done // max(1, progress.rows)
        line = f"answering [{'#' * filled}{'.' * (BAR - filled)}] {progress.done} of {progress.rows} rows"
        line += f", {progress.failed} failed" if progress.failed else ""
        if new:
            left = max(0, progress.rows - progress.done) * seconds / new
            line += f", {progress.pictures / seconds:.1f} pictures/s, {_time(left)} left"
        show_line(line + " ")

    return show


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
