"""A picture -> one square of pixels, as models without tiling were trained: resized to a square, or centre-cropped.

Pillow and NumPy; knows nothing of models. Rules: OpenGVLab/InternVL@2410d1d clip_benchmark/clip_benchmark/models/
internvl_huggingface (retrieval: resized to a square) and torchvision's Resize and CenterCrop (classification).
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def squeezed(picture: Image.Image, side: int) -> np.ndarray:
    """An RGB picture resized to a square -> (S, S, 3) uint8."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def middle(picture: Image.Image, side: int) -> np.ndarray:
    """An RGB picture with its short side resized to S, then centre-cropped -> (S, S, 3) uint8."""
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2.0) for length in resized.size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))
