"""python -m pytest tests/test_demo.py

The chatbot as a client meets it, over a local connection: streamed answers, pictures that stay, broken files.
"""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from demo.__main__ import main
from runtime.model import OVInternVLChatModel

gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def page(tiny, converted):
    from demo.chatbot import make_demo

    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    model = OVInternVLChatModel(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    demo = make_demo(model)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
    yield gradio_client.Client(address, verbose=False), model, tokenizer
    demo.close()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8)).save(path)
    return path


def test_an_answer_arrives_in_pieces_and_is_the_models(page, picture):
    client, model, tokenizer = page
    message = {"text": "What is it?", "files": [gradio_client.handle_file(str(picture))]}
    job = client.submit(message, 12, 8, api_name="/answer")
    job.result(timeout=120)
    pieces = [str(output) for output in job.outputs()]
    assert len(pieces) > 1
    import torch

    from runtime.image import Tiling, cut_tiles
    from runtime.picture import open_picture

    tiles = torch.from_numpy(cut_tiles(open_picture(picture), Tiling.of(model.config)))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert pieces[-1].strip() == model.chat(tokenizer, tiles, "What is it?", options)


def test_a_broken_picture_is_one_line_and_the_page_goes_on(page, tmp_path):
    client, _, _ = page
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    with pytest.raises(Exception, match="cannot be read as a picture"):
        client.predict({"text": "What?", "files": [gradio_client.handle_file(str(broken))]}, 12, 4, api_name="/answer")
    assert client.predict({"text": "Hello", "files": []}, 12, 4, api_name="/answer")


def test_pictures_stay_with_their_turns():
    from demo.chatbot import turns_of

    file = {"type": "file", "file": {"path": "a.png"}}
    history = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, file]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "And <image> this?"},
        {"role": "assistant", "content": "A dog."},
    ]
    assert turns_of(history) == [("What?", ["a.png"], "A cat."), ("And <image> this?", [], "A dog.")]


def test_a_folder_that_is_none_is_told(capsys, tmp_path):
    assert main([str(tmp_path / "none")]) == 2
    assert "is not there: give a model folder" in capsys.readouterr().err
