"""Pictures -> calibration data: tiles for the vision part, embeddings for the language part.

Pictures come from a folder, or are built-in. The language part's inputs come from the parts that are already converted, so that
its activations are those of the model folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from convert import scenes
from convert.exact import Part
from convert.reference.language import language_kind
from convert.tokenizer import context_id, prompt_of
from runtime.answer.prompt import CONTEXT_TOKEN, IMAGE_END, IMAGE_START
from runtime.errors import OptionError
from runtime.folder.config import InternVLConfig
from runtime.media.picture import open_picture
from runtime.media.tiles import Tiling, cut_pixels, cut_tiles, normalise
from runtime.parts.part import VISUAL_MASK

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TILES = 24  # of a dataset, for the vision part's activation ranges; each takes a second or two
SEEN = 2  # photographs to calibrate on; the others are held out
UNSEEN = 7  # seed of the drawn pictures that are held out
CHOSEN = 11  # and of those by which a search chooses
KEPT_APART = 4  # every fourth picture of a dataset is held out
QUESTION = "Describe this picture in detail."


def find_pictures(dataset: str, count: int) -> list[Path]:
    """The first `count` pictures of a folder by name; raises OptionError when there are none."""
    folder = Path(dataset)
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise OptionError(f"--dataset {dataset} is not a folder with pictures ({', '.join(PICTURES)})")
    return found[:count]


def divided(pictures: list[Path]) -> tuple[list[Path], list[Path]]:
    """Split pictures into those to calibrate on and every fourth, which is held out for the proof."""
    apart = pictures[KEPT_APART - 1 :: KEPT_APART]
    return [path for path in pictures if path not in apart], apart


def calibration_tiles(pictures: list[Path], tiling: Tiling) -> list[np.ndarray]:
    """At most TILES tiles (1, 3, S, S) of the pictures, taken from each picture in turn."""
    cut = [cut_pixels(open_picture(path), tiling)[::-1] for path in pictures[:TILES]]  # bytes, the thumbnail first
    turns = [tile for turn in zip_longest(*cut) for tile in turn if tile is not None]
    return [normalise(tile[None]) for tile in turns[:TILES]]


def tiles_at_hand(side: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Built-in tiles (1, 3, S, S) of photographs, pages, charts and screenshots: some to calibrate on, others held out."""
    photographs = scenes.photographs()
    seen = photographs[:SEEN]
    if not photographs:
        print(
            "vision: no photographs found (scikit-learn and matplotlib carry some): calibrated on drawn pictures only", flush=True
        )
    pictures = [crop for photograph in seen for crop in _crops(photograph)]
    pictures += [draw(seed) for draw in scenes.DRAWN for seed in ((0,) if seen else (0, 1, 2))]
    return [_tile(picture, side) for picture in pictures], tiles_kept_apart(side)


def tiles_seen(side: int) -> list[np.ndarray]:
    """Four of the calibration tiles (1, 3, S, S): photographs if there are any, a page, a window, a chart."""
    drawn = [draw(0) for draw in (scenes.window, scenes.chart, scenes.page)]
    photographs = [_crops(photograph)[0] for photograph in scenes.photographs()[:SEEN]] or [scenes.page(1)]
    return [_tile(picture, side) for picture in (photographs + drawn[len(photographs) - 1 :])]


def tiles_kept_apart(side: int) -> list[np.ndarray]:
    """Held-out tiles (1, 3, S, S): a page, a chart, a photograph if there is one."""
    pictures = [scenes.page(UNSEEN), scenes.chart(UNSEEN), *scenes.photographs()[SEEN:]]
    return [_tile(picture, side) for picture in pictures]


def tiles_to_choose_by(side: int) -> list[np.ndarray]:
    """Tiles (1, 3, S, S) that are neither calibrated on nor in the proof: a page, a window."""
    return [_tile(picture, side) for picture in (scenes.page(CHOSEN), scenes.window(CHOSEN))]


def question_of(picture: Path) -> str:
    """The question about a picture of a dataset: PICTURE.txt next to it, or a general question."""
    beside = picture.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.exists() else QUESTION


def tile_of(picture: Path, side: int) -> np.ndarray:
    """A whole picture as one tile (1, 3, S, S)."""
    return _tile(open_picture(picture), side)


def _crops(photograph: Image.Image) -> list[Image.Image]:
    """The largest square of a photograph, and a detail."""
    width, height = photograph.size
    side, detail = min(width, height), min(width, height) // 2
    return [photograph.crop((width - side, height - side, width, height)), photograph.crop((0, height - detail, detail, height))]


def _tile(picture: Image.Image, side: int) -> np.ndarray:
    return normalise(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))[None])


def calibration_samples(
    pictures: list[Path], work: Path, config: InternVLConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the language part's inputs for each picture and its question (PICTURE.txt, or a general one)."""
    vision, text = Part(work, "vision"), Part(work, "text_embeddings")
    for path in pictures:
        question = question_of(path)
        rows = vision(cut_tiles(open_picture(path), Tiling.of(config)))  # (N, P, D)
        context = CONTEXT_TOKEN * (rows.shape[0] * rows.shape[1])
        ids = np.array([tokenizer.encode(prompt_of(tokenizer, f"{IMAGE_START}{context}{IMAGE_END}\n{question}"))])
        embeds = np.array(text(ids))  # (1, T, D)
        embeds[ids == context_id(tokenizer)] = rows.reshape(-1, rows.shape[-1])
        length = ids.shape[1]
        routing = {VISUAL_MASK: (ids == context_id(tokenizer)).astype(np.int64)} if language_kind(config).visual_experts else {}
        yield routing | {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
