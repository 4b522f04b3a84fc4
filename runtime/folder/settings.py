"""What is known of a model folder on this machine, by device: the settings that `python -m runtime tune` found (`tuned.json`), and
the parts that overflow in float16 (`overflows.json`).

Tuned settings apply only to the processor and the OpenVINO version they were measured on. Reads, writes and removes them, and
derives the number of tiles; measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openvino as ov

from runtime.errors import OptionError
from runtime.folder.config import InternVLConfig
from runtime.folder.files import DECODE_FILE, OVERFLOWS_FILE, TUNED_FILE

BEST = "auto"  # the device name for the best device of each part; OpenVINO's AUTO chooses differently


def settings_of(folder: Path, core: ov.Core, device: str) -> dict[str, Any] | None:
    """The tuned settings of a device, if measured on this processor and OpenVINO version: {"parts", "decode", "seconds", ...}."""
    try:
        found = json.loads((folder / TUNED_FILE).read_text(encoding="utf-8"))[device]
        return found if found["machine"] == machine(core, device) else None
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, TypeError):
        raise OptionError(f"{folder / TUNED_FILE} cannot be read: python -m runtime tune {folder} --reset removes it") from None


def reset(folder: Path) -> bool:
    """Remove the tuned settings and overflows of all devices; False when there were none."""
    there = (folder / TUNED_FILE).exists() or (folder / OVERFLOWS_FILE).exists()
    for file in (folder / TUNED_FILE, folder / OVERFLOWS_FILE, folder / DECODE_FILE, (folder / DECODE_FILE).with_suffix(".bin")):
        file.unlink(missing_ok=True)
    return there


def tiles_within(settings: dict[str, Any], seconds: float, config: InternVLConfig) -> int:
    """How many tiles of one picture allow a time to first token of `seconds`: at least one.

    Computed from the measured times per tile and per prompt token; the thumbnail counts as a tile where the model has one. Raises
    OptionError for a time that is not positive.
    """
    if seconds <= 0:
        raise OptionError(f"first token after {seconds:g} s: give a positive number of seconds")
    measured = settings["seconds"]
    each = measured["tile"] + config.tokens_per_tile * measured["prompt_token"]
    room = int(seconds / each) - (1 if config.use_thumbnail else 0)
    return max(1, min(room, config.max_tiles))


def keep(folder: Path, device: str, settings: dict[str, Any]) -> None:
    """Write the tuned settings of a device; those of other devices stay."""
    file = folder / TUNED_FILE
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(kept | {device: settings}, indent=1) + "\n", encoding="utf-8")


def overflowing(folder: Path, device: str) -> list[str]:
    """The parts known to overflow in float16 on a device. Raises OptionError when the file cannot be read."""
    file = folder / OVERFLOWS_FILE
    try:
        return [*json.loads(file.read_text(encoding="utf-8")).get(device, [])]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError):
        raise OptionError(f"{file} cannot be read: delete it, it is written again when needed") from None


def remember_overflow(folder: Path, device: str, part: str) -> bool:
    """Record that a part overflows in float16 on a device; False where the folder cannot be written."""
    file = folder / OVERFLOWS_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(known | {device: sorted({*known.get(device, []), part})}) + "\n", encoding="utf-8")
        return True
    except OSError:
        return False


def machine(core: ov.Core, device: str) -> dict[str, str]:
    """What tuned settings depend on: the processor, its capabilities and the OpenVINO version."""
    names = core.available_devices if device == BEST else [device]
    able = " ".join(able for name in names for able in sorted(core.get_property(name, "OPTIMIZATION_CAPABILITIES")))
    processor = ", ".join(str(core.get_property(name, "FULL_DEVICE_NAME")) for name in names)  # virtual CPUs share it
    return {"processor": processor, "able": able, "openvino": ov.__version__}
