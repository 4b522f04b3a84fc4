"""On which device each part runs, and with which OpenVINO properties.

Decides from device names and capabilities alone, so tests can stand in for a machine with a GPU; compiles nothing.
Property names: openvinotoolkit/openvino src/inference/include/openvino/runtime/properties.hpp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from runtime.errors import DeviceError, OptionError
from runtime.folder.files import PART_FILES, PARTS
from runtime.parts.gpu_access import why_no_gpu

COMBINING = ("AUTO", "HETERO", "MULTI", "BATCH")  # devices that combine others, listed after a colon
PRECISIONS = ("default", "accuracy")
MODEL_CACHE = "model_cache"  # folder of compiled models, inside the model folder


FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
PRECISION_HINTS = ("INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "KV_CACHE_PRECISION")


class Core(Protocol):
    """What is used of ov.Core."""

    available_devices: Sequence[str]

    def get_property(self, device: str, name: str, /) -> Any:
        """A property of a device."""


@dataclass(frozen=True)
class ProcessorClass:
    """Measured defaults of a class of CPUs; a CPU belongs to it if OpenVINO reports the capabilities in `needs`.

    `activation_groups`: sizes of the quantisation groups of activations that are multiplied with compressed weights, best first.
    `pages`: the precision of keys and values. `tokens`: properties of a second compilation of the language part, for decode; None:
    one compilation for all. `guesses`: how many draft tokens a decode step checks at no cost. `tile_multiple`: what the tokens of a
    tile are padded to a multiple of, unless the vision part computes in float32.
    """

    name: str
    needs: frozenset[str]
    activation_groups: tuple[int, ...]
    pages: str
    tokens: Mapping[str, Any] | None
    guesses: int
    tile_multiple: int = 1


# The first match applies. docs/experiments.md has the measurements, under "What the defaults on a CPU rest on":
#   AMX: prefill in bfloat16 takes two thirds of its time in float32, decode in float32 three quarters of its time in bfloat16
#   (22 and 30 ms after 300 tokens, 29 and 34 after 3,380). Both precisions can read pages of 8 bits only. A tile of 1,056 tokens
#   takes 0.93 of the time of one of 1,025; elsewhere 1.03 to 1.06.
#   Others: float32, so a second compilation would be the same. Quantisation groups of 128 take four fifths of the time of
#   OpenVINO's 32; pages of 16 bits are exact, and are read faster than pages of 8 bits are unpacked.
PROCESSOR_CLASSES = (
    ProcessorClass("AMX", frozenset({"BF16", "FP16"}), (128, 64), "f16", {"INFERENCE_PRECISION_HINT": "f32"}, 2, 32),
    ProcessorClass("AVX2 to AVX-512 VNNI", frozenset({"FP32", "INT8"}), (128, 64), "f16", None, 1),
)


def processor_class(core: Core) -> ProcessorClass | None:
    """The class of this machine's CPU; None for an unmeasured one, which gets OpenVINO's defaults."""
    able = {*core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}
    return next((each for each in PROCESSOR_CLASSES if each.needs <= able), None)


@dataclass(frozen=True)
class Choice:
    """The devices that `--device auto` chooses, and why."""

    language: str
    vision: str
    reason: str

    def __str__(self) -> str:
        return f"language on {self.language}, vision on {self.vision}: {self.reason}"


@dataclass(frozen=True)
class GPUKind:
    """A kind of GPU: the properties OpenVINO reports, and whether it runs the language part. Not measured on any GPU."""

    name: str
    needs: frozenset[str]  # among its type and capabilities
    language: bool
    reason: str


# The first match applies. No GPU was at hand: these rules rest on knowledge of the hardware, and tune --device auto measures.
GPU_KINDS = (
    GPUKind("Arc", frozenset({"DISCRETE"}), True, "a GPU with memory of its own"),
    GPUKind("integrated, with matrix units", frozenset({"GPU_HW_MATMUL"}), True, "a GPU with matrix units"),
    GPUKind("integrated", frozenset(), False, "the GPU computes faster, and decode waits for the memory that both share"),
)
NOT_MEASURED = "a rule; python -m runtime tune FOLDER --device auto measures"


def choose_devices(core: Core, found: Mapping[str, Any] | None = None) -> Choice:
    """Where the large parts run for `--device auto`: as tune `found`, else by the kind of GPU."""
    if found is not None:
        return Choice(found["device"], found["vision_device"], "the fastest that tune measured")
    gpu = next((name for name in core.available_devices if name.startswith("GPU")), None)
    if gpu is None:
        return Choice("CPU", "CPU", "OpenVINO sees no GPU")
    told = {str(core.get_property(gpu, "DEVICE_TYPE")).rpartition(".")[2], *core.get_property(gpu, "OPTIMIZATION_CAPABILITIES")}
    kind = next(kind for kind in GPU_KINDS if kind.needs <= told)
    return Choice(gpu if kind.language else "CPU", gpu, f"{kind.reason} ({NOT_MEASURED})")


@dataclass(frozen=True)
class Placement:
    """The device and properties of one part, and its file in the model folder where that is not the part's own."""

    part: str
    device: str
    properties: dict[str, Any]
    other_file: str | None = None

    @property
    def file(self) -> str:
        """Name of its .xml file."""
        return self.other_file or PART_FILES[self.part]

    @property
    def accurate(self) -> bool:
        """Whether nothing may be rounded for speed."""
        return self.properties.get("EXECUTION_MODE_HINT") == "ACCURACY"


