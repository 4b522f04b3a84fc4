"""One part of a model folder: read, compiled for its device, run.

Turns errors of OpenVINO into one line; knows nothing of what a part computes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from runtime.errors import DeviceError, ModelFolderError
from runtime.folder.settings import remember_overflow
from runtime.parts.compile_cache import kept_in
from runtime.parts.device import Core, Placement, processor_class
from runtime.parts.memory import leaving_mapped

ACTIVATION_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
STORED_KINDS = ("u4", "i4", "u8", "i8")
VISUAL_MASK = "visual_token_mask"  # an input (B, T) int64 of language parts with visual experts: 1 on context tokens
PATCHES = "patch_hidden_state"  # a tensor (N, side * side, C) inside vision parts, and the input of a router
CACHE = "CACHE_DIR"
THREADS = "INFERENCE_NUM_THREADS"

logger = logging.getLogger(__name__)


def read_part(core: ov.Core, folder: Path, placement: Placement, width: int) -> ov.Model:
    """Read one part, with its weights memory-mapped. Raises ModelFolderError when it cannot be read.

    Also raises it when the width of its embeddings is not `width` of config.json: then the file is another model's.
    """
    file = folder / placement.file
    try:
        model = core.read_model(file)
    except RuntimeError as error:
        raise ModelFolderError(
            f"{file} cannot be read ({last_line(error)}): it is broken or of another OpenVINO version; convert the checkpoint again"
        ) from error
    port = model.input("inputs_embeds") if placement.part in ("language", "qllama") else model.outputs[0]
    found = port.partial_shape[-1]
    if found.is_static and found.get_length() != width:
        raise ModelFolderError(
            f"{file} has embeddings of width {found}, config.json says {width}: the folder mixes two models; "
            "convert the checkpoint again"
        )
    return model


def compile_part(core: ov.Core, folder: Path, model: ov.Model, placement: Placement) -> ov.CompiledModel:
    """Compile a part of a folder as it is placed. Raises DeviceError when its device refuses it or one of its properties.

    The property CACHE_DIR names the folder that caches the compiled part.
    """
    properties = activation_groups(core, model, placement) | placement.properties
    base = properties.pop(CACHE, None)
    try:
        if base is None:
            return core.compile_model(model, placement.device, properties)
        with kept_in(Path(base), core, placement, folder / placement.file, properties) as kept:
            return core.compile_model(model, placement.device, properties | ({} if kept is None else {CACHE: str(kept)}))
    except RuntimeError as error:
        raise DeviceError(
            f"{placement.device} cannot run the {placement.part} part ({last_line(error)}): "
            "choose another device or other properties"
        ) from error


def compile_wider(core: ov.Core, folder: Path, model: ov.Model, placement: Placement) -> ov.CompiledModel:
    """Compile a part that overflowed in float16 as it is placed now, warn, and record it in the folder. Raises DeviceError."""
    logger.warning(
        "the %s part overflows in float16 on %s: it is compiled again in float32%s",
        placement.part,
        placement.device,
        ", from now on" if remember_overflow(folder, placement.device, placement.part) else "",
    )
    return compile_part(core, folder, model, placement)


def activation_groups(core: Core, model: ov.Model, placement: Placement) -> dict[str, Any]:
    """The property that sets the quantisation group of activations, for products with compressed weights on a CPU; {} for none.

    A group larger than that of the weights would turn quantisation off.
    """
    known = None if placement.device != "CPU" or placement.accurate else processor_class(core)
    if known is None:
        return {}
    sizes = {size for node in model.get_ops() if node.get_type_name() == "MatMul" for size in _shared_scale(node)}
    group = next((group for group in known.activation_groups if sizes and all(size % group == 0 for size in sizes)), None)
    return {} if group is None else {ACTIVATION_GROUP: group}


def _shared_scale(product: ov.Node) -> list[int]:
    """The quantisation group of the weights of a matrix product; empty where they are not compressed."""
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Multiply", "Subtract"):
        node = node.input_value(0).get_node()
    stored = node.get_type_name() == "Constant" and node.get_output_element_type(0).get_type_name() in STORED_KINDS
    return [node.get_output_shape(0)[-1]] if stored else []


def threads_of(compiled: ov.CompiledModel) -> int:
    """Number of threads a compiled part computes with; 0 on devices without the property."""
    return compiled.get_property(THREADS) if THREADS in compiled.get_property("SUPPORTED_PROPERTIES") else 0


def infer(request: ov.InferRequest, inputs: Mapping[str, np.ndarray]) -> None:
    """Run a compiled part on these inputs by name; outputs stay in the request until its next run.

    OpenVINO's own dispatch of inputs and copy of outputs take half a millisecond, which matters per token. An input that is left
    out keeps its array of the run before, which must still exist.
    """
    tensors = {name: ov.Tensor(np.asarray(array, order="C"), shared_memory=True) for name, array in inputs.items()}
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    request.infer(share_outputs=True)


def leaving_file(folder: Path, placement: Placement) -> AbstractContextManager[None]:
    """Drop the pages of a part's file during its first run, in which the device packs the weights into its own memory."""
    return leaving_mapped((folder / placement.file).with_suffix(".bin"))


def equal_spans(total: int, most: int) -> list[tuple[int, int]]:
    """Cut `total` items into as few spans [start, end) of at most `most` as possible, of about equal length.

    A short last span is slower for its size, and its shape needs preparation of its own.
    """
    count = -(-total // most)
    return [(total * n // count, total * (n + 1) // count) for n in range(count)]


def last_line(error: Exception) -> str:
    """The line of an OpenVINO error that says what is wrong; the others are positions in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
