"""python -m pytest tests/demo/test_page.py

The chatbot as people meet it: the built-in model in a real browser, Chromium driven by Playwright (conftest.py).
Screenshots go to build/page, to be looked at.
"""

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from runtime import Box
from runtime.answer.conversation import Conversation

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "page"
EXAMPLE = "Which shape is purple?"
DONE = "first token after"


@pytest.fixture(scope="module")
def bot(converted, browser):  # without a browser nothing is converted
    from demo.chatbot import make_demo
    from runtime import OVInternVLChatModel

    model = OVInternVLChatModel(converted(ROOT / "demo" / "shapes" / "checkpoint", weight_format="int4"))
    page = make_demo(model)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
    yield SimpleNamespace(address=address, model=model)
    page.close()


@pytest.fixture
def window(windows, bot):
    with windows(bot.address) as open_window:

        def open_page(*size: int):
            page = open_window(*size)
            page.get_by_placeholder("Ask;").wait_for()
            return page

        yield open_page


def ask(page, question: str, *files: Path) -> None:
    page.locator(".submit-button").wait_for()  # the answer before has ended
    page.wait_for_timeout(300)
    if files:
        page.locator("input[type=file]").first.set_input_files([str(file) for file in files])
        page.get_by_role("button", name="Remove").first.wait_for()
    page.locator("textarea[data-testid=textbox]").first.fill(question)
    page.keyboard.press("Enter")


def answers(page, count: int) -> None:
    """Wait until this many answers are complete."""
    page.wait_for_function(f"document.body.innerText.split('{DONE}').length > {count}")


def test_an_example_a_second_turn_and_what_the_model_saw(window):
    page = window()
    page.get_by_text(EXAMPLE).first.click()
    answers(page, 1)
    assert page.get_by_text("circle", exact=True).is_visible()
    assert page.get_by_text("1 tile", exact=True).is_visible()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "wide.png")
    ask(page, "Where is it?")
    answers(page, 2)
    assert page.get_by_text("top", exact=True).is_visible()
    assert "reused" in page.inner_text("body")


@pytest.mark.parametrize(
    ("question", "answer", "tiles"),
    [
        ("How high is the red bar?", "9", "1 tile"),
        ("Read the text on the right.", "168", "3 x 1 tiles and a thumbnail"),
        ("Which picture has more shapes?", "Image-1", "1 tile"),
    ],
)
def test_every_example_is_answered_right_by_one_click(window, question, answer, tiles):
    page = window()
    page.get_by_text(question).first.click()
    answers(page, 1)
    assert page.get_by_text(answer, exact=True).is_visible()
    assert page.get_by_text(tiles, exact=True).first.is_visible()
    page.screenshot(path=SHOTS / f"example-{answer}.png")


@pytest.mark.parametrize("width", [1280, 420])
def test_boxes_are_clicked_and_switched_off(window, monkeypatch, width):
    """The built-in model writes no boxes: they are put into its answer's place."""
    boxes = [Box("a <b>circle</b>", 40, 2, 74, 37), Box("all", 0, 0, 112, 112)]
    monkeypatch.setattr(Conversation, "boxes", property(lambda self: boxes))
    page = window(width)
    page.get_by_text(EXAMPLE).first.click()
    answers(page, 1)
    shown, told = page.locator(".boxes"), page.locator(".boxes .told:visible")
    shown.wait_for()
    assert told.count() == 0
    outer = shown.bounding_box()
    assert outer["width"] == pytest.approx(outer["height"], abs=2), "the picture's form"
    assert outer["x"] + outer["width"] <= width

    def click(x: int, y: int, wanted: str) -> None:
        for _ in range(10):  # the page may still change: a box loses what it tells when it is drawn again
            size = shown.bounding_box()
            shown.click(position={"x": size["width"] * x / 112, "y": size["height"] * y / 112})  # once it stands still
            for _ in range(10):
                if told.all_inner_texts() == [wanted]:
                    return
                page.wait_for_timeout(100)
        raise AssertionError(told.all_inner_texts())

    click(57, 20, "a <b>circle</b> x1 40, y1 2, x2 74, y2 37")  # the small one is in front
    page.screenshot(path=SHOTS / f"boxes-{width}.png")
    click(5, 56, "all x1 0, y1 0, x2 112, y2 112")
    switch = page.get_by_label("Boxes in the chat")
    switch.uncheck()
    shown.wait_for(state="hidden")
    switch.check()
    shown.wait_for()


def test_the_example_with_two_pictures_has_no_raw_marks(window):
    page = window()
    page.get_by_text("Which picture has more shapes?").first.click()
    answers(page, 1)
    assert "<image>" not in page.inner_text("body")
    bubble = page.locator(".message.user").last
    assert bubble.inner_text().strip() == "Which picture has more shapes?"
    page.screenshot(path=SHOTS / "pair.png")


def test_a_webcam_picture_is_asked_about(window):
    page = window()
    page.get_by_text("Webcam").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")  # the camera shows something
    page.wait_for_timeout(500)
    page.get_by_role("button", name="capture photo").click()
    page.locator(".multimodal-textbox img").wait_for()  # it waits in the question's box
    page.screenshot(path=SHOTS / "webcam.png")
    ask(page, "What is it?")
    answers(page, 1)
    page.get_by_text("3 x 2 tiles and a thumbnail").wait_for()


