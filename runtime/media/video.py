"""Video -> frames, decoding no more of them than needed.

The only file that knows PyAV. Index rule: OpenGVLab/InternVL@2410d1d, get_index of the model cards' video example.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from runtime.errors import OptionError, VideoError
from runtime.media.picture import MOST_PIXELS

if TYPE_CHECKING:
    import av

    from runtime.progress import Progress

DEFAULT_SEGMENTS = 8
HIDDEN_FRAMES = ("vp8",)  # codecs with packets that show no frame, so packets cannot be counted as frames
logger = logging.getLogger(__name__)
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
    path: str | Path,
    segments: int = DEFAULT_SEGMENTS,
    bound: Bound | None = None,
    progress: Progress | None = None,
    seconds: float | None = None,
) -> list[Image.Image]:
    """The chosen frames of a video file as RGB pictures. Raises VideoError; `progress` reports the frames passed.

    `seconds` bounds the wall-clock time, for a server.

    Decoding starts at the keyframe before each chosen frame, where the container can seek. The nearest frame that can be decoded
    replaces one that cannot, and a warning counts these.
    """
    import av

    if not Path(path).is_file():
        raise VideoError(f"{path} does not exist" if not Path(path).exists() else f"{path} is a folder, expected a video file")
    try:
        check = _clock(seconds)
        index = _Index(path, check)
        wanted = frame_indices(index.count, index.fps, segments, bound)
        tell = progress or (lambda stage, done, total: None)
        tell("frames", 0, wanted[-1] + 1)
        found = _sought(path, index, wanted, tell, check) if index.can_seek else None
        if found is None:
            found = _passed(path, index, wanted, tell, check)
    except av.error.FFmpegError as error:
        reason = "it is cut off: its index at the end is missing" if _lacks_index(Path(path)) else error.strerror
        raise VideoError(f"{path} cannot be read as a video ({reason})") from None
    if not found:
        raise VideoError(f"{path} has {index.count} frames, and none near the wanted ones can be decoded")
    missing = {number for number in wanted if number not in found}
    if missing:
        logger.warning("%s: %d of %d frames cannot be decoded, the nearest ones are used", path, len(missing), len(set(wanted)))
    return [found[min(found, key=lambda number: abs(number - one))] for one in wanted]


def _clock(seconds: float | None) -> Callable[[], None]:
    """A check that raises VideoError when it is called after `seconds`; None: never."""
    deadline = None if seconds is None else monotonic() + seconds

    def check() -> None:
        if deadline is not None and monotonic() > deadline:
            raise VideoError(f"the video takes longer than {seconds:g} s to read: send a shorter piece, or some frames as pictures")

    return check


class _Index:
    """What the packets of a video tell without decoding: the number of frames, and when each of them is shown.

    Raises VideoError for a file without video.
    """

    def __init__(self, path: str | Path, check: Callable[[], None]):
        import av

        times: list[int | None] = []
        keys: list[int] = []
        self.count = 0
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video in it")
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate or stream.guessed_rate or 0)
            codec = stream.codec_context.name
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS:
                raise VideoError(f"{path} has frames of {width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
            with suppress(av.error.FFmpegError):  # a truncated file: what it has
                for packet in container.demux(stream):  # headers are often wrong
                    if packet.size:
                        self.count += 1
                        check()
                        if not packet.is_discard:
                            times.append(packet.pts)
                        if packet.is_keyframe and packet.pts is not None:
                            keys.append(packet.pts)
        if not self.count or not self.fps:
            raise VideoError(f"{path} has no frames")
        known = None not in times and len(set(times)) == len(times)
        self.times = sorted(time for time in times if time is not None) if known else []
        self.keys = sorted(keys)
        self.numbers = {time: number for number, time in enumerate(self.times)}
        self.can_seek = known and bool(keys) and codec not in HIDDEN_FRAMES

    def key_before(self, time: int) -> int | None:
        """The last keyframe shown at a time or before it: frames stored after it but shown before it need an earlier one."""
        place = bisect_right(self.keys, time)
        return self.keys[place - 1] if place else None


def _frames(container: Any, stream: Any, check: Callable[[], None]) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded, from the container's position on; damaged packets are skipped."""
    import av

    packets = container.demux(stream)
    while True:
        check()
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:  # the file ends too soon
            packet = None
        with suppress(av.error.FFmpegError):
            yield from stream.decode(packet)
        if packet is None:
            return


def _sought(
    path: str | Path, index: _Index, wanted: list[int], tell: Progress, check: Callable[[], None]
) -> dict[int, Image.Image] | None:
    """The wanted frames by number, each decoded from the keyframe before it; None where seeking fails."""
    import av

    found: dict[int, Image.Image] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames: Iterator[av.VideoFrame] = iter(())
        at: int | None = None  # time of the last frame
        last: av.VideoFrame | None = None
        for number in sorted(set(wanted)):
            if number >= len(index.times):
                number = len(index.times) - 1
            time = index.times[number]
            key = index.key_before(time)
            if key is None:
                return None
            if at is None or key > at:
                container.seek(key, stream=stream)
                stream.codec_context.flush_buffers()
                frames, last, at = _frames(container, stream, check), None, None
            following = None
            while at is None or at < time:
                frame = next(frames, None)
                if frame is None or frame.pts is None:
                    break
                if at is None and frame.pts > time:  # the keyframe is damaged, or the seek overshot
                    return None
                if frame.pts > time:
                    following = frame
                    break
                last, at = frame, frame.pts
            for frame in (last, following):
                if frame is not None and frame.pts in index.numbers:
                    found[index.numbers[frame.pts]] = _upright(frame)
            if following is not None:
                last, at = following, following.pts
            tell("frames", number, wanted[-1] + 1)
    return found or None


def _passed(
    path: str | Path, index: _Index, wanted: list[int], tell: Progress, check: Callable[[], None]
) -> dict[int, Image.Image]:
    """The wanted frames by number, decoding all frames up to the last, and the nearest neighbours of those that are missing."""
    import av

    found: dict[int, Image.Image] = {}
    chosen = set(wanted)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        before: tuple[int, av.VideoFrame] | None = None
        for passed, frame in enumerate(_frames(container, stream, check)):
            number = index.numbers.get(frame.pts, passed) if frame.pts is not None else passed
            if passed % 16 == 0:
                tell("frames", number, wanted[-1] + 1)
            if number in chosen:
                found[number] = _upright(frame)
            elif before is not None and any(before[0] < one < number for one in chosen):  # a wanted frame between them is missing
                found |= {before[0]: _upright(before[1]), number: _upright(frame)}
            before = number, frame
            if number >= wanted[-1]:
                break
        if before is not None and wanted[-1] not in found:
            found[before[0]] = _upright(before[1])
    return found


def _lacks_index(path: Path) -> bool:
    """Whether an MP4 file lacks its moov box, which is usually written last; walks the lengths of its boxes."""
    with open(path, "rb") as file:
        first = True
        while len(head := file.read(8)) == 8:
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if first and kind != b"ftyp":
                return False
            if kind == b"moov":
                return False
            first = False
            if size == 1:
                size = int.from_bytes(file.read(8), "big") - 8
            if size < 8:
                break
            file.seek(size - 8, os.SEEK_CUR)
        return not first


def _upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as RGB, turned as the video's display matrix says (upstream does not turn it: an intended difference)."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
