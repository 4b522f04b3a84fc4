"""How a command reads its line, and how it ends: quietly when its reader goes away, as shell tools do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

READER_GONE = 141  # what a shell says of a program that was ended by SIGPIPE


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name the option that was meant.

    It takes options between words that stand alone too: `chat FOLDER --image X QUESTION`. argparse, left to itself, has decided
    that there is no QUESTION once it meets --image.
    """

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside or self._subparsers:  # parse_known_intermixed_args comes back here, once for options and once for the rest
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
            return f"{unknown!r} is one too many: a text of several words stands in quotes"
        option = unknown.partition("=")[0]
        near = get_close_matches(option, self._option_string_actions, n=1)
        return f"there is no option {option}" + (f": {near[0]} is meant?" if near else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists what there is)\n")


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