def test_what_takes_long_shows_how_far_it_is(window, bot, monkeypatch):
    look = bot.model.encode_tiles
    monkeypatch.setattr(bot.model, "encode_tiles", lambda tiles: time.sleep(1.5) or look(tiles))
    bot.model.feature_cache.clear()
    page = window()
    page.get_by_text("Read the text on the right.").first.click()
    page.get_by_text("Looking at tiles").first.wait_for()
    page.screenshot(path=SHOTS / "progress.png")
    answers(page, 1)


def test_a_narrow_window_shows_the_chat_first(window):
    page = window(390, 800)
    page.screenshot(path=SHOTS / "narrow.png")
    box = page.get_by_placeholder("Ask;").bounding_box()
    assert box["y"] < 800
    assert box["x"] + box["width"] <= 390


def test_a_broken_file_is_one_line_in_the_chat_and_the_page_goes_on(window, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    page = window()
    ask(page, "What is it?", broken)
    page.get_by_text("cannot be read as a picture").wait_for()
    ask(page, "Which shape is blue?", picture(tmp_path / "blue.png", "blue"))
    answers(page, 1)


def test_half_of_a_character_is_replaced(window):
    """A page may hold what no text holds: it was pasted, or cut in the middle of an emoji."""
    page = window()
    box = page.locator("textarea[data-testid=textbox]").first
    box.wait_for()
    box.evaluate(
        """box => {
            const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set
            set.call(box, String.fromCharCode(0xd800) + " Which shape is purple?")
            box.dispatchEvent(new Event("input", {bubbles: true}))
        }"""
    )
    box.press("Enter")
    answers(page, 1)
    page.get_by_text("\ufffd Which shape is purple?").first.wait_for()


def test_stop_ends_the_decoding(window, bot, monkeypatch):
    embed, started, steps, clicked = bot.model.embed_tokens, [], itertools.count(), threading.Event()
    start = bot.model.start_conversation

    def slowly(ids):
        """A large model's pace; the second half of the answer waits for the click."""
        if next(steps) == 12:
            clicked.wait(60)
        time.sleep(0.2)
        return embed(ids)

    monkeypatch.setattr(bot.model, "start_conversation", lambda *given: started.append(start(*given)) or started[-1])
    monkeypatch.setattr(bot.model, "embed_tokens", slowly)
    page = window()
    ask(page, "Describe the picture.", ROOT / "demo" / "examples" / "shapes.png")
    page.get_by_text("purple circle").last.wait_for()
    page.screenshot(path=SHOTS / "streaming.png")
    page.locator(".stop-button").click()
    page.wait_for_timeout(300)  # the click is on its way
    clicked.set()
    deadline = time.monotonic() + 30
    while not (started[0].statistics and started[0].statistics.finish_reason) and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert started[0].statistics.finish_reason == "cancelled"
    assert 1 < started[0].statistics.new_tokens < 30
    monkeypatch.undo()
    ask(page, "What colour is the star?")
    answers(page, 1)


def test_retry_undo_and_edit(window):
    page = window()
    page.get_by_text(EXAMPLE).first.click()
    answers(page, 1)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_timeout(1000)
    answers(page, 1)
    assert page.get_by_text("circle", exact=True).count() == 1
    page.get_by_role("button", name="Edit").last.click()
    page.locator("textarea.edit-textarea").fill("Which shape is orange?")
    page.get_by_role("button", name="Submit").first.click()
    page.get_by_text("star", exact=True).wait_for()
    assert page.get_by_text("circle", exact=True).count() == 0
    answers(page, 1)
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("star", exact=True).wait_for(state="detached")
    assert "orange" in page.locator("textarea[data-testid=textbox]").first.input_value()


def test_two_windows_have_two_conversations(window, tmp_path):
    pages = {colour: window() for colour in ("red", "blue")}
    for colour, page in pages.items():
        ask(page, "What colour is the square?", picture(tmp_path / f"{colour}.png", colour))
    for page in pages.values():
        answers(page, 1)
    for colour, page in pages.items():
        ask(page, "What colour is it?")
        answers(page, 2)
        assert page.get_by_text(colour, exact=True).count() >= 1


def test_another_device_goes_on_with_the_conversation(window, bot):
    from playwright.sync_api import TimeoutError as TooLate

    page = window()
    page.get_by_text(EXAMPLE).first.click()
    answers(page, 1)
    page.get_by_text("Sampling, system message, device").click()
    box = page.get_by_label("Device")
    box.click()
    page.get_by_role("option", name="AUTO").click()
    page.wait_for_function("document.querySelector('[aria-label=Device]').value === 'AUTO'")
    ask(page, "Where is it?")
    answers(page, 2)
    assert page.get_by_text("top", exact=True).is_visible()
    for attempt in range(5):  # Gradio's list of choices sometimes takes the key for itself
        box.click()
        box.fill("NPX")
        page.wait_for_timeout(300)
        box.press("Enter")
        try:
            page.get_by_text("there is no device NPX here").first.wait_for(timeout=5_000)
            break
        except TooLate:
            assert attempt < 4
    page.screenshot(path=SHOTS / "device.png")
    page.wait_for_function("document.querySelector('[aria-label=Device]').value === 'AUTO'")


def picture(path: Path, colour: str) -> Path:
    """A square in the middle of a tile."""
    shades = {"red": (220, 40, 40), "blue": (40, 80, 220)}
    drawn = Image.new("RGB", (112, 112), (240, 240, 240))
    drawn.paste(shades[colour], (42, 42, 70, 70))
    drawn.save(path)
    return path
