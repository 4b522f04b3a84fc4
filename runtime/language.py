"""The stateful language part behind transformers' generate: greedy, sampling, beams, penalties and streamers are theirs.

Takes embeddings and gives logits of the last position; the KV cache lives in the infer request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.folder import GENERATION_CONFIG_FILE, PART_FILES


@dataclass
class Past:
    """Stands for the KV cache where transformers passes one around; what it holds is in the infer request."""

    length: int

    def get_seq_length(self) -> int:
        return self.length


def keep_last_position(model: ov.Model) -> ov.Model:
    """Let the head see the last position only, in memory; the logits of a whole prompt are not wanted and take gigabytes."""
    head = model.get_results()[0].input_value(0).get_node()
    last = opset.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


class OVLanguageModel(GenerationMixin):
    """transformers' view of the language part. One generation at a time."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = False

    def __init__(
        self, folder: Path, core: ov.Core, device: str, properties: dict[str, Any], config: dict[str, Any], embed: Callable
    ):
        model = keep_last_position(core.read_model(folder / PART_FILES["language"]))
        self._request = core.compile_model(model, device, properties).create_infer_request()
        self._embed = embed
        self._order = np.zeros(1, np.int32)  # which row of the batch each row continues
        self.config = PretrainedConfig(**{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")})
        self.generation_config = GenerationConfig.from_pretrained(folder, GENERATION_CONFIG_FILE)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def can_generate(self) -> bool:
        return True

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Embeddings (B, T, D), or ids (B, T) of a later step -> logits (B, 1, V) of the last position."""
        embeds = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        assert attention_mask is not None
        assert position_ids is not None
        if past_key_values is None:
            self._request.reset_state()
            self._order = np.arange(len(embeds), dtype=np.int32)
        self._request.infer(
            {
                "inputs_embeds": embeds.numpy(),
                "attention_mask": attention_mask.numpy(),
                "position_ids": position_ids.numpy(),
                "beam_idx": self._order,
            }
        )
        self._order = np.arange(len(embeds), dtype=np.int32)
        logits = torch.from_numpy(self._request.get_tensor("logits").data).clone()
        return CausalLMOutputWithPast(logits=logits, past_key_values=Past(attention_mask.shape[1]))  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The embeddings on the first step, the last ids after it; positions count what the mask shows."""
        assert attention_mask is not None
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        inputs = {"inputs_embeds": inputs_embeds} if past_key_values is None else {"input_ids": input_ids[:, -1:]}
        length = 1 if past_key_values is not None or inputs_embeds is None else inputs_embeds.shape[1]
        return inputs | {
            "attention_mask": attention_mask,
            "position_ids": positions[:, -length:],
            "past_key_values": past_key_values,
        }

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """The cache is the infer request's."""

    def _reorder_cache(self, past_key_values: Past, beam_idx: Tensor) -> Past:
        self._order = beam_idx.numpy().astype(np.int32)
        return past_key_values