def widened(core: Core, placement: Placement) -> Placement | None:
    """The same part in float32, where it computes in float16 by default and not by choice; else None."""
    chosen = placement.accurate or any(name in placement.properties for name in PRECISION_HINTS)
    if chosen or not uses(core, placement.device, "GPU"):
        return None
    return replace(placement, properties=placement.properties | FLOAT32)


def check_device(core: Core, device: str) -> None:
    """Raise DeviceError unless `device`, like CPU, GPU.1, AUTO or HETERO:GPU,CPU, exists on this machine."""
    seen = [*core.available_devices]
    families = {name.split(".")[0] for name in seen}
    kind, _, members = device.partition(":")
    wanted = [name.strip("-") for name in members.split(",") if name] if kind in COMBINING else [device]
    for name in wanted:
        name = name.partition("(")[0]  # MULTI:GPU(2)
        if name not in seen and name not in families and not (name == "GPU.0" and "GPU" in seen):
            reasons = why_no_gpu() if name.startswith("GPU") and "GPU" not in families else []
            raise DeviceError("; ".join([f"there is no device {name} here; there are {', '.join(seen)}", *reasons]))


def uses(core: Core, device: str, family: str) -> bool:
    """Whether `device` may run work on a device of `family`, like GPU."""
    kind, _, members = device.partition(":")
    if kind in COMBINING:
        names = members.split(",") if members else core.available_devices
        return any(name.strip("-").startswith(family) for name in names)
    return device.startswith(family)


