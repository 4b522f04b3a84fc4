"""A process in which openvino_genai works, seen from the one that starts it: sent messages, heard, ended.

Knows two modules that run in one, `worker.py` and `grammar.py`, and nothing of requests. Where the system or somebody else ends
the process, `receive` says so, and a new one may be started.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import IO, Any

LAST_SECONDS = 5.0  # for the last words of the process


class Process:
    """One process of a module. It is sent its setup; the first message that it sends is "ready", or the error it ended with."""

    def __init__(self, module: str, setup: Any):
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._finished = False
        self._finalizer = weakref.finalize(self, _end, self._process)  # also when the program just ends
        threading.Thread(target=_write, args=(self._outbox, self._process), name="prompts", daemon=True).start()
        self.send(setup)

    @property
    def pid(self) -> int:
        """Its number in the system."""
        return self._process.pid

    @property
    def is_to_end(self) -> bool:
        """Whether it ends because it was told to, or because the program does."""
        return self._finished or not self._finalizer.alive

    def send(self, message: Any) -> None:
        """Hand a message over, at once: a thread waits for the process, which takes none while it computes a step."""
        self._outbox.put(message)

    def receive(self) -> Any:
        """The next message, None when there are no more."""
        try:
            return pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):  # it has ended, perhaps in the middle of a message
            return None

    def kill(self) -> None:
        """End it at once."""
        self._finished = True
        self._process.kill()

    def finish(self) -> None:
        """Let it end by itself: it gets no more messages."""
        self._finished = True
        self._outbox.put(None)

    def wait(self) -> None:
        """Until it has ended; what it held here is given back."""
        self._outbox.put(None)
        self._process.wait()
        self._finalizer.detach()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _write(outbox: queue.SimpleQueue[Any], process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it has ended
        while (message := outbox.get()) is not None:
            send(message, process.stdin)
    with suppress(OSError):
        process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the process end: its standard input does."""
    with suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- the other side


def send(message: Any, out: IO[bytes]) -> None:
    """One message to the other side."""
    pickle.dump(message, out, protocol=pickle.HIGHEST_PROTOCOL)
    out.flush()


def pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Where messages come from and go to, in the process; whatever else reads and prints there does so elsewhere from now on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the engine says when it is over
    given, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what a library forks wants to close it, and would wait for the thread that reads
    os.dup2(2, 1)  # whatever prints
    return given, out
