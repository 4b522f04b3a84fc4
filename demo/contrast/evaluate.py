"""The exam of the small InternVL-C and -G: recall over unseen scenes, and captions that name what a scene shows.

Asks a model folder, or the PyTorch reference of a checkpoint. Knows no command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from demo.contrast.scenes import things_of, unseen
from runtime.contrast.model import OpenedInternVL, unit
from runtime.contrast.zeroshot import recalls
from runtime.folder.contrastive import CAPTION_PROMPT, MODES, TEXT_PREFIX

CAPTION_TOKENS = 60  # of three things at most


class Asked(Protocol):
    """What the exam needs of a model."""

    def encode_images(self, pictures: Sequence[Image.Image], mode: str) -> np.ndarray: ...
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]: ...


@dataclass(frozen=True)
class OfFolder:
    """A model folder."""

    model: OpenedInternVL

    def encode_images(self, pictures: Sequence[Image.Image], mode: str) -> np.ndarray:
        return self.model.encode_images([*pictures], mode)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode_texts([*texts])

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        return self.model.caption([*pictures], num_beams=1, max_new_tokens=CAPTION_TOKENS)


class OfCheckpoint:
    """The PyTorch reference of a checkpoint, in float32."""

    def __init__(self, folder: Path):
        from convert.checkpoint import ContrastiveCheckpoint
        from convert.reference.contrastive_model import InternVLModel
        from demo.contrast.train import TOKENIZER, Words

        self._model = InternVLModel.from_checkpoint(ContrastiveCheckpoint(folder))
        self._words = Words(folder / TOKENIZER)

    def encode_images(self, pictures: Sequence[Image.Image], mode: str) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = [self._model.encode_image(self._pixels([picture]), mode).numpy() for picture in pictures]
        return unit(np.concatenate(found))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            ids = [torch.tensor([[1, *self._words.pieces.encode(TEXT_PREFIX + text), 2]]) for text in texts]
            return unit(np.concatenate([self._model.encode_text(one).numpy() for one in ids]))

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        import torch

        prompt, written = torch.tensor([[1, *self._words.pieces.encode(CAPTION_PROMPT)]]), []
        with torch.inference_mode():
            for picture in pictures:
                steps = self._model.caption_steps(self._model.vision(self._pixels([picture]))[0], prompt)
                ids, logits = [], next(steps)
                while len(ids) < CAPTION_TOKENS and (not ids or ids[-1] != 2):
                    ids.append(int(logits.argmax()))
                    logits = steps.send(torch.tensor([[ids[-1]]]))
                written.append(self._words.pieces.decode(ids))
        return written

    def _pixels(self, pictures: Sequence[Image.Image]) -> Any:
        import torch

        from runtime.media.tiles import normalise

        return torch.from_numpy(normalise(np.stack([np.asarray(picture) for picture in pictures])))


def open_source(source: Path) -> Asked:
    """A model folder, or a checkpoint."""
    return OfCheckpoint(source) if (source / "model.safetensors").exists() else OfFolder(OpenedInternVL(source))


def evaluate(asked: Asked, scenes: int = 500, seed: int = 1, split: str = "test") -> dict[str, Any]:
    """Recall at 1 of pictures by descriptions and the reverse, in both modes and languages, and the share of right captions.

    Scenes are of a split that training never draws, and no two show the same. A caption is right if it names the colour and the
    shape of each thing, and no other thing.
    """
    shown = unseen(seed, scenes, split)
    pictures, own = [scene.picture for scene in shown], np.arange(scenes)
    texts = {language: asked.encode_texts([scene.texts[language] for scene in shown]) for language in ("en", "zh")}
    result: dict[str, Any] = {"scenes": scenes}
    for mode in MODES:
        vectors = asked.encode_images(pictures, mode)
        for language, of_texts in texts.items():
            found = recalls(of_texts @ vectors.T, own)
            result[f"{mode} {language}: picture by text"] = found["image_retrieval_recall@1"]
            result[f"{mode} {language}: text by picture"] = found["text_retrieval_recall@1"]
    written = asked.captions(pictures)
    right = [things_of(caption) == scene.things for caption, scene in zip(written, shown, strict=True)]
    return result | {"captions": sum(right) / scenes}
