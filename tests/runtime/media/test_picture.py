"""python -m pytest tests/runtime/media/test_picture.py

Pictures from everywhere, and what cannot be one: one clear line, in bounded time and memory.
"""

import base64
import io
import json
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.media.web
from runtime import load_image
from runtime.answer.turn import Question
from runtime.errors import PictureError
from runtime.folder.config import InternVLConfig
from runtime.media.picture import open_picture
from tests.checkpoints import CONFIGS
from tests.conftest import shared

ROOT = Path(__file__).parents[3]
CONFIG = InternVLConfig.from_dict(CONFIGS["tiny-qwen2"])
PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
REFUSED = {  # of the 49 odd pictures: what Pillow cannot read, and what it rightly will not
    "pillow_broken.png",
    "pillow_decompression_bomb.gif",
    "pillow_negative_size.ppm",
    "pillow_png_decompression_dos.png",
    "pillow_truncated_image.png",
    "pillow_ultrahdr.jpg",
    "pillow_zero_width.gif",
    "skimage_multipage_rgb.tif",
    "skimage_truncated.jpg",
}


def png(pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server():
    """Answers on 127.0.0.1 in good and bad ways."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture")
                self.end_headers()
            elif self.path == "/to-a-file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
            elif self.path == "/gone":
                self.send_error(404)
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    if stopped.wait(0.1):
                        return
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(png() if self.path == "/picture" else b"\0" * 3_000_000 if self.path == "/large" else b"text")

        def log_message(self, *_):
            pass

    stopped = threading.Event()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    stopped.set()
    httpd.shutdown()


def sources(folder: Path) -> dict[str, object]:
    path = folder / "a.png"
    path.write_bytes(png())
    encoded = base64.b64encode(png()).decode()
    return {
        "path": path,
        "text": str(path),
        "bytes": png(),
        "pil": Image.fromarray(PIXELS),
        "array": PIXELS,
        "array-alpha": np.dstack([PIXELS, np.full((20, 30), 7, np.uint8)]),
        "data-url": f"data:image/png;base64,{encoded}",
        "data-url-lines": f"data:image/png;base64,{encoded[:50]}\n{encoded[50:]}",
    }


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "pil", "array", "array-alpha"])
def test_every_source_gives_the_same_picture(kind, tmp_path):
    assert np.array_equal(np.asarray(open_picture(sources(tmp_path)[kind])), PIXELS)


@pytest.mark.parametrize("kind", ["data-url", "data-url-lines"])
def test_data_urls_give_the_picture(kind, tmp_path):
    assert np.array_equal(np.asarray(open_picture(sources(tmp_path)[kind], allow_urls=False)), PIXELS)


@pytest.mark.parametrize("path", ["/picture", "/moved"])
def test_web_addresses_are_fetched(server, path):
    assert np.array_equal(np.asarray(open_picture(server + path)), PIXELS)


def test_web_addresses_are_not_fetched_where_others_ask(server):
    with pytest.raises(PictureError, match="are not fetched here"):
        open_picture(server + "/picture", allow_urls=False)


def test_web_addresses_that_give_no_picture_are_told(server, monkeypatch):
    monkeypatch.setattr(runtime.media.web, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(runtime.media.web, "FETCH_SECONDS", 0.5)
    for path, message in (
        ("/gone", "cannot be fetched .HTTP 404"),
        ("/large", "is larger than 1 MB"),
        ("/slow", "took longer than 0.5 s"),
        ("/text", "cannot be read as a picture"),
        ("/to-a-file", "cannot be fetched"),
    ):
        with pytest.raises(PictureError, match=message):
            open_picture(server + path)
    with pytest.raises(PictureError, match="cannot be fetched"):
        open_picture("http://127.0.0.1:9/nobody")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "nowhere.png does not exist"),
        ("/", "cannot be read as a picture .Is a directory"),
        ("a\0b", "cannot be read as a picture"),
        (b"", "cannot be read as a picture"),
        (b"text", "not a format that Pillow knows"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,????", "is not base64"),
        (np.zeros((2, 2, 5), np.uint8), r"the array is uint8 \(2, 2, 5\), expected"),
        (np.zeros((2, 2, 3)), r"the array is float64 \(2, 2, 3\), expected"),
        (np.zeros((0, 2, 3), np.uint8), r"the array is uint8 \(0, 2, 3\), expected"),
        (3, "a int is not a picture"),
        (Image.new("L", (10_000, 9_000)), "10000 x 9000 pixels, more than 89 million"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, Image.Image) else "large",
)
def test_what_is_no_picture_is_told(source, message):
    with pytest.raises(PictureError, match=message):
        open_picture(source)


def test_open_files_and_buffers_are_pictures(tmp_path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    wanted = np.asarray(open_picture(data))
    with open(tmp_path / "a.png", "rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        spooled.seek(0)
        for source in (file, spooled, io.BytesIO(data), bytearray(data), memoryview(data)):
            assert np.array_equal(np.asarray(open_picture(source)), wanted)
        file.seek(0)
        assert (
            Question("What?", images=[file, bytearray(data)]).open(CONFIG).question.startswith("Image-1: <image>\nImage-2: <image>")
        )


def test_open_files_that_give_no_picture_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with open(tmp_path / "a.png", "rb") as file:
        open_picture(file)
        with pytest.raises(PictureError, match="the open file is at its end"):
            open_picture(file)
    with pytest.raises(PictureError, match=r"the open file cannot be read .*closed"):
        open_picture(file)
    with open(tmp_path / "b", "wb") as file, pytest.raises(PictureError, match="the open file cannot be read"):
        open_picture(file)
    with pytest.raises(PictureError, match="gives text: open it with mode 'rb'"):
        open_picture(io.StringIO("text"))
    for source in (bytearray(b"text"), io.BytesIO(b"text")):
        with pytest.raises(PictureError, match="not a format that Pillow knows"):
            open_picture(source)


@pytest.mark.parametrize("head", ["DATA:IMAGE/PNG;BASE64,", "data:image/png;Base64,"])
def test_data_urls_have_no_case(head):
    url = head + base64.b64encode(png()).decode()
    assert np.array_equal(np.asarray(open_picture(url)), PIXELS)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    picture = Image.new(mode, (8, 4))
    assert open_picture(picture).mode == "RGB"
    assert open_picture(picture).size == (8, 4)


def test_sixteen_bits_of_grey_keep_their_shades():
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(open_picture(Image.fromarray(grey)))[..., 0]
    assert np.array_equal(found.ravel(), np.arange(256))


@pytest.mark.parametrize("number", [3, 6, 8])
def test_photographs_are_turned_as_their_exif_says(number):
    """The same scene in eight orientations: upright, all look alike; upstream leaves them lying, an intended difference."""
    upright = open_picture(shared("data/pictures/Landscape_3.jpg"))
    turned = open_picture(shared(f"data/pictures/Landscape_{number}.jpg"))
    assert turned.size == upright.size == (1800, 1200)
    difference = np.abs(np.asarray(turned, int) - np.asarray(upright, int)).mean()
    assert difference < 12


def test_load_image_is_upstreams():
    tiles = load_image(Image.fromarray(np.zeros((480, 640, 3), np.uint8)), max_num=6)
    assert tuple(tiles.shape) == (7, 3, 448, 448)
    assert tuple(load_image(PIXELS, input_size=56, max_num=1).shape) == (1, 3, 56, 56)


def test_odd_pictures_are_read_or_refused_in_bounded_memory():
    """All in one process, which must neither crash nor hang nor take more than 0.3 GB above the imports."""
    folder = shared("data/odd-pictures")
    code = """
import json, sys, time
from pathlib import Path
from runtime.errors import PictureError
from runtime import load_image
from runtime.answer.turn import Question
from runtime.parts.memory import peak_bytes
import torch
before, found = peak_bytes(), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    started = time.process_time()
    try:
        message = None
        load_image(path)
    except PictureError as error:
        message = str(error)
    found[path.name] = [message, time.process_time() - started, peak_bytes() - before]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert len(found) == 49
    assert {name for name, (message, _, _) in found.items() if message} == REFUSED
    for name, (message, seconds, peak) in found.items():
        assert seconds < 10, name
        assert peak < 0.3e9, name
        assert message is None or (name in message and "\n" not in message)
    assert not done.stderr
