"""A child process for openvino_genai, seen from its parent: started, sent messages, read, ended.

`worker.py` and `grammar.py` run in such processes. Knows no requests. When the process dies, `receive` returns None, and a new one
may be started.
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

LAST_SECONDS = 5.0  # for the process to end by itself


class Process:
    """One process of a module. It gets its setup first; its first message is "ready", or the error that ended it."""

    def __init__(self, module: str, setup: Any):
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._finished = False
        self._finalizer = weakref.finalize(self, _end, self._process)  # also at the end of the program
        threading.Thread(target=_write, args=(self._outbox, self._process), name="prompts", daemon=True).start()
        self.send(setup)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_to_end(self) -> bool:
        """Whether it ends on request, or because the program ends."""
        return self._finished or not self._finalizer.alive

    def send(self, message: Any) -> None:
        """Queue a message and return at once: a thread writes it, because the process reads nothing during a step."""
        self._outbox.put(message)

    def receive(self) -> Any:
        """The next message; None when the process has ended."""
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
        """Wait for its end, then release its pipes."""
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
    """Close the standard input of the process, which ends it; kill it after LAST_SECONDS."""
    with suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- in the child process


def send(message: Any, out: IO[bytes]) -> None:
    """Write one message to the other process."""
    pickle.dump(message, out, protocol=pickle.HIGHEST_PROTOCOL)
    out.flush()


def pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The streams of messages in the child, in and out; standard input and output of other code are redirected from now on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the engine decides when this one ends
    given, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a process that a library forks closes it, and would wait for the thread that reads
    os.dup2(2, 1)  # other prints go to standard error
    return given, out
