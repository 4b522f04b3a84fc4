"""OVInternVL and OVInternViT: opened model folders with upstream's calls on tensors, for code written for the published models.

Calls on pictures and texts are the opened model's own and need no torch; the calls here import it on first use.
Source of the calls: OpenGVLab/InternVL@2410d1d clip_benchmark/clip_benchmark/models/internvl_huggingface/modeling_internvl.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.contrast.features import Features, OpenedInternViT
from runtime.contrast.model import OpenedInternVL, Pictures, unit
from runtime.errors import PromptError
from runtime.upstream.libraries import import_torch
from runtime.upstream.model import OF_UPSTREAM

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class _AsUpstream:
    """Calls that all of upstream's models have."""

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, device: str = "CPU", **options: Any) -> Any:
        """The constructor under upstream's name; upstream's PyTorch options have no meaning here and are dropped."""
        return cls(model_dir, device, **{name: value for name, value in options.items() if name not in OF_UPSTREAM})  # type: ignore[call-arg]

    @property
    def device(self) -> torch.device:
        """The device of tensors, in and out: host memory."""
        return import_torch("device").device("cpu")

    def eval(self) -> Any:
        """Nothing to do: upstream's code calls it."""
        return self


class OVInternVL(_AsUpstream, OpenedInternVL):
    """InternVL-C and -G on devices, with upstream's calls. Arguments are those of OpenedInternVL."""

    def __call__(self, image: Tensor, text: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, S, S) and token ids (K, T), right-padded with 0 -> logits per image (N, K) and per text (K, N)."""
        torch = import_torch("the model's call")
        logits = self.logit_scale * unit(self._pixels(image, mode)) @ unit(self.encode_ids(self._texts(text))).T
        return torch.from_numpy(logits), torch.from_numpy(np.ascontiguousarray(logits.T))

    def encode_image(self, image: Tensor, mode: str) -> Tensor:
        """Pictures (N, 3, S, S) -> embeddings (N, E), not normalised."""
        return import_torch("encode_image").from_numpy(self._pixels(image, mode))

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (K, T), right-padded with 0 -> embeddings (K, E), not normalised."""
        return import_torch("encode_text").from_numpy(self.encode_ids(self._texts(text)))

    def generate(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **generation_options: Any
    ) -> Tensor:
        """Captions: pictures (N, 3, S, S) and the token ids of their prompts (N, T) -> new token ids (N R, T'), right-padded.

        `attention_mask` (N, T) is 0 on padding; R is `num_return_sequences`. Options are decoding's, by transformers' names.
        Raises PromptError unless there is one prompt a picture, OptionError.
        """
        torch = import_torch("generate")
        if len(input_ids) != len(pixel_values):
            raise PromptError(f"{len(pixel_values)} pictures and {len(input_ids)} prompts: give one for each picture")
        pixels, options = self._array(pixel_values), {"num_beams": 1} | generation_options  # transformers' default
        read = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        groups: dict[tuple[int, ...], list[int]] = {}  # pictures with the same prompt share a batch
        for number, (row, mask) in enumerate(zip(input_ids, read, strict=True)):
            groups.setdefault(tuple(row[mask.bool()].tolist()), []).append(number)
        count = options.get("num_return_sequences", 1)
        found: list[list[int]] = [[] for _ in range(count * len(pixels))]
        for ids, numbers in groups.items():
            written = self.write_captions(pixels[numbers], ids, options)
            for place, number in enumerate(numbers):
                found[count * number : count * (number + 1)] = written[count * place : count * (place + 1)]
        made = torch.full((len(found), max(map(len, found))), self.config.qllama.pad_token_id)
        for row, tokens in zip(made, found, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return made

    def _pixels(self, image: Tensor, mode: str) -> np.ndarray:
        pixels, size = self._array(image), self.pictures_at_once
        return np.concatenate([self.encode_pixels(pixels[at : at + size], mode) for at in range(0, len(pixels), size)])

    def _texts(self, text: Tensor) -> list[list[int]]:
        pad = self.config.qllama.pad_token_id
        return [[token for token in row if token != pad] for row in text.tolist()]

    def _array(self, image: Tensor) -> np.ndarray:
        return image.detach().cpu().float().numpy()


class OVInternViT(_AsUpstream, OpenedInternViT):
    """InternViT on devices, with upstream's call. Arguments are those of OpenedInternVL."""

    def __call__(self, pictures: Pictures | Tensor, *, output_hidden_states: bool = False) -> Features | BaseModelOutputWithPooling:
        """Pictures from any source -> Features; a tensor (N, 3, S, S), as upstream's model takes it, -> transformers' output."""
        if not hasattr(pictures, "detach"):  # no tensor
            return self.encode_pixels(self.pixels_of(pictures), output_hidden_states=output_hidden_states)
        torch = import_torch("the model's call")
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pixels = pictures.detach().cpu().float().numpy()
        found = self.encode_pixels(pixels, output_hidden_states=output_hidden_states)
        last, states = torch.from_numpy(found.last_hidden_state), found.hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            hidden_states=None if states is None else tuple(torch.from_numpy(state) for state in states),
        )
