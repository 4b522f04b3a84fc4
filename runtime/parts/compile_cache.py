"""The cache of compiled parts on the disk, for a quick next start: its keys, and how incomplete entries are found.

OpenVINO writes and reads the entries, and compares the weights. Each entry is a folder, named by a hash of all else it depends on:
the part's file, the OpenVINO version, the device and its driver (which OpenVINO ignores), and the properties. A folder gets its
name once it is complete. Knows files; compiles nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openvino as ov

from runtime.parts.device import Core, Placement, uses

WHOLE_FILE = "whole.json"  # what a compiled part depends on, and the sizes of its files
OPENCL = {"win32": "OpenCL.dll", "linux": "libOpenCL.so.1"}  # the library by which OpenVINO drives a GPU
LONGEST_SECONDS = 86_400.0  # upper bound of the time to compile
DRIVER_VERSION, GPUS = 0x102D, 4  # CL_DRIVER_VERSION, CL_DEVICE_TYPE_GPU

logger = logging.getLogger(__name__)


@contextmanager
def kept_in(base: Path, core: Core, placement: Placement, xml: Path, properties: Mapping[str, Any]) -> Iterator[Path | None]:
    """Yield the folder in which OpenVINO finds or stores a compiled part; None where it cannot be written.

    Warns on a GPU when there is no entry yet, since compiling takes minutes there. A new entry replaces those of an older file,
    another OpenVINO version or another driver.
    """
    made_of = _made_of(core, placement, xml)
    key = hashlib.sha256(
        json.dumps([{**made_of, "file": ""}, {name: str(properties[name]) for name in sorted(properties)}]).encode()
    ).hexdigest()
    final = base / f"{placement.part}-{key[:16]}"
    if _is_whole(final):
        yield final
        return
    try:
        shutil.rmtree(final, ignore_errors=True)
        base.mkdir(parents=True, exist_ok=True)
        for killed in base.glob(f".{final.name}.*"):  # left by programs that were killed while compiling
            if time.time() - killed.lstat().st_mtime > LONGEST_SECONDS:
                _remove(killed)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=base))
    except OSError as error:
        logger.warning("%s cannot be written (%s): compiled parts are not kept", base, error.strerror)
        work = None
    if uses(core, placement.device, "GPU"):
        logger.warning(
            "compiling the %s part for %s, which takes minutes; %s",
            placement.part,
            placement.device,
            f"it is kept in {base} for the next start" if work else "it is not kept for the next start",
        )
    if work is None:
        yield None
        return

    atexit.register(_remove, work)  # a compiling thread does not outlive the program
    try:
        yield work
    except BaseException:
        _remove(work)
        raise
    _finish(work, final, made_of)


def bytes_kept(base: Path) -> int:
    """Bytes that the compiled parts of a folder take."""
    return sum(file.stat().st_size for path in base.iterdir() if not path.is_symlink() for file in path.rglob("*"))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _made_of(core: Core, placement: Placement, xml: Path) -> dict[str, Any]:
    """What a compiled part depends on besides its weights and properties."""
    devices = {
        name: _identity(core, name) for name in core.available_devices if uses(core, placement.device, name.partition(".")[0])
    }
    gpu = any(name.startswith("GPU") for name in devices)
    return {
        "file": str(xml.resolve()),
        "part": hashlib.sha256(xml.read_bytes()).hexdigest(),
        "openvino": ov.get_version(),
        "device": placement.device,
        "devices": devices,
        "drivers": _drivers() if gpu else [],
    }


def _identity(core: Core, device: str) -> str:
    able = sorted(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    return " ".join([str(core.get_property(device, "FULL_DEVICE_NAME")), *able])


def _is_whole(folder: Path) -> bool:
    """Whether a compiled part is complete; warns where it was cut short."""
    sizes = _read(folder / WHOLE_FILE).get("sizes") or {}
    whole = bool(sizes) and all(_size(folder / name) == size for name, size in sizes.items())
    if folder.exists() and not whole:
        logger.warning("%s is incomplete: the part is compiled again", folder)
    return whole


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _finish(work: Path, final: Path, made_of: Mapping[str, Any]) -> None:
    """Give a compiled part its final name, and remove the entries it replaces."""
    sizes = {file.name: file.stat().st_size for file in work.glob("*.blob")}
    try:
        if not sizes:  # OpenVINO does not report a failed write
            raise OSError(errno.ENOSPC, "the disk is full")
        (work / WHOLE_FILE).write_text(json.dumps({**made_of, "sizes": sizes}), encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's 0700 would lock other users out
        work.rename(final)
        with suppress(OSError):
            work.symlink_to(final.name)  # a GPU adds kernels while it runs, under the name it was given
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        if not _is_whole(final):  # else another program was first
            logger.warning("%s cannot be written (%s): the compiled part is not kept", final.parent, error.strerror)
        return
    for other in final.parent.glob(f"*/{WHOLE_FILE}"):
        known = _read(other)
        replaced = all(known.get(name) == made_of[name] for name in ("file", "device")) and {**known, "sizes": 0} != {
            **made_of,
            "sizes": 0,
        }
        if replaced:
            shutil.rmtree(other.parent, ignore_errors=True)


def _drivers() -> list[str]:
    """Versions of the GPU drivers that OpenCL lists; none without OpenCL."""
    try:
        cl = ctypes.CDLL(OPENCL.get(sys.platform, OPENCL["linux"]))
    except OSError:
        return []
    count, found = ctypes.c_uint(), []
    if cl.clGetPlatformIDs(0, None, ctypes.byref(count)):
        return []
    platforms = (ctypes.c_void_p * count.value)()
    cl.clGetPlatformIDs(count, platforms, None)
    for platform in map(ctypes.c_void_p, platforms):
        if cl.clGetDeviceIDs(platform, ctypes.c_uint64(GPUS), 0, None, ctypes.byref(count)):
            continue
        devices = (ctypes.c_void_p * count.value)()
        cl.clGetDeviceIDs(platform, ctypes.c_uint64(GPUS), count, devices, None)
        for device in map(ctypes.c_void_p, devices):
            text = ctypes.create_string_buffer(256)
            cl.clGetDeviceInfo(device, DRIVER_VERSION, ctypes.c_size_t(len(text)), text, None)
            found.append(text.value.decode(errors="replace"))
    return found
