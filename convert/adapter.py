"""An unmerged adapter as PEFT and ms-swift save it (adapter_config.json, adapter_model) -> its change of each tensor.

LoRA with its patterns, rank-stabilised LoRA and DoRA are merged; biases and modules that were trained whole replace the model's
own. Names as huggingface/peft@v0.17.0 src/peft/utils/save_and_load.py writes them. What cannot be merged raises an error with the
reason: nothing is left out silently. Knows no other files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from convert.lora import WRAPPER, Update, check_fit, given
from convert.weight_files import load_pickle, some
from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.folder.config import read_config

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
A, B = ".lora_A.weight", ".lora_B.weight"
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
REFUSED = {  # key -> why it cannot be merged
    "fan_in_fan_out": "its matrices are transposed, which those of InternVL are not",
    "lora_bias": "its lora_B have biases",
    "layer_replication": "it repeats layers",
    "trainable_token_indices": "it trains single rows of the embedding table",
    "alora_invocation_tokens": "it applies only after certain tokens, which merged weights cannot",
    "use_qalora": "its pairs are grouped for quantised weights",
}
KEEPS_WEIGHTS = ("gaussian", "eva", "orthogonal")  # named initialisations that do not change the model's own weights


class Adapter:
    """The changes of one adapter. Raises CheckpointError, UnsupportedModelError."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a LoRA adapter, as PEFT saves it")
        self._settings = settings = read_config(folder / CONFIG)
        if settings.get("peft_type") != "LORA":
            raise UnsupportedModelError(f"{folder / CONFIG}: peft_type is {settings.get('peft_type')!r}; only LORA can be merged")
        found = [f"{name} ({why})" for name, why in REFUSED.items() if settings.get(name)]
        start = settings.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEEPS_WEIGHTS:
            found.append(f"init_lora_weights {start} (it changed the model's own weights before it was trained)")
        if found:
            raise UnsupportedModelError(
                f"{folder / CONFIG} asks for {', '.join(found)}, which cannot be merged here: merge it with PEFT"
            )
        if not isinstance(settings.get("lora_alpha"), int | float):
            raise CheckpointError(f"{folder / CONFIG} has no number lora_alpha: save the adapter again with PEFT")
        self._updates: dict[str, Update] = {}  # by the adapter's name, after fit() by stored name
        self._whole: dict[str, torch.Tensor] = {}
        self._sort(self._read())

    def _read(self) -> dict[str, torch.Tensor]:
        file = self.folder / WEIGHTS
        if not file.exists() and (self.folder / PICKLED).exists():
            return load_pickle(self.folder / PICKLED)
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): fetch the adapter again") from None

    def _sort(self, tensors: dict[str, torch.Tensor]) -> None:
        """Separate pairs, magnitudes and whole tensors. Raises CheckpointError, UnsupportedModelError."""
        strange, magnitudes = [], {}
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for full, tensor in tensors.items():
            if ".original_module." in full:  # PEFT's copy of a module that was trained whole
                continue
            name = re.sub(r"\.modules_to_save\.(default\.)?", ".", full.removeprefix(WRAPPER).replace(".base_layer.", "."))
            if name.endswith((A, B)):
                pairs.setdefault(name[: -len(A)], {})[name[-len(A) :]] = tensor
            elif name.endswith(MAGNITUDES):
                magnitudes[name.partition(".lora_magnitude_vector")[0]] = tensor
            elif ".lora_" in name:
                strange.append(full)
            else:
                self._whole[name] = tensor
        if strange:
            raise UnsupportedModelError(
                f"{self.folder} holds {some(strange)}, which cannot be merged here (embedding tables and biases of pairs): "
                "merge it with PEFT"
            )
        single = [f"{module}{next(iter(pair))}" for module, pair in pairs.items() if len(pair) == 1]
        if single or not tensors:
            raise CheckpointError(
                f"{self.folder} holds {some(single) or 'no tensors'} without the other half of the pair: save the adapter again"
            )
        for module, pair in pairs.items():
            magnitude = magnitudes.pop(module, None)
            self._updates[module + ".weight"] = Update(
                given(pair[A]),
                given(pair[B]),
                self._scale(module, len(pair[A])),
                None if magnitude is None else given(magnitude),
            )
        if magnitudes:
            raise CheckpointError(
                f"{self.folder} holds magnitudes without lora_A and lora_B, {some(sorted(magnitudes))}: save the adapter again"
            )

    def _scale(self, module: str, rank: int) -> float:
        """alpha / rank (or its square root): alpha of the first pattern that matches the module, rank of this matrix."""
        alpha = float(self._settings["lora_alpha"])
        for pattern, value in (self._settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(value)
                break
        return alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)

    def fit(self, shapes: dict[str, tuple[int, ...]], published: Callable[[str], str]) -> None:
        """Find the stored tensor of every change; names in an adapter of the language model alone lack its prefix.

        `published` gives stored and adapter names a common form. Raises CheckpointError if a tensor is missing or misshapen.
        """
        stored = {published(name): name for name in shapes}

        def own(name: str, shape: list[int]) -> str:
            found = stored.get(published(name)) or stored.get(published(f"language_model.{name}"))
            there = "no such tensor" if found is None else f"{list(shapes[found])} there"
            if found is None or [*shapes[found]] != shape:
                raise CheckpointError(f"{self.folder} adapts {name} {shape}, {there}: it is an adapter of another model")
            return found

        updates: dict[str, Update] = {}
        for name, update in self._updates.items():
            down, up = update.down().shape, update.up().shape
            place = own(name, [up[0], down[-1]])
            check_fit(name, shapes[place], tuple(down), tuple(up))
            updates[place] = update
        self._updates = updates
        self._whole = {own(name, [*tensor.shape]): tensor for name, tensor in self._whole.items()}

    def changes(self, name: str) -> bool:
        """Whether the stored tensor `name` is changed."""
        return name in self._updates or name in self._whole

    def update_alone(self, name: str) -> Update | None:
        """The pair for the stored tensor `name`, if nothing else changes the tensor."""
        return None if name in self._whole else self._updates.get(name)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Merge the adapter's change into `weight`, a copy of the stored tensor `name`."""
        if name in self._whole:
            weight.copy_(self._whole[name])
        return self._updates[name].merge(weight, weight) if name in self._updates else weight
