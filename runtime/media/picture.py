"""A picture from any source: path, bytes, open file, PIL, NumPy, data URL or web address -> RGB, upright, of bounded size.

Knows nothing of tiles. Rejects what is not a picture with a one-line error, before its pixels take memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import PictureError
from runtime.media.web import MOST_BYTES, fetch, is_web_address

Source = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray

MOST_PIXELS = 89_478_485  # Pillow's limit for a warning; 256 MB of RGB


def open_picture(source: Source, *, allow_urls: bool | Collection[str] = True) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF orientation says.

    `source` is a path, the bytes of a picture file, a file opened in binary mode, a PIL picture, a uint8 array (H, W),
    (H, W, 1), (H, W, 3) or (H, W, 4), a data URL, or an http(s) address. `allow_urls` limits addresses, as a server must: False
    refuses all, a collection names the hosts that may be fetched from, redirects included. Of several frames, the first is taken.
    Two intended differences from upstream's Image.open(...).convert("RGB"): upstream ignores the orientation, so photographs lie
    on their side, and turns 16-bit pictures white. Raises PictureError.
    """
    source = read_source(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"the picture of {len(source)} bytes")
    if not isinstance(source, str | Path):
        raise PictureError(
            f"a {type(source).__name__} is not a picture: give a path, bytes, an open file, a PIL picture, an array or a URL"
        )
    text = str(source)
    if is_data_url(text):
        return _decode(io.BytesIO(read_data_url(text)), "the data URL")
    if is_web_address(text):
        if not allow_urls:
            raise PictureError("web addresses are not fetched here: send the picture itself")
        return _decode(io.BytesIO(fetch(text, None if allow_urls is True else allow_urls)), text)
    try:
        with open(source, "rb") as file:
            return _decode(file, text)
    except FileNotFoundError:
        raise PictureError(f"{text} does not exist") from None
    except (OSError, ValueError) as error:  # a folder, no permission, an invalid name
        raise PictureError(f"{text} cannot be read as a picture ({getattr(error, 'strerror', None) or error})") from None


def read_source(source: Any) -> Any:
    """The bytes of a buffer, or of an open file from its position on; anything else unchanged. Raises PictureError."""
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Image.Image) or not callable(getattr(source, "read", None)):
        return source
    try:
        data = source.read()
    except (OSError, ValueError) as error:  # closed, or not open for reading
        raise PictureError(f"the open file cannot be read ({error})") from None
    if not isinstance(data, bytes):
        raise PictureError("the open file gives text: open it with mode 'rb'")
    if not data:
        raise PictureError("the open file is at its end: seek(0) before it is read again")
    return data


def _decode(file: Any, name: str) -> Image.Image:
    try:
        _know_heif(file)
        with Image.open(file) as picture:
            return _to_rgb(picture, name)
    except PictureError:
        raise
    except Image.DecompressionBombError:  # Pillow's limit for an error, twice as high
        raise PictureError(f"{name} has more than {MOST_PIXELS / 1e6:.0f} million pixels: scale it down first") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} cannot be read as a picture (not a format that Pillow knows)") from None
    except Exception as error:  # Pillow's readers raise many kinds of errors on broken files
        raise PictureError(f"{name} cannot be read as a picture ({error or type(error).__name__})") from None


def _know_heif(file: Any) -> None:
    """Register the HEIF format of iPhones with Pillow when the first such file comes: it begins with an ftyp box."""
    if file.read(12)[4:8] == b"ftyp" and "HEIF" not in Image.OPEN:
        import pi_heif

        pi_heif.register_heif_opener()
    file.seek(0)


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise PictureError(f"{name} has {width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million: scale it down first")
    if not width or not height:
        raise PictureError(f"{name} has {width} x {height} pixels: it is empty")
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16- or 32-bit grey, which convert() would clip at 255
        grey = np.asarray(upright, np.int64)
        upright = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise PictureError(
            f"the array is {array.dtype} {shape}, expected uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with values 0 to 255"
        )
    return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and shape[2] == 1 else array), "the array")


def read_data_url(url: str) -> bytes:
    """The bytes of a data URL. Raises PictureError."""
    if len(url) > 2 * MOST_BYTES:
        raise PictureError(f"the data URL has {len(url) >> 20} MB, more than {MOST_BYTES >> 20} MB of picture: scale it down first")
    head, comma, data = url.partition(",")
    if not comma:
        raise PictureError("the data URL has no comma: expected data:image/png;base64,...")
    raw = urllib.parse.unquote_to_bytes(data)
    if not head.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise PictureError(f"the data URL is not base64 ({error})") from None


def is_data_url(text: str) -> bool:
    """Whether a text is a data URL; schemes are case-insensitive."""
    return text[:5].lower() == "data:"
