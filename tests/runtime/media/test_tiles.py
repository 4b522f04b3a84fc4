"""python -m pytest tests/runtime/media/test_tiles.py

Grids and pixels are the original's.
"""

import json

import numpy as np
import pytest
from PIL import Image

from runtime.errors import PictureError
from runtime.folder.config import InternVLConfig
from runtime.media.picture import open_picture
from runtime.media.tiles import Tiling, choose_grid, cut_tiles
from tests.checkpoints import CONFIGS
from tests.conftest import DATA, shared

TILING = json.loads((DATA / "tiling.json").read_text())


def test_every_grid_is_the_originals():
    wrong = [
        case
        for case in TILING["grids"]
        if list(choose_grid(*case["size"], Tiling(448, max_tiles=case["max_tiles"]))) != case["grid"]
    ]
    assert len(TILING["grids"]) > 600
    assert not wrong


@pytest.mark.parametrize("name", TILING["images"])
@pytest.mark.parametrize("limit", ["1", "6", "12"])
def test_pixels_are_the_originals(name, limit):
    wanted = TILING["images"][name][limit]
    tiles = cut_tiles(open_picture(shared(f"data/pictures/{name}")), Tiling(448, max_tiles=int(limit)))
    assert list(tiles.shape) == wanted["shape"]
    assert np.allclose(tiles.mean(axis=(1, 2, 3), dtype=np.float64), wanted["mean"], atol=1e-5)
    assert np.allclose(tiles.std(axis=(1, 2, 3), dtype=np.float64), wanted["std"], atol=1e-5)
    for tile, samples in zip(tiles, wanted["samples"], strict=True):
        found = [tile[channel, y, x] for channel in range(3) for y, x in TILING["sample_positions"]]
        assert np.allclose(found, samples, atol=1e-5)


def test_tile_limits_come_from_the_configuration():
    assert Tiling.of(InternVLConfig.from_dict(CONFIGS["InternVL2-1B"])) == Tiling(448, 1, 12, thumbnail=True)
    assert Tiling.of(InternVLConfig.from_dict(CONFIGS["tiny-chat-v1-2"])) == Tiling(56, 1, 1, thumbnail=False)


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (0, 0, 20, 20))
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # as a camera on its side stores it, with orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_any_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16", "F") else "picture.png")
    Image.new(mode, (30, 20)).save(path)
    assert open_picture(path).mode == "RGB"


def test_unreadable_pictures_are_told(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(PictureError, match=r"text.jpg cannot be read as a picture"):
        open_picture(tmp_path / "text.jpg")
    with pytest.raises(PictureError, match=r"gone.jpg does not exist"):
        open_picture(tmp_path / "gone.jpg")
