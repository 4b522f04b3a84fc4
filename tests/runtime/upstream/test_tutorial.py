"""python -m pytest tests/runtime/upstream/test_tutorial.py

The code of the model cards and of the tutorial, as their readers have it: only the class and the folder differ.
"""

from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, TextIteratorStreamer

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime import load_image as load_any
from runtime import load_video as load_any_video

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
SIDE = 56  # of the tiny model's tiles


def load_image(image_file, input_size=SIDE, max_num=12):
    return load_any(image_file, input_size=input_size, max_num=max_num)


def load_video(video_path, bound=None, input_size=SIDE, max_num=1, num_segments=32):
    return load_any_video(video_path, bound=bound, input_size=input_size, max_num=max_num, num_segments=num_segments)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in ((1, (100, 75)), (2, (100, 100))):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"image{number}.png")
    return folder


@pytest.fixture(scope="module", params=["ours", "reference"])
def path_and_class(request, tiny, converted):
    """The same code must run on both, and `answers` compares what it said."""
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    if request.param == "reference":
        return InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2"))), tokenizer
    model = OVInternVLChatModel.from_pretrained(
        folder,
        torch_dtype=torch.bfloat16,
        low_cpu_mem_usage=True,
        use_flash_attn=True,
        trust_remote_code=True,
        ov_config=EXACT,
    ).eval()
    return model, tokenizer


ANSWERS: dict[str, list[str]] = {}


def test_the_model_card(path_and_class, pictures, request, capsys):
    model, tokenizer = path_and_class
    said = []
    generation_config = dict(max_new_tokens=10, do_sample=False)  # noqa: C408  as the card writes it

    # pure-text conversation
    question = "Hello, who are you?"
    response, history = model.chat(tokenizer, None, question, generation_config, history=None, return_history=True)
    said.append(response)
    question = "Can you tell me a story?"
    response, history = model.chat(tokenizer, None, question, generation_config, history=history, return_history=True)
    said.append(response)
    assert [turn[0] for turn in history] == ["Hello, who are you?", "Can you tell me a story?"]

    # single-image single-round, then multi-round
    pixel_values = load_image(pictures / "image1.png", max_num=12)
    question = "<image>\nPlease describe the image shortly."
    said.append(model.chat(tokenizer, pixel_values, question, generation_config))
    response, history = model.chat(tokenizer, pixel_values, question, generation_config, history=None, return_history=True)
    said.append(response)
    question = "Please write a poem according to the image."
    response, history = model.chat(tokenizer, pixel_values, question, generation_config, history=history, return_history=True)
    said.append(response)

    # multi-image multi-round, combined images
    pixel_values1 = load_image(pictures / "image1.png", max_num=12)
    pixel_values2 = load_image(pictures / "image2.png", max_num=12)
    pixel_values = torch.cat((pixel_values1, pixel_values2), dim=0)
    question = "<image>\nDescribe the two images in detail."
    response, history = model.chat(tokenizer, pixel_values, question, generation_config, history=None, return_history=True)
    said.append(response)
    question = "What are the similarities and differences between these two images."
    response, history = model.chat(tokenizer, pixel_values, question, generation_config, history=history, return_history=True)
    said.append(response)

    # multi-image multi-round, separate images
    num_patches_list = [pixel_values1.size(0), pixel_values2.size(0)]
    question = "Image-1: <image>\nImage-2: <image>\nDescribe the two images in detail."
    response, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=None,
        return_history=True,
    )
    said.append(response)
    question = "What are the similarities and differences between these two images."
    response, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=history,
        return_history=True,
    )
    said.append(response)

    # batch inference, single image per sample
    questions = ["<image>\nDescribe the image in detail."] * len(num_patches_list)
    responses = model.batch_chat(
        tokenizer, pixel_values, num_patches_list=num_patches_list, questions=questions, generation_config=generation_config
    )
    said += responses

    # streaming
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    streamed_config = dict(max_new_tokens=10, do_sample=False, streamer=streamer)  # noqa: C408
    thread = Thread(
        target=model.chat,
        kwargs=dict(  # noqa: C408
            tokenizer=tokenizer,
            pixel_values=pixel_values1,
            question="<image>\nPlease describe the image shortly.",
            history=None,
            return_history=False,
            generation_config=streamed_config,
        ),
    )
    thread.start()
    generated_text = ""
    for new_text in streamer:
        if new_text == model.conv_template.sep:
            break
        generated_text += new_text
    thread.join()
    assert generated_text.strip() == said[2]

    # positions of upstream's argument list
    arguments = (tokenizer, pixel_values1, "What?", generation_config, None, True, None, "<img>", "</img>", "<IMG_CONTEXT>", True)
    capsys.readouterr()
    response, history = model.chat(*arguments)
    printed = capsys.readouterr().out
    assert printed.startswith(f"dynamic ViT batch size: {len(pixel_values1)}\n")
    assert "<image>\nWhat?" in printed
    assert "<IMG_CONTEXT>" not in printed
    with pytest.warns(DeprecationWarning, match="image_counts is now num_patches_list"):
        counted = model.batch_chat(tokenizer, pixel_values, questions, generation_config, image_counts=num_patches_list)
    assert counted == responses
    assert generation_config == {"max_new_tokens": 10, "do_sample": False}
    _agree(request, said)


def test_the_video_loop(path_and_class, tmp_path, request):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number, np.uint8))))
        container.mux(stream.encode(None))
    model, tokenizer = path_and_class
    generation_config = dict(max_new_tokens=10, do_sample=False)  # noqa: C408
    pixel_values, num_patches_list = load_video(tmp_path / "a.mp4", num_segments=8, max_num=1)
    pixel_values = pixel_values.to(torch.float32)
    video_prefix = "".join([f"Frame{i + 1}: <image>\n" for i in range(len(num_patches_list))])
    question = video_prefix + "What is the red panda doing?"
    response, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=None,
        return_history=True,
    )
    said = [response]
    question = "Describe this video in detail."
    response, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=history,
        return_history=True,
    )
    _agree(request, [*said, response])


def _agree(request, said: list[str]) -> None:
    """The first of the two classes leaves its answers for the second."""
    name = request.node.originalname
    assert ANSWERS.setdefault(name, said) == said
