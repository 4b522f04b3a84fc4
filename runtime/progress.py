"""Progress reports, cancellation, and background threads that do not keep the program alive.

Every room may report progress; none knows who listens.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Progress = Callable[[str, int, int], None]  # stage, done, total; stages are parts, frames, tiles and prefill
T = TypeVar("T")
_at_work: list[Future[Any]] = []
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells report it


class Cancelled(Exception):
    """Raised inside an answer that was cancelled; never reaches the caller."""


def beside(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread that delays neither Ctrl-C nor the end of the program."""
    done: Future[T] = Future()
    if not _at_work:
        atexit.unregister(_leave)
        atexit.register(_leave)
    _at_work.append(done)

    def run() -> None:
        try:
            found = work()
        except BaseException as error:  # re-raised in the thread that asks for the result
            _at_work.remove(done)
            done.set_exception(error)
        else:
            _at_work.remove(done)
            done.set_result(found)

    threading.Thread(target=run, daemon=True).start()
    return done


def _leave() -> None:
    """Skip the libraries' exit handlers while one of them still works, since they would crash: only Ctrl-C gets here so."""
    if _at_work:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
