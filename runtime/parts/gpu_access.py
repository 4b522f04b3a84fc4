"""Why OpenVINO does not see the Intel GPU of a machine: the missing package, group or device file, one line each.

Reads files of Linux only, below a given root; loads no driver.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

INTEL, DISPLAY_CLASS = "0x8086", "0x03"  # PCI vendor, and the first digits of the PCI class of display controllers
PACKAGES = {  # of the OpenCL driver, by distribution (os-release, ID and ID_LIKE)
    "debian": "apt install intel-opencl-icd",
    "ubuntu": "apt install intel-opencl-icd",
    "fedora": "dnf install intel-compute-runtime",
    "rhel": "dnf install intel-opencl",
    "suse": "zypper install intel-opencl",
    "arch": "pacman -S intel-compute-runtime",
}


def why_no_gpu(root: Path = Path("/"), groups: list[int] | None = None) -> list[str]:
    """The obstacles to using an Intel GPU, one line each, in the order to fix them; empty where the kernel sees no Intel GPU.

    `groups` are the group ids of a user, by default those of this process.
    """
    if sys.platform != "linux":
        return []
    drawn = {path.parent.parent.name for path in root.glob("sys/class/drm/card*/device/vendor") if _text(path) == INTEL}
    on_bus = any(
        _text(path) == INTEL and _text(path.with_name("class")).startswith(DISPLAY_CLASS)
        for path in root.glob("sys/bus/pci/devices/*/vendor")
    )
    if not drawn and not on_bus:
        return []
    if not drawn:
        return ["the kernel sees an Intel GPU and has no driver for it: a newer kernel has (i915, or xe since 6.8)"]
    found = []
    nodes = sorted(root.glob("dev/dri/renderD*"))
    if not nodes:
        found.append("the kernel sees an Intel GPU, and /dev/dri is not here: in a container, start it with  --device /dev/dri")
    for node in nodes:
        group = node.stat().st_gid
        if not _may_use(node, groups):
            name = _group_name(root, group)
            found.append(f"/dev/dri/{node.name} is for the group {name}: sudo usermod -aG {name} $USER, then log in again")
    if not any("intel" in icd.name.lower() for icd in root.glob("etc/OpenCL/vendors/*.icd")):
        found.append(f"the OpenCL driver for Intel GPUs is not installed: {_package(root)}")
    return found


def _may_use(node: Path, groups: list[int] | None) -> bool:
    status = node.stat()
    if groups is None:
        return os.access(node, os.R_OK | os.W_OK)
    return status.st_mode & 0o006 == 0o006 or (status.st_gid in groups and status.st_mode & 0o060 == 0o060)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _group_name(root: Path, gid: int) -> str:
    lines = [line.split(":") for line in _text(root / "etc/group").splitlines()]
    return next((line[0] for line in lines if len(line) > 2 and line[2] == str(gid)), str(gid))


def _package(root: Path) -> str:
    told = dict(line.split("=", 1) for line in _text(root / "etc/os-release").splitlines() if "=" in line)
    names = " ".join(told.get(name, "").strip('"') for name in ("ID", "ID_LIKE")).split()
    return next((PACKAGES[name] for name in names if name in PACKAGES), "the package intel-opencl-icd, or intel-compute-runtime")
