"""Weight formats in practice: NNCF's weight compression of one traced part.

The only file that imports nncf. Takes and returns ov.Model; knows nothing of checkpoints or folders.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset

from convert.four_bits import EightBits, FourBits, pairs
from convert.lora import Later
from convert.options import W8A8, ConvertOptions
from runtime.errors import OptionError
from runtime.parts.memory import page_out

WEIGHT_TYPES = {"u4": "int4", "i4": "int4", "u8": "int8", "i8": "int8", "f16": "fp16", "bf16": "bf16", "f32": "fp32"}
WEIGHTS_AT_ONCE = 1 << 24  # of a vocabulary matrix; NNCF takes about ten bytes for each while it works


def _nncf() -> Any:
    """NNCF without telemetry, which it sends unless this variable is set at its first import."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF imports it; it warns where CUDA is missing
    nncf.set_log_level("ERROR")
    return nncf


@contextmanager
def _compiled_once() -> Iterator[None]:
    """Let NNCF reuse the small model with which it quantises matrices.

    NNCF compiles a new one for each of some 300 matrices, since its result lives in the infer request and the next run would
    overwrite it. Here the result is copied out; this saves a quarter of the time, and the bytes are the same (tests compare).
    """
    _nncf()
    from nncf.openvino.optimized_functions import models
    from nncf.quantization.algorithms.weight_compression import openvino_backend
    from nncf.tensor import Tensor

    infer, uncached = models._infer_ov_model, openvino_backend.disable_results_caching

    def infer_and_copy(*arguments: Any) -> list[Any]:
        return [Tensor(_copy(result.data)) for result in infer(*arguments)]

    models._infer_ov_model = infer_and_copy
    openvino_backend.disable_results_caching = nullcontext
    try:
        yield
    finally:
        models._infer_ov_model, openvino_backend.disable_results_caching = infer, uncached


def _copy(result: ov.Tensor | np.ndarray) -> ov.Tensor | np.ndarray:
    if isinstance(result, np.ndarray):
        return result.copy()
    copied = ov.Tensor(result.element_type, result.shape)
    result.copy_to(copied)
    return copied


@contextmanager
def _merging(later: Later) -> Iterator[None]:
    """Merge LoRA into each matrix when NNCF reads the matrix to compress it."""
    _nncf()
    from nncf.quantization.algorithms.weight_compression import openvino_backend

    stored = openvino_backend.get_const_value_as_ov_tensor

    def trained(constant: ov.Node) -> ov.Tensor:
        merged = later.merge(np.asarray(constant.data).ctypes.data)
        if merged is None:
            return stored(constant)
        raw = merged.view(torch.uint8).numpy()  # numpy has no bfloat16
        return ov.Tensor(raw, ov.Shape([*merged.shape]), constant.get_output_element_type(0))

    openvino_backend.get_const_value_as_ov_tensor = trained
    try:
        yield
    finally:
        openvino_backend.get_const_value_as_ov_tensor = stored
    if len(later):
        raise RuntimeError(f"{len(later)} matrices were to be merged when they are compressed, and were not")


def compress(
    model: ov.Model,
    weight_format: str,
    options: ConvertOptions,
    samples: Iterable[Any] = (),
    later: Later | None = None,
    *,
    spared: str | None = None,
) -> ov.Model:
    """Compress the weights of `model`, which must not be used afterwards; fp32 and fp16 stay as they were traced.

    int8 has one scale a row, asymmetric unless `options.sym`. int4 is NNCF's INT4_ASYM (INT4_SYM) by groups, with the embedding
    table and the last matrix in the backup precision, as in NNCF. `samples` are inputs of the model, for the data-aware
    algorithms. In a w8a8 part (convert/quantise.py) the remaining matrices become int8. Matrices in `later` are merged when they
    are compressed, if `options.looks_once`. In int8, nodes whose names match `spared` are not compressed. Raises OptionError if
    the group size does not divide a row.
    """
    if weight_format in ("fp32", "fp16"):
        return model
    with _compiled_once(), _merging(later or Later()):
        return _compress(model, weight_format, options, samples, spared)


