"""The boxes of an answer drawn into its picture, as HTML for the page: a click or Tab on a box shows its label and numbers.

Plain HTML and CSS, no script; what a model wrote is escaped. For people; nothing is computed from it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from runtime.answer.boxes import Box
from runtime.answer.drawing import draw_boxes

SHOWN = 560, 1024  # pixels of the longer side: small pictures are enlarged, so that labels can be read
MOST_LETTERS = 200  # of a label
SWITCH = "boxes-switch"  # the id of the checkbox that shows and hides them

STYLE = f"""<style>
.boxes {{ position: relative; max-width: 100%; margin: 4px 0; background-size: 100% 100% }}
.boxes .box {{ position: absolute; cursor: pointer }}
.boxes .box:focus {{ outline: 2px solid #fff; outline-offset: 1px; box-shadow: 0 0 0 5px #000 }}
.boxes .told {{ display: none; position: absolute; left: 0; right: 0; bottom: 0; padding: 4px 8px; background: #000d;
  font-size: 14px; line-height: 1.3; overflow-wrap: anywhere; pointer-events: none }}
.boxes .told, .boxes .told * {{ color: #fff !important }}
.boxes .box:focus + .told {{ display: block }}
body:has(#{SWITCH} input:not(:checked)) .boxes {{ display: none }}
</style>"""


def show_boxes(picture: Image.Image, boxes: Sequence[Box]) -> str:
    """A picture with its boxes, in pixels of it, drawn and to be clicked."""
    long = max(picture.size)
    scale = min(max(long, SHOWN[0]), SHOWN[1]) / long
    width, height = (max(1, round(side * scale)) for side in picture.size)
    across, down = width / picture.width, height / picture.height
    scaled = [replace(box, x1=box.x1 * across, y1=box.y1 * down, x2=box.x2 * across, y2=box.y2 * down) for box in boxes]
    file = io.BytesIO()
    draw_boxes(picture.resize((width, height), Image.Resampling.BICUBIC), scaled).save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    # The small ones last: they lie over the large ones.
    over = "".join(_area(box, picture.size) for box in sorted(boxes, key=_size, reverse=True))
    place = f"width:min({width}px,{45 * width / height:.2f}vh);aspect-ratio:{width}/{height}"
    ground = f"background-image:url(data:image/jpeg;base64,{data})"
    return f'<div class="boxes" role="group" aria-label="{len(boxes)} boxes" style="{place};{ground}">{over}</div>'


def _size(box: Box) -> float:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def _area(box: Box, size: tuple[int, int]) -> str:
    """What is clicked, and behind it what is shown then."""
    left, top, wide, high = (
        100 * value / size[n % 2] for n, value in enumerate((box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1))
    )
    label = html.escape(box.label[:MOST_LETTERS])
    numbers = ", ".join(f"{name} {value:.0f}" for name, value in zip(("x1", "y1", "x2", "y2"), _edges(box), strict=True))
    style = f"left:{left:.2f}%;top:{top:.2f}%;width:{wide:.2f}%;height:{high:.2f}%"
    return (
        f'<div class="box" tabindex="0" role="button" aria-label="{label}" style="{style}"></div>'
        f'<div class="told"><bdi>{label}</bdi> <small>{numbers}</small></div>'
    )


def _edges(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2
