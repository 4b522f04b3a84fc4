"""How long work is followed and ended: who hears of it, what stops it, a thread that holds up nobody.

Every room may report; none knows who listens.
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
INTERRUPTED = 130  # what a shell says of a program that was ended by Ctrl-C


class Cancelled(Exception):
    """Raised inside a running answer that is not wanted any more; never reaches the caller."""


def beside(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread that holds up neither Ctrl-C nor the end of the program."""
    done: Future[T] = Future()
    if not _at_work:
        atexit.unregister(_leave)
        atexit.register(_leave)
    _at_work.append(done)

    def run() -> None:
        try:
            found = work()
        except BaseException as error:  # carried to the thread that asks for the result
            _at_work.remove(done)
            done.set_exception(error)
        else:
            _at_work.remove(done)
            done.set_result(found)

    threading.Thread(target=run, daemon=True).start()
    return done


def _leave() -> None:
    """End without the libraries' own ends where one of them is at work still, which would crash: only Ctrl-C comes here so."""
    if _at_work:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
