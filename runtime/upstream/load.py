"""load_image and load_video of the model cards: pictures and videos as torch tensors of tiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.media.picture import Source, open_picture
from runtime.media.tiles import Tiling, cut_tiles
from runtime.media.video import Bound, read_frames
from runtime.upstream.libraries import import_torch

if TYPE_CHECKING:
    import torch


def load_image(picture: Source, input_size: int = 448, max_num: int = 12) -> torch.Tensor:
    """Upstream's: a picture -> tiles (N, 3, input_size, input_size) float32, at most `max_num` and a thumbnail.

    Takes what runtime.media.picture.open_picture takes; raises PictureError, and OptionError where torch is not installed.
    """
    torch = import_torch("load_image")
    return torch.from_numpy(cut_tiles(open_picture(picture), Tiling(input_size, max_tiles=max_num)))


def load_video(
    video_path: str | Path, bound: Bound | None = None, input_size: int = 448, max_num: int = 1, num_segments: int = 32
) -> tuple[torch.Tensor, list[int]]:
    """Upstream's: a video -> tiles (N, 3, input_size, input_size) of all frames, and how many each frame has.

    Raises VideoError, and OptionError where torch is not installed.
    """
    torch = import_torch("load_video")
    frames = read_frames(video_path, num_segments, bound)
    tiles = [cut_tiles(frame, Tiling(input_size, max_tiles=max_num)) for frame in frames]
    return torch.from_numpy(np.concatenate(tiles)), [len(cut) for cut in tiles]
