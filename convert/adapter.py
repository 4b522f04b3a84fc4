"""An unmerged LoRA adapter (PEFT's adapter_config.json and adapter_model.safetensors) -> what it adds to each matrix.

W' = W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised ones: E. Hu et al. 2021, arXiv:2106.09685;
D. Kalajdzievski 2023, arXiv:2312.03732. Names as huggingface/peft@v0.17.0 src/peft/utils/save_and_load.py writes them. Other kinds
of adapter, and what LoRA can carry besides, are refused by name: nothing is left out silently. Knows no other files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.folder.config import read_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
REFUSED = (
    "use_dora",
    "modules_to_save",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
KEEPS_WEIGHTS = ("gaussian", "eva")  # named ways to start that leave the model's own weights as they are; others change them


class Adapter:
    """The matrices of one adapter and what they are scaled by. Raises CheckpointError, UnsupportedModelError."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a LoRA adapter, as PEFT saves it")
        settings = read_config(folder / CONFIG)
        if settings.get("peft_type") != "LORA":
            raise UnsupportedModelError(f"{folder / CONFIG}: peft_type is {settings.get('peft_type')!r}; only LORA can be merged")
        found = [name for name in REFUSED if settings.get(name)]
        if settings.get("bias", "none") != "none":
            found.append("bias")
        start = settings.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEEPS_WEIGHTS:
            found.append(f"init_lora_weights {start}")
        if found:
            raise UnsupportedModelError(
                f"{folder / CONFIG} asks for {', '.join(found)}, which cannot be merged here: merge it with PEFT"
            )
        if not isinstance(settings.get("lora_alpha"), int | float):
            raise CheckpointError(f"{folder / CONFIG} has no lora_alpha, a number: it is not the file that PEFT saved")
        self._alpha, self._root = float(settings["lora_alpha"]), 0.5 if settings.get("use_rslora") else 1.0
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}): fetch the adapter again") from None
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, down in tensors.items():
            if name.endswith(A) and name.removesuffix(A) + B in tensors:
                self._pairs[name.removesuffix(A).removeprefix(PREFIX) + ".weight"] = (down, tensors[name.removesuffix(A) + B])
        strange = [name for name in tensors if not name.endswith((A, B))]
        if strange or 2 * len(self._pairs) != len(tensors):
            other = strange or sorted(tensors)
            raise UnsupportedModelError(f"{folder / WEIGHTS} holds more than pairs of lora_A and lora_B: {', '.join(other[:3])}")

    def fit(self, shapes: dict[str, tuple[int, ...]], published: Callable[[str], str]) -> None:
        """Find the stored tensor of every pair; an adapter of the language model alone names them from there on.

        `published` gives stored and adapter names a common form. Raises CheckpointError when one has no tensor or another shape.
        """
        stored = {published(name): name for name in shapes}
        pairs, self._pairs = self._pairs, {}
        for name, (down, up) in pairs.items():
            own = stored.get(published(name)) or stored.get(published(f"language_model.{name}"))
            if own is None or shapes[own] != (up.shape[0], down.shape[1]):
                wanted = "no such tensor" if own is None else f"{list(shapes[own])} there"
                raise CheckpointError(
                    f"{self.folder} adapts {name} [{up.shape[0]}, {down.shape[1]}], {wanted}: it is an adapter of another model"
                )
            self._pairs[own] = (down, up)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The stored tensor `name` (rows, columns) with what the adapter adds, in its own type; others are returned as they are."""
        if name not in self._pairs:
            return weight
        down, up = (tensor.float() for tensor in self._pairs[name])
        return (weight.float() + self._alpha / len(down) ** self._root * (up @ down)).to(weight.dtype)
