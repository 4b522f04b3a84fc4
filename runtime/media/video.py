"""Video -> frames.

The only file that knows PyAV. Index rule: OpenGVLab/InternVL@2410d1d, get_index of the model cards' video example.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from runtime.errors import OptionError, VideoError

if TYPE_CHECKING:
    import av

    from runtime.progress import Progress

DEFAULT_SEGMENTS = 8
Bound = tuple[float, float]  # first and last second


def frame_indices(frames: int, fps: float, segments: int, bound: Bound | None = None) -> list[int]:
    """Indices of the middle frames of `segments` equal parts of a video, or of its seconds `bound`.

    Rounds as upstream does, half to even. Raises OptionError for no segments, VideoError when `bound` lies outside.
    """
    if segments < 1:
        raise OptionError(f"video segments {segments} is not positive")
    start, end = (-100_000.0, 100_000.0) if bound is None else bound
    first, last = max(0, round(start * fps)), min(round(end * fps), frames - 1)
    if first > last:
        raise VideoError(f"seconds {start:g} to {end:g} hold no frame: the video is {frames / fps:.1f} s long")
    length = (last - first) / segments
    return [int(first + length / 2 + np.round(length * k)) for k in range(segments)]


def read_frames(
    path: str | Path, segments: int = DEFAULT_SEGMENTS, bound: Bound | None = None, progress: Progress | None = None
) -> list[Image.Image]:
    """The chosen frames of a video file as RGB pictures. Raises VideoError; `progress` hears of the frames passed."""
    import av

    if not Path(path).is_file():
        raise VideoError(f"{path} is not there" if not Path(path).exists() else f"{path} is a folder, expected a video file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video in it")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            count = sum(packet.size > 0 for packet in container.demux(stream))  # what the header says is often wrong
            if not count or not fps:
                raise VideoError(f"{path} has no frames")
            wanted = frame_indices(count, fps, segments, bound)
            container.seek(0)
            stream.thread_type = "AUTO"
            found: dict[int, Image.Image] = {}
            picture = None
            for index, frame in enumerate(container.decode(stream)):
                if progress is not None and index % 16 == 0:
                    progress("frames", index, wanted[-1] + 1)
                if index in wanted:
                    found[index] = picture = _upright(frame)
                if index >= wanted[-1]:
                    break
    except av.error.FFmpegError as error:
        raise VideoError(f"{path} cannot be read as a video ({error.strerror})") from None
    if picture is None:
        raise VideoError(f"{path} has {count} frames, none of which can be decoded up to number {wanted[0]}")
    return [found.get(index, picture) for index in wanted]


def _upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as RGB, turned as the video's display matrix says (upstream does not turn it: an intended difference)."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
