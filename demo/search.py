"""A Gradio page over InternVL-C and -G and an index: type words or give a picture, and see the nearest pictures.

Knows the page; vectors and their comparison are the runtime's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from runtime.contrast.index import Index
from runtime.contrast.model import OpenedInternVL
from runtime.contrast.search import query_of
from runtime.errors import InternVLError, PictureError
from runtime.media.picture import open_picture

TITLE = "InternVL on OpenVINO: search"
SHOWN, MOST_SHOWN = 12, 60
THUMBNAIL = 384  # pixels; the page gets thumbnails, so it needs no access to the files
STYLE = (
    "<style>.grid-container { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) !important; }</style>"  # as many as fit
)


class Search:
    """The opened model and its index."""

    def __init__(self, model: OpenedInternVL, index: Index):
        self.model, self.index = model, index

    def find(self, text: str, picture: str | None, count: float) -> list[tuple[Image.Image, str]]:
        """The nearest pictures with name and score; files that are gone are left out. Empty without a query."""
        if not text.strip() and picture is None:
            return []
        try:
            query = query_of(self.model, self.index, text.strip() or None, None if picture is None else Path(picture))
        except InternVLError as error:
            raise gr.Error(str(error)) from None
        shown = []
        for score, path in self.index.nearest(query, int(count)):
            try:
                found = open_picture(Path(path))
            except PictureError:
                continue
            found.thumbnail((THUMBNAIL, THUMBNAIL))
            shown.append((found, f"{Path(path).name} {score:.2f}"))
        return shown


def make_search(model: OpenedInternVL, index: Index) -> gr.Blocks:
    """The page, ready to launch."""
    search = Search(model, index)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as page, gr.Tab("Search"):
        with gr.Row():
            text = gr.Textbox(label=f"Search {len(index.paths)} pictures", placeholder="words, in any language it knows", scale=3)
            count = gr.Slider(1, MOST_SHOWN, value=SHOWN, step=1, label="Pictures", scale=1)
        with gr.Accordion("Pictures like this one", open=False):
            like = gr.Image(type="filepath", show_label=False)
        gr.HTML(STYLE, padding=False)
        found = gr.Gallery(show_label=False, object_fit="contain", height="auto", interactive=False)
        asked: dict[str, Any] = {"fn": search.find, "inputs": [text, like, count], "outputs": found}
        text.submit(**asked, api_name="search")
        like.change(**asked, api_name=False)
        count.release(**asked, api_name=False)
    return page
