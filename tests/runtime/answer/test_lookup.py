"""python -m pytest tests/runtime/answer/test_lookup.py

Prompt lookup decoding: the same greedy answers in fewer runs of the language part.
"""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from runtime import OVInternVLChatModel
from runtime.answer.decode import look_up
from runtime.errors import OptionError
from tests.conftest import DATA

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.fixture(scope="module", params=["CPU", "HETERO:CPU"], ids=["pages", "state"])
def model(request, tiny, converted):
    made = OVInternVLChatModel(converted(tiny("tiny-qwen2"), weight_format="fp32"), request.param, ov_config=EXACT)
    made.wait_until_packed()  # which runs it, too
    return made


@pytest.fixture
def runs(model, monkeypatch):
    """How often the language part runs."""
    counted = []
    step = model.language_part._cache_kind._step
    monkeypatch.setattr(model.language_part._cache_kind, "_step", lambda *given: counted.append(1) or step(*given))
    return counted


@pytest.mark.parametrize(
    ("ids", "most", "found"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 5, [4, 9, 1, 2, 3]),  # three tokens
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([7, 2, 3, 4, 8, 2, 3, 5, 6, 2, 3], 2, [5, 6]),  # two, the latest place
        ([1, 2, 3, 4, 9, 1, 2, 3, 7, 2, 3], 1, [7]),
        ([1, 2, -5, -6, 9, 1, 2], 3, []),  # a picture follows
        ([1, 2, 3], 3, []),
        ([5], 3, []),
        ([4, 4, 4, 4], 9, [4]),
    ],
)
def test_what_followed_before_is_found(ids, most, found):
    assert look_up(np.array(ids), most).tolist() == found


@pytest.mark.parametrize("guesses", [1, 3, 10])
def test_answers_are_the_same_in_fewer_runs(model, runs, guesses):
    """A random model falls into repeating itself, which is what lookup is good at."""
    saved = 0
    for seed in range(6):
        ids = torch.randint(20, 300, (1, 30), generator=torch.Generator().manual_seed(seed))
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": 2}
        runs.clear()
        wanted, alone = model.generate(input_ids=ids, **options), len(runs)
        runs.clear()
        assert model.generate(input_ids=ids, prompt_lookup_num_tokens=guesses, **options).tolist() == wanted.tolist()
        saved += alone - len(runs)
    assert saved > 20


def test_a_conversation_goes_on_after_guesses(model):
    plain, guessing = model.start_conversation(), model.start_conversation()
    for question in ("Say it again and again.", "Why?", "Say it again and again."):
        answer = guessing.ask(question, max_new_tokens=40, prompt_lookup_num_tokens=5)
        assert answer == plain.ask(question, max_new_tokens=40)
        assert guessing.statistics.new_tokens == plain.statistics.new_tokens


def test_a_prompt_that_is_in_the_cache_already_is_answered_right(model):
    """Only its last token is computed then; what is cut away after wrong guesses must be the guesses and nothing else."""
    options = {"do_sample": False, "eos_token_id": 2}
    for seed in range(8):
        ids = torch.randint(20, 60, (1, 40), generator=torch.Generator().manual_seed(seed))  # few ids: guesses are often wrong
        wanted = model.generate(input_ids=ids, max_new_tokens=24, **options)
        for _ in range(2):
            model.generate(input_ids=ids, max_new_tokens=1, **options)
            assert (
                model.generate(input_ids=ids, max_new_tokens=24, prompt_lookup_num_tokens=4, **options).tolist() == wanted.tolist()
            )


def test_prompts_without_keys_are_answered_right(model):
    """Features that were computed outside, and rows with padding, are fed to a cache that was not told what they are."""
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 2}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        features = model.extract_feature(torch.randn(1, 3, 56, 56, generator=generator))
        ids = torch.cat([torch.full((1, 4), 5), torch.randint(20, 60, (1, 30), generator=generator)], dim=1)
        given = {"input_ids": ids, "visual_features": features}
        assert (
            model.generate(**given, prompt_lookup_num_tokens=4, **options).tolist() == model.generate(**given, **options).tolist()
        )
        mask = torch.ones(1, 30, dtype=torch.int64)
        mask[:, :3] = 0
        given = {"input_ids": ids[:, 4:], "attention_mask": mask}
        assert (
            model.generate(**given, prompt_lookup_num_tokens=4, **options).tolist() == model.generate(**given, **options).tolist()
        )


def test_a_generation_config_may_ask_for_it(model, runs):
    ids = torch.randint(20, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0, prompt_lookup_num_tokens=4)
    wanted = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, eos_token_id=2)
    assert model.generate(input_ids=ids, generation_config=config).tolist() == wanted.tolist()
    assert config.prompt_lookup_num_tokens == 4, "the caller's own is left alone"
    config.num_beams = 2
    with pytest.raises(OptionError, match="prompt_lookup_num_tokens is for one greedy answer"):
        model.generate(input_ids=ids, generation_config=config)


def test_guesses_stop_where_positions_begin_to_depend_on_the_length(converted):
    model = OVInternVLChatModel(converted(DATA / "golden" / "dynamic-rope", weight_format="fp32"), ov_config=EXACT)
    ids = torch.randint(20, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": 2}
    wanted = model.generate(input_ids=ids, **options)
    assert model.generate(input_ids=ids, prompt_lookup_num_tokens=8, **options).tolist() == wanted.tolist()


@pytest.mark.parametrize("other", [{"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.2}])
def test_it_is_refused_where_it_would_not_be_used(model, other):
    with pytest.raises(OptionError, match="prompt_lookup_num_tokens is for one greedy answer"):
        model.generate(input_ids=torch.full((1, 5), 40), max_new_tokens=2, prompt_lookup_num_tokens=3, **other)
