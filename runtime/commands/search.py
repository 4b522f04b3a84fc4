"""python -m runtime search INDEX [TEXT]: the pictures of an index that are nearest to a text or a picture."""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import Any

from runtime.commands.options import add_device
from runtime.errors import OptionError, PictureError

THUMBNAIL = 256  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", type=Path, help="index that python -m runtime embed wrote")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what to look for, in any language that the model knows")
    parser.add_argument("--image", metavar="FILE", help="picture to find similar ones of; with TEXT, both count equally")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="pictures to list (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with the pictures")
    parser.add_argument("--model", metavar="FOLDER", type=Path, help="model folder, if it has moved (default: as the index says)")
    add_device(parser)


def run(index: Path, text: str | None, image: str | None, top: int, html: Path | None, model: Path | None, **placed: Any) -> None:
    """Print scores and paths, best first. Raises OptionError and other InternVLError kinds."""
    from runtime.contrast.index import Index
    from runtime.contrast.search import open_for, query_of

    if text is None and image is None:
        raise OptionError('there is nothing to look for: give words, like "a red panda", or --image')
    if top < 1:
        raise OptionError(f"top {top} is not positive")
    found = Index.read(index)
    query = query_of(open_for(found, model, **placed), found, text, image)
    best = found.nearest(query, top)
    for score, path in best:
        print(f"{score:.4f}  {_from_here(path)}")
    if html is not None:
        write_page(html, " + ".join(filter(None, [text, image])), best)


def write_page(file: Path, title: str, best: list[tuple[float, str]]) -> None:
    """Write a contact sheet in HTML, with embedded thumbnails. Raises OptionError if it cannot be written."""
    cells = [
        f'<figure><img src="{_thumbnail(path)}" alt=""><figcaption>{score:.4f}<br>{html.escape(path)}</figcaption></figure>'
        for score, path in best
    ]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 14px sans-serif; margin: 2em }} main {{ display: flex; flex-wrap: wrap; gap: 1em }}
figure {{ margin: 0; width: {THUMBNAIL}px; overflow-wrap: anywhere }}</style>
<h1>{html.escape(title)}</h1><main>
{chr(10).join(cells)}
</main></html>
"""
    try:
        file.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"--html {file} cannot be written ({error.strerror})") from None


def _from_here(path: str) -> str:
    """A path relative to the current folder, if it lies below it."""
    below = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if below else path


def _thumbnail(path: str) -> str:
    """A thumbnail of a picture as a data URL; empty if the file cannot be read."""
    from runtime.media.picture import open_picture

    try:
        picture = open_picture(Path(path))
    except PictureError:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