def place_parts(
    core: Core,
    folder: Path,
    device: str,
    *,
    vision_device: str | None = None,
    wide_vision: bool = False,
    router: bool = False,
    precision: str = "default",
    cache_dir: str | Path | Literal[False] | None = None,
    ov_config: Mapping[str, Any] | None = None,
    part_config: Mapping[str, Mapping[str, Any]] | None = None,
    tuned: Callable[[str], Mapping[str, Any] | None] = lambda device: None,
    overflowing: Callable[[str], Sequence[str]] = lambda device: (),
) -> dict[str, Placement]:
    """The device and the properties of every part.

    `wide_vision`: the vision transformer's activations do not fit float16 (InternViT-6B). `router`: there is a router; it runs on
    the device of the vision part, in float32, since its last digits decide. `tuned` gives the tuned settings of a device and
    `overflowing` the parts that overflow in float16 there (runtime/folder/settings.py); both are ignored with `precision` accuracy.
    A second compilation of the language part, for decode, is placed as "decode" where tune found one, else as "later" where the
    processor class has one. `ov_config` holds properties of all parts and `part_config` of single ones; both override the choices
    made here. Raises DeviceError for a device that does not exist, OptionError for an unknown precision or part.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision {precision!r} is not known; known are {', '.join(PRECISIONS)}")
    unknown = set(part_config or {}) - set(PARTS)
    if unknown:
        raise OptionError(f"part_config names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    # Embeddings go to host memory anyway: looking them up on a GPU would only add a round trip per token.
    devices = {"text_embeddings": "CPU", "vision": vision_device or device, "language": device}
    if router:
        devices["router"] = devices["vision"]
    placed, own = {}, {part: dict(ov_config or {}) | dict((part_config or {}).get(part, {})) for part in devices}
    for part, name in devices.items():
        check_device(core, name)
        wide = (wide_vision and part == "vision") or (precision == "default" and part in overflowing(name))
        properties = _chosen(core, folder, part, name, precision, cache_dir, wide=wide)
        if part == "router":
            properties |= FLOAT32
        found = tuned(name) if precision == "default" else None
        if found is not None:
            properties |= found["parts"].get(part, {})
        placed[part] = Placement(part, name, properties | own[part])
    if precision == "default":
        second = (tuned(device) or {}).get("decode")
        if second is not None and (folder / second["file"]).exists():
            properties = placed["language"].properties | second["properties"] | own["language"]
            placed["decode"] = Placement("language", device, properties, second["file"])
        elif (known := _single_tokens(core, placed["language"])) is not None:
            placed["later"] = known
    return placed


def place_part(
    core: Core,
    folder: Path,
    part: str,
    device: str,
    *,
    wide: bool = False,
    precision: str = "default",
    cache_dir: str | Path | Literal[False] | None = None,
    ov_config: Mapping[str, Any] | None = None,
) -> Placement:
    """The device and properties of one part of a folder that is not a chat model; arguments as in `place_parts`.

    `wide`: its activations do not fit float16. Raises DeviceError, OptionError.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision {precision!r} is not known; known are {', '.join(PRECISIONS)}")
    check_device(core, device)
    properties = _chosen(core, folder, part, device, precision, cache_dir, wide=wide)
    return Placement(part, device, properties | dict(ov_config or {}))


def _single_tokens(core: Core, language: Placement) -> Placement | None:
    """The second compilation, for decode, of the processor class; None where the caller sets the precision of the first."""
    known = processor_class(core) if language.device == "CPU" else None
    if known is None or known.tokens is None or any(name in language.properties for name in PRECISION_HINTS):
        return None
    return replace(language, properties=language.properties | dict(known.tokens))


def _chosen(
    core: Core, folder: Path, part: str, device: str, precision: str, cache_dir: str | Path | Literal[False] | None, *, wide: bool
) -> dict[str, Any]:
    """Properties of one part, before the caller's own.

    A GPU computes in float16, whose largest value is 65,504; past it the answer is one repeated character. The saved language part
    makes the GPU plugin scale activations down (ACTIVATIONS_SCALE_FACTOR, written by convert); InternViT-6B computes in float32
    there.
    """
    gpu = uses(core, device, "GPU")
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision == "accuracy":
        properties["EXECUTION_MODE_HINT"] = "ACCURACY"
        if part in ("language", "qllama"):
            properties["KV_CACHE_PRECISION"] = "f16" if gpu else "f32"
    elif gpu and wide:
        properties |= FLOAT32
    if cache_dir is not None and cache_dir is not False:
        properties["CACHE_DIR"] = str(cache_dir)
    elif gpu and cache_dir is None:  # compiling for a GPU takes minutes the first time
        properties["CACHE_DIR"] = str(folder / MODEL_CACHE)
    return properties
