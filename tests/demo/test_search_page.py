"""python -m pytest tests/demo/test_search_page.py

The page over an index as people meet it, in a real browser: words in two languages, and a picture. Which scenes show what was asked
for is known, since they are drawn.
"""

from pathlib import Path

import pytest

from demo.contrast.scenes import unseen
from runtime import OVInternVL
from runtime.contrast.embed import embed

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "page"
ENGLISH, CHINESE, THING = "a purple diamond", "紫色的菱形", ("purple", "diamond")


@pytest.fixture(scope="module")
def place(browser, converted, tmp_path_factory):
    """Where the page is, the drawn files, and which of them show the thing."""
    from demo.search import make_search

    model = OVInternVL(converted(ROOT / "demo" / "contrast" / "checkpoint", weight_format="int8", verify=False))
    folder = tmp_path_factory.mktemp("scenes")
    right = set()
    for number, scene in enumerate(unseen(1, 60)):
        scene.picture.save(folder / f"{number:03}.png")
        if THING in scene.things:
            right.add(f"{number:03}.png")
    page = make_search(model, embed(model, [folder], folder / "index.npz"))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
    yield address, folder, right
    page.close()


def found(page, count: int) -> list[str]:
    """The names of the files under the pictures, best first."""
    page.wait_for_function("n => document.querySelectorAll('.caption-label').length === n", arg=count)
    return [text.split()[0] for text in page.locator(".caption-label").all_inner_texts()]


@pytest.mark.parametrize(("width", "height"), [(1280, 860), (420, 860)])
def test_words_find_what_is_drawn(place, windows, width, height):
    address, _, right = place
    assert len(right) >= 3
    with windows(address) as open_page:
        page = open_page(width, height)
        page.get_by_placeholder("words, in any").fill(ENGLISH)
        page.keyboard.press("Enter")
        best = found(page, 12)
        assert right.issuperset(best[:3])
        page.wait_for_timeout(500)
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"search-{width}.png")
        page.get_by_placeholder("words, in any").fill(CHINESE)
        page.keyboard.press("Enter")
        page.wait_for_function("before => document.querySelector('.caption-label').innerText !== before", arg=best[0])
        assert right.issuperset(found(page, 12)[:3])


def test_a_picture_finds_itself(place, windows):
    address, folder, _ = place
    with windows(address) as open_page:
        page = open_page()
        page.get_by_text("Pictures like this one").click()
        page.locator("input[type=file]").first.set_input_files(str(folder / "007.png"))
        assert found(page, 12)[0] == "007.png"
