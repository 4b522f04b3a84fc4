"""Bounding boxes: parsed from an answer, in pixels of its pictures, and the question that asks for them.

Takes texts and the sizes of pictures. Knows no tokens and no model; `drawing.py` draws the boxes.
Coordinates and question: OpenGVLab/InternVL@2410d1d internvl_chat/eval/refcoco/evaluate_grounding.py.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import PictureError, PromptError
from runtime.folder.tokenizer import PLACE_TOKENS, check_text
from runtime.media.picture import Source, open_picture

BOX_KEYS, LABEL_KEYS = ("bbox_2d", "bbox", "box"), ("label", "name")  # in JSON answers
FULL = 1000  # thousandths of a picture's width or height
LEAST_THOUSANDTHS = 4  # RefCOCO's rule: four numbers with a smaller sum are fractions
MOST_NESTED = 32  # depth of nested lists and objects
ONE, SEVERAL = (  # RefCOCO's question for one object; upstream's chat data format for several
    "Please provide the bounding box coordinate of the region this sentence describes: {}",
    "Detect the {} in the image with their bounding boxes.",
)

_NAME = re.compile(r"\b(?:Image-|Frame)\d+", re.IGNORECASE)  # names of pictures in prompts
_START = re.compile(r"<ref>|[\[{]")
_REF_END = re.compile(r"</ref>|(?=<ref>|<box>)")
_TAG = re.compile("|".join(PLACE_TOKENS))
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)("?)' + r"|'((?:[^'\\]|\\.)*)('?)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*")
_KEY_BEFORE = re.compile(r"[\"']?(?:" + "|".join(BOX_KEYS) + r")[\"']?\s*:\s*$")
_SENTENCE = re.compile(r"(?<!\bMr|\bMs|\bDr|\bSt|\bNo|\bvs)[.!?]\s+|[。！？]")  # noqa: RUF001  Chinese has its own
_BULLET = re.compile(r"(?:[-*•]|\d+[.)])\s+")
_PROSE_END = re.compile(r"\s(?:is|are|at|in|coordinates?|box|boxes)$")
_EDGES = " \t,;:.-–—*_`\"'=，；：、"  # noqa: RUF001  around a label
_CUT, _OTHER = object(), object()  # the answer ends inside a list or object; true, false, null

Size = tuple[int, int]  # width, height
Found = tuple[str, list[float], str, int]  # label, four numbers, other texts of their object, position in the answer


@dataclass(frozen=True)
class Box:
    """A labelled box: its edges in pixels of the picture as given (upright), and the index of that picture, from 0."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    picture: int = 0


def find_boxes(
    answer: str,
    pictures: Source | Size | Sequence[Source | Size],
    *,
    question: str = "",
    names: Mapping[str, int] | None = None,
) -> list[Box]:
    """The boxes in an answer, in order, clipped to their pictures.

    Forms: `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`; the same without its special tokens, `label[[...]]`; JSON lists and
    objects with `bbox_2d`, `bbox` or `box` and `label` or `name`, in a code fence or in prose, truncated or not. Four numbers with
    a sum of 4 or more are thousandths of the whole picture's width and height, smaller ones are fractions. Numbers that form no box
    (x2 <= x1, five numbers, text) are skipped.
    `pictures` are the pictures shown, or their sizes (width, height) upright. A box belongs to the picture named by its label, its
    object, the words before it, the whole answer or `question`, else to the last. "Image-2" and "Frame2" are the second, unless
    `names` (lower-case name -> index) differs; boxes of a picture that does not exist are skipped.
    Raises PictureError for boxes without any picture, and for what is not a picture; PromptError for an answer that is not text.
    """
    if not isinstance(answer, str):
        raise PromptError(f"an answer is a text, this is a {type(answer).__name__}: give its text")
    found = [*_found(answer)]
    sizes = _sizes(pictures)
    if found and not sizes:
        raise PictureError(f"the answer has boxes ({len(found)}) and there is no picture: give it, or its (width, height)")
    said = [(match.start(), match[0].lower()) for match in _NAME.finditer(answer)]
    whole = {name for _, name in said} or {*_names(question)}
    boxes = []
    for label, numbers, others, at in found:
        before = said[bisect_left(said, (at, "")) - 1 :][:1] if said and said[0][0] < at else []
        told = _names(label)[-1:] or _names(others)[-1:] or [name for _, name in before] or ([*whole] if len(whole) == 1 else [])
        index = _index(told[0], names) if told else len(sizes) - 1
        box = _scaled(label, numbers, sizes[index], index) if 0 <= index < len(sizes) else None
        boxes += [] if box is None else [box]
    return boxes


