"""python -m pytest tests/runtime/media/test_video.py

Which frames of a video are taken, and what reaches the model. Videos are written here; the index rule's numbers are upstream's.
"""

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel, load_video
from runtime.answer.prompt import frame_marks
from runtime.errors import OptionError, VideoError
from runtime.media.video import frame_indices, read_frames
from tests.conftest import shared

av = pytest.importorskip("av")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.mark.parametrize(
    ("frames", "fps", "segments", "bound", "wanted"),
    [
        (300, 30.0, 8, None, [18, 55, 93, 130, 168, 205, 242, 280]),
        (300, 30.0, 8, (1, 3), [33, 41, 48, 55, 63, 71, 78, 85]),
        (1, 25.0, 3, None, [0, 0, 0]),
        (10, 5.0, 1, (0, 1), [2]),
    ],
    ids=["whole", "bound", "one-frame", "first-second"],
)
def test_indices_are_upstreams(frames, fps, segments, bound, wanted):
    assert frame_indices(frames, fps, segments, bound) == wanted


def test_indices_outside_the_video_are_told():
    with pytest.raises(VideoError, match=r"seconds 20 to 30 hold no frame: the video is 10\.0 s long"):
        frame_indices(300, 30.0, 8, (20, 30))
    with pytest.raises(OptionError, match="video segments 0 is not positive"):
        frame_indices(300, 30.0, 0)


def test_the_frames_of_the_indices_are_read(video):
    seen = []
    frames = read_frames(video, 6, progress=lambda *stage: seen.append(stage))
    wanted = frame_indices(60, 10.0, 6)
    for frame, index in zip(frames, wanted, strict=True):
        assert np.asarray(frame).mean() == pytest.approx(4 * index, abs=2)
    assert seen[0] == ("frames", 0, wanted[-1] + 1)


def test_more_segments_than_frames_repeat_frames(video):
    assert len(read_frames(video, 100)) == 100


def test_load_video_is_upstreams(video):
    tiles, counts = load_video(video, num_segments=4, input_size=56)
    assert tuple(tiles.shape) == (4, 3, 56, 56)
    assert counts == [1, 1, 1, 1]
    tiles, counts = load_video(video, bound=(0, 2), num_segments=2, max_num=12, input_size=56)
    assert counts == [13, 13]


def test_a_video_lying_on_its_side_is_turned(video, tmp_path):
    """The display matrix of a telephone held upright, written into the file: a quarter turn clockwise."""
    data = bytearray(video.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = (1 << 16).to_bytes(4, "big")
    minus = ((1 << 32) - (1 << 16)).to_bytes(4, "big")
    zero = bytes(4)
    data[matrix : matrix + 36] = b"".join([zero, one, zero, minus, zero, zero, zero, zero, (1 << 30).to_bytes(4, "big")])
    (tmp_path / "turned.mp4").write_bytes(data)
    assert read_frames(video, 1)[0].size == (64, 48)
    assert read_frames(tmp_path / "turned.mp4", 1)[0].size == (48, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"text", "cannot be read as a video"), ("folder", "is a folder"), ("sound", "has no video in it")],
    ids=["gone", "text", "folder", "sound"],
)
def test_what_is_no_video_is_told(content, message, tmp_path):
    path = tmp_path / "a.wav"
    if content == "folder":
        path.mkdir()
    elif content == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif content:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=message):
        read_frames(path)


def test_a_cut_off_video_gives_what_it_has_or_one_line(video, tmp_path):
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[: int(video.stat().st_size * share)])
        try:
            found = len(read_frames(tmp_path / "cut.mp4", 4))
        except VideoError as error:
            found = str(error).count("\n") + 4
        assert found == 4


def test_the_red_panda_gives_the_frames_of_the_model_card():
    path = shared("data/video/red-panda.mp4")
    seen = []
    assert frame_indices(895, 895000 / 29833, 8) == [55, 167, 279, 390, 502, 614, 725, 837]
    tiles, counts = load_video(path, num_segments=8, max_num=1)
    assert len(tiles) == sum(counts) == 8
    frames = read_frames(path, 8, progress=lambda *stage: seen.append(stage))
    assert seen[-1][2] == 838
    with av.open(str(path)) as container:
        every = {index: frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index in (55, 837)}
    assert np.array_equal(np.asarray(frames[0]), np.asarray(every[55]))
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(every[837]))


def test_a_conversation_about_a_video_is_the_references(video, tiny, converted):
    model = OVInternVLChatModel(converted(tiny("tiny-qwen2"), weight_format="fp32"), ov_config=EXACT)
    reference = InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2")))
    ours, theirs = model.start_conversation(), reference.start_conversation()
    for question, given in (
        ("What moves?", {"video": video}),
        ("And here?", {"video": video, "images": [read_frames(video, 1)[0]]}),
    ):
        answer = ours.ask(question, max_new_tokens=8, num_segments=4, **given)
        assert answer == theirs.ask(question, max_new_tokens=8, num_segments=4, **given)
    assert ours.turns[0].question == frame_marks(4) + "What moves?"
    assert ours.turns[1].question == frame_marks(4) + "<image>\nAnd here?"
    assert frame_marks(2) == "Frame1: <image>\nFrame2: <image>\n"
