"""Checkpoints published in four bits: AWQ, GPTQ, and MXFP4 of GPT-OSS's experts.

Numbers are repacked and never rounded again. Layouts: InternLM/lmdeploy@1263d5c lmdeploy/lite/quantization/modules/linear.py (AWQ,
version gemm), AutoGPTQ/AutoGPTQ@v0.7.1 auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (GPTQ),
huggingface/transformers@v5.5.4 src/transformers/integrations/mxfp4.py. Knows names and sizes; opens no files itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convert.four_bits import BITS, FourBits, Matrices
from convert.weight_files import Shapes, some
from runtime.errors import CheckpointError

EACH = 8  # numbers in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in an int32, lowest bits first
MIDDLE = 8  # the zero point of symmetric numbers
SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")

Open = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """The quantization_config of a checkpoint."""

    method: str  # awq or gptq
    group_size: int  # -1: one group per row
    kept: tuple[str, ...]  # substrings of the names of modules that are not quantised
    stored_less: int  # by how much stored zeros are too small

    def __str__(self) -> str:
        groups = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.method.upper()}, four bits, {groups}"


def read_recipe(raw: Mapping[str, Any]) -> Recipe | None:
    """The recipe in config.json, None if the checkpoint is not packed. Raises CheckpointError for an unsupported one."""
    said = raw.get("quantization_config") or (raw.get("llm_config") or {}).get("quantization_config")
    if not said or str(said.get("quant_method")).lower() == "mxfp4":  # find_mxfp4 needs only names and shapes
        return None
    method, version = str(said.get("quant_method")).lower(), str(said.get("version", "gemm")).lower()
    bits, group = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size", 128))
    for key, found, right in (
        ("quant_method", method, ("awq", "gptq")),
        ("bits", bits, (BITS,)),
        ("version", version if method == "awq" else "gemm", ("gemm",)),
    ):
        if found not in right:
            wanted = " and ".join(map(str, right))
            raise CheckpointError(
                f"config.json: quantization_config.{key} is {found!r}, expected {wanted}: convert the unquantised checkpoint"
            )
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group < 1):
        raise CheckpointError(f"config.json: quantization_config.group_size is {group!r}, expected a positive number or -1")
    second = str(said.get("checkpoint_format", "gptq")) == "gptq_v2"
    kept = tuple(said.get("modules_to_not_convert") or ())
    return Recipe(method, group, kept, 1 if method == "gptq" and not second else 0)


@dataclass(frozen=True)
class Packed:
    """One packed matrix of a checkpoint: its stored tensors and its shape (rows, columns)."""

    name: str  # of the matrix, published
    stored: Mapping[str, str]  # suffix -> name in the files
    shape: tuple[int, int]
    recipe: Recipe

    def load(self, open_: Open) -> FourBits:
        """Read the matrix."""
        packed = open_(self.stored[".qweight"])
        scales = open_(self.stored[".scales"]).t().to(torch.float16).contiguous()
        if self.recipe.method == "awq":
            codes = _pairs_of_rows(packed, AWQ_ORDER).t().contiguous()
        else:  # an int32 holds eight inputs in order: four bytes of two
            codes = packed.t().contiguous().view(torch.uint8)
        return FourBits(codes, self._zeros(open_, scales), scales)

    def check(self, open_: Open) -> None:
        """Raise CheckpointError for groups of columns that are not contiguous, and for zeros that exceed four bits."""
        scales = open_(self.stored[".scales"])
        if ".g_idx" in self.stored:
            group, columns = open_(self.stored[".g_idx"]), self.shape[1]
            if not torch.equal(group.long(), torch.arange(columns) // (columns // len(scales))):
                raise CheckpointError(
                    f"{self.name}: g_idx is out of order (desc_act), and OpenVINO stores groups of adjacent columns only: "
                    "convert the unquantised checkpoint"
                )
        highest = int(self._zeros(open_, scales.t()).max())
        if highest >= 1 << BITS:
            raise CheckpointError(
                f"{self.name}: a zero point is {highest}, more than four bits hold: convert the unquantised checkpoint"
            )

    def _zeros(self, open_: Open, scales: torch.Tensor) -> torch.Tensor:
        """The zeros of all groups, in the shape of `scales`."""
        if ".qzeros" not in self.stored:
            return torch.full_like(scales, MIDDLE, dtype=torch.uint8)
        order = AWQ_ORDER if self.recipe.method == "awq" else range(EACH)
        return (_nibbles(open_(self.stored[".qzeros"]), order).t() + self.recipe.stored_less).contiguous()


def _pairs_of_rows(packed: torch.Tensor, order: Iterable[int]) -> torch.Tensor:
    """int32 (rows, columns / 8) -> uint8 (rows / 2, columns): a byte holds two rows, the first in its lower half."""
    upper, lower = packed[1::2].contiguous().view(torch.uint8), packed[0::2].contiguous().view(torch.uint8)
    upper, lower = (each.unflatten(-1, (-1, EACH // 2)) for each in (upper, lower))  # (rows / 2, columns / 8, 4)
    out = lower.new_empty((*lower.shape[:2], EACH))
    for place, column in enumerate(order):
        first, second = lower[..., place // 2], upper[..., place // 2]
        out[..., column] = (first >> BITS) | (second & 240) if place % 2 else (first & 15) | (second << BITS)
    return out.flatten(-2)


def _nibbles(packed: torch.Tensor, order: Iterable[int]) -> torch.Tensor:
    """int32 (rows, columns / 8) -> uint8 (rows, columns); `order` gives the column of each four bits, lowest first."""
    octets = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, EACH // 2))
    out = octets.new_empty((*packed.shape, EACH))
    for place, column in enumerate(order):
        half = octets[..., place // 2]
        out[..., column] = half >> BITS if place % 2 else half & 15
    return out.flatten(-2)


def find_packed(
    stored: dict[str, list[str]], shapes: Shapes, dtypes: Mapping[str, str], recipe: Recipe | None
) -> dict[str, Packed]:
    """The packed matrices of a checkpoint, by the name of the matrix; removes their tensors from `stored`.

    Raises CheckpointError for wrong sizes, missing tensors, and matrices that should be packed and are not.
    """
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    if not modules:
        if recipe is not None:
            raise CheckpointError(
                f"config.json: quantization_config says {recipe}, but no tensor is packed: remove it, or fetch the packed weights"
            )
        return {}
    if recipe is None:
        raise CheckpointError(
            f"{len(modules)} matrices are packed ({some(modules)}), but config.json has no quantization_config: "
            "fetch config.json again"
        )
    found = {}
    for module in modules:
        own = {suffix: stored.pop(module + suffix)[0] for suffix in SUFFIXES if module + suffix in stored}
        found[module + ".weight"] = Packed(module + ".weight", own, _shape(module, own, shapes, dtypes, recipe), recipe)
    left = [
        name
        for name in stored
        if name.startswith("language_model.")
        and ".layers." in name
        and name.endswith(".weight")
        and len(shapes[stored[name][0]]) == 2
    ]
    strange = [name for name in left if not any(part in name for part in recipe.kept)]
    if strange:
        raise CheckpointError(
            f"{len(strange)} matrices are not packed as the others are ({some(strange)}), and modules_to_not_convert does not name "
            "them: the files come from two checkpoints"
        )
    return found


def _shape(module: str, own: Mapping[str, str], shapes: Shapes, dtypes: Mapping[str, str], recipe: Recipe) -> tuple[int, int]:
    """Rows and columns of a packed matrix. Raises CheckpointError if its tensors do not fit each other."""
    if ".scales" not in own:
        raise CheckpointError(f"{module} has a qweight but no scales: fetch the checkpoint again")
    given = {suffix: [*shapes[name]] for suffix, name in own.items()}
    weight, scales = given[".qweight"], given[".scales"]
    told = f"{module}: " + ", ".join(f"{suffix[1:]} {shape}" for suffix, shape in given.items())
    kinds = {suffix: dtypes[name] for suffix, name in own.items()}
    if any(kinds.get(suffix, "I32") != "I32" for suffix in (".qweight", ".qzeros")):
        raise CheckpointError(f"{module}: qweight and qzeros are {kinds['.qweight']} and {kinds.get('.qzeros')}, expected I32")
    if len(weight) != 2 or len(scales) != 2:
        raise CheckpointError(f"{told}: expected two axes each")
    columns, rows = (weight[0], weight[1] * EACH) if recipe.method == "awq" else (weight[0] * EACH, weight[1])
    groups = 1 if recipe.group_size == -1 else columns // recipe.group_size
    fits = columns % groups == 0 if groups else False
    right = {".scales": [groups, rows], ".qzeros": [groups, rows // EACH], ".g_idx": [columns]}
    if not fits or any(given[suffix] != shape for suffix, shape in right.items() if suffix in given):
        raise CheckpointError(f"{told} do not fit {recipe}: the files are broken or of another config.json")
    return rows, columns


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # the sign is the highest of four bits
BIAS = 127  # of e8m0
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4:
    """Joined experts as GPT-OSS publishes them: blocks (E, rows, G, 16) uint8, each with a scale (E, rows, G) uint8.

    A block is 32 e2m1 numbers, two a byte, the first in the lower half, times 2 ** (scale - 127). Format: OCP Microscaling
    Formats (MX) v1.0; layout: huggingface/transformers@v5.5.4 src/transformers/integrations/mxfp4.py
    """

    name: str
    stored: tuple[str, str]  # blocks and scales
    shape: tuple[int, int, int]  # E, columns, rows, as they are published unpacked

    def load(self, open_: Open) -> torch.Tensor:
        """All experts (E, columns, rows) in bfloat16, which represents every number exactly."""
        single = self.single(open_)
        return torch.stack([single[number] for number in range(self.shape[0])]).transpose(1, 2)

    def single(self, open_: Open) -> Matrices:
        """Matrices (rows, columns) bfloat16, unpacked on access."""
        return _Unpacked(*(open_(name) for name in self.stored))


class _Unpacked:
    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor):
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, number: int, /) -> torch.Tensor:
        halves = torch.stack([self._blocks[number] & 15, self._blocks[number] >> BITS], dim=-1).flatten(-2).long()
        values = torch.cat([E2M1, -E2M1])[halves]
        powers = torch.exp2(self._scales[number].float() - BIAS)
        return (values * powers[..., None]).flatten(-2).to(torch.bfloat16)


def find_mxfp4(stored: dict[str, list[str]], shapes: Shapes, dtypes: Mapping[str, str]) -> dict[str, Mxfp4]:
    """The joined experts in MXFP4 of a checkpoint, by their unpacked names; removes their tensors from `stored`.

    Raises CheckpointError for blocks and scales that do not fit each other.
    """
    found = {}
    for name in [name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)]:
        if name + BLOCK_SCALES not in stored:
            raise CheckpointError(f"{name} has blocks but no scales: fetch the checkpoint again")
        own = stored.pop(name + BLOCKS)[0], stored.pop(name + BLOCK_SCALES)[0]
        blocks, scales = (shapes[part] for part in own)
        if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3] or {dtypes[part] for part in own} != {"U8"}:
            told = f"blocks {[*blocks]} {dtypes[own[0]]} and scales {[*scales]} {dtypes[own[1]]}"
            raise CheckpointError(f"{name}: {told} are not MXFP4, expected U8 (E, rows, G, 16) and (E, rows, G): fetch it again")
        found[name] = Mxfp4(name, own, (blocks[0], blocks[2] * 32, blocks[1]))
    return found
