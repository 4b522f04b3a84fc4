"""LoRA pairs and DoRA magnitudes, and how they are merged into their matrices.

W' = W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA: E. Hu et al. 2021, arXiv:2106.09685;
D. Kalajdzievski 2023, arXiv:2312.03732. DoRA gives each row of W' the length m: S. Liu et al. 2024, arXiv:2402.09353. Everything in
float32, one matrix at a time. Also PEFT's names in a checkpoint that was saved with its LoRA unmerged, as upstream's training does:
OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py (wrap_llm_lora).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from runtime.errors import CheckpointError

WRAPPER = "base_model.model."
PARTS = {"language": "language_model.", "vision": "vision_model."}
ROWS_AT_ONCE = 1 << 10  # of a matrix, so that they stay in the processor's caches
UPSTREAM_SCALE = 2.0  # upstream's alpha is twice the rank
UNCOPIED = re.compile(r"^(?!.*(embed|lm_head|output\.weight|\.experts\.)).*\.weight$")  # matrices that are traced where they lie
PAIR = re.compile(r"\.lora_(A|B)(?:\.default)?\.weight$")

Loader = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Update:
    """The update of a matrix (rows, columns): `down` (r, columns), `up` (rows, r); `magnitude` is the length of each row."""

    down: Loader
    up: Loader
    scale: float
    magnitude: Loader | None = None

    def merge(self, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the merged matrix to `out`, which may be of another type; computed in float32, ROWS_AT_ONCE at a time."""
        down, up = self.down().float(), self.up().float()
        lengths = None if self.magnitude is None else self.magnitude().float().flatten()
        room = torch.empty(min(len(weight), ROWS_AT_ONCE), weight.shape[1])  # allocating for each block takes longer than the rest
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            merged = room[: len(weight[rows])].copy_(weight[rows]).addmm_(up[rows], down, alpha=self.scale)
            if lengths is not None:
                merged *= (lengths[rows] / merged.norm(dim=1))[:, None]
            out[rows] = merged
        return out


class Later:
    """Matrices that are merged one at a time, when they are compressed; keyed by the address of their memory.

    Matrices merged earlier are written to disk and read again, which for a large model takes longer than all the rest.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[torch.Tensor, Update]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, weight: torch.Tensor, update: Update) -> None:
        """Register a matrix with its update."""
        self._waiting[weight.data_ptr()] = weight, update

    def move(
        self, weight: torch.Tensor, parts: Iterable[torch.Tensor], split: Callable[[torch.Tensor], list[torch.Tensor]]
    ) -> None:
        """If a matrix is registered, register instead the parts into which `split` cut its rows."""
        _, update = self._waiting.pop(weight.data_ptr(), (None, None))
        if update is None:
            return
        ups = split(update.up())
        lengths = [None] * len(ups) if update.magnitude is None else split(update.magnitude().reshape(-1, 1))
        for part, up, length in zip(parts, ups, lengths, strict=True):
            self.add(part, replace(update, up=given(up), magnitude=None if length is None else given(length)))

    def merge(self, address: int) -> torch.Tensor | None:
        """A merged copy of the matrix at this address; None if none is registered."""
        weight, update = self._waiting.pop(address, (None, None))
        return None if weight is None or update is None else update.merge(weight, torch.empty_like(weight))


def given(tensor: torch.Tensor) -> Loader:
    """A loader of a tensor in memory."""
    return lambda: tensor


def unwrap(names: Iterable[str]) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Names of a checkpoint -> stored name by the name without PEFT's wrapping, and the LoRA pair of each adapted matrix.

    A wrapped matrix is X.base_layer.weight, in PEFT before 0.7 X.weight. Raises CheckpointError for half of a pair.
    """
    plain: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    for stored in names:
        name = stored
        for part in PARTS.values():
            if name.startswith(part + WRAPPER):
                name = part + name.removeprefix(part + WRAPPER)
        found = PAIR.search(name)
        if found:
            halves.setdefault(name[: found.start()] + ".weight", {})[found[1]] = stored
        else:
            plain[name.replace(".base_layer.", ".")] = stored
    single = [next(iter(half.values())) for half in halves.values() if len(half) == 1]
    if single:
        raise CheckpointError(
            f"{len(single)} adapted matrices have a lora_A without lora_B, or the other way round, like {single[0]}: "
            "save the checkpoint again"
        )
    return plain, {name: (half["A"], half["B"]) for name, half in halves.items()}


def check_fit(name: str, weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> None:
    """Raise CheckpointError unless `up` @ `down` has the shape of the matrix."""
    if len(down) != 2 or len(up) != 2 or up[1] != down[0] or (up[0], down[1]) != tuple(weight):
        raise CheckpointError(
            f"the LoRA of {name} {list(weight)} does not fit it: A is {list(down)}, B {list(up)}; "
            "it was trained on another model, or is damaged"
        )


def ranks(shapes: dict[str, tuple[int, ...]], pairs: dict[str, tuple[str, str]]) -> dict[str, list[int]]:
    """The ranks of the adapted matrices of each part, ascending."""
    return {
        part: sorted({shapes[down][0] for name, (down, _) in pairs.items() if name.startswith(prefix)})
        for part, prefix in PARTS.items()
    }
