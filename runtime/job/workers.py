"""The same job in several processes of this machine, each on its own cores: a NUMA node, or a share of the cores.

Weights are mapped from one file; OpenVINO's packed copies are per process. Rows and answers travel over queues.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.errors import InternVLError, OptionError
from runtime.job import ask
from runtime.job.answers import AGAIN, Answer
from runtime.job.requests import Row
from runtime.parts.memory import return_freed_memory

ROWS_AHEAD = 2 * ask.WINDOW  # per process: more rows than it ever needs before its first answer
WAIT_SECONDS = 1.0  # between checks that the processes are alive
NODES = Path("/sys/devices/system/node")


def shares_of_cores(count: int) -> list[list[int]]:
    """Divide the cores that this process may use into `count` shares, by NUMA node. Raises OptionError."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    if not 1 <= count <= len(cores):
        raise OptionError(f"{count} workers for {len(cores)} cores: give from 1 to {len(cores)}")
    nodes = {core: number for number, own in enumerate(map(_cores_of, sorted(NODES.glob("node[0-9]*")))) for core in own}
    cores.sort(key=lambda core: (nodes.get(core, 0), core))
    return [cores[len(cores) * n // count : len(cores) * (n + 1) // count] for n in range(count)]


def _cores_of(node: Path) -> list[int]:
    """The cores of a NUMA node, from a list like 0-3,8."""
    spans = [span.split("-") for span in (node / "cpulist").read_text().strip().split(",") if span]
    return [core for span in spans for core in range(int(span[0]), int(span[-1]) + 1)]


def answers(count: int, open_model: Any, asking: Any, cache_bytes: int, rows: Iterator[Row]) -> Iterator[Answer]:
    """The answers to rows, in the order in which they finish; each process calls `open_model`, which must be picklable.

    Raises the InternVLError of a process that cannot start, and OptionError for one that was killed.
    """
    spawning = multiprocessing.get_context("spawn")
    found: Any = spawning.Queue()
    shares = shares_of_cores(count)
    inboxes = [spawning.Queue() for _ in shares]
    given = [(number, cores, open_model, asking, cache_bytes, inboxes[number], found) for number, cores in enumerate(shares)]
    processes = [spawning.Process(target=_work, args=each, daemon=True) for each in given]
    for process in processes:
        process.start()
    try:
        waiting, more, handed, number = [0] * count, True, 0, 0
        while more or any(waiting):
            while more and min(waiting) < ROWS_AHEAD:
                row = next(rows, None)
                if not handed % ask.LOOKED_AT_ONCE:  # nearby rows share pictures: they go to one process
                    number = waiting.index(min(waiting))
                handed += 1
                if row is None:
                    more = False
                    for inbox in inboxes:
                        inbox.put(None)
                else:
                    inboxes[number].put(row)
                    waiting[number] += 1
            with suppress(queue.Empty):
                worker, answer = found.get(timeout=WAIT_SECONDS)
                if isinstance(answer, BaseException):
                    raise answer
                waiting[worker] -= 1
                yield answer
                continue
            gone = [process.exitcode for process, left in zip(processes, waiting, strict=True) if left and not process.is_alive()]
            if gone:
                raise OptionError(f"a worker process ended (code {gone[0]}; -9 is a kill, as when memory is short): {AGAIN}")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(number: int, cores: list[int], open_model: Any, asking: Any, cache_bytes: int, inbox: Any, found: Any) -> None:
    """In a worker process: answer rows until None arrives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and terminates this process
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return_freed_memory()
    try:
        for answer in ask.answers(open_model(), asking, cache_bytes, iter(inbox.get, None)):
            found.put((number, answer))
    except InternVLError as error:
        found.put((number, error))
