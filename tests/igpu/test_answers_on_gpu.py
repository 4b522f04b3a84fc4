"""build/igpu/run python -m pytest tests/igpu/test_answers_on_gpu.py

The built-in model on a GPU: what people do with it gives what a CPU gives, and computes no more of a prompt. In float32, where
answers are to be the same; test_exam_on_gpu.py asks in float16.
"""

import threading
from pathlib import Path

import pytest
from PIL import Image

from runtime import OVInternVLChatModel, pipeline
from tests.igpu.conftest import KEPT

PICTURE = Path(__file__).parents[2] / "demo" / "examples" / "shapes.png"
QUESTIONS = ["Which shape is purple?", "Describe the picture.", "How many shapes are there?"]
EXACT = {"precision": "accuracy", "cache_dir": KEPT}
OPTIONS = {"max_new_tokens": 60, "do_sample": False}


@pytest.fixture(scope="module")
def cpu(shapes):
    return OVInternVLChatModel(shapes, "CPU", precision="accuracy")


@pytest.fixture(scope="module", params=["GPU", "vision on the GPU", "language on the GPU", "AUTO:GPU,CPU", "HETERO:GPU,CPU"])
def gpu(request, shapes):
    placed = {
        "vision on the GPU": {"device": "CPU", "vision_device": "GPU"},
        "language on the GPU": {"device": "GPU", "vision_device": "CPU"},
    }
    return OVInternVLChatModel(shapes, **placed.get(request.param, {"device": request.param}), **EXACT)


def ask(conversation, question, **more):
    """The answer, and what of the prompt was computed for it: tokens, tiles."""
    answer = conversation.ask(question, **OPTIONS, **more)
    took = conversation.statistics
    return answer, took.prompt_tokens - took.reused_tokens, took.encoded_tiles


def talk(model):
    model.forget()
    one = model.start_conversation()
    found = [ask(one, QUESTIONS[0], images=[PICTURE]), ask(one, QUESTIONS[1])]
    one.turns = one.turns[:1]  # edited
    found.append(ask(one, QUESTIONS[2]))
    one.turns[0].answer = "nothing"
    found.append(ask(one, QUESTIONS[0]))
    one.reset()
    found.append(ask(one, "Hello?"))
    other = model.start_conversation()
    return [*found, ask(other, QUESTIONS[1], images=[PICTURE])]  # the same picture


def test_turns_edits_and_the_same_picture_compute_what_a_cpu_does(gpu, cpu):
    ours, theirs = talk(gpu), talk(cpu)
    assert [each[0] for each in ours] == [each[0] for each in theirs]
    assert [each[2] for each in ours] == [each[2] for each in theirs]
    assert [each[1] for each in ours[:-1]] == [each[1] for each in theirs[:-1]]
    assert theirs[-1][1] - 32 < ours[-1][1] <= theirs[-1][1]  # a CPU copies whole pages


def test_several_pictures_and_a_video(gpu, cpu, video):
    small = Image.open(PICTURE).resize((112, 112))
    for given in ({"images": [PICTURE, small]}, {"images": [PICTURE], "max_tiles": 1}, {"video": video, "num_segments": 4}):
        found, wanted = (model.start_conversation().ask("What is it?", **given, **OPTIONS) for model in (gpu, cpu))
        assert found == wanted


def test_beams_batches_guesses_and_draws(gpu, cpu):
    def answers(model):
        yield model.ask_batch(["Describe the picture.", "Which shape is purple?", "Hello"], **OPTIONS)
        yield model.ask_batch(["Tell me about shapes."], num_beams=3, num_return_sequences=2, **OPTIONS)
        talk = model.start_conversation()
        yield talk.ask(QUESTIONS[1], images=[PICTURE], prompt_lookup_num_tokens=4, **OPTIONS)
        yield talk.ask(QUESTIONS[1], prompt_lookup_num_tokens=4, **OPTIONS)
        yield talk.ask(QUESTIONS[1], temperature=0.7, seed=3, max_new_tokens=20)

    assert [*answers(gpu)] == [*answers(cpu)]


def test_two_at_once_a_stop_and_what_follows(gpu, cpu):
    wanted = [cpu.start_conversation().ask(question, images=[PICTURE], **OPTIONS) for question in QUESTIONS[:2]]
    found: dict[int, str] = {}

    def run(number):
        found[number] = gpu.start_conversation().ask(QUESTIONS[number], images=[PICTURE], **OPTIONS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == wanted
    stopped = gpu.start_conversation()
    pieces = stopped.stream(QUESTIONS[1], images=[PICTURE], **OPTIONS)
    first = next(pieces)
    pieces.close()
    assert wanted[1].startswith(first)
    assert stopped.ask(QUESTIONS[0], **OPTIONS) == wanted[0]


def test_a_pipeline_of_the_native_engine(shapes, cpu):
    with pipeline(shapes, engine="native", device="GPU", **EXACT) as pipe:
        found = pipe((QUESTIONS[0], str(PICTURE))).text
    assert found == cpu.start_conversation().ask(QUESTIONS[0], images=[PICTURE], **OPTIONS)
