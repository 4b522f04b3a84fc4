"""python -m runtime {chat,batch,benchmark,serve,tune,info} FOLDER: ask a model folder, measure, serve, tune it, see what it holds;
python -m runtime {embed,classify,caption} FOLDER PICTURES, search INDEX: compare pictures and texts (InternVL-C and -G);
python -m runtime score ANSWERS: how right answers are; doctor: what this machine has, and what is missing.

Chooses the command; what each does is in runtime/commands.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from runtime import __version__
from runtime.commands import batch, benchmark, caption, chat, classify, doctor, embed, info, score, search, serve, tune
from runtime.errors import InternVLError
from runtime.terminal import CommandParser, ending_quietly

COMMANDS = {
    "chat": (chat, "answer one question, or chat when there is none"),
    "batch": (batch, "answer a file of requests or a folder of pictures, in a job that resumes"),
    "score": (score, "score the answers of batch, by the usual metrics"),
    "benchmark": (benchmark, "measure first token, speed and memory"),
    "serve": (serve, "start an OpenAI-compatible server"),
    "tune": (tune, "find the fastest settings of this machine and keep them in the folder"),
    "info": (info, "show what a model folder holds"),
    "embed": (embed, "write an index of pictures (InternVL-C and -G)"),
    "search": (search, "find the pictures of an index that are nearest to words or to a picture"),
    "classify": (classify, "choose a picture's label without training, or evaluate that"),
    "caption": (caption, "write a line about a picture"),
    "doctor": (doctor, "show what this machine has, what is missing and how to install it"),
}


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="python -m runtime", description="Ask a model folder that python -m convert wrote.")
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (command, described) in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=described))
    return p


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags in pictures that can still be read
    try:
        COMMANDS[options.pop("command")][0].run(**options)
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def chat_main() -> int:
    """`internvl-chat ...` is `python -m runtime chat ...`."""
    return main(sys.argv[1:] if sys.argv[1:] == ["--version"] else ["chat", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
