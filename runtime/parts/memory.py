"""How much memory the process has used, and giving it back: large blocks are freed all the time and must not be kept.

The only file that knows of operating systems.
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
LEAVE_SECONDS = 0.1  # in which a device packs some 30 MB of weights
MADV_DONTNEED, MADV_PAGEOUT = 4, 21  # asm-generic/mman-common.h; the second from Linux 5.4 on


def return_freed_memory() -> None:
    """Make the C library give large freed blocks back at once.

    glibc raises this threshold to 32 MB by itself as soon as large blocks are freed, and then keeps the holes: measured, the
    trace of a 300M vision transformer left 600 MB of them behind. Other C libraries have nothing to set.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def page_out(array: np.ndarray) -> None:
    """Let the system drop the pages of an array that will hardly be read again; mapped from a file, they come back if it is.

    Only whole pages inside the array, and only where the system knows the request: without it, memory is merely kept longer.
    """
    if sys.platform != "linux":
        return
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (array.ctypes.data + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)


def leave_mapped(file: Path) -> None:
    """Let the pages of a file that is mapped to be read leave this process; those that are read again come back from the file.

    Linux alone; other systems do so by themselves when memory is short.
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
    """Let the pages of a mapped file leave this process while the block reads through it, and once more at its end."""
    return leaving(lambda: leave_mapped(file))


@contextmanager
def leaving(leave: Callable[[], None]) -> Iterator[None]:
    """Call `leave`, which lets pages go, again and again while the block reads through them, and once more at its end."""
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
    """Largest resident memory of this process so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def of_machine() -> tuple[int, int]:
    """Bytes of memory that this machine has, and those that a process can still get."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available
