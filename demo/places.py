"""The boxes of an answer over its picture, as HTML for the page: labelled outlines; a click or Tab on one shows its edges too.

Plain HTML and CSS, no script; the model's labels are escaped, and the browser has fonts for their scripts. For display only:
nothing is computed from it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from runtime.answer.boxes import Box
from runtime.answer.drawing import COLOURS

SHOWN = 560, 1024  # pixels of the longer side: small pictures are shown larger, large ones are sent smaller
MOST_LETTERS = 200  # of a label
SWITCH = "boxes-switch"  # the id of the checkbox that shows and hides them

STYLE = f"""<style>
.boxes {{ position: relative; max-width: 100%; margin: 4px 0; background-size: 100% 100% }}
.boxes .box {{ position: absolute; cursor: pointer; outline: 2px solid var(--c); box-shadow: 0 0 0 3px #000, inset 0 0 0 1px #000 }}
.boxes .box:focus {{ outline: 4px solid #fff; box-shadow: 0 0 0 6px #000, inset 0 0 0 1px #000; z-index: 1 }}
.boxes .tag {{ position: absolute; max-width: 12em; padding: 0 4px; font-size: 12px; line-height: 16px; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; background: var(--c); color: #000 !important; border: 1px solid #000 }}
.boxes .told {{ display: none; position: absolute; left: 0; right: 0; bottom: 0; padding: 4px 8px; background: #000d; z-index: 2;
  font-size: 14px; line-height: 1.3; overflow-wrap: anywhere; pointer-events: none }}
.boxes .told, .boxes .told * {{ color: #fff !important }}
.boxes .box:focus + .told {{ display: block }}
body:has(#{SWITCH} input:not(:checked)) .boxes {{ display: none }}
</style>"""


def show_boxes(picture: Image.Image, boxes: Sequence[Box]) -> str:
    """A picture with clickable boxes, whose edges are in its pixels."""
    long = max(picture.size)
    width, height = (max(1, round(side * max(long, SHOWN[0]) / long)) for side in picture.size)
    sent = picture.copy()
    sent.thumbnail((SHOWN[1], SHOWN[1]), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    sent.save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    labels = [*dict.fromkeys(box.label for box in boxes)]
    in_front_last = sorted(boxes, key=lambda box: (box.x2 - box.x1) * (box.y2 - box.y1), reverse=True)
    over = "".join(_area(box, picture.size, COLOURS[labels.index(box.label) % len(COLOURS)]) for box in in_front_last)
    place = f"width:min({width}px,{45 * width / height:.2f}vh);aspect-ratio:{width}/{height}"
    ground = f"background-image:url(data:image/jpeg;base64,{data})"
    return f'<div class="boxes" role="group" aria-label="{len(boxes)} boxes" style="{place};{ground}">{over}</div>'


def _area(box: Box, size: tuple[int, int], colour: str) -> str:
    """One clickable box, then the text that a click shows."""
    left, right = 100 * box.x1 / size[0], 100 * box.x2 / size[0]
    top, bottom = 100 * box.y1 / size[1], 100 * box.y2 / size[1]
    label = html.escape(box.label[:MOST_LETTERS])
    edge = "bottom:100%" if top > 15 else "top:100%" if bottom < 85 else "top:0"  # where the picture has room for the label
    side = "left:0" if left < 60 else "right:0"
    tag = f'<bdi class="tag" style="{edge};{side}">{label}</bdi>' if label.strip() else ""
    style = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%;--c:{colour}"
    numbers = f"x1 {box.x1:.0f}, y1 {box.y1:.0f}, x2 {box.x2:.0f}, y2 {box.y2:.0f}"
    return (
        f'<div class="box" tabindex="0" role="button" aria-label="{label}" style="{style}">{tag}</div>'
        f'<div class="told"><bdi>{label}</bdi> <small>{numbers}</small></div>'
    )
