"""Peak memory of the process, and returning freed memory to the system: large blocks are freed all the time.

The only file that calls the operating system about memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
LARGE_BLOCK = 1 << 20
LEAVE_SECONDS = 0.1  # a device packs some 30 MB of weights in this time
MADV_DONTNEED, MADV_PAGEOUT = 4, 21  # asm-generic/mman-common.h; the second from Linux 5.4 on


def return_freed_memory() -> None:
    """Make the C library return large freed blocks to the system at once.

    glibc raises this threshold to 32 MB by itself as soon as large blocks are freed, and then keeps the holes: tracing a 300M
    vision transformer left 600 MB of them. Other C libraries have nothing to set.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def page_out(array: np.ndarray) -> None:
    """Let the system page out an array that is unlikely to be read again; it can still be read.

    Affects whole pages inside the array, and only on Linux 5.4 or later; elsewhere memory is merely kept longer.
    """
    if sys.platform != "linux":
        return
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)


def leave_mapped(file: Path) -> None:
    """Drop the pages of a file mapped read-only from this process; pages read again come back from the file.

    Linux only; other systems do so by themselves when memory is short.
    """
    if sys.platform != "linux":
        return
    name = str(file.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if path == [name] and "w" not in rights:
            start, end = (int(address, 16) for address in span.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def leaving_mapped(file: Path) -> AbstractContextManager[None]:
    """Drop the pages of a mapped file repeatedly while the block reads through it, and once more at its end."""
    return leaving(lambda: leave_mapped(file))


@contextmanager
def leaving(leave: Callable[[], None]) -> Iterator[None]:
    """Call `leave`, which drops pages, repeatedly while the block reads through them, and once more at its end."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LEAVE_SECONDS):
            leave()

    thread = threading.Thread(target=watch, name="pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        leave()


def peak_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def of_machine() -> tuple[int, int]:
    """Total memory of this machine and what is available to processes, in bytes."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available
