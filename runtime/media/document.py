"""A PDF from any source -> its pages as pictures, rendered at the resolution of their tiles; anything else -> one picture.

The only file that knows pypdfium2. Page ranges are written as in web addresses: paper.pdf#page=2-4.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import PictureError, not_installed
from runtime.media.picture import Source, is_data_url, open_picture, read_data_url, read_source
from runtime.media.tiles import Tiling, choose_grid
from runtime.media.web import fetch, is_web_address

MOST_PAGES = 16  # of one document at once
MAGIC = b"%PDF-"
NAMED = re.compile(r"(?P<file>.+\.pdf)(?:#page=(?P<first>\d+)(?:-(?P<last>\d+))?)?", re.IGNORECASE | re.DOTALL)


def open_pictures(source: Source, tiling: Tiling, *, allow_urls: bool | Collection[str] = True) -> list[Image.Image]:
    """The pages of a PDF, or the one picture that `source` is: what open_picture takes, and PDFs in the same forms.

    A PDF gives all pages, or those of `#page=2-4` after its name. Raises PictureError, and OptionError where the rendering library
    is not installed.
    """
    source = read_source(source)
    if isinstance(source, bytes) and source.startswith(MAGIC):
        return _render(source, f"the PDF of {len(source)} bytes", tiling, None)
    if not isinstance(source, str | Path):
        return [open_picture(source, allow_urls=allow_urls)]
    text = str(source)
    if is_data_url(text):
        if "application/pdf" not in text[:64].lower():
            return [open_picture(source, allow_urls=allow_urls)]
        return _render(read_data_url(text), "the PDF of the data URL", tiling, None)
    named = NAMED.fullmatch(text)
    if named is None:
        return [open_picture(source, allow_urls=allow_urls)]
    pages = None
    if named["first"] is not None:
        pages = int(named["first"]), int(named["last"] or named["first"])
        if not 1 <= pages[0] <= pages[1]:
            raise PictureError(
                f"{text}: pages {pages[0]} to {pages[1]} are not a range: the first page is 1, as in paper.pdf#page=2-4"
            )
    if is_web_address(text):
        if not allow_urls:
            raise PictureError("web addresses are not fetched here: send the file itself")
        return _render(fetch(named["file"], None if allow_urls is True else allow_urls), named["file"], tiling, pages)
    if not Path(named["file"]).is_file():
        raise PictureError(f"{named['file']} does not exist")
    return _render(Path(named["file"]), named["file"], tiling, pages)


def file_of(name: str) -> str:
    """The file name of a picture or document, without its page range."""
    named = NAMED.fullmatch(name)
    return named["file"] if named else name


def _render(source: bytes | Path, name: str, tiling: Tiling, pages: tuple[int, int] | None) -> list[Image.Image]:
    try:
        import pypdfium2
    except ModuleNotFoundError as error:
        raise not_installed(error, "documents", "; it renders PDF pages") from None
    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        reason = "it is protected by a password: save it without one" if locked else f"{error}: it is damaged or no PDF"
        raise PictureError(f"{name} cannot be read as a PDF ({reason})") from None
    try:
        count = len(document)
        first, last = pages or (1, count)
        if last > count:
            raise PictureError(f"{name} has {count} pages, no page {last}")
        if last - first + 1 > MOST_PAGES:
            raise PictureError(
                f"{name}: {last - first + 1} pages of {count}, at most {MOST_PAGES} at once: name some, like "
                f"{Path(name).name}#page={first}-{first + MOST_PAGES - 1}"
            )
        if not count:
            raise PictureError(f"{name} has no pages")
        return [_page(document, number, name, tiling) for number in range(first - 1, last)]
    finally:
        document.close()


def _page(document: Any, number: int, name: str, tiling: Tiling) -> Image.Image:
    """One page, rendered to cover the grid of tiles that it is cut into."""
    import pypdfium2

    try:
        page = document[number]
        width, height = page.get_size()
        if width <= 0 or height <= 0:
            raise PictureError(f"{name}: page {number + 1} is empty")
        columns, rows = choose_grid(round(1000 * width), round(1000 * height), tiling)
        scale = max(columns * tiling.side / width, rows * tiling.side / height)
        scale = min(scale, 8 * max(columns, rows) * tiling.side / max(width, height))  # bounds the long side of a very narrow page
        return page.render(scale=scale).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        raise PictureError(f"{name}: page {number + 1} cannot be rendered ({error})") from None
