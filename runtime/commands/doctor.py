"""python -m runtime doctor: the machine, its devices and packages, what is missing, and the command that helps. Opens no model."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.errors import DeviceError
from runtime.parts import memory
from runtime.parts.device import choose_devices, processor_class
from runtime.parts.gpu_access import why_no_gpu

PACKAGE = "internvl-openvino"
OF_DEVELOPERS = ("test", "test-plain", "docs", "clients")  # extras that only developers need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for a bug report")


def run(**options: Any) -> None:
    """Print what was found. Raises DeviceError for a GPU that is there and cannot be used."""
    found = examine()
    print(json.dumps(found, ensure_ascii=False) if options["json"] else "\n".join(_lines(found)))
    if found["gpu"]:
        raise DeviceError("\n       ".join(found["gpu"]))


def examine() -> dict[str, Any]:
    """The machine, its devices and packages; sizes in bytes, empty lists where nothing is missing."""
    import openvino as ov

    core = ov.Core()
    able = processor_class(core)
    total, available = memory.of_machine()
    sees_gpu = any(device.startswith("GPU") for device in core.available_devices)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "openvino": ov.get_version(),
        "devices": {
            device: f"{core.get_property(device, 'FULL_DEVICE_NAME')}: "
            + " ".join(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
            for device in core.available_devices
        },
        "class": able.name if able else None,
        "memory": total,
        "available_memory": available,
        "free_disk": shutil.disk_usage(Path.cwd()).free,
        "auto": str(choose_devices(core)),
        "gpu": [] if sees_gpu else why_no_gpu(),
        "missing": missing_packages(),
    }


def missing_packages() -> dict[str, list[str]]:
    """The packages of each extra that are not installed; empty if this package itself is not installed."""
    try:
        own = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for extra in own.metadata.get_all("Provides-Extra") or []:
        if extra in OF_DEVELOPERS:
            continue
        of_extra = [line for line in own.requires or [] if line.endswith(f'extra == "{extra}"') and "sys_platform" not in line]
        names = [name.group() for line in of_extra if (name := re.match(r"[\w.-]+", line))]
        missing[extra] = [name for name in names if name != PACKAGE and not _is_here(name)]
    return missing


def _is_here(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _lines(found: dict[str, Any]) -> list[str]:
    rows = {
        "version": f"{found['version']}, Python {found['python']}, {found['system']}",
        "openvino": found["openvino"],
        **found["devices"],
        "class": found["class"] or "unknown: OpenVINO's defaults apply",
        "auto": found["auto"],
        "memory": f"{found['memory'] / 1e9:.1f} GB, {found['available_memory'] / 1e9:.1f} GB available",
        "disk": f"{found['free_disk'] / 1e9:.1f} GB free here",
    }
    for extra, names in found["missing"].items():
        rows[extra] = f"lacks {', '.join(names)}: pip install '{PACKAGE}[{extra}]'" if names else "installed"
    return [f"{name:<10}{told}" for name, told in rows.items()]
