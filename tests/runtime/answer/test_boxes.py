"""python -m pytest tests/runtime/answer/test_boxes.py

Boxes in answers: every form that models write, and what is drawn of them.
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from runtime import Box, draw_boxes, find_boxes
from runtime.answer import drawing
from runtime.answer.boxes import intersection_over_union, locate_question
from runtime.errors import PictureError, PromptError

WIDE = (2000, 500)  # a thousandth is 2 pixels wide and half a pixel high
TWO = [(1000, 1000), (2000, 500)]
A = ("car", 200, 100, 600, 300)  # of [100, 200, 300, 600]
B = ("dog", 1000, 0, 2000, 500)  # of [500, 0, 1000, 1000]


def at(label: str, *edges: float, picture: int = 0) -> tuple:
    return (label, *edges, picture)


ANSWERS = {  # name -> answer, its boxes in a picture of 2,000 x 500 pixels
    "tokens": ("<ref>car</ref><box>[[100, 200, 300, 600]]</box>", [A]),
    "several boxes of a label": (
        "<ref>car</ref><box>[[100, 200, 300, 600], [500, 0, 1000, 1000]]</box>",
        [A, ("car", *B[1:])],
    ),
    "several labels": ("<ref>car</ref><box>[[100, 200, 300, 600]]</box><ref>dog</ref><box>[[500, 0, 1000, 1000]]</box>", [A, B]),
    "tokens in prose": (
        "There is a <ref>car</ref><box>[[100, 200, 300, 600]]</box> beside the <ref>dog</ref> <box>[[500, 0, 1000, 1000]]</box>.",
        [A, B],
    ),
    "white space everywhere": (
        "<ref> the\n red  car </ref>\n <box> [ [ 100 ,\n200, 300\t, 600 ] ]\n</box>",
        [("the red car", *A[1:])],
    ),
    "one pair of brackets": ("<ref>car</ref><box>[100, 200, 300, 600]</box>", [A]),
    "a box a token pair": ("<ref>car</ref><box>[[100,200,300,600]]</box><box>[[500,0,1000,1000]]</box>", [A, ("car", *B[1:])]),
    "box without a label": ("<box>[[100, 200, 300, 600]]</box>", [("", *A[1:])]),
    "label without an end": ("<ref>car<box>[[100, 200, 300, 600]]</box>", [A]),
    "brackets in a label": ("<ref>sign [exit] {1}</ref><box>[[100, 200, 300, 600]]</box>", [("sign [exit] {1}", *A[1:])]),
    "Chinese": ("<ref>红色的汽车</ref><box>[[100, 200, 300, 600]]</box>", [("红色的汽车", *A[1:])]),
    "a label that got no box": ("<ref>cat</ref> is not there, <ref>car</ref><box>[[100, 200, 300, 600]]</box>", [A]),
    "cut off in a second box": ("<ref>car</ref><box>[[100, 200, 300, 600], [500, 0, 10", [A]),
    "cut off in the first box": ("<ref>car</ref><box>[[100, 200, 300, 600", []),
    "cut off behind it": ("<ref>car</ref><box>[[100, 200, 300, 600]", [A]),
    "cut off in a label": ("<ref>car</ref><box>[[100, 200, 300, 600]]</box><ref>the do", [A]),
    "skipped tokens": ("car[[100, 200, 300, 600]]", [A]),
    "skipped tokens, several": (
        "car[[100, 200, 300, 600], [500, 0, 1000, 1000]]dog[[500, 0, 1000, 1000]]",
        [A, ("car", *B[1:]), B],
    ),
    "skipped tokens, a comma": ("car[[100, 200, 300, 600]], dog[[500, 0, 1000, 1000]]", [A, B]),
    "skipped tokens in prose": ("It is sunny. car[[100, 200, 300, 600]] and dog[[500, 0, 1000, 1000]].", [A, B]),
    "a full stop in a label": ("No. 10 car[[100, 200, 300, 600]]", [("No. 10 car", *A[1:])]),
    "skipped tokens, lines": ("car[[100, 200, 300, 600]]\ndog[[500, 0, 1000, 1000]]\n", [A, B]),
    "skipped tokens, a list": ("1. car: [[100, 200, 300, 600]]\n2. **dog** [[500, 0, 1000, 1000]]", [A, B]),
    "skipped tokens, cut off": ("car[[100, 200, 300, 600]]dog[[500, 0", [A]),
    "JSON list": (
        '[{"bbox_2d": [100, 200, 300, 600], "label": "car"}, {"bbox_2d": [500, 0, 1000, 1000], "label": "dog"}]',
        [A, B],
    ),
    "JSON object": ('{"bbox_2d": [100, 200, 300, 600], "label": "car"}', [A]),
    "tokens in a label of JSON": ('{"bbox_2d": [100, 200, 300, 600], "label": "<ref>car</ref>"}', [A]),
    "other names": ('[{"name": "car", "bbox": [100, 200, 300, 600]}, {"label": "dog", "box": [500, 0, 1000, 1000]}]', [A, B]),
    "in a fence": ('```json\n[\n  {"bbox_2d": [100, 200, 300, 600], "label": "car"}\n]\n```', [A]),
    "in prose": ('Sure, it is {"bbox_2d": [100, 200, 300, 600], "label": "car"}, as you see.', [A]),
    "in a fence in prose": ('Here it is:\n```json\n{"box": [100, 200, 300, 600], "label": "car"}\n```\nThat was [1].', [A]),
    "a fence without an end": ('```json\n[{"bbox_2d": [100, 200, 300, 600], "label": "car"}', [A]),
    "JSON cut off in a second object": ('[{"bbox_2d": [100, 200, 300, 600], "label": "car"}, {"bbox_2d": [500, 0, 1', [A]),
    "JSON cut off behind a comma": ('[{"label": "car", "bbox_2d": [100, 200, 300, 600]},', [A]),
    "JSON cut off in a label": ('[{"bbox_2d": [100, 200, 300, 600], "label": "ca', [("ca", *A[1:])]),
    "JSON cut off in a key": ('[{"label": "car", "bbox_2d": [100, 200, 300, 600], "conf', [A]),
    "several boxes of an object": (
        '{"label": "car", "bbox_2d": [[100, 200, 300, 600], [500, 0, 1000, 1000]]}',
        [A, ("car", *B[1:])],
    ),
    "objects in an object": ('{"objects": [{"label": "car", "bbox": [100, 200, 300, 600], "colour": [1, 2, 3, 4]}]}', [A]),
    "Python's quotes, a comma too many": ("[{'bbox_2d': [100, 200, 300, 600,], 'label': 'car',},]", [A]),
    "escapes": (r'{"bbox_2d": [100, 200, 300, 600], "label": "a \"car\" \u7ea2"}', [('a "car" 红', *A[1:])]),
    "no label in JSON": ('{"bbox_2d": [100, 200, 300, 600], "score": 0.9, "label": null}', [("", *A[1:])]),
    "numbers alone": ("[[100, 200, 300, 600], [500, 0, 1000, 1000]]", [("", *A[1:]), ("", *B[1:])]),
    "nested lists": ("car[[[100, 200, 300, 600]], [[[500, 0, 1000, 1000]]]]", [A, ("car", *B[1:])]),
    "fractions": ("The bounding box of the car is [0.1, 0.2, 0.3, 0.6].", [("", *A[1:])]),
    "fractions in tokens": ("<ref>car</ref><box>[[0.1, 0.2, 0.3, 0.6]]</box>", [A]),
    "each box by itself": ("car[[0.1, 0.2, 0.3, 0.6]]dog[[500, 0, 1000, 1000]]", [A, B]),
    "the whole picture in fractions": ("car[[0, 0, 1, 1]]", [("car", 0, 0, 2000, 500)]),
    "thousandths as floats": ("car[[100.0, 200.5, 3e2, 600.0]]", [("car", 200, 100.25, 600, 300)]),
    "sum of exactly four": ("car[[0, 0, 2, 2]]", [("car", 0, 0, 4, 1)]),
    "clipped": ("car[[-50, 200, 300, 1200]]", [("car", 0, 100, 600, 500)]),
    "far outside, and negative": ("car[[-900, -900, 300, 600]]", [("car", 0, 0, 600, 300)]),
    "outside altogether": ("car[[1100, 200, 1200, 600]] dog[[-9, -9, -1, -1]]", []),
    "x2 before x1": ("car[[300, 200, 100, 600]]", []),
    "no area": ("car[[100, 200, 100, 600]] dog[[100, 200, 300, 200]]", []),
    "five numbers": ("car[[100, 200, 300, 600, 1]]dog[[500, 0, 1000, 1000]]", [B]),
    "three numbers": ("car[[100, 200, 300]]", []),
    "a quad": ("<ref>text</ref><quad>[[1, 2, 30, 2, 30, 40, 1, 40]]</quad>", []),
    "text in the place of numbers": (
        'car[["a", 200, 300, 600]] {"bbox": "100, 200, 300, 600"} [x1, y1, x2, y2] [1, two, 3, 4]',
        [],
    ),
    "numbers as text": ('{"bbox_2d": ["100", "200", "300", "600"], "label": "car"}', []),
    "true is no number": ('{"bbox_2d": [true, 200, 300, 600]} {"bbox": {"x1": 1}} {"bbox_2d": null}', []),
    "too large for a float": ("car[[100, 200, 1e999, 600]] dog[[" + "9" * 400 + ", 1, 2, 3]]", []),
    "nothing": ("", []),
    "no boxes": ("A red car [see 3] stands {here}, 12:30 <box></box> []", []),
    "brackets without an end": ("[[[[ {{{{ <ref> [ { \" '", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_gives_its_boxes(name):
    answer, expected = ANSWERS[name]
    found = find_boxes(answer, WIDE)
    assert [box.label for box in found] == [label for label, *_ in expected]
    assert [(box.x1, box.y1, box.x2, box.y2) for box in found] == [pytest.approx(edges) for _, *edges in expected]
    assert all(box.picture == 0 for box in found)


SEVERAL = {  # of pictures of 1,000 x 1,000 and 2,000 x 500 pixels
    "the last": ("<ref>car</ref><box>[[100, 200, 300, 600]]</box>", "", [at(*A, picture=1)]),
    "the label names it": ("<ref>Image-1 car</ref><box>[[100, 200, 300, 600]]</box>", "", [at("Image-1 car", 100, 200, 300, 600)]),
    "the words before": (
        "Image-1: <ref>car</ref><box>[[100, 200, 300, 600]]</box>\nImage-2: <ref>car</ref><box>[[100, 200, 300, 600]]</box>",
        "",
        [at("car", 100, 200, 300, 600), at(*A, picture=1)],
    ),
    "the words behind": ("car[[100, 200, 300, 600]] in Image-1", "", [at("car", 100, 200, 300, 600)]),
    "the question": ("car[[100, 200, 300, 600]]", "Where is the car in image-1?", [at("car", 100, 200, 300, 600)]),
    "the label before the question": ("Image-2 car[[100, 200, 300, 600]]", "In Image-1?", [at("Image-2 car", *A[1:], picture=1)]),
    "a question about both": ("car[[100, 200, 300, 600]]", "Is it in Image-1 or Image-2?", [at(*A, picture=1)]),
    "JSON": ('{"label": "Image-1: car", "bbox_2d": [100, 200, 300, 600]}', "", [at("Image-1: car", 100, 200, 300, 600)]),
    "JSON, a field of its own": (
        '[{"bbox": [100, 200, 300, 600], "label": "car", "image": "Image-1"}, {"image": "Image-2", "bbox": [100, 200, 300, 600]}]',
        "",
        [at("car", 100, 200, 300, 600), at("", *A[1:], picture=1)],
    ),
    "not there": (
        "<ref>Image-3</ref><box>[[1, 2, 30, 40]]</box> Image-0 car[[1, 2, 30, 40]] Image-99999999999999[[1, 2, 30, 40]]",
        "",
        [],
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_box_is_of_the_picture_that_is_named(name):
    answer, question, expected = SEVERAL[name]
    found = find_boxes(answer, TWO, question=question)
    assert [(box.label, box.x1, box.y1, box.x2, box.y2, box.picture) for box in found] == expected


def test_pictures_are_pictures_or_sizes(tmp_path):
    Image.new("RGB", (200, 50)).save(tmp_path / "a.png")
    for given in (
        tmp_path / "a.png",
        Image.new("L", (200, 50)),
        np.zeros((50, 200, 3), np.uint8),
        (200, 50),
        [200, 50],
        [(200, 50)],
    ):
        assert find_boxes("a[[100, 200, 300, 600]]", given) == [Box("a", 20, 10, 60, 30)]
    turned = Image.new("RGB", (50, 200))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert find_boxes("a[[100, 200, 300, 600]]", tmp_path / "turned.jpg") == [Box("a", 20, 10, 60, 30)]


@pytest.mark.parametrize("size", [(112, 112), (112, 336), (336, 112), (4000, 300), (1, 3), (3, 1), (8000, 8000)])
def test_each_axis_has_its_own_scale(size):
    """The reports: scaled by the wrong side, by the tile, by the resized picture."""
    (box,) = find_boxes("a[[250, 125, 750, 500]]", size)
    assert (box.x1, box.y1, box.x2, box.y2) == (size[0] / 4, size[1] / 8, size[0] * 3 / 4, size[1] / 2)


def test_boxes_without_a_picture_are_one_line():
    assert find_boxes("no box", []) == []
    with pytest.raises(PictureError, match=r"has boxes \(1\) and there is no picture: give it"):
        find_boxes("a[[1, 2, 30, 40]]", [])
    with pytest.raises(PromptError, match="an answer is a text, this is a NoneType"):
        find_boxes(None, (10, 10))
    with pytest.raises(PictureError, match="is not the size of a picture"):
        find_boxes("a[[1, 2, 30, 40]]", [(0, 10)])
    with pytest.raises(PictureError, match="does not exist"):
        find_boxes("a[[1, 2, 30, 40]]", "missing.png")


@pytest.mark.parametrize(
    "piece", ["[", "{", '{"a":', "[1,", "<ref>", '"', "Image-1 <ref>a</ref><box>[[1, 2, 3, 4]]</box>", "[1,2,3,4],"]
)
def test_broken_and_endless_answers_are_read_in_time(piece):
    started = time.process_time()
    find_boxes(piece * 4000, WIDE)
    assert time.process_time() - started < 5  # 0.6 s at most were measured


def test_any_cut_of_an_answer_is_read():
    """An answer may end anywhere; what was whole before stays."""
    whole = json.dumps([{"bbox_2d": [100, 200, 300, 600], "label": 'a "b" \\ é'}, {"bbox": [0.5, 0, 1, 1], "name": "dog"}])
    for text in (whole, "x <ref>a</ref><box>[[100, 200, 300, 600], [500, 0, 1000, 1000]]</box> and a[[100, 200, 300, 600]]."):
        counts = [len(find_boxes(text[:end], WIDE)) for end in range(len(text) + 1)]
        assert counts == sorted(counts)
        assert counts[-1] == len(find_boxes(text, WIDE)) > 1


def test_the_question_is_the_published_one():
    of_one = "Please provide the bounding box coordinate of the region this sentence describes: "
    assert (
        locate_question("the dog on the left")
        == locate_question(["the dog on the left"])
        == of_one + "<ref>the dog on the left</ref>"
    )
    assert locate_question(["a"], marked=False) == of_one + "a"
    assert locate_question(["a", "b"]) == "Detect the <ref>a</ref>, <ref>b</ref> in the image with their bounding boxes."
    for labels, said in (([], "no labels"), (["a", " "], "is empty"), (["a</ref>"], "has the mark </ref>"), ([3], "this is a int")):
        with pytest.raises(PromptError, match=said):
            locate_question(labels)


def rasterised(one: Box, other: Box) -> float:
    """The same by counting pixels of whole boxes."""
    masks = []
    for box in (one, other):
        mask = np.zeros((40, 40), bool)
        mask[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = True
        masks.append(mask)
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


def test_what_boxes_share_is_counted_right():
    dice = np.random.default_rng(0)
    pairs = [
        [Box("", *np.concatenate([low := dice.integers(0, 30, 2), low + dice.integers(1, 11, 2)])) for _ in "ab"]
        for _ in range(500)
    ]
    pairs += [[Box("", 0, 0, 10, 10)] * 2, [Box("", 0, 0, 10, 10), Box("", 10, 0, 20, 10)]]
    shared = [intersection_over_union(*pair) for pair in pairs]
    assert shared == pytest.approx([rasterised(*pair) for pair in pairs])
    assert sum(0 < one < 1 for one in shared) > 30
    assert shared[-2:] == [1, 0]


def test_what_boxes_share_is_torchvisions():
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    dice = np.random.default_rng(1)
    corners = np.concatenate([low := dice.uniform(0, 30, (100, 2)), low + dice.uniform(0.1, 20, (100, 2))], axis=1)
    boxes = [Box("", *row) for row in corners]
    theirs = ops.box_iou(torch.tensor(corners), torch.tensor(corners))
    ours = [[intersection_over_union(one, other) for other in boxes] for one in boxes]
    assert np.abs(np.array(ours) - theirs.numpy()).max() < 1e-6


# ---- drawing


def changed(picture: Image.Image, boxes: list[Box]) -> np.ndarray:
    """Which pixels (H, W) boxes change."""
    before, after = (np.asarray(one.convert("RGB"), np.int16) for one in (picture, draw_boxes(picture, boxes)))
    return np.abs(before - after).max(axis=2)


@pytest.mark.parametrize("ground", ["white", "black", "#808080"])
@pytest.mark.parametrize("size", [(100, 100), (640, 480), (4000, 300), (300, 4000), (8000, 400)])
def test_outline_and_label_stand_out_from_any_ground(size, ground):
    width, height = size
    box = Box("red car", width * 0.3, height * 0.4, width * 0.7, height * 0.9)
    contrast = changed(Image.new("RGB", size, ground), [box])
    for x, y in ((0.5, 0.4), (0.5, 0.9), (0.3, 0.65), (0.7, 0.65)):  # the middles of its edges
        near = contrast[max(0, int(y * height) - 4) : int(y * height) + 5, max(0, int(x * width) - 4) : int(x * width) + 5]
        assert near.max() > 100
    plain = changed(Image.new("RGB", size, ground), [Box("", box.x1, box.y1, box.x2, box.y2)])
    label = np.argwhere((contrast > 100) != (plain > 100))
    assert np.ptp(label[:, 0]) >= 8
    assert np.ptp(label[:, 1]) >= 25


def has_label(label: str) -> bool:
    picture, edges = Image.new("RGB", (400, 300)), (100, 100, 300, 200)
    return bool((changed(picture, [Box(label, *edges)]) != changed(picture, [Box("", *edges)])).any())


def test_labels_in_every_script_that_a_font_has():
    assert all(has_label(label) for label in ("red car", "Überfall", "Привет", "Ελλάδα"))
    assert not any(has_label(label) for label in ("", "\n", "\u200b", "\U000f0000"))
    letters = frozenset("\u0bf5\u1202\u1361")  # Tamil and Ethiopic in one word: no font of this machine has both
    assert has_label("".join(sorted(letters))) == (drawing._file_with(letters) is not None)


@pytest.mark.parametrize(
    "label", ["x" * 10_000, "שלום עולם", "مرحبا بالعالم", "红色的汽车", "a\nb\tc\x00", "\ud800", "\u202eabc", "👩‍👩‍👧"]
)
@pytest.mark.parametrize("size", [(1, 3), (3, 1), (100, 100), (900, 40)])
def test_any_label_leaves_a_box(label, size):
    box = Box(label, 0.2 * size[0], 0.2 * size[1], 0.8 * size[0], 0.8 * size[1])
    assert changed(Image.new("RGB", size, "white"), [box]).any()


def test_letters_in_the_wrong_order_are_not_shown(monkeypatch):
    """Pillow without Raqm writes from left to right and joins nothing."""
    monkeypatch.setattr(drawing.features, "check", lambda name: False)
    assert not has_label("שלום")
    assert not has_label("مرحبا")
    assert has_label("red car")


def test_no_font_at_all_leaves_a_box(monkeypatch):
    monkeypatch.setattr(drawing, "_file_with", lambda letters: None)
    assert not has_label("red car")


def test_boxes_that_cannot_be_drawn_are_left_out():
    picture = Image.new("RGB", (50, 50))
    nan, inf = float("nan"), float("inf")
    for edges in ((nan, 0, 10, 10), (0, 0, inf, 10), (30, 0, 10, 10)):
        assert not changed(picture, [Box("a", *edges)]).any()
    assert changed(picture, [Box("a", -100, -100, 1000, 1000, picture=7)]).any()


def test_the_picture_itself_stays_as_it_is():
    picture = Image.new("RGBA", (50, 50))
    drawn = draw_boxes(picture, [Box("a", 10, 10, 40, 40)])
    assert (drawn.mode, drawn.size, picture.getbbox()) == ("RGB", (50, 50), None)
    rgb = Image.new("RGB", (50, 50))
    draw_boxes(rgb, [Box("a", 10, 10, 40, 40)])
    assert rgb.getbbox() is None
