"""A picture from wherever it is: path, bytes, PIL, NumPy, data URL or web address -> RGB, upright, of bounded size.

Knows nothing of tiles. Refuses what cannot be a picture with one clear line and before its pixels take memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime import __version__
from runtime.errors import PictureError

Source = str | Path | bytes | Image.Image | np.ndarray

MOST_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: 256 MB of RGB
MOST_BYTES = 64 << 20  # of a picture from a web address or a data URL
CONNECT_SECONDS, FETCH_SECONDS = 10, 30


def open_picture(source: Source, *, allow_urls: bool | Collection[str] = True) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF orientation says.

    `source` is a path, the bytes of a picture file, a PIL picture, a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), a data
    URL, or an http(s) address. `allow_urls` off refuses addresses, as it must be wherever others ask, or names the hosts that may
    be fetched from, also by way of redirects. Of several frames, the first.
    Two intended differences from upstream's Image.open(...).convert("RGB"): it ignores the orientation, so that photographs lie
    on their side, and it turns 16-bit pictures white. Raises PictureError.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"the picture of {len(source)} bytes")
    if not isinstance(source, str | Path):
        raise PictureError(f"a {type(source).__name__} is not a picture: give a path, bytes, a PIL picture, an array or a URL")
    text = str(source)
    if text.startswith("data:"):
        return _decode(io.BytesIO(read_data_url(text)), "the data URL")
    if is_web_address(text):
        if not allow_urls:
            raise PictureError("web addresses are not fetched here: send the picture itself")
        return _decode(io.BytesIO(fetch(text, None if allow_urls is True else allow_urls)), text)
    try:
        with open(source, "rb") as file:
            return _decode(file, text)
    except FileNotFoundError:
        raise PictureError(f"{text} is not there") from None
    except (OSError, ValueError) as error:  # a folder, no permission, an impossible name
        raise PictureError(f"{text} cannot be read as a picture ({getattr(error, 'strerror', None) or error})") from None


def _decode(file: Any, name: str) -> Image.Image:
    try:
        _know_heif(file)
        with Image.open(file) as picture:
            return _to_rgb(picture, name)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} cannot be read as a picture (not a format that Pillow knows)") from None
    except Exception as error:  # Pillow's readers raise many kinds on broken files, some of them by accident
        raise PictureError(f"{name} cannot be read as a picture ({error or type(error).__name__})") from None


def _know_heif(file: Any) -> None:
    """Teach Pillow the pictures of iPhones, when the first one comes: a box that says ftyp begins them."""
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
    if upright.mode.startswith("I"):  # 16 or 32 bits of grey, which convert() would cut off at 255
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
    if not head.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise PictureError(f"the data URL is not base64 ({error})") from None


def check_host(url: str, hosts: Collection[str]) -> None:
    """Raise PictureError unless an address is on one of these hosts."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host not in hosts:
        raise PictureError(f"media are not fetched from {host or 'there'}: send the data itself")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to some hosts only."""

    def __init__(self, hosts: Collection[str]):
        self._hosts = hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_host(newurl, self._hosts)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_web_address(text: str) -> bool:
    """Whether something would have to be fetched."""
    return text.lower().startswith(("http://", "https://"))


def fetch(url: str, hosts: Collection[str] | None) -> bytes:
    """Read a web address, within limits of size and time; redirects stay with http and https, and with `hosts` if there are any.

    Raises PictureError.
    """
    if hosts is not None:
        check_host(url, hosts)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    opener.add_handler(urllib.request.HTTPRedirectHandler() if hosts is None else _Redirects(hosts))
    request = urllib.request.Request(url, headers={"User-Agent": f"internvl-openvino/{__version__}"})
    deadline = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    try:
        with opener.open(request, timeout=CONNECT_SECONDS) as answer:
            while piece := answer.read1(1 << 16):
                data += piece
                if len(data) > MOST_BYTES:
                    raise PictureError(f"{url} is larger than {MOST_BYTES >> 20} MB: fetch it and scale it down first")
                if time.monotonic() > deadline:
                    raise PictureError(f"{url} took longer than {FETCH_SECONDS} s: fetch it first and give the file")
    except urllib.error.HTTPError as error:
        raise PictureError(f"{url} cannot be fetched (HTTP {error.code} {error.reason})") from None
    except PictureError:
        raise
    except Exception as error:  # name resolution, TLS, broken answers, bad addresses
        raise PictureError(f"{url} cannot be fetched ({getattr(error, 'reason', None) or error})") from None
    return bytes(data)
