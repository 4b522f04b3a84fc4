"""What tests ask of a server in a process of its own, as it is started on a command line: its address, its memory, its worker."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    address: str
    process: psutil.Process
    errors: Path  # what it wrote on standard error

    @property
    def port(self) -> int:
        """Where it listens on this machine."""
        return int(self.address.rpartition(":")[2])

    @property
    def worker(self) -> psutil.Process | None:
        """The process in which openvino_genai answers, if there is one."""
        for each in self.process.children():
            if "runtime.serve.worker" in each.cmdline():
                return each
        return None

    @property
    def memory(self) -> int:
        """Resident bytes of the server and its processes."""
        return sum(each.memory_info().rss for each in (self.process, *self.process.children(recursive=True)))


@contextmanager
def started(folder: Path, scratch: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`python -m runtime serve` over a folder; ended by a signal."""
    command = [sys.executable, "-m", "runtime", "serve", str(folder), "--port", "0", "--cache-size", "1", "--model-name", "shapes"]
    errors = scratch / "errors.txt"
    with (
        errors.open("w") as told,
        subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=told, text=True, env={**environ, **(environment or {})}
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at " in line, errors.read_text()
            yield Server(line.split(" at ")[1].split("/v1")[0], psutil.Process(process.pid), errors)
        finally:
            process.terminate()


def eventually(true: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(true())
