"""python -m pytest tests/runtime/commands/test_broken_text.py

Bytes that are no text, on the command line and typed into the terminal: one line, or a replacement, and never a traceback.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.__main__ import main

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("place", ["question", "--system", "--answer-prefix"])
def test_an_argument_that_is_no_text_is_one_line(shapes, capsys, place):
    arguments = ["\udcff?"] if place == "question" else ["What?", place, "\udcff"]
    assert main(["chat", str(shapes), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert "lone surrogate U+DCFF" in said


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape"])
def test_what_is_typed_and_no_text_is_replaced_and_the_conversation_goes_on(shapes, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "chat", str(shapes), "--max-new-tokens", "2"],
        input=b"\xff How many?\nWhich shape?\n/quit\n",
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        timeout=120,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert said.count("first token after") == 2
