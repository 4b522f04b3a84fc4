"""python -m pytest tests/runtime/answer/test_decode.py

How tokens are chosen: transformers' own processors give the same distribution for random logits and settings.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.answer.decode import DEFAULT_TOP_K, Decoding, Sampler, distribution, logprobs_of, write, write_rows
from runtime.errors import OptionError

ENDS = (3, 7)


def transformers_scores(logits: np.ndarray, written: list[int], d: Decoding) -> np.ndarray:
    """What transformers makes of logits (V,) after these tokens; it has no presence or frequency penalty."""
    processors = LogitsProcessorList()
    if d.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(d.repetition_penalty))
    if d.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(d.no_repeat_ngram_size))
    if d.temperature:
        processors.append(TemperatureLogitsWarper(d.temperature))
        if d.top_k:
            processors.append(TopKLogitsWarper(d.top_k))
        if d.top_p < 1:
            processors.append(TopPLogitsWarper(d.top_p))
        if d.min_p:
            processors.append(MinPLogitsWarper(d.min_p))
    scores = torch.from_numpy(logits.astype(np.float32))[None].clone()
    return processors(torch.tensor([written], dtype=torch.int64), scores)[0].numpy()


def random_settings(rng: np.random.Generator) -> Decoding:
    def maybe(value, other):
        return value if rng.random() < 0.5 else other

    return Decoding(
        temperature=float(rng.uniform(0.1, 2)),
        top_k=int(maybe(rng.integers(1, 60), 0)),
        top_p=float(maybe(rng.uniform(0.05, 0.99), 1.0)),
        min_p=float(maybe(rng.uniform(0.01, 0.5), 0.0)),
        repetition_penalty=float(maybe(rng.uniform(0.5, 2), 1.0)),
        no_repeat_ngram_size=int(maybe(rng.integers(1, 4), 0)),
    )


@pytest.mark.parametrize("vocabulary", [50, 6000])
def test_distributions_are_those_of_transformers(vocabulary):
    """200 settings each; the larger vocabulary takes the short way of top-p."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        d = random_settings(rng)
        logits = rng.normal(0, rng.uniform(1, 6), vocabulary).astype(np.float32)
        written = rng.integers(0, vocabulary, 12).tolist() * 2
        sampler = Sampler(d)
        for token in written:
            sampler.ids.append(token)
            sampler._counts[token] += 1
        ids, chances = distribution(sampler.processed(logits), d)
        found = np.zeros(vocabulary)
        found[ids] = chances
        wanted = torch.softmax(torch.from_numpy(transformers_scores(logits, written, d)).double(), -1).numpy()
        assert np.abs(found - wanted).max() < 1e-6, (seed, d)


def test_the_likeliest_token_after_penalties_is_that_of_transformers():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        d = replace(random_settings(rng), temperature=0.0)
        sampler = Sampler(d)
        for _ in range(30):
            logits = rng.normal(0, 3, 40).astype(np.float32)
            wanted = int(transformers_scores(logits, sampler.ids, d).argmax())
            assert sampler.choose(logits).id == wanted


def test_presence_and_frequency_are_openais():
    """c[j] > 0 times presence, and c[j] times frequency, are taken off: the formula of OpenAI's API reference."""
    d = Decoding(presence_penalty=0.7, frequency_penalty=0.2)
    sampler = Sampler(d)
    for token in (4, 4, 9):
        logits = np.zeros(12, np.float32)
        logits[token] = 50
        assert sampler.choose(logits).id == token
    logits = np.linspace(-1, 1, 12, dtype=np.float32)
    wanted = logits.copy()
    wanted[4] -= 0.7 + 2 * 0.2
    wanted[9] -= 0.7 + 0.2
    assert np.allclose(sampler.processed(logits), wanted)


def test_ends_come_only_after_the_least_number_of_tokens():
    sampler = Sampler(Decoding(min_new_tokens=2, max_new_tokens=10, eos_token_ids=ENDS))
    logits = np.zeros(12, np.float32)
    logits[7], logits[3], logits[5] = 9, 8, 7
    assert [sampler.choose(logits).id for _ in range(2)] == [5, 5]
    assert not sampler.ended
    assert sampler.choose(logits).id == 7
    assert sampler.ended


