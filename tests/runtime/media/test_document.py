"""python -m pytest tests/runtime/media/test_document.py

PDF pages are pictures, as large as the tiles can show them; iPhone pictures are pictures. The files are written by other code.
"""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from runtime.answer.turn import Question
from runtime.errors import PictureError
from runtime.folder.config import InternVLConfig
from runtime.media import document
from runtime.media.document import MOST_PAGES, open_pictures
from runtime.media.picture import open_picture
from runtime.media.tiles import Tiling, choose_grid
from tests.checkpoints import CONFIGS

TILING = Tiling(448)
pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: it writes pictures as iPhones do")
pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed: it writes the PDFs of these tests")
pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install 'internvl-openvino[documents]'")


def page(number: int, size=(595, 842)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, size[0] // 2, size[1] // 2), fill=(20 * number % 250, 0, 200))
    return picture


def write(path: Path, pages: int = 3, size=(595, 842)) -> Path:
    first, *rest = [page(number, size) for number in range(1, pages + 1)]
    first.save(path, save_all=True, append_images=rest, resolution=72)
    return path


def corner(picture: Image.Image) -> tuple:
    return picture.getpixel((5, 5))


def close(found, wanted) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 12  # Pillow's PDFs hold JPEG


@pytest.mark.parametrize(
    ("name", "pages"),
    [("a.pdf", [1, 2, 3]), ("a.pdf#page=2", [2]), ("a.pdf#page=2-3", [2, 3]), ("A.PDF#page=1-1", [1])],
)
def test_pages_are_pictures(tmp_path, name, pages):
    write(tmp_path / name.partition("#")[0])
    found = open_pictures(str(tmp_path / name), TILING)
    assert len(found) == len(pages)
    assert all(close(corner(picture), (20 * number % 250, 0, 200)) for picture, number in zip(found, pages, strict=True))


@pytest.mark.parametrize("size", [(595, 842), (842, 595), (595, 600), (200, 1000)])
@pytest.mark.parametrize("tiles", [1, 6, 12])
def test_a_page_has_the_pixels_that_its_tiles_show(tmp_path, size, tiles):
    tiling = Tiling(448, max_tiles=tiles)
    (picture,) = open_pictures(write(tmp_path / "a.pdf", 1, size), tiling)
    columns, rows = choose_grid(*picture.size, tiling)
    assert picture.width >= 448 * columns - 2
    assert picture.height >= 448 * rows - 2
    assert min(picture.width / (448 * columns), picture.height / (448 * rows)) < 1.02


def test_every_form_of_a_picture_may_be_a_document(tmp_path):
    data = write(tmp_path / "a.pdf").read_bytes()
    url = "data:application/pdf;base64," + base64.b64encode(data).decode()
    for source in (data, url, tmp_path / "a.pdf"):
        assert len(open_pictures(source, TILING)) == 3
    picture = page(1)
    assert open_pictures(picture, TILING)[0].size == picture.size


def test_a_question_shows_all_pages_with_a_mark_each(tmp_path):
    config = InternVLConfig.from_dict(CONFIGS["InternVL2-1B"])
    page(9).save(tmp_path / "b.png")
    turn = Question("Compare.", images=[write(tmp_path / "a.pdf", 2), tmp_path / "b.png"], max_tiles=1).open(config)
    assert turn.question == "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\nCompare."
    assert [picture.count for picture in turn.pictures] == [1, 1, 1]


def test_a_document_that_cannot_be_read_is_one_line(tmp_path):
    whole = write(tmp_path / "a.pdf", 3)
    writer = pypdf.PdfWriter(clone_from=whole)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    (tmp_path / "text.pdf").write_text("no PDF")
    (tmp_path / "cut.pdf").write_bytes(whole.read_bytes()[:200])
    many = pypdf.PdfWriter()
    for _ in range(10_000):
        many.add_blank_page(100, 100)
    many.write(tmp_path / "many.pdf")
    for name, message in (
        ("gone.pdf", "gone.pdf does not exist"),
        ("locked.pdf", "it is protected by a password: save it without one"),
        ("text.pdf", "it is damaged or no PDF"),
        ("cut.pdf", "it is damaged or no PDF"),
        ("many.pdf", rf"10000 pages of 10000, at most {MOST_PAGES} at once: name some, like many.pdf#page=1-{MOST_PAGES}"),
        ("a.pdf#page=4", "has 3 pages, no page 4"),
        ("a.pdf#page=3-2", "pages 3 to 2 are not a range"),
        ("a.pdf#page=0", "pages 0 to 0 are not a range"),
    ):
        with pytest.raises(PictureError, match=message) as raised:
            open_pictures(str(tmp_path / name), TILING)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [(28346, 28346), (14000, 20)])
def test_a_page_of_ten_metres_takes_no_more_memory(tmp_path, size):
    writer = pypdf.PdfWriter()
    writer.add_blank_page(*size)
    writer.write(tmp_path / "large.pdf")
    (picture,) = open_pictures(tmp_path / "large.pdf", TILING)
    assert picture.width * picture.height < 40e6
    assert max(picture.size) <= 8 * 12 * 448


def test_addresses_of_documents_are_fetched_where_that_is_allowed(tmp_path, monkeypatch):
    data = write(tmp_path / "a.pdf").read_bytes()
    monkeypatch.setattr(document, "fetch", lambda url, hosts: data)
    assert len(open_pictures("https://example.org/a.pdf#page=1-2", TILING)) == 2
    with pytest.raises(PictureError, match="web addresses are not fetched here"):
        open_pictures("https://example.org/a.pdf", TILING, allow_urls=False)


def heic(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(picture).save(file, quality=95, **options)
    return file.getvalue()


def test_iphone_pictures_are_opened(tmp_path):
    halves = Image.new("RGB", (160, 96), "red")
    halves.paste("blue", (80, 0, 160, 96))
    (tmp_path / "photo.heic").write_bytes(heic(halves))
    for source in (tmp_path / "photo.heic", heic(halves)):
        found = open_picture(source)
        assert (found.mode, found.size) == ("RGB", (160, 96))
        assert np.abs(np.asarray(found, int) - np.asarray(halves, int)).mean() < 8


def test_iphone_pictures_are_turned_upright():
    """An iPhone writes the turn twice, as a transformation and as EXIF; it must be made once."""
    tall = Image.new("RGB", (96, 160), "red")
    tall.paste("blue", (0, 80, 96, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = tall.rotate(90, expand=True)
    found = open_picture(heic(lying, exif=exif.tobytes()))
    assert found.size == (96, 160)
    assert found.getpixel((48, 20))[0] > 200
    assert found.getpixel((48, 140))[2] > 200


def test_an_iphone_picture_that_claims_to_be_huge_is_refused():
    """The spatial extent is written in its ispe box, and read before pixels take memory."""
    data = bytearray(heic(Image.new("RGB", (160, 96))))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(PictureError) as raised:
        open_picture(bytes(data))
    assert "\n" not in str(raised.value)


def test_a_damaged_iphone_picture_is_one_line():
    data = heic(Image.effect_noise((160, 96), 60).convert("RGB"))
    for cut in (20, len(data) // 2):
        with pytest.raises(PictureError, match="cannot be read as a picture"):
            open_picture(data[:cut])
