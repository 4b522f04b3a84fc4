"""Matrices in four or eight bits, and how they enter a graph: as constants that OpenVINO computes with.

weight[..., r, c] = (code[..., r, c] - zero[..., r, c // group]) * scale[..., r, c // group], codes and zeros in 0..15; in
eight bits in 0..255, with one group a row. Knows nothing of the source of the numbers: packed checkpoints (packed.py), or matrices
that are rounded one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset

BITS = 4
PLACES = 1 << 20  # bytes at the start of the shared memory in which placeholders begin
PLACE = 64  # bytes between two beginnings

Empty = Callable[..., torch.Tensor]
Quantise = Callable[[torch.Tensor], "Compressed"]


class Matrices(Protocol):
    """The matrices of experts, one by one."""

    def __getitem__(self, number: int, /) -> torch.Tensor:
        """The matrix of one expert, (rows, columns)."""


@dataclass(frozen=True)
class Compressed:
    """A compressed matrix (..., rows, columns): codes and zeros uint8, scales (..., rows, groups) float16."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def node(self, name: str, kind: ov.Type, empty: Empty) -> ov.Output:
        """The matrix as graph nodes in NNCF's form, with output type `kind`; the codes lie in memory from `empty`."""
        raise NotImplementedError

    @classmethod
    def stack(cls, matrices: Sequence[Compressed]) -> Compressed:
        """Stack matrices of one kind and shape along a new first axis."""
        kind = type(matrices[0])
        return kind(*(torch.stack([getattr(each, name) for each in matrices]) for name in ("codes", "zeros", "scales")))

    def split(self, split: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[Compressed]:
        """The matrices into which `split` divides the rows."""
        return [type(self)(*parts) for parts in zip(split(self.codes), split(self.zeros), split(self.scales), strict=True)]


class FourBits(Compressed):
    """Codes are uint8 (..., rows, columns / 2), two columns a byte, the first in the lower half, as in OpenVINO."""

    def unpack(self, out: torch.Tensor) -> torch.Tensor:
        """Dequantise into `out`; computed in float32."""
        single = torch.stack([self.codes & 15, self.codes >> BITS], dim=-1).flatten(-2)
        grouped = single.unflatten(-1, (self.scales.shape[-1], -1)).to(torch.float32)
        grouped -= self.zeros[..., None]
        grouped *= self.scales[..., None]
        return out.copy_(grouped.flatten(-2))

    def node(self, name: str, kind: ov.Type, empty: Empty) -> ov.Output:
        *rows, half = self.codes.shape
        groups, columns = self.scales.shape[-1], 2 * half
        codes = _constant(self.codes.reshape(-1), [*rows, groups, columns // groups], ov.Type.u4, name, empty)
        zeros = _constant(pairs(self.zeros.reshape(-1)), [*rows, groups, 1], ov.Type.u4, f"{name}/zero_point", empty)
        scaled = _scaled(codes, zeros, self.scales.unsqueeze(-1), name)
        whole = opset.reshape(scaled, opset.constant(np.array([*rows, columns], np.int64)), special_zero=False)
        return opset.convert(whole, kind).output(0)


class EightBits(Compressed):
    """Codes are uint8 (..., rows, columns); a row is one group."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Some rows of a matrix (rows, columns), dequantised to float32."""
        return self.codes[first:last].float().sub_(self.zeros[first:last]).mul_(self.scales[first:last].float())

    def node(self, name: str, kind: ov.Type, empty: Empty) -> ov.Output:
        codes = _constant(self.codes, [*self.codes.shape], ov.Type.u8, name, empty)
        zeros = _constant(self.zeros, [*self.zeros.shape], ov.Type.u8, f"{name}/zero_point", empty)
        return opset.convert(_scaled(codes, zeros, self.scales, name), kind).output(0)


def pairs(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers below 16 (..., columns) uint8 -> two a byte (..., columns / 2), the first in the lower half; padded with 0."""
    if numbers.shape[-1] % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(*numbers.shape[:-1], 1)], dim=-1)
    return numbers[..., 0::2] | (numbers[..., 1::2] << BITS)


def _constant(stored: torch.Tensor, shape: list[int], kind: ov.Type, name: str, empty: Empty) -> ov.Node:
    """A constant of numbers given as bytes, 4-bit ones two a byte."""
    kept = empty(stored.shape, dtype=torch.uint8).copy_(stored)
    made = ov.op.Constant(ov.Tensor(kept.numpy(), ov.Shape(shape), kind), shared_memory=True)
    made.set_friendly_name(name)
    return made


def _scaled(codes: ov.Node, zeros: ov.Node, scales: torch.Tensor, name: str) -> ov.Node:
    """(codes - zeros) * scales in float16, with NNCF's names."""
    scale = opset.constant(scales.to(torch.float16).numpy(), name=f"{name}/scale", shared_memory=False)
    moved = opset.subtract(opset.convert(codes, ov.Type.f16), opset.convert(zeros, ov.Type.f16), name=f"{name}/zero_point/subtract")
    return opset.multiply(moved, scale, name=f"{name}/fq_weights_1")


class Ready:
    """Matrices in four or eight bits, keyed by the address of the placeholder that is traced instead of each.

    Placeholders are zeros that take no memory: they overlap, and each begins at its own offset with its own number, since
    OpenVINO merges equal constants.
    """

    def __init__(self, empty: Empty, quantise: Quantise) -> None:
        self._empty, self._quantise = empty, quantise
        self._waiting: dict[int, Callable[[], Compressed]] = {}
        self._unread: dict[int, Callable[[], Matrices]] = {}
        self._kept: list[torch.Tensor] = []  # memory of constants, which OpenVINO does not own
        self._zeros = np.zeros(0, np.uint8)
        self._place = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def placeholder(self, shape: Iterable[int], dtype: torch.dtype, load: Callable[[], Compressed]) -> torch.Tensor:
        """A placeholder for the matrix that `load` returns later."""
        made = self._nothing(shape, dtype)
        self._waiting[made.data_ptr()] = load
        return made

    def _nothing(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        shape = torch.Size(shape)
        size = shape.numel() * dtype.itemsize
        if self._place + PLACE + size > len(self._zeros):
            self._zeros, self._place = np.zeros(size + PLACES, np.uint8), 0
        self._place += PLACE
        place = self._zeros[self._place : self._place + size]
        place[:4] = np.array([self._place // PLACE], np.int32).view(np.uint8)
        return torch.from_numpy(place).view(dtype).view(shape)

    def split(self, matrix: torch.Tensor, split: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor] | None:
        """Placeholders for the row blocks of a placeholder; None if `matrix` is no placeholder."""
        load = self._waiting.pop(matrix.data_ptr(), None)
        if load is None:
            return None
        whole: dict[int, Compressed] = {}  # loaded with the first block, kept until the last

        def part(number: int) -> Compressed:
            if not whole:
                whole.update(enumerate(load().split(split)))
            return whole.pop(number)

        heights = [len(each) for each in split(matrix[:, :1])]  # one column suffices and takes no time
        return [self.placeholder((rows, matrix.shape[1]), matrix.dtype, partial(part, n)) for n, rows in enumerate(heights)]

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """A placeholder for a layer's experts, one matrix each: packed ones as they are, others rounded one by one."""
        quantised = [partial(self._quantise, matrix) for matrix in matrices]
        loads = [self._waiting.pop(matrix.data_ptr(), other) for matrix, other in zip(matrices, quantised, strict=True)]
        shape = (len(matrices), *matrices[0].shape)
        return self.placeholder(shape, torch.float32, lambda: Compressed.stack([load() for load in loads]))

    def read_later(self, shape: Iterable[int], load: Callable[[], Matrices]) -> torch.Tensor:
        """A placeholder for joined experts (E, columns, rows) that `load` reads one by one; an argument for `turn`."""
        made = self._nothing(shape, torch.bfloat16)
        self._unread[made.data_ptr()] = load
        return made

    def turn(self, joined: torch.Tensor) -> torch.Tensor:
        """A placeholder (E, rows, columns) for transposed experts (E, columns, rows), rounded one by one."""
        read = self._unread.pop(joined.data_ptr(), lambda: [one.t() for one in joined])
        experts, columns, rows = joined.shape

        def load() -> Compressed:
            matrices = read()
            return Compressed.stack([self._quantise(matrices[number]) for number in range(experts)])

        return self.placeholder((experts, rows, columns), torch.float32, load)

    def _room(self, shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        self._kept.append(self._empty(shape, dtype=dtype))
        return self._kept[-1]

    def insert(self, model: ov.Model) -> None:
        """Replace the placeholders in a traced model by their matrices."""
        for constant in [node for node in model.get_ops() if node.get_type_name() == "Constant"]:
            load = self._waiting.pop(np.asarray(constant.data).ctypes.data, None) if constant.get_byte_size() else None
            if load is None:
                continue
            kind = constant.get_output_element_type(0)
            matrix = load().node(constant.get_friendly_name(), kind, self._room)
            for target in constant.output(0).get_target_inputs():
                target.replace_source_output(matrix)
        model.validate_nodes_and_infer_types()
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} compressed matrices have no place in the traced model")
