"""How a command parses its arguments, and how it ends: quietly when its output is closed, as shell tools do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

READER_GONE = 141  # exit code of a program that SIGPIPE ended, as shells report it


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the option that was meant.

    Options may stand between positional arguments: `chat FOLDER --image X QUESTION`. Plain argparse decides that there is no
    QUESTION once it meets --image.
    """

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside or self._subparsers:  # parse_known_intermixed_args calls this twice: for options, then for the rest
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
        if unknown:
            self.error(self._what_is_wrong(unknown[0]))
        return found, unknown

    def _what_is_wrong(self, unknown: str) -> str:
        if not unknown.startswith("-"):
            return f"unexpected argument {unknown!r}: put a text of several words in quotes"
        option = unknown.partition("=")[0]
        near = get_close_matches(option, self._option_string_actions, n=1)
        return f"there is no option {option}" + (f": did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def ending_quietly(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wrap a main() whose reader may close standard output early, like `head -1`."""

    def run(arguments: Sequence[str] | None = None) -> int:
        try:
            code = main(arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
            return READER_GONE

    return run
