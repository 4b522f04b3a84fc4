"""python -m pytest tests/runtime/answer/test_places.py

Conversations that ask where things are: tokens of places stay in the turns and out of the text, boxes are in pixels.
"""

import numpy as np
import pytest
from PIL import Image

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import Box, OVInternVLChatModel, Question, find_boxes
from runtime.answer.boxes import locate_question
from runtime.answer.decode import Token
from runtime.answer.prompt import template_of
from runtime.answer.stream import TextStream
from runtime.answer.turn import picture_names
from runtime.errors import PromptError
from runtime.folder.tokenizer import PLACE_TOKENS, Tokenizer

CAR = "<ref>car</ref><box>[[100, 200, 300, 600]]</box>"
SHOWN = "car[[100, 200, 300, 600]]"


class Scripted(InternVLChatModel):
    """The reference with answers that are given: everything but the choice of the tokens is real."""

    says = CAR

    def tokens(self, prompt, decoding, cache=None, statistics=None, progress=None):
        self.asked = prompt
        for token in self.tokenizer.encode(self.says, add_special_tokens=False):
            yield Token(token)
        yield Token(self.stop_id)


@pytest.fixture(scope="module")
def model():
    from tests.test_docs import BUILT_IN

    return Scripted.from_checkpoint(Checkpoint(BUILT_IN))


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def test_tokens_of_places_stay_in_the_turn_and_out_of_the_text(model):
    conversation = model.start_conversation()
    assert conversation.boxes == []
    assert conversation.ask("Where is the car?", images=[picture(2000, 500)]) == SHOWN, "as upstream's chat() shows it"
    (turn,) = conversation.turns
    assert turn.answer == SHOWN
    assert set(turn.tokens) >= model.tokenizer.place_ids - {model.tokenizer.convert_tokens_to_ids(f"<{s}quad>") for s in ("", "/")}
    assert conversation.boxes == [Box("car", 200, 100, 600, 300)]
    conversation.ask("And now?")
    assert f"{model.conv_template.assistant}{CAR}" in model.tokenizer.decode(model.asked.ids), "the next prompt has them too"
    conversation.turns[0].answer = "car[[1, 2, 3, 4]]"  # edited: its tokens count no more
    conversation.ask("And now?")
    assert f"{model.conv_template.assistant}car[[1, 2, 3, 4]]" in model.tokenizer.decode(model.asked.ids)


def test_text_with_special_tokens_where_somebody_wants_them(model):
    conversation = model.start_conversation()
    assert conversation.ask("Where?", images=[picture(2000, 500)], skip_special_tokens=False) == CAR
    assert conversation.boxes == [Box("car", 200, 100, 600, 300)]
    conversation.ask("And now?")
    assert f"{model.conv_template.assistant}{CAR}" in model.tokenizer.decode(model.asked.ids)


def test_boxes_are_of_the_picture_that_is_named(model, monkeypatch):
    conversation = model.start_conversation()
    assert conversation.ask("Where?") == SHOWN
    assert conversation.boxes == [], "there is no picture"
    pair = [picture(1000, 1000), picture(2000, 500)]
    conversation.ask("Where?", images=pair)
    assert conversation.boxes == [Box("car", 200, 100, 600, 300, 1)], "the last"
    conversation.ask("Where is it in Image-1?")
    assert conversation.boxes == [Box("car", 100, 200, 300, 600, 0)], "the question names it, a turn later"
    conversation.ask("Where?", images=[picture(100, 100)])
    assert conversation.boxes == [Box("car", 10, 20, 30, 60, 2)]
    monkeypatch.setattr(model, "says", f"Image-2: {CAR} Image-9: {CAR}")
    conversation.ask("Where?")
    assert conversation.boxes == [Box("car", 200, 100, 600, 300, 1)]
    conversation.reset()
    assert conversation.boxes == []


