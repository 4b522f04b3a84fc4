"""Upstream's calls and the conversation, over any backend.

Knows prompts, histories and which rows of an embedding are pictures; knows no device. The OpenVINO model and the PyTorch
reference are both backends, so that the same call can be driven on either.
Rules: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py. Differences: the
caller's generation_config, history and tokenizer are not changed; marks that do not fit the pictures are an error; batch_chat takes
several pictures a question, and none.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runtime.config import InternVLConfig
from runtime.conversation import Conversation, Exchange
from runtime.embeddings import FeatureCache, encode_pictures, keys_of
from runtime.errors import NumericsError, OptionError, PromptError
from runtime.image import PictureTiles, Tiling
from runtime.picture import Source, open_picture
from runtime.prompt import (
    CONTEXT_TOKEN,
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    Template,
    Turn,
    expand_marks,
    frame_marks,
    picture_marks,
    render,
    template_of,
)
from runtime.stream import Progress, Statistics, after_lead, lead_ids, whole_answer
from runtime.video import DEFAULT_SEGMENTS, Bound, read_frames

LONG_KEYS = 1 << 58  # a bit that no other key uses: of tokens in prompts that are longer than the model's plain length
_prompts = count()


class ChatModel(ABC):
    """What a backend gives, and the calls that follow from it."""

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerBase
    img_context_token_id: int  # upstream's name for the id of the context token
    system_message: str  # may be set
    feature_cache: FeatureCache
    tiles_at_once: int  # handed to the vision part, which bounds its memory

    @abstractmethod
    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> embeddings (B, T, D)."""

    @abstractmethod
    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        """At most `tiles_at_once` tiles (N, 3, S, S) -> context embeddings (N, P, D)."""

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
        """Embeddings (B, T, D) under a mask (B, T), after what `cache` holds -> new ids; options are those of transformers.

        `visual_token_mask` (B, T) int64 is 1 on context tokens: for language models with visual experts.
        """

    def rest_vision(self) -> None:  # noqa: B027  a backend may have nothing to do
        """All tiles of a prompt are encoded: intermediate memory may go back."""

    def new_cache(self) -> Any:
        """A KV cache for one conversation, or None where each call computes its whole prompt."""
        return None

    def give_back(self, cache: Any) -> None:  # noqa: B027  a backend may keep none
        """A conversation is over that had this KV cache."""

    def forget(self) -> None:
        """Drop what is kept for prompts that may come again; conversations keep what is theirs."""
        self.feature_cache.clear()

    def lend_cache(self, keys: np.ndarray) -> AbstractContextManager[Any]:
        """A KV cache for one stateless call with a prompt of these keys (T,)."""
        return nullcontext()

    @property
    def conv_template(self) -> Template:
        """The conversation template of this model."""
        return template_of(self.config)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Tiles (N, 3, S, S), normalised -> context embeddings (N, P, D). Raises PromptError for tiles of another size."""
        self._check_tiles(pixel_values)
        return torch.cat([self.encode_tiles(batch) for batch in pixel_values.split(self.tiles_at_once)])

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
        if generation_config is not None:
            options["generation_config"] = generation_config
        if output_hidden_states is not None:
            options["output_hidden_states"] = output_hidden_states
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if visual_features is not None:
            return self._generate_batch(input_ids, mask, visual_features, **options)
        return self._generate(input_ids, mask, self._pictures_of(pixel_values, None), **options)

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: Sequence[Turn] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = IMAGE_START,
        IMG_END_TOKEN: str = IMAGE_END,
        IMG_CONTEXT_TOKEN: str = CONTEXT_TOKEN,
        verbose: bool = False,
    ) -> Any:
        """Answer `question` about the tiles (N, 3, S, S) of all pictures of the dialogue, `num_patches_list` tiles each.

        What an earlier call has computed of the same dialogue is not computed again. Returns the answer, or with
        `return_history` the answer and a new history with this turn at its end.
        """
        tokens = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        _check_question(question)
        pictures = self._pictures_of(pixel_values, num_patches_list)
        if history is None and pixel_values is not None and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n{question}"
        prompt = self.prompt_of(self.system_message, history or [], question, pictures, tokens)
        encoded = tokenizer(prompt, return_tensors="pt")
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
        tokenizer: PreTrainedTokenizerBase,
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
        """Answer each question about its own pictures, all at once.

        `num_patches_list` has one entry a question: the tiles of its picture, or a list with the tiles of each of its pictures,
        empty for a question about none. `image_counts` is upstream's old name for it.
        """
        if history is not None or return_history:
            raise NotImplementedError("batch_chat keeps no history: call chat for several turns")
        if image_counts is not None:
            warnings.warn("image_counts is now num_patches_list", DeprecationWarning, stacklevel=2)
            num_patches_list = image_counts
        tokens = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        for question in questions:
            _check_question(question)
        counts = _counts_of(pixel_values, questions, num_patches_list)
        pictures = iter(self._pictures_of(pixel_values, [count for sample in counts for count in sample]))
        samples = [[next(pictures) for _ in sample] for sample in counts]
        if verbose and pixel_values is not None:
            print(f"dynamic ViT batch size: {len(pixel_values)}")
        prompts = [
            self.prompt_of(
                self.system_message,
                [],
                picture_marks(len(sample)) + question if sample and IMAGE_MARK not in question else question,
                sample,
                tokens,
            )
            for question, sample in zip(questions, samples, strict=True)
        ]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)  # type: ignore[assignment]
        options = generation_config | {"eos_token_id": self._stop_id(tokenizer)}
        flat = [picture for sample in samples for picture in sample]
        return self._answers(tokenizer, self._generate(encoded["input_ids"], encoded["attention_mask"], flat, **options))

    def start_conversation(self, system: str | None = None) -> Conversation:
        """A conversation of its own; `system` is the system message, by default the model's."""
        return Conversation(self, self.system_message if system is None else system)

    def prepare(
        self,
        question: str,
        *,
        images: Source | Sequence[Source] = (),
        video: str | Path | None = None,
        max_tiles: int | None = None,
        num_segments: int = DEFAULT_SEGMENTS,
        bound: Bound | None = None,
        allow_urls: bool = True,
        progress: Progress | None = None,
    ) -> Exchange:
        """A turn without its answer: the pictures opened and cut, and a mark in the question for each.

        `images` are what runtime.picture.open_picture takes, cut into at most `max_tiles` tiles each (and a thumbnail). They stand
        at the `<image>` marks of the question, or before it. Of `video`, `num_segments` frames of its seconds `bound` stand before
        that, one tile each. `progress` hears of the frames. Raises PictureError, VideoError, PromptError, OptionError.
        """
        _check_question(question)
        tiling = Tiling.of(self.config).at_most(max_tiles)
        frames = [] if video is None else read_frames(video, num_segments, bound, progress)
        several = images if isinstance(images, list | tuple) else [images]
        pictures = [open_picture(one, allow_urls=allow_urls) for one in several]  # type: ignore[arg-type]
        cut = [PictureTiles.of_picture(frame, tiling.at_most(1)) for frame in frames]
        cut += [PictureTiles.of_picture(picture, tiling) for picture in pictures]
        if pictures and IMAGE_MARK not in question:
            question = picture_marks(len(pictures)) + question
        return Exchange(frame_marks(len(frames)) + question, "", cut)

    def answer(self, ids: Tensor, pictures: Sequence[PictureTiles], streamer: Any, **options: Any) -> None:
        """Generate after one prompt (1, T) for its streamer; `options` are those of `_generate` and of transformers."""
        mask, stop = torch.ones_like(ids), self._stop_id(self.tokenizer)
        if not many_rows(options):
            self._generate(ids, mask, pictures, streamer=streamer, eos_token_id=stop, **options)
            return
        found = self._generate(ids, mask, pictures, eos_token_id=stop, **options)  # transformers streams no beams
        streamer.put(getattr(found, "sequences", found)[0])
        streamer.end()

    def prompt_of(
        self,
        system: str,
        history: Sequence[Turn],
        question: str,
        pictures: Sequence[PictureTiles],
        tokens: tuple[str, str, str] = (IMAGE_START, IMAGE_END, CONTEXT_TOKEN),
    ) -> str:
        """The whole prompt, context tokens written out. Raises PromptError when marks and pictures do not fit."""
        prompt = render(self.conv_template, system, history, question)
        return expand_marks(prompt, [picture.count for picture in pictures], self.config.tokens_per_tile, *tokens)

    def ids_of(self, system: str, past: Sequence[Exchange], question: str, pictures: Sequence[PictureTiles]) -> Tensor:
        """Token ids (1, T) of the whole prompt. Raises PromptError when marks and pictures do not fit.

        The text is that of `prompt_of`. A context token stands for each picture while it is tokenised, because thousands of them
        take tens of milliseconds, and for each answer whose own tokens are known: they come back as they were generated, which
        need not be as the tokenizer writes them.
        """
        answers = [self._own_tokens(turn) for turn in past]
        history = [(turn.question, turn.answer if own is None else CONTEXT_TOKEN) for turn, own in zip(past, answers, strict=True)]
        text = render(self.conv_template, system, history, question)
        ids = self.tokenizer(expand_marks(text, [1] * len(pictures), 1), return_tensors="pt")["input_ids"][0]
        counts = iter([picture.count * self.config.tokens_per_tile for picture in pictures])
        known = iter([own for own in answers if own is not None])
        marks = re.findall(f"{re.escape(IMAGE_MARK)}|{re.escape(CONTEXT_TOKEN)}", text)
        first, *rest = ids.tensor_split(torch.eq(ids, self.img_context_token_id).nonzero().flatten())
        if not len(rest) == len(marks) == len(pictures) + sum(own is not None for own in answers):
            raise PromptError(f"the text has {CONTEXT_TOKEN} in it, which stands for pictures: write {IMAGE_MARK} instead")
        pieces = [first]
        for mark, piece in zip(marks, rest, strict=True):
            pieces.append(torch.full((next(counts),), self.img_context_token_id) if mark == IMAGE_MARK else next(known))
            pieces.append(piece[1:])
        return torch.cat(pieces)[None]

    def _own_tokens(self, turn: Exchange) -> Tensor | None:
        """A turn's tokens behind the lead, if they are its answer: not when it was edited, cut off in a character, or had white
        space around it."""
        own = after_lead(turn.tokens, lead_ids(self.tokenizer, self.conv_template))
        return torch.tensor(own) if own and self.tokenizer.decode(own) == turn.answer else None

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        pictures: Sequence[PictureTiles],
        *,
        cache: Any = None,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        """Prompts (B, T) and all their pictures in order -> new token ids. A single prompt computes only what no cache holds."""
        statistics = statistics or Statistics()
        statistics.prompt_tokens = ids.shape[1]
        self.check(ids, pictures, options)
        if len(ids) > 1 or not mask.all() or many_rows(options):
            features, statistics.encoded_tiles = self._encode(pictures, progress)
            rows = torch.cat([each.flatten(0, 1) for each in features]) if features else None
            return self._generate_batch(ids, mask, rows, progress=progress, **options)
        keys = self._keys(ids[0], pictures)
        with (
            nullcontext(cache) if cache is not None else self.lend_cache(keys) as cache,
            nullcontext() if cache is None else cache.busy,
        ):
            statistics.reused_tokens = reused = cache.keep(keys) if cache is not None else 0
            rows, statistics.encoded_tiles = self._rows_after(ids[0], reused, pictures, progress)
            embeds = self.merge(ids[:, reused:], rows)
            new = ids[:, reused:]
            return self.generate_from(embeds, mask[:, reused:], self._visual(new), cache=cache, progress=progress, **options)

    def _keys(self, ids: Tensor, pictures: Sequence[PictureTiles]) -> np.ndarray:
        """What each token of a prompt (T,) stands for, so that prompts can be compared with what a KV cache holds.

        Where rotary positions depend on the length of the prompt, the same token leaves other keys and values behind: then it is
        not the same.
        """
        keys = keys_of(ids.numpy(), self.img_context_token_id, pictures, self.config.tokens_per_tile)
        if self.config.plain_length is None or len(keys) <= self.config.plain_length:
            return keys
        if self.config.has_dynamic_rope:  # like nothing before it
            return LONG_KEYS + (next(_prompts) << 24) + np.arange(len(keys))
        return keys ^ LONG_KEYS

    def _generate_batch(self, ids: Tensor, mask: Tensor, rows: Tensor | None, **options: Any) -> Any:
        """Prompts (B, T) and the rows (R, D) of all their context tokens -> new token ids, with a KV cache of their own."""
        return self.generate_from(self.merge(ids, rows), mask, self._visual(ids), cache=self.new_cache(), **options)

    def _visual(self, ids: Tensor) -> Tensor:
        """Which of the tokens (B, T) stand for pictures, as int64."""
        return torch.eq(ids, self.img_context_token_id).long()

    def _encode(self, pictures: Sequence[PictureTiles], progress: Progress | None) -> tuple[list[Tensor], int]:
        features, encoded = encode_pictures(pictures, self.encode_tiles, self.tiles_at_once, self.feature_cache, progress)
        if encoded:
            self.rest_vision()
        if not all(torch.isfinite(each).all() for each in features):
            self.feature_cache.clear()
            raise NumericsError(
                "the vision part gave features that are not numbers: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return features, encoded

    def _rows_after(
        self, ids: Tensor, start: int, pictures: Sequence[PictureTiles], progress: Progress | None
    ) -> tuple[Tensor | None, int]:
        """The rows (R, D) of the context tokens of `ids` (T,) from `start` on; pictures before it are not looked at."""
        done = int(torch.eq(ids[:start], self.img_context_token_id).sum())
        wanted = list(pictures)
        while wanted and done >= wanted[0].count * self.config.tokens_per_tile:
            done -= wanted.pop(0).count * self.config.tokens_per_tile
        features, encoded = self._encode(wanted, progress)
        return (torch.cat([each.flatten(0, 1) for each in features])[done:] if features else None), encoded

    def embeddings_of(self, ids: Tensor, pictures: Sequence[PictureTiles]) -> Tensor:
        """A prompt (1, T) and its pictures -> what the language part reads, (1, T, D)."""
        return self.merge(ids, self._rows_after(ids[0], 0, pictures, None)[0])

    def merge(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Token ids (B, T) and context embeddings (R, D) or (N, P, D) -> embeddings (B, T, D), in order over the context tokens.

        Raises PromptError when there are more or fewer context tokens than rows.
        """
        rows = None if rows is None else rows.reshape(-1, rows.shape[-1])
        embeds = self.embed_tokens(ids)
        here = torch.eq(ids, self.img_context_token_id).to(embeds.device)
        self._check_rows(ids, 0 if rows is None else len(rows))
        if rows is not None:
            embeds[here] = rows.to(embeds)
        return embeds

    def check(self, ids: Tensor, pictures: Sequence[PictureTiles], options: dict[str, Any]) -> None:
        """Raise before any work what cannot be answered: OptionError, PromptError."""
        new, tiles = options.get("max_new_tokens"), sum(picture.count for picture in pictures)
        if new is not None and new < 1:
            raise OptionError(f"max new tokens {new} is not positive")
        context = self.config.context_length
        if context and ids.shape[1] >= context:
            raise PromptError(
                f"the prompt has {ids.shape[1]} tokens, {tiles * self.config.tokens_per_tile} of them for {tiles} tiles; "
                f"the model reads {context}: lower the tiles a picture (--max-tiles, max_tiles or max_num), give fewer pictures, "
                "or start a new conversation"
            )
        self._check_rows(ids, tiles * self.config.tokens_per_tile)

    def _check_rows(self, ids: Tensor, given: int) -> None:
        found = int(torch.eq(ids, self.img_context_token_id).sum())
        if found != given:
            raise PromptError(
                f"the prompt has {found} context tokens for {given} rows of picture features: "
                f"each tile takes {self.config.tokens_per_tile}"
            )

    def _stop_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
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

    def _answers(self, tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
        return [whole_answer(tokenizer, row, self.conv_template) for row in getattr(ids, "sequences", ids)]


def _check_question(question: str) -> None:
    if not question.strip():
        raise PromptError("the question is empty: write one")


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
    """Whether transformers will make several rows of one prompt: beams, or several answers."""
    config = options.get("generation_config")
    return any((options.get(name) or getattr(config, name, None) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
