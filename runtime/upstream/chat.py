"""Upstream's calls over any backend: chat, batch_chat, generate, extract_feature, on torch tensors and transformers' options.

Knows tensors, histories as pairs of texts, and transformers' generate; the chat core places image features and reuses KV caches.
Imports torch and transformers when a call is first used.
Rules: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py. Differences: the
caller's generation_config, history and tokenizer are not changed; marks that do not match the pictures are an error; batch_chat
takes several pictures a question, or none.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.answer.chat_core import Prompt
from runtime.answer.chat_model import ChatModel
from runtime.answer.prompt import (
    CONTEXT_TOKEN,
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    check_question,
    expand_marks,
    picture_marks,
    render,
)
from runtime.answer.stream import after_lead
from runtime.errors import OptionError, PromptError
from runtime.folder.tokenizer import Tokenizer, check_text
from runtime.media.tiles import PictureTiles
from runtime.progress import Progress
from runtime.upstream.libraries import import_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class UpstreamCalls(ChatModel):
    """The calls, for a backend that can hand a prompt to transformers' generate."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of returned tensors."""

    @abstractmethod
    def generate_from(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        visual_token_mask: Tensor,
        cache: Any = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        """Embeddings (B, T, D) under a mask (B, T), after the tokens in `cache` -> new token ids; options are transformers'.

        `visual_token_mask` (B, T) int64 is 1 on context tokens: for language models with visual experts.
        """

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Tiles (N, 3, S, S), normalised -> context embeddings (N, P, D). Raises PromptError for tiles of another size."""
        torch = import_torch("extract_feature")
        self._check_tiles(pixel_values)
        batches = [_array(batch) for batch in pixel_values.split(self.tiles_at_once)]
        return torch.from_numpy(np.concatenate([self.encode_tiles(batch) for batch in batches])).to(self.device)

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
        torch = import_torch("generate")
        if input_ids is None:
            raise PromptError("generate needs input_ids: tokenise a prompt first, or call chat")
        if generation_config is not None:
            options["generation_config"] = generation_config
        if output_hidden_states is not None:
            options["output_hidden_states"] = output_hidden_states
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if visual_features is not None:
            return self._generate_batch(input_ids, mask, _array(visual_features), **options)
        return self._generate(input_ids, mask, self._pictures_of(pixel_values, None), **options)

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = IMAGE_START,
        IMG_END_TOKEN: str = IMAGE_END,
        IMG_CONTEXT_TOKEN: str = CONTEXT_TOKEN,
        verbose: bool = False,
    ) -> Any:
        """Answer `question` about the tiles (N, 3, S, S) of all pictures of the dialogue, `num_patches_list` tiles each.

        Tokens that an earlier call of the same dialogue has computed are reused. Returns the answer, or with
        `return_history` the answer and a new history that ends with this turn.
        """
        tokens = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        import_torch("chat")
        check_question(question)
        pictures = self._pictures_of(pixel_values, num_patches_list)
        if history is None and pixel_values is not None and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n{question}"
        prompt = self.prompt_text(self.system_message, history or [], question, pictures, tokens)
        encoded = _encoded(tokenizer, prompt)
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)  # type: ignore[assignment]
        options = generation_config | {"eos_token_id": self._stop_id(tokenizer)}
        ids = self._generate(encoded["input_ids"], encoded["attention_mask"], pictures, **options)
        answer = self._answers(tokenizer, ids)[0]
        if verbose:
            if pixel_values is not None:
                print(f"dynamic ViT batch size: {len(pixel_values)}")
            print(prompt.replace(IMG_CONTEXT_TOKEN, "").replace(IMG_START_TOKEN + IMG_END_TOKEN, IMAGE_MARK), answer)
        return (answer, [*(history or []), (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        pixel_values: Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any],
        num_patches_list: Sequence[int | Sequence[int]] | None = None,
        history: None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = IMAGE_START,
        IMG_END_TOKEN: str = IMAGE_END,
        IMG_CONTEXT_TOKEN: str = CONTEXT_TOKEN,
        verbose: bool = False,
        image_counts: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer each question about its own pictures, in one batch.

        `num_patches_list` has one entry a question: the tiles of its picture, or a list with the tiles of each of its pictures,
        empty for a question about none. `image_counts` is upstream's old name for it.
        """
        import_torch("batch_chat")
        if history is not None or return_history:
            raise NotImplementedError("batch_chat keeps no history: call chat for several turns")
        if image_counts is not None:
            warnings.warn("image_counts is now num_patches_list", DeprecationWarning, stacklevel=2)
            num_patches_list = image_counts
        tokens = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        for question in questions:
            check_question(question)
        counts = _counts_of(pixel_values, questions, num_patches_list)
        pictures = iter(self._pictures_of(pixel_values, [count for sample in counts for count in sample]))
        samples = [[next(pictures) for _ in sample] for sample in counts]
        if verbose and pixel_values is not None:
            print(f"dynamic ViT batch size: {len(pixel_values)}")
        prompts = [
            self.prompt_text(
                self.system_message,
                [],
                picture_marks(len(sample)) + question if sample and IMAGE_MARK not in question else question,
                sample,
                tokens,
            )
            for question, sample in zip(questions, samples, strict=True)
        ]
        encoded = _encoded(tokenizer, prompts)
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)  # type: ignore[assignment]
        options = generation_config | {"eos_token_id": self._stop_id(tokenizer)}
        flat = [picture for sample in samples for picture in sample]
        return self._answers(tokenizer, self._generate(encoded["input_ids"], encoded["attention_mask"], flat, **options))

    def prompt_text(
        self,
        system: str,
        history: Sequence[tuple[str, str]],
        question: str,
        pictures: Sequence[PictureTiles],
        tokens: tuple[str, str, str] = (IMAGE_START, IMAGE_END, CONTEXT_TOKEN),
    ) -> str:
        """The whole prompt, with its context tokens. Raises PromptError if marks and pictures do not match."""
        prompt = render(self.conv_template, system, history, question)
        return expand_marks(prompt, [picture.count for picture in pictures], self.config.tokens_per_tile, *tokens)

    def _generate(self, ids: Tensor, mask: Tensor, pictures: Sequence[PictureTiles], **options: Any) -> Any:
        """Prompts (B, T) and all their pictures in order -> new token ids. A single prompt computes only what no KV cache holds."""
        torch = import_torch("generate")
        new_tokens, plain = options.get("max_new_tokens"), _array(ids)
        if new_tokens is not None and new_tokens < 1:
            raise OptionError(f"max new tokens {new_tokens} is not positive")
        self.check(Prompt(plain, pictures))
        self.settle()
        if len(ids) > 1 or not mask.all() or many_rows(options):
            if self.flash is None:
                return self._generate_batch(ids, mask, self.rows_of([Prompt(plain, pictures)])[0], **options)
            prompts = [self.route(prompt) for prompt in self._rows_of_batch(plain, _array(mask), pictures)]
            padded = _padded([prompt.ids.tolist() for prompt in prompts])
            return self._generate_batch(padded["input_ids"], padded["attention_mask"], self.rows_of(prompts)[0], **options)
        prompt = self.route(Prompt(plain[0], pictures))
        keys = self.keys(prompt)
        with self.lend_cache(keys) as cache, cache.busy:
            reused = cache.keep(keys)
            rows, _ = self.rows_after(prompt, reused, None)
            new = prompt.ids[None, reused:]
            embeds, visual = torch.from_numpy(self.merge(new, rows)), torch.from_numpy(self.visual(new))
            return self.generate_from(embeds, torch.ones_like(visual), visual, cache=cache, **options)

    def _rows_of_batch(self, ids: np.ndarray, mask: np.ndarray, pictures: Sequence[PictureTiles]) -> list[Prompt]:
        """Prompts (B, T) and all their tiles in order -> a prompt a row. Raises PromptError for a row with an incomplete tile."""
        tiles = (PictureTiles((key,), each.pixels[n : n + 1]) for each in pictures for n, key in enumerate(each.tile_keys))
        prompts = []
        for row, seen in zip(ids, mask, strict=True):
            own = row[seen == 1]
            count = int((own == self.img_context_token_id).sum()) // self.config.tokens_per_tile
            prompts.append(Prompt(own, [*islice(tiles, count)]))
            self.check(prompts[-1])
        return prompts

    def _generate_batch(self, ids: Tensor, mask: Tensor, rows: np.ndarray | None, **options: Any) -> Any:
        """Prompts (B, T) and the image features (R, D) of their context tokens -> new token ids, with a KV cache of their own."""
        torch, plain = import_torch("generate"), _array(ids)
        embeds, visual = torch.from_numpy(self.merge(plain, rows)), torch.from_numpy(self.visual(plain))
        return self.generate_from(embeds, mask, visual, **options)

    def _stop_id(self, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> int:
        return tokenizer.encode(self.conv_template.stop_token, add_special_tokens=False)[0]

    def _check_tiles(self, pixel_values: Tensor) -> None:
        side = self.config.tile_size
        if pixel_values.shape[1:] != (3, side, side):
            found = tuple(pixel_values.shape)
            raise PromptError(
                f"pixel_values is {found}, this model takes (N, 3, {side}, {side}): load_image(..., input_size={side})"
            )

    def _pictures_of(self, pixel_values: Tensor | None, num_patches_list: Sequence[int] | None) -> list[PictureTiles]:
        """Tiles (N, 3, S, S) of several pictures -> the pictures; without a list, one picture. Raises PromptError."""
        given = 0 if pixel_values is None else len(pixel_values)
        counts = list(num_patches_list) if num_patches_list is not None else [given] if given else []
        if sum(counts) != given:
            raise PromptError(f"num_patches_list {counts} counts {sum(counts)} tiles, pixel_values has {given}")
        if pixel_values is None:
            return []
        self._check_tiles(pixel_values)
        return [PictureTiles.of_tiles(tiles.float().cpu().numpy()) for tiles in pixel_values.split(counts)]

    def _answers(self, tokenizer: PreTrainedTokenizerBase | Tokenizer, ids: Any) -> list[str]:
        """New token ids -> answers as upstream decodes them, without the template's lead."""
        found, template = getattr(ids, "sequences", ids).tolist(), self.conv_template
        lead = tokenizer.encode(template.lead, add_special_tokens=False) if template.lead else []
        texts = [str(tokenizer.decode(after_lead(row, lead), skip_special_tokens=True)) for row in found]
        return [text.split(template.stop_token)[0].strip() for text in texts]


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor in host memory as an array; bfloat16, which NumPy does not have, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _encoded(tokenizer: PreTrainedTokenizerBase | Tokenizer, prompts: str | list[str]) -> dict[str, Tensor]:
    """Prompts -> input_ids and attention_mask (B, T), left-padded."""
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        check_text(prompt)
    if not isinstance(tokenizer, Tokenizer):
        padding = {} if isinstance(prompts, str) else {"padding": True, "padding_side": "left"}
        return tokenizer(prompts, return_tensors="pt", **padding)
    return _padded([tokenizer.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)])


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Token ids of several prompts -> input_ids and attention_mask (B, T), left-padded."""
    torch, longest = import_torch("chat"), max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])}


def _counts_of(
    pixel_values: Tensor | None, questions: Sequence[str], num_patches_list: Sequence[int | Sequence[int]] | None
) -> list[list[int]]:
    """Tiles of each picture of each question. Raises PromptError."""
    if num_patches_list is None:
        if pixel_values is None:
            return [[] for _ in questions]
        num_patches_list = [len(pixel_values)]
    if len(num_patches_list) != len(questions):
        raise PromptError(
            f"{len(questions)} questions for {len(num_patches_list)} pictures: num_patches_list needs one entry a question, "
            "a list where a question has several pictures or none"
        )
    return [[entry] if isinstance(entry, int) else list(entry) for entry in num_patches_list]


def many_rows(options: dict[str, Any]) -> bool:
    """Whether transformers expands one prompt to several rows: beams, or several answers."""
    config = options.get("generation_config")
    return any((options.get(name) or getattr(config, name, None) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
