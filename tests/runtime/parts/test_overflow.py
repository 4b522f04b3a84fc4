"""python -m pytest tests/runtime/parts/test_overflow.py

A part that overflows in float16 is computed again in float32, and the answer is the same. No GPU is here: single runs are made to
give what is no number, and the part that follows is the same one; tests/igpu plants real overflows.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import OVInternVLChatModel
from runtime.errors import NumericsError, OptionError
from runtime.folder.files import OVERFLOWS_FILE
from runtime.folder.settings import overflowing, remember_overflow, reset
from runtime.parts import language_part, stateless_part
from runtime.parts.device import place_parts, widened
from runtime.parts.stateful_cache import StatefulCache
from tests.runtime.parts.test_device import LAPTOP

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8))
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def folder(tiny, converted, tmp_path):
    return shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="fp32"), tmp_path / "model")


@pytest.fixture
def open_model(folder, monkeypatch):
    """A model whose parts may be widened though they are on no GPU."""
    for module in (language_part, stateless_part):
        monkeypatch.setattr(module, "widened", lambda core, placement: replace(placement))
    return lambda: OVInternVLChatModel(folder, "HETERO:CPU", ov_config=EXACT)


def overflow_at(monkeypatch, run):
    """The `run`th run of the language part, and no run of one that is compiled later, gives what is no number."""
    step, runs, wanting = StatefulCache._step, [], []

    def spoil(cache, *given):
        logits = step(cache, *given)
        wanting[:] = wanting or [cache._compiled]
        runs.append(cache._compiled is wanting[0])
        return np.full_like(logits, np.nan) if sum(runs) >= run and runs[-1] else logits

    monkeypatch.setattr(StatefulCache, "_step", spoil)


CALLS = {
    "a conversation": lambda model: [model.start_conversation().ask("What?", images=[PICTURE], **OPTIONS)],
    "guesses": lambda model: [model.start_conversation().ask("a b a b a b", prompt_lookup_num_tokens=3, **OPTIONS)],
    "a batch": lambda model: model.ask_batch(["What is it?", "Why?"], **OPTIONS),
    "beams": lambda model: model.ask_batch(["What is it?"], num_beams=3, **OPTIONS),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("run", [1, 5], ids=["in the prompt", "in the middle of the answer"])
def test_the_answer_is_what_it_would_have_been(open_model, monkeypatch, call, run, folder):
    ask = CALLS[call]
    wanted = ask(OVInternVLChatModel(folder, "HETERO:CPU", ov_config=EXACT))
    model = open_model()
    model.wait_until_packed()
    overflow_at(monkeypatch, run)
    assert ask(model) == wanted
    assert overflowing(folder, "HETERO:CPU") == ["language"]
    assert model.language_part._is_wide


def test_other_conversations_go_on(open_model, monkeypatch, folder):
    def talk(model, before):
        one, two = model.start_conversation(), model.start_conversation()
        first = one.ask("What?", images=[PICTURE], **OPTIONS)
        before()
        return [first, two.ask("And?", images=[PICTURE], **OPTIONS), one.ask("Why?", **OPTIONS), two.ask("Why?", **OPTIONS)]

    wanted = talk(OVInternVLChatModel(folder, "HETERO:CPU", ov_config=EXACT), lambda: None)
    model = open_model()
    assert talk(model, lambda: overflow_at(monkeypatch, 2)) == wanted


def test_what_overflows_in_float32_too_is_an_error(open_model, monkeypatch):
    model = open_model()
    model.wait_until_packed()
    step = StatefulCache._step
    monkeypatch.setattr(StatefulCache, "_step", lambda *given: np.nan * step(*given))
    with pytest.raises(NumericsError, match="the language part gave NaN"):
        model.start_conversation().ask("What?", **OPTIONS)


def test_the_vision_part_is_computed_again(open_model, monkeypatch, folder):
    tiles = torch.rand(2, 3, 56, 56).numpy()
    model = open_model()
    wanted, narrow, run = model.encode_tiles(tiles), model._vision._compiled, stateless_part.infer

    def spoil(request, inputs):
        run(request, {name: values * (np.nan if model._vision._compiled is narrow else 1) for name, values in inputs.items()})

    monkeypatch.setattr(stateless_part, "infer", spoil)
    assert np.array_equal(model.encode_tiles(tiles), wanted)
    assert overflowing(folder, "HETERO:CPU") == ["vision"]


def test_it_is_remembered_and_forgotten(tmp_path):
    for part in ("vision", "language", "vision"):
        assert remember_overflow(tmp_path, "GPU", part)
    assert overflowing(tmp_path, "GPU") == ["language", "vision"]
    assert overflowing(tmp_path, "CPU") == []
    assert not remember_overflow(tmp_path / "not there", "GPU", "vision")
    placed = place_parts(LAPTOP, tmp_path, "GPU", overflowing=lambda device: overflowing(tmp_path, device))
    hints = {part: placement.properties.get("INFERENCE_PRECISION_HINT") for part, placement in placed.items()}
    assert hints == {"text_embeddings": None, "vision": "f32", "language": "f32"}
    assert reset(tmp_path)
    assert overflowing(tmp_path, "GPU") == []
    (tmp_path / OVERFLOWS_FILE).write_text("[]")
    with pytest.raises(OptionError, match="cannot be read: delete it"):
        overflowing(tmp_path, "GPU")


def test_only_what_nobody_chose_is_widened(tmp_path):
    placed = place_parts(LAPTOP, tmp_path, "GPU")
    assert widened(LAPTOP, placed["language"]).properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert widened(LAPTOP, placed["text_embeddings"]) is None  # on the CPU
    chosen = place_parts(LAPTOP, tmp_path, "GPU", ov_config={"INFERENCE_PRECISION_HINT": "f16"})
    assert widened(LAPTOP, chosen["language"]) is None
    assert widened(LAPTOP, place_parts(LAPTOP, tmp_path, "GPU", precision="accuracy")["vision"]) is None
