"""build/igpu/run python -m pytest tests/igpu/test_golden_on_gpu.py

The original's numbers on tiny checkpoints, through OpenVINO's GPU plugin in float32: features, logits, states, tokens, batches.
"""

import numpy as np
import pytest
import torch

from convert.exact import LanguagePart
from runtime import OVInternVLChatModel
from tests.convert.test_golden import NEW_TOKENS, PARTS, visual
from tests.igpu.conftest import KEPT


def difference(found, expected) -> float:
    """Relative to the largest number: a GPU adds up in another order."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def model(golden, converted):
    folder = converted(golden.folder, weight_format="fp32")
    return OVInternVLChatModel(folder, "GPU", precision="accuracy", cache_dir=KEPT)


def test_the_plugin_gives_the_originals_numbers(golden, model):
    """One test a kind, since its parts take a minute to compile."""
    features = model.extract_feature(golden["pixel_values"])
    assert difference(features, golden["image_features"]) < PARTS
    for name, rows, logits in (("input_ids", features, "logits"), ("text_input_ids", None, "text_logits")):
        ids = golden[name].numpy()
        embeds, seen = model.merge(ids, None if rows is None else rows.numpy()), visual(golden, name).numpy()
        ones, total = np.ones_like(ids), ids.shape[1]
        assert difference(model.new_cache()._step(embeds, ones, seen, True), golden[logits]) < PARTS
        cache, ends = model.new_cache(), (total // 3, total // 2, total)
        for start, end in zip((0, *ends), ends, strict=False):  # the state goes on over three calls
            last = cache.feed(embeds[:, start:end], ones[:, start:end], None, visual=seen[:, start:end])
            assert difference(last[:, 0], golden[logits][:, end - 1]) < PARTS
    check_turns(golden, model)
    check_edits(golden, model, features.numpy())
    wanted = golden["greedy_ids"]
    found = model.generate(golden["pixel_values"], golden["input_ids"], max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)
    wanted = golden["batch_greedy_ids"]
    inputs = (golden["pixel_values"][:2], golden["batch_input_ids"], golden["batch_attention_mask"])
    found = model.generate(*inputs, max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)


def check_turns(golden, model):
    """Caches of equal lengths by turns, and one that begins after a prompt of its own length: the plugin mixes such requests up."""
    ids, oracle = golden["text_input_ids"].numpy(), LanguagePart(model.folder)
    texts = [ids, np.roll(ids, 1, 1), np.roll(ids, 2, 1)]
    wanted = [np.array(oracle.logits(model.embed_tokens(text), np.ones_like(text), visual=0 * text)) for text in texts]
    caches, half = [model.new_cache() for _ in texts], ids.shape[1] // 2
    for start, end in ((0, half), *((place, place + 1) for place in range(half, ids.shape[1]))):
        for text, cache, logits in zip(texts, caches, wanted, strict=True):
            found = cache.feed(model.embed_tokens(text[:, start:end]), np.ones((1, end - start), np.int64), None)
            assert difference(found[:, 0], logits[:, end - 1]) < PARTS


def check_edits(golden, model, features):
    """A second turn goes on after the first; an edited one computes what follows its first other token, and no more."""
    ids, oracle, cache = golden["input_ids"].numpy(), LanguagePart(model.folder), model.new_cache()
    seen, ones, total = visual(golden, "input_ids").numpy(), np.ones_like(ids), ids.shape[1]
    after = int(np.flatnonzero(seen[0])[-1]) + 1  # the first token after the picture
    late, early = ids.copy(), ids.copy()
    late[:, total - 2] ^= 1  # few tokens are dropped: they are masked out
    early[:, after] ^= 1  # many are: the state is written anew without them
    for text, end, kept in ((ids, after + 2, 0), (ids, total, after + 2), (late, total, total - 2), (early, total, after)):
        embeds, prompt = model.merge(text, features), slice(kept, end)
        assert cache.keep(text[0, :end]) == kept
        found = cache.feed(embeds[:, prompt], ones[:, prompt], None, visual=seen[:, prompt])
        wanted = np.array(oracle.logits(embeds[:, :end], ones[:, :end], visual=seen[:, :end]))
        assert difference(found[:, 0], wanted[:, -1]) < PARTS
