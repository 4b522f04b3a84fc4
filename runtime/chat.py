"""Upstream's calls: chat, batch_chat, generate, extract_feature, over any backend.

Knows prompts, histories and which rows of an embedding are pictures; knows no device. The OpenVINO model and the PyTorch
reference are both backends, so that the same call can be driven on either.
Rules: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py. Differences: the
caller's generation_config, history and tokenizer are not changed, and marks that do not fit the pictures are an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runtime.config import InternVLConfig
from runtime.errors import PromptError
from runtime.prompt import IMAGE_MARK, Turn, expand_marks, get_template, render


class ChatModel(ABC):
    """What a backend gives, and the calls that follow from it."""

    config: InternVLConfig
    context_id: int  # of the context token
    system_message: str  # may be set

    @abstractmethod
    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> embeddings (B, T, D)."""

    @abstractmethod
    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        """Tiles (N, 3, S, S) -> context embeddings (N, P, D)."""

    @abstractmethod
    def generate_from(self, inputs_embeds: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Embeddings (B, T, D) under a mask (B, T) -> new token ids; options are those of transformers' generate."""

    @property
    def conv_template(self) -> Any:
        """The conversation template of this model."""
        return get_template(self.config.template)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Tiles (N, 3, S, S), normalised -> context embeddings (N, P, D)."""
        return self.encode_tiles(pixel_values)

    def merge(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token ids (B, T) and context embeddings (N, P, D) -> embeddings (B, T, D), features over the context tokens in order.

        Raises PromptError when there are more or fewer context tokens than rows.
        """
        embeds = self.embed_tokens(input_ids)
        here = torch.eq(input_ids, self.context_id).to(embeds.device)
        rows = embeds.new_zeros(0, embeds.shape[-1]) if features is None else features.flatten(0, 1).to(embeds)
        if int(here.sum()) != len(rows):
            raise PromptError(
                f"the prompt has {int(here.sum())} context tokens for {len(rows)} rows of picture features: "
                f"each tile takes {self.config.tokens_per_tile}"
            )
        embeds[here] = rows
        return embeds

    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> Any:
        """Token ids (B, T), left-padded under `attention_mask`, and tiles (N, 3, S, S) or their features -> new token ids.

        `generation_config` and options are transformers'. Only new tokens are returned.
        """
        if input_ids is None:
            raise PromptError("generate needs input_ids: tokenise a prompt first, or call chat")
        features = visual_features if pixel_values is None or visual_features is not None else self.extract_feature(pixel_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if generation_config is not None:
            options["generation_config"] = generation_config
        if output_hidden_states is not None:
            options["output_hidden_states"] = output_hidden_states
        return self.generate_from(self.merge(input_ids, features), mask, **options)

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: Sequence[Turn] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        *,
        verbose: bool = False,
    ) -> Any:
        """Answer `question` about the tiles (N, 3, S, S) of all pictures of the dialogue, `num_patches_list` tiles each.

        Returns the answer, or with `return_history` the answer and a new history with this turn at its end.
        """
        tiles = self._tiles_of(pixel_values, num_patches_list)
        if history is None and pixel_values is not None and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n{question}"
        prompt = expand_marks(
            render(self.conv_template, self.system_message, history or [], question), tiles, self.config.tokens_per_tile
        )
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = self.generate(
            pixel_values=pixel_values,
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            **generation_config | {"eos_token_id": self._stop_id(tokenizer)},
        )
        answer = self._answers(tokenizer, ids)[0]
        if verbose:
            print(render(self.conv_template, self.system_message, history or [], question), answer)
        return (answer, [*(history or []), (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any],
        num_patches_list: Sequence[int] | None = None,
        history: None = None,
        return_history: bool = False,
    ) -> list[str]:
        """Answer each question about its own picture, at once; `num_patches_list` has one entry a question."""
        if history is not None or return_history:
            raise NotImplementedError("batch_chat keeps no history: call chat for several turns")
        tiles = self._tiles_of(pixel_values, num_patches_list)
        if pixel_values is not None and len(tiles) != len(questions):
            raise PromptError(f"{len(questions)} questions for {len(tiles)} pictures: give one picture a question")
        prompts = []
        for n, question in enumerate(questions):
            if pixel_values is not None and IMAGE_MARK not in question:
                question = f"{IMAGE_MARK}\n{question}"
            prompt = render(self.conv_template, self.system_message, [], question)
            prompts.append(expand_marks(prompt, tiles[n : n + 1], self.config.tokens_per_tile))
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids = self.generate(
            pixel_values=pixel_values,
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            **generation_config | {"eos_token_id": self._stop_id(tokenizer)},
        )
        return self._answers(tokenizer, ids)

    def _tiles_of(self, pixel_values: Tensor | None, num_patches_list: Sequence[int] | None) -> list[int]:
        given = 0 if pixel_values is None else len(pixel_values)
        tiles = list(num_patches_list) if num_patches_list is not None else [given] if given else []
        if sum(tiles) != given:
            raise PromptError(f"num_patches_list {tiles} counts {sum(tiles)} tiles, pixel_values has {given}")
        return tiles

    def _stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return tokenizer.encode(self.conv_template.stop_token, add_special_tokens=False)[0]

    def _answers(self, tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
        texts = tokenizer.batch_decode(getattr(ids, "sequences", ids), skip_special_tokens=True)
        return [text.split(self.conv_template.stop_token)[0].strip() for text in texts]
