"""transformers' generate over the language part: greedy, sampling, beams, penalties and streamers are transformers'.

Takes embeddings and gives logits of the last position; a KVCache holds keys and values of earlier tokens. Knows nothing of prompts,
pictures or files. Its import takes seconds, so model.py imports it on first use.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.answer.decode import NO_LOOKUP, Decoding, Embed, write
from runtime.answer.stream import Progress
from runtime.errors import OptionError
from runtime.parts.kv_cache import KVCache

LOOKUP = "prompt_lookup_num_tokens"  # transformers' name
ENDLESS = 1 << 40  # tokens: the stopping criteria end an answer


class OVLanguageModel(GenerationMixin):
    """transformers' view of the language part. Several threads may generate at once, each with a cache of its own."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = False

    def __init__(self, generation_config: GenerationConfig, config: dict[str, Any], embed: Embed):
        self._embed = embed
        self.config = PretrainedConfig(**{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")})
        self.generation_config = generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def generate(self, *, many_rows: bool, **options: Any) -> Any:  # type: ignore[override]
        """transformers' generate of embeddings (B, T, D) over a cache; `many_rows`: it expands a prompt to several rows.

        Raises OptionError for prompt lookup with anything but one greedy answer.
        """
        config = options.get("generation_config")
        lookup_tokens = options.pop(LOOKUP, None) or getattr(config, LOOKUP, None) or 0
        if lookup_tokens and many_rows:
            raise OptionError(NO_LOOKUP)
        if getattr(config, LOOKUP, None):  # transformers' own lookup needs a cache of its own kind
            options["generation_config"] = config = copy.copy(config)
            setattr(config, LOOKUP, None)
        return super().generate(lookup_tokens=lookup_tokens, **options)  # type: ignore[misc]

    def can_generate(self) -> bool:
        return True

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        return self.forward(**inputs)

    def forward(
        self,
        cache: KVCache,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        progress: Progress | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Embeddings (B, T, D) of a prompt under its masks (B, T), or ids (B, 1) after it -> logits (B, 1, V)."""
        if inputs_embeds is None:
            assert input_ids is not None
            ids = input_ids.numpy()
            logits = cache.feed(self._embed(ids), np.ones_like(ids), ids[0] if len(ids) == 1 else None)
        else:
            assert attention_mask is not None
            assert visual_token_mask is not None
            logits = cache.feed(inputs_embeds.numpy(), attention_mask.numpy(), None, progress, visual_token_mask.numpy())
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=cache)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cache: KVCache,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        progress: Progress | None = None,
        lookup_tokens: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """The new inputs: embeddings on the first step, the last ids after it. The cache knows the positions."""
        if past_key_values is not None:
            return {"cache": cache, "input_ids": input_ids[:, -1:]}
        return {
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "visual_token_mask": visual_token_mask,
            "progress": progress,
        }

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """transformers' loop, except for greedy decoding of one row, which is a millisecond a token faster without it."""
        config = generation_config
        if len(input_ids) > 1 or config.do_sample or config.return_dict_in_generate or len(logits_processor):
            if inputs.get("lookup_tokens"):
                raise OptionError(NO_LOOKUP)
            return super()._sample(  # type: ignore[misc]
                input_ids,  # type: ignore[arg-type]
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **inputs,
            )
        cache = inputs["cache"]
        prompt = [inputs[name].numpy() for name in ("inputs_embeds", "attention_mask", "visual_token_mask")]
        logits = cache.feed(*prompt[:2], None, inputs.get("progress"), prompt[2])
        likeliest = Decoding(ENDLESS, prompt_lookup_num_tokens=inputs.get("lookup_tokens") or 0)
        for found in write(cache, logits, self._embed, likeliest):
            token = torch.tensor([[found.id]])
            input_ids = torch.cat([input_ids, token], dim=1)
            if streamer is not None:
                streamer.put(token[0])
            if stopping_criteria(input_ids, None).all():
                break
        if streamer is not None:
            streamer.end()
        return input_ids

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: CausalLMOutputWithPast, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> dict[str, Any]:
        """Note only that there is a past: the cache keeps the mask."""
        model_kwargs["past_key_values"] = outputs.past_key_values
        return model_kwargs

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Nothing to do: the caller passes the cache."""

    def _reorder_cache(self, past_key_values: KVCache, beam_idx: Tensor) -> KVCache:
        past_key_values.reorder(beam_idx.tolist())
        return past_key_values
