"""How a command ends: quietly when its reader goes away, as shell tools do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

READER_GONE = 141  # what a shell says of a program that was ended by SIGPIPE


def ending_quietly(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A main() whose standard output may be closed by whoever reads it, like `head -1`."""

    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            code = main(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
            return READER_GONE

    return run
