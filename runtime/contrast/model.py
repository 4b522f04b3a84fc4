"""A model folder of InternVL-C and -G, opened: pictures and texts to unit vectors, labels to probabilities, pictures to captions.

Puts the parts together. Imports no torch; upstream's own calls on tensors are in runtime/upstream/contrastive.py.
Rules: OpenGVLab/InternVL@2410d1d clip_benchmark/clip_benchmark/models/internvl_huggingface/modeling_internvl.py
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import openvino as ov

from runtime.answer.decode import Decoding, write_beams, write_rows
from runtime.errors import ModelFolderError, OptionError, PromptError
from runtime.folder.config import read_config
from runtime.folder.contrastive import (
    CAPTION_PROMPT,
    CONTRASTIVE,
    MODES,
    TEXT_PREFIX,
    TEXT_TOKENS,
    ContrastiveConfig,
    check_mode,
)
from runtime.folder.files import CONFIG_FILE, PARTS_OF, check_folder
from runtime.folder.sentences import Sentences
from runtime.media.fit import middle, squeezed
from runtime.media.picture import Source, open_picture
from runtime.media.tiles import normalise
from runtime.parts.device import place_part
from runtime.parts.query_decoder import QueryDecoder
from runtime.parts.stateless_part import StatelessPart

PATCHES_AT_ONCE = 4096  # of the pictures in a batch; as for tiles of chat models
TEXTS_AT_ONCE = 32
TEMPLATES = ("a photo of a {c}.",)
CAPTION_BEAMS, CAPTION_LEAST, CAPTION_MOST = 5, 8, 30  # beams, fewest and most new tokens of upstream's evaluation
Pictures = Source | Sequence[Source]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class _Later(Generic[T]):
    """A part that is opened on first use: pictures in mode C need no QLLaMA, half of a 14B."""

    def __init__(self, open_it: Callable[[], T]):
        self._open, self._lock = open_it, threading.Lock()
        self._opened: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._opened:
                self._opened.append(self._open())
            return self._opened[0]


class OpenedInternVL:
    """The parts of a model folder of InternVL-C and -G, each compiled for a device on first use.

    `precision` accuracy is slower, and closest to the PyTorch path; `cache_dir` keeps compiled parts (on a GPU by default in
    the folder; False keeps none); `ov_config` holds OpenVINO properties of all parts. Several threads may use it. Raises
    ModelFolderError for a folder that is incomplete or of another kind, DeviceError for a device that is not present.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        *,
        precision: str = "default",
        cache_dir: str | Path | Literal[False] | None = None,
        ov_config: Mapping[str, Any] | None = None,
    ):
        self.folder = folder = Path(model_dir)
        check_folder(folder, CONTRASTIVE)
        raw = read_config(folder / CONFIG_FILE)
        self.config = config = ContrastiveConfig.from_dict(raw)
        if not isinstance(raw.get("logit_scale"), float):
            raise ModelFolderError(f"{folder / CONFIG_FILE} has no logit_scale: convert the checkpoint again")
        self.logit_scale = float(np.exp(np.float32(raw["logit_scale"])))  # cosines are multiplied by it
        core, width, seen = ov.Core(), config.qllama.hidden_size, config.vision.hidden_size
        placed = {
            part: place_part(
                core,
                folder,
                part,
                "CPU" if part == "text_embeddings" else device,
                wide=part == "vision" and config.vision.norm_type == "rms_norm",
                precision=precision,
                cache_dir=cache_dir,
                ov_config=ov_config,
            )
            for part in PARTS_OF[CONTRASTIVE]
        }
        self._table = _Later(lambda: StatelessPart(folder, core, placed["text_embeddings"], width))
        self._vision = _Later(lambda: StatelessPart(folder, core, placed["vision"], seen))
        self._pool = _Later(lambda: StatelessPart(folder, core, placed["query_pool"], config.embed_dim))
        self._decoder = _Later(lambda: QueryDecoder(folder, core, placed["qllama"], width, seen))
        self.pictures_at_once = max(1, PATCHES_AT_ONCE // config.grid_side**2)
        self._cut_told = False

    def open_parts(self) -> None:
        """Open all parts now, not on first use. Raises ModelFolderError, DeviceError."""
        for part in (self._table, self._vision, self._pool, self._decoder):
            part()

    @cached_property
    def sentences(self) -> Sentences:
        """The tokenizer. Raises TokenizerError for a folder without one."""
        return Sentences(self.folder, self.config.qllama)

    # pictures

    def pixels_of(self, pictures: Pictures, *, crop: bool = False, allow_urls: bool = True) -> np.ndarray:
        """Pictures from any source -> (N, 3, S, S) float32, squeezed to a square, or with `crop` cut to it. Raises PictureError."""
        fit = middle if crop else squeezed
        opened = (open_picture(source, allow_urls=allow_urls) for source in listed(pictures))
        return normalise(np.stack([fit(picture, self.config.image_size) for picture in opened]))

    def encode_images(self, pictures: Pictures, mode: str = MODES[0], *, crop: bool = False) -> np.ndarray:
        """Pictures -> unit vectors (N, E), comparable with those of texts. Raises PictureError, OptionError."""
        check_mode(mode)
        sources = listed(pictures)
        batches = (self.pixels_of(batch, crop=crop) for batch in _batches(sources, self.pictures_at_once))
        found = [unit(self.encode_pixels(pixels, mode)) for pixels in batches]
        return np.concatenate(found) if found else np.zeros((0, self.config.embed_dim), np.float32)

    def encode_pixels(self, pixels: np.ndarray, mode: str) -> np.ndarray:
        """Pictures (N, 3, S, S) -> (N, E): in mode C the pooled ones, in mode G the sum of two unit vectors. Raises OptionError."""
        check_mode(mode)
        if mode == MODES[0]:
            return self._vision().run(pixels, [1])[0]
        tokens, embeds = self._vision().run(pixels, [0, 1])
        return unit(embeds) + unit(self._pool()(self.run_queries(tokens)))

    def run_queries(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of pictures (N, T, C) -> hidden states of the queries, (N, Q, D)."""
        return self._decoder().encode_queries(np.repeat(self._queries, len(tokens), 0), tokens)

    @cached_property
    def _queries(self) -> np.ndarray:
        """The queries (1, Q, D): the last rows of the embedding table."""
        first = self.config.qllama.vocab_size
        return self._table()(np.arange(first, first + self.config.queries)[None])

    # texts

    def encode_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors (K, E), the same for both modes. Long ones are cut, which is logged once. Raises PromptError."""
        return unit(self.encode_ids([self.ids_of(text) for text in listed(texts)]))

    def ids_of(self, text: str) -> list[int]:
        """The token ids of a text with its prefix, cut to TEXT_TOKENS. Raises PromptError for an empty text, TokenizerError."""
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{text!r} is no text that could be compared: write some words")
        ids = self.sentences.encode(TEXT_PREFIX + text, end=True)
        if len(ids) > TEXT_TOKENS:
            if not self._cut_told:
                logger.warning("a text has %d tokens, more than %d: it is cut, and so are others like it", len(ids), TEXT_TOKENS)
            self._cut_told = True
            ids = [*ids[: TEXT_TOKENS - 1], ids[-1]]
        return ids

    def encode_ids(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Token ids of texts, without padding -> embeddings (K, E), not normalised. Raises PromptError for an empty text."""
        made = np.zeros((len(texts), self.config.embed_dim), np.float32)
        if not all(len(ids) for ids in texts):
            raise PromptError("a text has no tokens: give some")
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # texts of equal length need no padding
        for batch in _batches(order, TEXTS_AT_ONCE):
            length = max(len(texts[number]) for number in batch)
            ids = np.full((len(batch), length), self.config.qllama.pad_token_id, np.int64)
            mask = np.zeros(ids.shape, np.int64)
            for row, number in enumerate(batch):
                ids[row, length - len(texts[number]) :] = texts[number]
                mask[row, length - len(texts[number]) :] = 1
            made[batch] = self._decoder().encode_texts(self._table()(ids), mask)
        return made

    # comparison

    def similarity(self, pictures: Pictures, texts: str | Sequence[str], mode: str = MODES[0]) -> np.ndarray:
        """Pictures and texts -> cosines (N, K). Times `logit_scale` they are upstream's logits per image."""
        return self.encode_images(pictures, mode) @ self.encode_texts(texts).T

    def class_vectors(
        self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES, tell: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Labels -> unit vectors (K, E), each the mean over templates, in which {c} stands for the label. Raises OptionError.

        `tell` gets the number of labels done. Source: CLIP_benchmark, metrics/zeroshot_classification.py zero_shot_classifier.
        """
        check_labels(labels)
        check_templates(templates)
        made = []
        for number, label in enumerate(labels):
            made.append(unit(self.encode_texts([template.replace("{c}", label) for template in templates]).mean(0)))
            if tell is not None:
                tell(number + 1)
        return np.stack(made)

    def classify(
        self,
        picture: Pictures,
        labels: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        mode: str = MODES[0],
    ) -> np.ndarray:
        """The probability (K,) of each label for a picture; of several pictures (N, K). Raises OptionError, PictureError."""
        vectors = self.class_vectors(labels, templates)
        logits = self.logit_scale * self.encode_images(picture, mode, crop=True) @ vectors.T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        found = weights / weights.sum(1, keepdims=True)
        return found if isinstance(picture, list | tuple) else found[0]

    # captions

    def caption(self, picture: Pictures, prompt: str = CAPTION_PROMPT, **options: Any) -> Any:
        """A caption of a picture; of several a list. Options are decoding's, by transformers' names.

        Without options, upstream's: 5 beams, 8 to 30 new tokens. Raises PictureError, OptionError.
        """
        if options.get("num_return_sequences", 1) != 1:
            raise OptionError("caption writes one caption a picture: leave num_return_sequences out")
        ids = self.sentences.encode(prompt, end=False)
        written = [self.sentences.decode(found) for found in self._captions(self.pixels_of(picture), ids, options)]
        return written if isinstance(picture, list | tuple) else written[0]

    def _captions(self, pixels: np.ndarray, ids: Sequence[int], options: Mapping[str, Any]) -> Iterator[list[int]]:
        for batch in _batches(range(len(pixels)), self.pictures_at_once):
            yield from self.write_captions(pixels[batch.start : batch.stop], ids, options)

    def write_captions(self, pixels: np.ndarray, ids: Sequence[int], options: Mapping[str, Any]) -> list[list[int]]:
        """Pictures (N, 3, S, S) and the ids of one prompt -> new token ids of each, the end token included. Raises OptionError.

        With `num_return_sequences` R each picture has R results in a row; beams give the best first.
        """
        defaults = {"eos_token_id": self.config.qllama.eos_token_id, "max_new_tokens": CAPTION_MOST}
        own = options or {"num_beams": CAPTION_BEAMS, "min_new_tokens": CAPTION_LEAST}
        decoding = Decoding.of(defaults, own)
        tokens = self._vision().run(pixels, [0])[0]
        prompt = self._table()(np.array([[*ids]], np.int64))
        start = np.concatenate([self._queries, prompt], axis=1)
        cache, embed = self._decoder().new_caption(), self._table()
        if decoding.num_beams > 1:
            answers = []
            for one in tokens:
                answers += write_beams(cache, cache.begin(start, self.config.queries, one[None]), embed, decoding)
        else:
            tokens = np.repeat(tokens, decoding.num_return_sequences, 0)
            logits = cache.begin(np.repeat(start, len(tokens), 0), self.config.queries, tokens)
            answers = write_rows(cache, logits, embed, decoding)
        return [[token.id for token in answer] for answer in answers]


def listed(given: Any) -> list[Any]:
    """One value or several -> a list."""
    return [*given] if isinstance(given, list | tuple) else [given]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., E) -> the same, scaled to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def check_labels(labels: Sequence[str]) -> None:
    """Raise OptionError unless there are labels, none of them twice."""
    if not labels:
        raise OptionError("there are no labels: give some, one a line")
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice:
        raise OptionError(f"{len(twice)} labels stand there twice, like {twice[0]!r}: take the second one out")


def check_templates(templates: Sequence[str]) -> None:
    """Raise OptionError unless there are templates, each with {c}."""
    wrong = [template for template in templates if "{c}" not in template]
    if wrong or not templates:
        raise OptionError(f"the template {wrong[0]!r} has no {{c}}" if wrong else "there are no templates: give some, one a line")


def _batches(items: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