def intersection_over_union(one: Box, other: Box) -> float:
    """Intersection over union of two boxes: 0 if disjoint, 1 if equal. Ignores which pictures they belong to."""
    wide = min(one.x2, other.x2) - max(one.x1, other.x1)
    high = min(one.y2, other.y2) - max(one.y1, other.y1)
    common = max(0.0, wide) * max(0.0, high)
    areas = sum((box.x2 - box.x1) * (box.y2 - box.y1) for box in (one, other))
    return common / (areas - common) if common else 0.0


def locate_question(labels: str | Sequence[str], *, marked: bool = True) -> str:
    """The published question for the boxes of labels. `marked` off omits `<ref>` tokens, for vocabularies without them.

    Raises PromptError for labels that are empty, not text, or contain such marks.
    """
    several = [labels] if isinstance(labels, str) else [*labels]
    if not several:
        raise PromptError("locate has no labels: give words, like 'the red car'")
    for label in several:
        check_text(label)
        if not label.strip():
            raise PromptError("a label to locate is empty: give words, like 'the red car'")
        if mark := _TAG.search(label):
            raise PromptError(f"the label {label[:60]!r} has the mark {mark[0]}: give the words alone")
    told = [f"<ref>{label.strip()}</ref>" if marked else label.strip() for label in several]
    return (ONE if len(told) == 1 else SEVERAL).format(", ".join(told))


# ---- pictures


def _sizes(pictures: Any) -> list[Size]:
    """(width, height) of one picture or of several."""
    if isinstance(pictures, list | tuple) and not _is_size(pictures):
        return [_size(picture) for picture in pictures]
    return [_size(pictures)]


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int | np.integer) for side in value)


def _size(picture: Any) -> Size:
    if not isinstance(picture, list | tuple):
        return open_picture(picture).size
    if not _is_size(picture) or min(picture) < 1:
        raise PictureError(f"{str(picture)[:60]} is not the size of a picture: give (width, height) in pixels, or the picture")
    return int(picture[0]), int(picture[1])


def _names(text: str) -> list[str]:
    return [name.lower() for name in _NAME.findall(text)]


def _index(name: str, names: Mapping[str, int] | None) -> int:
    """The index of the picture with this name; -1 or past the end where there is none."""
    if names is not None and name in names:
        return names[name]
    return int(name.removeprefix("image-").removeprefix("frame")[:9]) - 1


def _scaled(label: str, numbers: list[float], size: Size, index: int) -> Box | None:
    """Four numbers of an answer as a box of a picture; None where it covers nothing of the picture."""
    if not all(map(math.isfinite, numbers)):
        return None
    within = [max(0.0, number) for number in numbers]  # clipped first, or negative numbers would turn thousandths into fractions
    full = 1 if sum(within) < LEAST_THOUSANDTHS else FULL
    x1, y1, x2, y2 = (min(value * size[n % 2] / full, float(size[n % 2])) for n, value in enumerate(within))
    return Box(label, x1, y1, x2, y2, index) if x1 < x2 and y1 < y2 else None


# ---- reading an answer


def _found(text: str) -> Iterator[Found]:
    """Lists of four numbers with their labels, anywhere in a text."""
    at = since = 0  # where the search continues, and where the words of the next label begin
    ref: str | None = None
    last = ""
    while start := _START.search(text, at):
        if start[0] == "<ref>":
            end = _REF_END.search(text, start.end())
            if end is None:
                return
            ref, at = " ".join(text[start.end() : end.start()].split()), end.end()
            continue
        try:
            value, end_of_value = _value(text, start.start())
        except _NoValue:
            at = start.end()
            continue
        between = text[since : start.start()]
        last = _label(between, last) if ref is None else ref
        for label, numbers, others in _rectangles(value, last, unnamed=ref or ""):
            yield label, numbers, others, start.start()
        at = since = end_of_value
        ref = None


