"""docs/options.md: what --help of every command prints.

python -m tests.options_page > docs/options.md
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import convert.__main__
import demo.__main__
import runtime.__main__

COLUMNS = "120"
START = """# Which options are there?

What `--help` prints. The pages on [converting](convert.md), [asking](terminal.md) and [serving](serving.md) say when to change a
default.
"""


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The name of every command, and its parser."""
    yield "convert", convert.__main__.parser()
    (choice,) = (action for action in runtime.__main__.parser()._actions if isinstance(action, argparse._SubParsersAction))
    yield from choice.choices.items()
    yield "demo", demo.__main__.parser()


def page() -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS  # argparse asks for it
    try:
        helps = [f"\n## {name}\n\n```\n{parser.format_help().rstrip()}\n```\n" for name, parser in commands()]
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return START + "".join(helps)


if __name__ == "__main__":
    print(page(), end="")
