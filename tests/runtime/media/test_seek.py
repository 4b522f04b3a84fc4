"""python -m pytest tests/runtime/media/test_seek.py

Frames that are sought are those that decoding everything gives, bit for bit; damaged videos give what they have.
"""

import re
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from runtime.errors import VideoError
from runtime.media import video
from runtime.media.video import frame_indices, read_frames

FRAMES = 240
KINDS = {  # name -> file, codec, its options
    "mp4, B frames": ("a.mp4", "libx264", {"bf": "3", "g": "48"}),
    "mp4, open groups": ("a.mp4", "libx264", {"bf": "2", "g": "40", "x264-params": "open-gop=1"}),
    "mp4, one keyframe": ("a.mp4", "libx264", {"g": "1000"}),
    "mp4, hevc": ("a.mp4", "libx265", {"x265-params": "keyint=40:log-level=none"}),
    "mkv": ("a.mkv", "libx264", {"bf": "2", "g": "30"}),
    "webm, vp9": ("a.webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}),
    "webm, vp8": ("a.webm", "libvpx", {"g": "40", "deadline": "realtime", "auto-alt-ref": "1"}),
    "ts": ("a.ts", "libx264", {"bf": "2", "g": "30"}),
    "avi": ("a.avi", "mpeg4", {"g": "30"}),
    "mov, mjpeg": ("a.mov", "mjpeg", {}),
    "raw h264": ("a.h264", "libx264", {"bf": "2", "g": "30"}),
}


def write(path, codec, options, *, frames=FRAMES, size=(96, 64), variable=False):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (size[1], size[0], 3), np.uint8)
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream(codec, rate=25, options=options)
        except Exception as error:
            pytest.skip(f"{codec} cannot be written here ({error})")
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if variable:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        at = 0
        for number in range(frames):
            pixels = noise.copy()
            pixels[:, :, number % 3] += np.uint8(number % 190)
            pixels[(3 * number) % (size[1] - 8) :][:8] = 255
            frame = av.VideoFrame.from_ndarray(pixels)
            if variable:
                frame.pts, frame.time_base = at, Fraction(1, 1000)
                at += int(rng.choice([20, 40, 40, 200]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def every(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def equal(found, wanted) -> bool:
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sought_frames_are_those_of_decoding_everything(kind, tmp_path):
    name, codec, options = KINDS[kind]
    path = write(tmp_path / name, codec, options)
    frames = every(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate)
        count = sum(packet.size > 0 for packet in container.demux(stream))
    for segments in (1, 8, 32):
        wanted = frame_indices(count, fps, segments)
        assert equal(read_frames(path, segments), [frames[min(number, len(frames) - 1)] for number in wanted])
    span = (1.0, 2.0)
    wanted = frame_indices(count, fps, 4, span)
    assert equal(read_frames(path, 4, span), [frames[number] for number in wanted])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rates(name, tmp_path):
    path = write(tmp_path / name, "libx264", {"bf": "2", "g": "30"}, variable=True)
    frames = every(path)
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
    wanted = frame_indices(len(frames), fps, 8)
    assert equal(read_frames(path, 8), [frames[number] for number in wanted])


def test_few_frames_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", "libx264", {"bf": "2", "g": "24"}, frames=600)
    decoded = []
    frames = video._frames

    def counted(*given):
        for frame in frames(*given):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "_frames", counted)
    read_frames(path, 8)
    assert len(decoded) < 8 * 24 + 8


def test_seeking_takes_a_fraction_of_the_time(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", "libx264", {"preset": "ultrafast", "g": "50"}, frames=3000, size=(320, 180))
    times = []
    for seek in (True, False):
        if not seek:
            monkeypatch.setattr(video, "_sought", lambda *given: None)
        started = time.process_time()
        read_frames(path, 8)
        times.append(time.process_time() - started)
    assert times[0] < 0.5 * times[1], times


def damaged(path, where: float, length: int = 3000):
    data = bytearray(path.read_bytes())
    start = int(len(data) * where)
    data[start : start + length] = np.random.default_rng(1).integers(0, 255, length, np.uint8).tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seek", [True, False], ids=["sought", "passed"])
@pytest.mark.parametrize("where", [0.3, 0.5, 0.8])
def test_a_damaged_part_costs_its_frames_and_no_more(tmp_path, monkeypatch, where, seek):
    """mjpeg, whose frames stand alone: those that cannot be decoded are stood in for by their neighbours."""
    path = write(tmp_path / "a.mp4", "mjpeg", {})
    good = read_frames(path, FRAMES)
    damaged(path, where, 12000)
    if not seek:
        monkeypatch.setattr(video, "_sought", lambda *given: None)
    found = read_frames(path, FRAMES)
    assert len(found) == FRAMES
    same = [np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(found, good, strict=True)]
    assert 0.8 * FRAMES < sum(same) < FRAMES
    assert same[0]
    assert same[-1]


def test_frames_that_stand_in_are_counted(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(video.logger, "warning", lambda line, *values: told.append(line % values))
    path = damaged(write(tmp_path / "a.mp4", "mjpeg", {}), 0.5, 12000)
    assert len(read_frames(path, FRAMES)) == FRAMES
    assert len(told) == 1
    assert re.search(r"a\.mp4: \d+ of \d+ frames cannot be decoded, the nearest ones are used", told[0])


def test_a_video_of_nothing_but_damage_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {"g": "24"})
    data = path.read_bytes()
    end = data.index(b"moov") - 4
    path.write_bytes(data[:64] + bytes(np.random.default_rng(0).integers(0, 255, end - 64, np.uint8)) + data[end:])
    with pytest.raises(VideoError) as raised:
        read_frames(path, 4)
    assert "\n" not in str(raised.value)


def test_a_video_that_is_cut_off_says_what_is_missing(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"cannot be read as a video \(it is cut off: its index at the end is missing\)"):
        read_frames(path)


@pytest.mark.parametrize("times", [0, 1000])
def test_a_header_that_lies_about_the_length_changes_nothing(tmp_path, times):
    """The durations in the mvhd, tkhd and mdhd boxes of an MP4, none or a thousand times as long."""
    path = write(tmp_path / "a.mp4", "libx264", {"g": "24", "bf": "0"})
    wanted = read_frames(path, 8)
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # version 0: where the duration stands behind the name
        at = data.index(box) + offset
        data[at : at + 4] = min(times * int.from_bytes(data[at : at + 4], "big"), (1 << 32) - 2).to_bytes(4, "big")
    path.write_bytes(data)
    assert equal(read_frames(path, 8), wanted)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_containers_without_an_index_give_what_they_have(tmp_path, name):
    path = write(tmp_path / name, "libx264", {"g": "24"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read_frames(path, 4)) == 4