def _label(between: str, last: str) -> str:
    """The words before a list that are its label; the previous label where there are only separators."""
    if _KEY_BEFORE.search(between):
        return ""
    words = _TAG.sub("", between)
    lines = [line for line in words.splitlines() if line.strip()]
    if not words.strip(_EDGES + "\n([{}])"):
        return last
    line = lines[-1]
    if "```" in line or (words.rstrip(" ") != words.rstrip() and line.rstrip().endswith(":")):  # a code fence, an introduction
        return ""
    attached = line[-1:] not in (" ", ":")
    line = _SENTENCE.split(line.rstrip(_EDGES))[-1].strip(_EDGES)
    line = _BULLET.sub("", line, count=1).lstrip(_EDGES + ")]}").rstrip(_EDGES + "([{").removeprefix("and ")
    return "" if not attached and _PROSE_END.search(line) else " ".join(line.split())


def _rectangles(
    value: Any, label: str, *, unnamed: str = "", bare: bool = True, others: str = ""
) -> Iterator[tuple[str, list[float], str]]:
    """The lists of four numbers in a value, with this label; in an object only those of its box key, with its own label or
    `unnamed`, and with its other texts."""
    if isinstance(value, list):
        if bare and len(value) == 4 and all(isinstance(number, float) for number in value):
            yield label, value, others
        for one in value:
            yield from _rectangles(one, label, unnamed=unnamed, bare=bare, others=others)
    elif isinstance(value, dict):
        labels = (value[key] for key in LABEL_KEYS if isinstance(value.get(key), str))
        own = next((" ".join(_TAG.sub("", label).split()) for label in labels), unnamed)
        box = next((key for key in BOX_KEYS if key in value), None)
        texts = " ".join([others, *(one for one in value.values() if isinstance(one, str))])
        for key, one in value.items():
            yield from _rectangles(one, own, unnamed=own, bare=key == box, others=texts)


class _NoValue(Exception):
    """There is no list, object, string or number at this position."""


def _value(text: str, at: int, depth: int = 0) -> tuple[Any, int]:
    """The JSON value at a position, and its end: numbers as floats; accepts single quotes, trailing commas and truncation.

    Raises _NoValue.
    """
    first = text[at]
    if first in "[{":
        if depth == MOST_NESTED:
            raise _NoValue
        return _list(text, at + 1, depth) if first == "[" else _object(text, at + 1, depth)
    if first in "\"'":
        found = _STRING.match(text, at)
        assert found is not None
        closed = found[2] or found[4]
        return _unescaped(found[1] or found[3] or ""), found.end() if closed else len(text)
    if number := _NUMBER.match(text, at):
        return float(number[0]), number.end()
    if (word := _WORD.match(text, at)) and (word.end() == len(text) or word[0].lower() in ("true", "false", "null", "none", "nan")):
        return _OTHER, word.end()
    if not text[at + 1 :].strip() and first in "+-.":
        return _CUT, len(text)
    raise _NoValue


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    while (at := _next(text, at)) < len(text):
        if text[at] == "]":
            return values, at + 1
        value, at = _value(text, at, depth + 1)
        values.append(value)
    return [*values, _CUT], at


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    while (at := _next(text, at)) < len(text):
        if text[at] == "}":
            return values, at + 1
        if word := _WORD.match(text, at):  # a key without quotes
            key, at = word[0], word.end()
        else:
            key, at = _value(text, at, depth + 1)
        at = _next(text, at, "")
        if at == len(text):
            break
        if not isinstance(key, str) or text[at] != ":":
            raise _NoValue
        at = _next(text, at + 1, "")
        if at < len(text):
            value, at = _value(text, at, depth + 1)
            values.setdefault(key, value)
    return values, at


def _next(text: str, at: int, skipped: str = ",") -> int:
    """The next position of anything but white space and `skipped` characters."""
    while at < len(text) and (text[at].isspace() or text[at] in skipped):
        at += 1
    return at


def _unescaped(text: str) -> str:
    try:
        read = json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text
    return str(read).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