def _compress(model: ov.Model, weight_format: str, options: ConvertOptions, samples: Iterable[Any], spared: str | None) -> ov.Model:
    nncf = _nncf()
    kind = "SYM" if options.sym else "ASYM"
    if weight_format in ("int8", W8A8):
        _compress_vocabulary_matrix(model, f"INT8_{kind}")
        scope = None if spared is None else nncf.IgnoredScope(patterns=[spared])
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[f"INT8_{kind}"], ignored_scope=scope)
    backup = options.backup_precision.upper()
    done = backup != "NONE" and _compress_vocabulary_matrix(model, backup)
    inputs = list(samples)
    dataset = nncf.Dataset(inputs) if inputs else None
    try:
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode[f"INT4_{kind}"],
            group_size=options.nncf_group,
            ratio=options.ratio,
            all_layers=done,  # NNCF spares the last matrix; that is compressed already, and it must not spare another
            backup_mode=nncf.BackupMode[backup],
            awq=options.awq,
            scale_estimation=options.scale_estimation and dataset is not None,
            dataset=dataset,
        )
    except nncf.InvalidGroupSizeError as error:
        sizes = [int(size) for size in re.findall(r"channel size: (\d+)", str(error))]
        raise OptionError(_group_size_advice(sizes, options.nncf_group)) from None


def _compress_vocabulary_matrix(model: ov.Model, mode: str) -> bool:
    """Compress the embedding table or the head by blocks of rows; return whether the model has one.

    Each row has its own scale, so the result equals NNCF's for the whole matrix, in a tenth of the memory (1.6 GB for a
    vocabulary of 150,000 and a width of 900).
    """
    matrix = _vocabulary_matrix(model)
    if matrix is None:
        return False
    values = np.empty(matrix.get_output_shape(0), dtype=np.int8 if mode.endswith("_SYM") else np.uint8)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    start = 0
    for block in _row_blocks(matrix):
        quantised, scale, zero = _quantised_rows(block, mode)
        values[start : start + len(quantised)] = quantised
        scales.append(scale)
        if zero is not None:
            zeros.append(zero)
        start += len(quantised)
    name = matrix.get_friendly_name()
    result = opset.convert(opset.constant(values, name=name, shared_memory=True), ov.Type.f16)
    if zeros:
        zero_point = opset.constant(np.concatenate(zeros), name=f"{name}/zero_point")
        result = opset.subtract(result, opset.convert(zero_point, ov.Type.f16), name=f"{name}/zero_point/subtract")
    scale = opset.constant(np.concatenate(scales), name=f"{name}/scale")
    result = opset.multiply(result, scale, name=f"{name}/fq_weights_1")
    for target in matrix.output(0).get_target_inputs():
        if target.get_node().get_type_name() == "Convert":
            target.replace_source_output(result.output(0))
        else:
            target.replace_source_output(opset.convert(result, matrix.get_output_element_type(0)).output(0))
    model.validate_nodes_and_infer_types()
    page_out(np.asarray(matrix.data))  # 270 MB of a 1B checkpoint, not needed while the other layers are compressed
    return True


