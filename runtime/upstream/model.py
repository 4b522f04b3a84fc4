"""OVInternVLChatModel: an opened model folder with upstream's calls, for code written for the published models.

Conversations and batches of questions are the opened model's own and need no torch; the calls in chat.py import it on first use.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.answer.model import OpenedModel
from runtime.folder.files import GENERATION_CONFIG_FILE
from runtime.parts.kv_cache import KVCache
from runtime.progress import Progress
from runtime.upstream.chat import UpstreamCalls, many_rows
from runtime.upstream.libraries import import_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig

    from runtime.upstream.generation import OVLanguageModel

OF_UPSTREAM = {"torch_dtype", "dtype", "low_cpu_mem_usage", "use_flash_attn", "trust_remote_code", "attn_implementation"}


class OVInternVLChatModel(UpstreamCalls, OpenedModel):
    """A model folder on devices, with upstream's calls and conversations. Arguments are those of OpenedModel."""

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, device: str = "CPU", **options: Any) -> OVInternVLChatModel:
        """The constructor under upstream's name; upstream's PyTorch options have no meaning here and are dropped."""
        return cls(model_dir, device, **{name: value for name, value in options.items() if name not in OF_UPSTREAM})

    @property
    def device(self) -> torch.device:
        """The device of tensors, in and out: host memory."""
        return import_torch("device").device("cpu")

    def eval(self) -> OVInternVLChatModel:
        """Nothing to do: upstream's code calls it."""
        return self

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """transformers' view of generation_config.json, the defaults of `generate`; may be changed."""
        import_torch("generation_config")
        from transformers import GenerationConfig

        there = (self.folder / GENERATION_CONFIG_FILE).exists()
        return GenerationConfig.from_pretrained(self.folder, GENERATION_CONFIG_FILE) if there else GenerationConfig()

    @cached_property
    def language_model(self) -> OVLanguageModel:
        """transformers' view of the language part."""
        import_torch("generate")
        from runtime.upstream.generation import OVLanguageModel

        return OVLanguageModel(self.generation_config, self.config.language, self.embed_tokens)

    def generate_from(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        visual_token_mask: Tensor,
        cache: KVCache | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        self.settle()
        written = self.language_model.generate(
            many_rows=many_rows(options),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            visual_token_mask=visual_token_mask,
            cache=self.new_cache() if cache is None else cache,
            progress=progress,
            **options,
        )
        self.rest()
        return written
