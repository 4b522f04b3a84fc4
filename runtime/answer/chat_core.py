"""The backend interface (embeddings, image features, a KV cache), and generation from a prompt with pictures over it.

Knows prompts, token ids and which embeddings are image features; knows no device and no conversation. OpenVINO's parts and the
PyTorch reference are both backends, so the same call runs on either.
Rules: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from runtime.answer.boxes import locate_question
from runtime.answer.decode import Decoding, Rule, Token, write, write_beams, write_rows
from runtime.answer.features import FeatureCache, TileFeatures, encode_pictures, keys_of
from runtime.answer.flash import choose_few, cut_ids
from runtime.answer.grammar import Grammars
from runtime.answer.prompt import CONTEXT_TOKEN, IMAGE_END, IMAGE_MARK, IMAGE_START, Template, render_pieces, template_of
from runtime.answer.stream import Statistics, after_lead, lead_ids
from runtime.answer.turn import Question, Turn
from runtime.errors import NumericsError, PromptError
from runtime.folder.config import FlashConfig, InternVLConfig
from runtime.folder.tokenizer import Tokenizer, Typed, check_text
from runtime.media.tiles import PictureTiles
from runtime.progress import Progress

LONG_KEYS = 1 << 58  # a bit that no other key uses: marks tokens of prompts longer than the model's plain length
ROUTED_BYTES = 1 << 20  # the router's probabilities of a quarter of a million tiles
_prompts = count()


@dataclass(frozen=True)
class Prompt:
    """A whole prompt as a model reads it.

    `few` tells which of its tiles have few context tokens, once the router has run (ChatCore.route); `encoded` is the number of
    tiles encoded for that, and `known` holds their features, since the cache may lack room for them.
    """

    ids: np.ndarray  # (T,) int64
    pictures: Sequence[PictureTiles]  # in the order of their context tokens
    few: np.ndarray | None = None  # (N,) bool
    encoded: int = 0
    known: Mapping[bytes, TileFeatures] = field(default_factory=dict, repr=False)

    @property
    def tiles(self) -> int:
        """Number of tiles N of all pictures."""
        return sum(picture.count for picture in self.pictures)


class ChatCore(ABC):
    """Backend and prompts. Subclasses set the attributes and implement the abstract methods."""

    config: InternVLConfig
    tokenizer: Tokenizer
    img_context_token_id: int  # upstream's name for the id of the context token
    system_message: str  # may be replaced
    feature_cache: FeatureCache[TileFeatures]
    flash: FlashConfig | None = None  # None: no router, or it is off
    tiles_at_once: int  # batch size of the vision part, bounds its memory
    generation_defaults: Mapping[str, Any]  # from generation_config.json, by transformers' names

    @abstractmethod
    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, T) -> embeddings (B, T, D) float32."""

    @abstractmethod
    def encode_tiles(self, pixel_values: np.ndarray) -> np.ndarray:
        """At most `tiles_at_once` tiles (N, 3, S, S) -> image features (N, P, D) float32."""

    def route_tiles(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, with the few image features (N, P', D) and the probability that these suffice (N,): needs a router."""
        raise NotImplementedError

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty KV cache (runtime.parts.kv_cache.KVCache or one with its calls), for one conversation or batch."""

    def settle(self) -> None:  # noqa: B027  a backend may have nothing to do
        """Called before an answer: the backend ends its background work, so that it does not compete with the answer."""

    def rest(self) -> None:  # noqa: B027
        """Called at the end of an answer."""

    def release_vision(self) -> None:  # noqa: B027
        """Called when all tiles of a prompt are encoded: intermediate memory may be released."""

    def give_back(self, cache: Any) -> None:  # noqa: B027  a backend may keep none
        """Called at the end of the conversation with this KV cache."""

    def forget(self) -> None:
        """Clear the caches for prompts that may come again; conversations keep their own."""
        self.feature_cache.clear()
        self._routed.clear()

    def lend_cache(self, keys: np.ndarray) -> AbstractContextManager[Any]:
        """A KV cache for one stateless call, for a prompt with these keys (T,)."""
        return nullcontext(self.new_cache())

    @property
    def conv_template(self) -> Template:
        """The conversation template of this model."""
        return template_of(self.config)

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.encode(self.conv_template.stop_token, add_special_tokens=False)[0]

    def decoding_of(self, options: Mapping[str, Any]) -> Decoding:
        """The decoding options from a caller's, by transformers' names, and generation_config.json. Raises OptionError.

        As in upstream's chat(), only the template's stop token ends an answer.
        """
        return Decoding.of(self.generation_defaults, {"eos_token_id": self.stop_id, **options})

    def rule_of(self, decoding: Decoding) -> Rule | None:
        """The grammar of an answer that must fit a schema or may call functions; None for any other.

        Raises OptionError for a bad schema.
        """
        if decoding.json_schema is None and decoding.calls is None:
            return None
        return self._grammars.of(decoding.json_schema, decoding.calls, thoughts=decoding.thoughts)

    @cached_property
    def _grammars(self) -> Grammars:
        ends = self.generation_defaults.get("eos_token_id", self.stop_id)
        own = {self.stop_id, *(ends if isinstance(ends, list) else [ends])}
        return Grammars(self.tokenizer, self.config.language["vocab_size"], sorted(own))

    # ---- prompts

    def open_turn(self, question: Question, progress: Progress | None = None) -> Turn:
        """The turn of a question, without its answer; `locate` becomes the question this model was trained with. Raises subclasses
        of InternVLError."""
        if question.locate:
            asked = locate_question(question.locate, marked=bool(self.tokenizer.place_ids))
            question = replace(question, text=f"{question.text}\n{asked}" if question.text else asked)
        return question.open(self.config, progress)

    def prompt_of(self, system: str, turns: Sequence[Turn]) -> Prompt:
        """The prompt that asks the last of `turns` after the others. Raises PromptError when marks and pictures do not fit.

        Typed text is plain text: special tokens spelt in it have no meaning. During tokenisation one context token stands for each
        picture, because thousands of them take tens of milliseconds, and for each answer with known tokens: these are inserted as
        they were generated, which may differ from how the tokenizer encodes the text.
        """
        *past, asked = turns
        for text in (system, *(part for turn in turns for part in (turn.question, turn.answer))):
            check_text(text)
        answers = [self._own_tokens(turn) for turn in past]
        history = [
            (turn.pieces(), Typed(turn.answer) if own is None else CONTEXT_TOKEN) for turn, own in zip(past, answers, strict=True)
        ]
        pieces = render_pieces(self.conv_template, Typed(system), history, asked.pieces(), Typed(asked.answer))
        ours = [None if isinstance(piece, Typed) else piece for piece in pieces]
        for at, piece in enumerate(ours):
            if piece == IMAGE_MARK:
                pieces[at] = IMAGE_START + CONTEXT_TOKEN + IMAGE_END
        ids = np.array(self.tokenizer.encode_pieces(pieces), np.int64)
        pictures = [picture for turn in turns for picture in turn.pictures]
        counts = iter([picture.count * self.config.tokens_per_tile for picture in pictures])
        known = iter([own for own in answers if own is not None])
        parts = np.split(ids, np.flatnonzero(ids == self.img_context_token_id))
        whole = parts[:1]
        for mark, part in zip([piece for piece in ours if piece in (IMAGE_MARK, CONTEXT_TOKEN)], parts[1:], strict=True):
            whole.append(np.full(next(counts), self.img_context_token_id) if mark == IMAGE_MARK else np.array(next(known)))
            whole.append(part[1:])
        return Prompt(np.concatenate(whole), pictures)

    def prefix_tokens(self, prompt: Prompt, turn: Turn) -> list[int]:
        """The tokens at the end of a prompt that are the answer prefix; none where they merge with the tokens before."""
        if not turn.answer:
            return []
        own = self.tokenizer.encode_pieces([Typed(turn.answer)], add_special_tokens=False)
        return own if prompt.ids[-len(own) :].tolist() == own else []

    def _own_tokens(self, turn: Turn) -> list[int] | None:
        """A turn's tokens after the lead, if they decode to its answer: not when it was edited, truncated inside a character, or
        surrounded by white space. Tokens around boxes are not in its text, and stay."""
        own = after_lead(turn.tokens, lead_ids(self.tokenizer, self.conv_template))
        return own if own and turn.answer in (self.text_without_places(own), self.tokenizer.decode(own)) else None

    def text_without_places(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens as shown, without the tokens around labels and boxes."""
        return self.tokenizer.decode([token for token in ids if token not in self.tokenizer.place_ids])

    def marked_answer(self, turn: Turn) -> str:
        """The answer of a turn with the tokens around labels and boxes, where its tokens are known; else its text."""
        own = self._own_tokens(turn)
        return turn.answer if own is None else self.tokenizer.decode(own)

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError, before any computation, for a prompt (T,) or (B, T) that cannot be answered."""
        context, length, rows = self.config.context_length, prompt.ids.shape[-1], int(self._counts(prompt).sum())
        self._check_rows(prompt.ids, rows)
        if self.flash is not None and prompt.few is None:  # the router may still give all tiles few
            fewer = prompt.tiles * (self.config.tokens_per_tile - self.config.few_per_tile)
            length, rows = length - fewer, rows - fewer
        if context and length >= context:
            raise PromptError(
                f"the prompt has {length} tokens, {rows} of them for {prompt.tiles} tiles; "
                f"the model reads {context}: lower the tiles a picture (--max-tiles, max_tiles or max_num), give fewer pictures, "
                "or start a new conversation"
            )

    def _check_rows(self, ids: np.ndarray, given: int) -> None:
        found = int((ids == self.img_context_token_id).sum())
        if found != given:
            raise PromptError(
                f"the prompt has {found} context tokens for {given} rows of picture features: "
                f"each tile takes {self.config.tokens_per_tile}"
            )

    def _counts(self, prompt: Prompt) -> np.ndarray:
        """Number of context tokens of each tile of a prompt, (N,)."""
        few = np.zeros(prompt.tiles, bool) if prompt.few is None else prompt.few
        return np.where(few, self.config.few_per_tile, self.config.tokens_per_tile)

    def route(self, prompt: Prompt, progress: Progress | None = None) -> Prompt:
        """The prompt with few context tokens for the tiles that the router chooses; unchanged without a router, or once routed.

        Raises NumericsError, and PromptError where the prompt is still too long.
        """
        if self.flash is None or prompt.few is not None:
            return prompt
        keys = [key for picture in prompt.pictures for key in picture.tile_keys]
        told = {key: self._routed.find(key) for key in keys}
        unknown = [picture for picture in prompt.pictures if any(told[key] is None for key in picture.tile_keys)]
        known, encoded = self._encode(unknown, progress)
        for key, features in known.items():
            told[key] = features.suffice
            self._routed.add(key, features.suffice)
        few = choose_few(np.array([told[key] for key in keys], np.float32), self.flash)
        ids = cut_ids(prompt.ids, self.img_context_token_id, few, self.config.tokens_per_tile, self.config.few_per_tile)
        routed = replace(prompt, ids=ids, few=few, encoded=encoded, known=known)
        self.check(routed)
        return routed

    @cached_property
    def _routed(self) -> FeatureCache[np.float32]:
        """The router's probabilities by tile: later turns need those of all tiles again."""
        return FeatureCache(ROUTED_BYTES)

    # ---- tokens

    def tokens(
        self,
        prompt: Prompt,
        decoding: Decoding,
        cache: Any = None,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Token]:
        """The tokens of one answer as they are chosen; prefill skips what the KV cache holds of the prompt.

        With beam search all tokens come at the end. Raises PromptError, NumericsError, and Cancelled out of `progress`.
        """
        self.check(prompt)
        if decoding.num_beams > 1:
            yield from self.answers([prompt], decoding, statistics, progress)[0]
            return
        rule = self.rule_of(decoding)
        try:
            with self.prefilled(prompt, cache, statistics, progress) as (own, logits):
                own.repeatable = decoding.seed is not None
                yield from write(own, logits, self.embed_tokens, decoding, rule)
        finally:  # the caller stops at the token that ends the answer
            self.rest()

    @contextmanager
    def prefilled(
        self, prompt: Prompt, cache: Any = None, statistics: Statistics | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """A KV cache after prefill of the prompt, the given one or a lent one, and the logits (1, 1, V) of its last token."""
        self.settle()
        prompt = self.route(prompt, progress)
        statistics, ids = statistics or Statistics(), prompt.ids
        statistics.prompt_tokens = len(ids)
        keys = self.keys(prompt)
        with nullcontext(cache) if cache is not None else self.lend_cache(keys) as cache, cache.busy:
            statistics.reused_tokens = reused = cache.keep(keys)
            rows, encoded = self.rows_after(prompt, reused, progress)
            statistics.encoded_tiles = encoded
            new = ids[None, reused:]
            embeds = self.merge(new, rows)
            yield cache, cache.feed(embeds, np.ones_like(new), None, progress, self.visual(new))

    def answers(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
    ) -> list[list[Token]]:
        """The tokens of all answers to several prompts, decoded as a batch: `num_return_sequences` per prompt, prompt by prompt.

        Each prompt is prefilled once. Raises PromptError, NumericsError.
        """
        for prompt in prompts:
            self.check(prompt)
        if decoding.num_beams > 1:
            return [answer for prompt in prompts for answer in self._beams(prompt, decoding, statistics, progress)]
        self.settle()
        statistics, prompts = statistics or Statistics(), [self.route(prompt, progress) for prompt in prompts]
        longest = max(len(prompt.ids) for prompt in prompts)
        statistics.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left-padded
            ids[row, longest - len(prompt.ids) :], mask[row, longest - len(prompt.ids) :] = prompt.ids, 1
        rows, statistics.encoded_tiles = self.rows_of(prompts, progress)
        visual = (ids == self.img_context_token_id) & (mask == 1)
        embeds = self.embed_tokens(ids)
        if rows is not None:
            embeds[visual] = rows
        cache = self.new_cache()
        cache.repeatable = decoding.seed is not None
        logits = cache.feed(embeds, mask, None, progress, visual.astype(np.int64))
        if decoding.num_return_sequences > 1:
            copies = np.repeat(np.arange(len(prompts)), decoding.num_return_sequences)
            cache.reorder(copies.tolist())
            logits = logits[copies]
        written = write_rows(cache, logits, self.embed_tokens, decoding, [self.rule_of(decoding) for _ in logits])
        self.rest()
        return written

    def _beams(
        self, prompt: Prompt, decoding: Decoding, statistics: Statistics | None, progress: Progress | None
    ) -> list[list[Token]]:
        with self.prefilled(prompt, self.new_cache(), statistics, progress) as (cache, logits):
            return write_beams(cache, logits, self.embed_tokens, decoding)

    def keys(self, prompt: Prompt) -> np.ndarray:
        """A key for each token of a prompt (T,), to compare prompts with the contents of a KV cache.

        Where rotary positions depend on the length of the prompt, the same token has other keys and values, and so another key
        here.
        """
        fewer = 0 if prompt.few is None else self.config.few_per_tile
        keys = keys_of(
            prompt.ids, self.img_context_token_id, prompt.pictures, self._counts(prompt), self.config.tokens_per_tile, fewer
        )
        if self.config.plain_length is None or len(keys) <= self.config.plain_length:
            return keys
        if self.config.has_dynamic_rope:  # equal to no earlier key
            return LONG_KEYS + (next(_prompts) << 24) + np.arange(len(keys))
        return keys ^ LONG_KEYS

    # ---- embeddings

    def _encode(
        self, pictures: Sequence[PictureTiles], progress: Progress | None = None, known: Mapping[bytes, TileFeatures] | None = None
    ) -> tuple[dict[bytes, TileFeatures], int]:
        """Pictures -> the features of their tiles by key, cached ones included, and the number of tiles encoded.

        Raises NumericsError.
        """
        found, encoded = encode_pictures(pictures, self._look_at, self.tiles_at_once, self.feature_cache, progress, known)
        if encoded:
            self.release_vision()
        if not all(features.is_finite for features in found.values()):
            self.forget()
            raise NumericsError(
                "the vision part gave NaN: its activations overflow on this device; "
                "open the model with precision accuracy (--precision accuracy)"
            )
        return found, encoded

    def _look_at(self, pixel_values: np.ndarray) -> list[TileFeatures]:
        """Tiles (N, 3, S, S) -> the features of each, copied: a view would keep the features of all in memory."""
        if self.flash is None:
            return [TileFeatures(rows.copy()) for rows in self.encode_tiles(pixel_values)]
        return [
            TileFeatures(rows.copy(), few.copy(), suffice)
            for rows, few, suffice in zip(*self.route_tiles(pixel_values), strict=True)
        ]

    def with_features(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with the image features of all their tiles, encoded together.

        Raises NumericsError, and PromptError where one is too long.
        """
        prompts = [self.route(prompt) for prompt in prompts]
        known = {key: features for prompt in prompts for key, features in prompt.known.items()}
        found, _ = self._encode([picture for prompt in prompts for picture in prompt.pictures], None, known)
        keys = [[key for picture in prompt.pictures for key in picture.tile_keys] for prompt in prompts]
        return [replace(prompt, known={key: found[key] for key in own}) for prompt, own in zip(prompts, keys, strict=True)]

    def rows_of(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> tuple[np.ndarray | None, int]:
        """The image features (R, D) of all context tokens of several prompts, None without any, and the number of tiles encoded.

        Raises NumericsError.
        """
        known = {key: features for prompt in prompts for key, features in prompt.known.items()}
        found, encoded = self._encode([picture for prompt in prompts for picture in prompt.pictures], progress, known)
        rows = []
        for prompt in prompts:
            keys = [key for picture in prompt.pictures for key in picture.tile_keys]
            left = [False] * len(keys) if prompt.few is None else prompt.few
            rows += [found[key].few if few else found[key].rows for key, few in zip(keys, left, strict=True)]
        return (np.concatenate(rows) if rows else None), encoded + sum(prompt.encoded for prompt in prompts)

    def rows_after(self, prompt: Prompt, start: int, progress: Progress | None) -> tuple[np.ndarray | None, int]:
        """The image features (R, D) of the context tokens of a prompt from token `start` on, and the number of tiles encoded.

        Pictures before `start` are not encoded, except for the router.
        """
        done = int((prompt.ids[:start] == self.img_context_token_id).sum())
        wanted, counts = list(prompt.pictures), self._counts(prompt)
        few = np.zeros(prompt.tiles, bool) if prompt.few is None else prompt.few
        while wanted and done >= (rows := counts[: wanted[0].count].sum()):
            tiles = wanted.pop(0).count
            done, counts, few = done - rows, counts[tiles:], few[tiles:]
        rows, encoded = self.rows_of([replace(prompt, pictures=wanted, few=few)], progress)
        return None if rows is None else rows[done:], encoded

    def embeddings_of(self, prompt: Prompt) -> np.ndarray:
        """A prompt and its pictures -> the input embeddings of the language part, (1, T, D)."""
        prompt = self.route(prompt)
        return self.merge(prompt.ids[None], self.rows_of([prompt])[0])

    def merge(self, ids: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        """Token ids (B, T) and image features (R, D) or (N, P, D) -> embeddings (B, T, D), features in order on the context tokens.

        Raises PromptError when the numbers of context tokens and features differ.
        """
        rows = None if rows is None else rows.reshape(-1, rows.shape[-1])
        self._check_rows(ids, 0 if rows is None else len(rows))
        embeds = self.embed_tokens(ids)
        if rows is not None:
            embeds[ids == self.img_context_token_id] = rows
        return embeds

    def visual(self, ids: np.ndarray) -> np.ndarray:
        """The mask of context tokens, int64 of the same shape."""
        return (ids == self.img_context_token_id).astype(np.int64)