def test_pictures_are_numbered_beside_the_frames_of_a_video(model, video):
    turns = [model.open_turn(Question("Look at Image-1.", video=video, num_segments=3, images=[picture(50, 60)]))]
    names, asked = picture_names(turns)
    assert names == {"frame1": 0, "frame2": 1, "frame3": 2, "image-1": 3}
    assert asked.split() == ["Look", "at", "Image-1."]
    text = "Image-1: <image>\nImage-2: <image>\nWhere?"
    names, asked = picture_names([*turns, model.open_turn(Question(text, images=[picture(50, 60)] * 2))])
    assert names == {"frame1": 0, "frame2": 1, "frame3": 2, "image-1": 4, "image-2": 5, "image-3": 5}, "the later one of a name"
    assert asked.split() == ["Where?"]


def test_typed_marks_of_places_are_tokens(model):
    asked = model.open_turn(Question(f"Where is {''.join(PLACE_TOKENS)}?"))
    ids = model.prompt_of("S", [asked]).ids
    assert model.tokenizer.place_ids <= set(ids.tolist())
    assert len(model.tokenizer.place_ids) == len(PLACE_TOKENS)


def test_what_is_to_be_located_is_asked_in_the_published_words(model, monkeypatch):
    conversation = model.start_conversation()
    conversation.ask(locate=["the red car"], images=[picture(56, 56)])
    assert conversation.turns[0].question == "<image>\n" + locate_question(["the red car"])
    ref = model.tokenizer.convert_tokens_to_ids("<ref>")
    assert np.count_nonzero(model.asked.ids == ref) == 1
    conversation.ask("Look.", locate=["a", "b"])
    assert conversation.turns[1].question == "Look.\n" + locate_question(["a", "b"])
    monkeypatch.setattr(model.tokenizer, "place_ids", frozenset())  # a vocabulary without them
    conversation.ask(locate="a")
    assert conversation.turns[2].question == locate_question("a", marked=False)
    for options, said in (({"locate": ["a"]}, "there is no picture to locate anything in"), ({"locate": [" "]}, "is empty")):
        with pytest.raises(PromptError, match=said):
            model.start_conversation().ask(**options)
    with pytest.raises(PromptError, match="the question is empty"):
        conversation.ask()


@pytest.fixture(scope="module")
def opened(shapes):
    return OVInternVLChatModel(shapes)


@pytest.mark.parametrize("tiles", [1, 12])
@pytest.mark.parametrize("size", [(112, 112), (112, 336), (336, 112), (4000, 300), (1, 3), (3, 1)])
def test_boxes_are_of_the_picture_and_not_of_its_tiles(opened, size, tiles):
    """From the picture to the box, over OpenVINO's parts, with an answer that is begun with a box: each axis by its own side."""
    conversation = opened.start_conversation()
    options = {"answer_prefix": CAR, "min_new_tokens": 2, "max_new_tokens": 8}
    answer = conversation.ask(locate="the red circle", images=[picture(*size)], max_tiles=tiles, **options)
    (turn,) = conversation.turns
    assert turn.answer.startswith(CAR)
    assert turn.answer.endswith(answer)
    (box,) = conversation.boxes[:1]
    assert (box.label, box.picture) == ("car", 0)
    wide, high = size
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((0.1 * wide, 0.2 * high, 0.3 * wide, 0.6 * high))


def test_real_tokenizers_keep_and_show_places(real_tokenizer):
    folder, config = real_tokenizer
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.place_ids) == len(PLACE_TOKENS)
    answer = f"{CAR}<ref>红色 的 汽车</ref><box>[[1, 2, 30, 40], [5, 6, 70, 80]]</box>"
    for said in (answer, f"Sure, it is {answer} as you see."):
        ids = tokenizer.encode(said, add_special_tokens=False)
        shown, marked = (
            TextStream(tokenizer, template_of(config)),
            TextStream(tokenizer, template_of(config), skip_special_tokens=False),
        )
        text = "".join([*(shown.add(token) for token in ids), shown.end()])
        assert text == said.replace("<ref>", "").replace("</ref>", "").replace("<box>", "").replace("</box>", "")
        assert text == tokenizer.decode([token for token in ids if token not in tokenizer.place_ids]).strip()
        whole = "".join([*(marked.add(token) for token in ids), marked.end()])
        for form in (whole, text):
            boxes = find_boxes(form, (1000, 1000))
            assert [box.label for box in boxes][1:] == ["红色 的 汽车"] * 2
            assert [(box.x1, box.y2) for box in boxes] == [(100, 600), (1, 40), (5, 80)]
