"""A model folder of InternViT alone, opened: pictures to features. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov

from runtime.contrast.model import PATCHES_AT_ONCE, Pictures, listed
from runtime.folder.config import read_config
from runtime.folder.contrastive import FEATURES, FeaturesConfig
from runtime.folder.files import CONFIG_FILE, check_folder
from runtime.media.fit import squeezed
from runtime.media.picture import open_picture
from runtime.media.tiles import normalise
from runtime.parts.device import place_part
from runtime.parts.stateless_part import StatelessPart


@dataclass(frozen=True)
class Features:
    """InternViT's features of pictures; the first of the T tokens is the class token, and its row is `pooler_output`."""

    last_hidden_state: np.ndarray  # (N, T, C)
    hidden_states: tuple[np.ndarray, ...] | None = None  # L + 1 of (N, T, C), the embeddings first

    @property
    def pooler_output(self) -> np.ndarray:
        """The class token, (N, C), without a norm."""
        return self.last_hidden_state[:, 0]


class OpenedInternViT:
    """The vision transformer of a model folder, compiled for a device. Arguments and errors are those of OpenedInternVL."""

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
        check_folder(folder, FEATURES)
        self.config = FeaturesConfig.from_dict(read_config(folder / CONFIG_FILE))
        core, vision = ov.Core(), self.config.vision
        placement = place_part(
            core,
            folder,
            "vision",
            device,
            wide=vision.norm_type == "rms_norm",
            precision=precision,
            cache_dir=cache_dir,
            ov_config=ov_config,
        )
        between = [f"hidden_states.{number}" for number in range(vision.num_hidden_layers)]
        self._part = StatelessPart(folder, core, placement, vision.hidden_size)
        self._open_layers = lambda: StatelessPart(folder, core, placement, vision.hidden_size, between)
        self._layers: StatelessPart | None = None
        self._at_once = max(1, PATCHES_AT_ONCE // self.config.grid_side**2)

    def pixels_of(self, pictures: Pictures) -> np.ndarray:
        """Pictures from any source -> (N, 3, S, S) float32, squeezed to a square. Raises PictureError."""
        side = self.config.image_size
        return normalise(np.stack([squeezed(open_picture(source), side) for source in listed(pictures)]))

    def encode_pixels(self, pixels: np.ndarray, *, output_hidden_states: bool = False) -> Features:
        """Pictures (N, 3, S, S) -> their features; the first call for all layers compiles the part a second time."""
        batches = [pixels[start : start + self._at_once] for start in range(0, len(pixels), self._at_once)]
        if not output_hidden_states:
            return Features(np.concatenate([self._part(batch) for batch in batches]))
        if self._layers is None:
            self._layers = self._open_layers()
        count = self.config.vision.num_hidden_layers
        found = [self._layers.run(batch, range(count + 1)) for batch in batches]
        last, *between = (np.concatenate(states) for states in zip(*found, strict=True))
        return Features(last, (*between, last))