def test_draws_follow_the_distribution_and_repeat_with_a_seed():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    d = Decoding(max_new_tokens=10**6, temperature=1.0, seed=1)
    first, again = Sampler(d), Sampler(d)
    drawn = [first.choose(logits).id for _ in range(20000)]
    assert drawn[:50] == [again.choose(logits).id for _ in range(50)]
    other = Sampler(d, number=1)
    assert drawn[:50] != [other.choose(logits).id for _ in range(50)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.02


def test_log_probabilities_are_those_of_torch():
    logits = np.random.default_rng(0).normal(0, 5, 1000).astype(np.float32)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    value, top = logprobs_of(logits, 17, 5)
    assert value == pytest.approx(float(wanted[17]), abs=1e-5)
    best = wanted.topk(5)
    assert [i for i, _ in top] == best.indices.tolist()
    assert [v for _, v in top] == pytest.approx(best.values.tolist(), abs=1e-5)
    token = Sampler(Decoding(logprobs=True, top_logprobs=2, temperature=0.5, seed=0)).choose(logits)
    assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-5), "under the model's own logits"
    assert len(token.top) == 2


class Countdown:
    """A cache and a model in one: after token n comes n - 1, and 0 ends."""

    room_for_drafts = free_guesses = 0
    ids = np.zeros(0, np.int64)

    def __init__(self):
        self.rows = []

    def embed(self, ids):
        return ids[..., None].astype(np.float32)

    def feed(self, embeds, mask, keys):
        self.rows.append(len(embeds))
        return self.logits(embeds[:, -1, 0].astype(int) - 1)

    def logits(self, tokens):
        found = np.zeros((len(tokens), 1, 20), np.float32)
        found[np.arange(len(tokens)), 0, tokens] = 9
        return found

    def reorder(self, rows):
        self.kept = rows


def test_an_answer_ends_at_its_end_or_at_its_bound():
    model = Countdown()
    d = Decoding(eos_token_ids=(0,))
    assert [t.id for t in write(model, model.logits([4]), model.embed, d)] == [4, 3, 2, 1, 0]
    assert [t.id for t in write(model, model.logits([4]), model.embed, replace(d, max_new_tokens=2))] == [4, 3]
    beyond = replace(d, ignore_eos=True, max_new_tokens=7)
    assert [t.id for t in write(model, model.logits([4]), model.embed, beyond)][:6] == [4, 3, 2, 1, 0, 19]


def test_rows_that_end_are_computed_no_more():
    model = Countdown()
    rows = write_rows(model, model.logits([2, 5, 1]), model.embed, Decoding(eos_token_ids=(0,)))
    assert [[t.id for t in row] for row in rows] == [[2, 1, 0], [5, 4, 3, 2, 1, 0], [1, 0]]
    assert model.rows == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("defaults", "options", "wanted"),
    [
        ({}, {}, {"temperature": 0.0}),
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": DEFAULT_TOP_K}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 5}, {}, {"temperature": 0.6, "top_k": 5}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.6}, {}, {"temperature": 0.0}),
        ({}, {"temperature": 0.7}, {"temperature": 0.7}),
        ({}, {"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 4}, {"eos_token_ids": (4,)}),
        ({"eos_token_id": [5, 6]}, {}, {"eos_token_ids": (5, 6)}),
        ({"max_new_tokens": 9, "transformers_version": "x"}, {"max_new_tokens": None}, {"max_new_tokens": 9}),
        ({}, {"stop_strings": "end"}, {"stop_strings": ("end",)}),
    ],
)
def test_options_win_over_the_files_and_a_temperature_draws(defaults, options, wanted):
    made = Decoding.of(defaults, options)
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "num_beams", "seed"])
@pytest.mark.parametrize("value", ["many", -3, math.nan, [1], True])
def test_values_that_are_impossible_are_one_line(field, value):
    with pytest.raises(OptionError, match=f"^{field.replace('_', ' ')} .* is not ") as raised:
        Decoding(**{field: value})
    assert "\n" not in str(raised.value)