def _vocabulary_matrix(model: ov.Model) -> ov.Node | None:
    """The embedding table (text embeddings) or the head's matrix; None for the vision part and for a matrix that is compressed."""
    if not any(port.get_any_name() in ("logits", "inputs_embeds") for port in model.outputs):
        return None
    node = model.get_results()[0]
    while node.get_type_name() in ("Result", "Convert"):
        node = node.input_value(0).get_node()
    node = node.input_value({"Gather": 0, "MatMul": 1}[node.get_type_name()]).get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _row_blocks(matrix: ov.Node) -> Iterator[ov.Tensor]:
    """The matrix as blocks of rows that share its memory, in its own type (numpy has no bfloat16)."""
    rows, width = matrix.get_output_shape(0)
    step = max(1, WEIGHTS_AT_ONCE // width)
    kind = matrix.get_output_element_type(0)
    raw = np.asarray(matrix.data).reshape(rows, -1).view(np.uint8)
    for start in range(0, rows, step):
        block = np.ascontiguousarray(raw[start : start + step])
        yield ov.Tensor(block, ov.Shape([len(block), width]), kind)


def _quantised_rows(block: ov.Tensor, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Let NNCF compress one block; return its values, scales and zero points."""
    ids = opset.parameter([-1], dtype=ov.Type.i64)
    table = opset.convert(opset.constant(block, shared_memory=True, name="rows"), ov.Type.f32)
    small = ov.Model([opset.gather(table, ids, 0)], [ids])
    with redirect_stdout(io.StringIO()):  # hides NNCF's progress bar for every block
        nncf = _nncf()
        small = nncf.compress_weights(small, mode=nncf.CompressWeightsMode[mode])
    found = {node.get_friendly_name(): node.data for node in small.get_ops() if node.get_type_name() == "Constant"}
    return found["rows"], found["rows/scale"], found.get("rows/zero_point")


def four_bits(matrix: torch.Tensor, group_size: int) -> FourBits:
    """A matrix (rows, columns) in four bits, rounded as `compress` does with INT4_ASYM."""
    codes, zeros, scales = _rounded(matrix, "INT4_ASYM", group_size)
    return FourBits(pairs(codes), zeros, scales)


def eight_bits(matrix: torch.Tensor) -> EightBits:
    """A matrix (rows, columns) in eight bits, rounded as `compress` does with INT8_ASYM."""
    parts = [_rounded(rows, "INT8_ASYM", -1) for rows in matrix.split(max(1, WEIGHTS_AT_ONCE // matrix.shape[1]))]
    codes, zeros, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return EightBits(codes, zeros, scales.half())


def _rounded(matrix: torch.Tensor, mode: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (rows, columns) uint8, zeros uint8 and scales (rows, groups) by NNCF."""
    _nncf()
    from nncf import CompressWeightsMode
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.weight_lowering import do_integer_quantization
    from nncf.tensor import Tensor

    config = WeightCompressionConfig(CompressWeightsMode[mode], group_size)
    found = do_integer_quantization(Tensor(matrix.float().numpy()), config, reduction_axes=1)
    codes, zeros, scales = (
        torch.from_numpy(np.array(part.data)).reshape(len(matrix), -1) for part in (found.tensor, found.zero_point, found.scale)
    )
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales


def check_group_size(widths: Iterable[int], group_size: int) -> None:
    """Raise OptionError if the group size does not divide every row width; NNCF would only find out after tracing."""
    sizes = sorted(width for width in widths if group_size > 0 and width % group_size)
    if sizes:
        raise OptionError(_group_size_advice(sizes, group_size))


def _group_size_advice(sizes: list[int], group_size: int) -> str:
    """A line that names a row that does not fit, and the largest group size that fits all rows."""
    fitting = next((g for g in (128, 64, 32, 16) if g < group_size and sizes and all(size % g == 0 for size in sizes)), None)
    what = f"a layer {sizes[0]} wide" if sizes else "a layer"
    first = f"--group-size {fitting} or " if fitting else ""
    return f"group size {group_size} does not divide {what}: use {first}--group-size -1 (one scale a row), or --weight-format int8"


def bit_widths(model: ov.Model) -> dict[str, float]:
    """Share of the weights in each stored type, largest first; scales and zero points are not counted."""
    counted: Counter[str] = Counter()
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant" or name.endswith(("/scale", "/zero_point")) or len(node.get_output_shape(0)) < 2:
            continue
        kind = WEIGHT_TYPES.get(node.get_output_element_type(0).get_type_name())
        if kind:
            counted[kind] += math.prod(node.get_output_shape(0))
    total = counted.total() or 1
    return {kind: count / total for kind, count in counted.most_common()}
