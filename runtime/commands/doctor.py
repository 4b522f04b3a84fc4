"""python -m runtime doctor: the devices that OpenVINO sees, what --device auto takes, what keeps a GPU from being used."""

from __future__ import annotations

import argparse

from runtime.errors import DeviceError
from runtime.parts.device import choose_devices
from runtime.parts.gpu_access import why_no_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run() -> None:
    """Print the devices. Raises DeviceError for a GPU that is there and cannot be used."""
    import openvino as ov

    core = ov.Core()
    print(f"{'openvino':<10}{ov.get_version()}")
    for device in core.available_devices:
        able = " ".join(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
        print(f"{device:<10}{core.get_property(device, 'FULL_DEVICE_NAME')}: {able}")
    chosen = choose_devices(core)
    print(f"{'auto':<10}{chosen}")
    missing = why_no_gpu()
    if missing and not any(device.startswith("GPU") for device in core.available_devices):
        raise DeviceError("\n       ".join(missing))
