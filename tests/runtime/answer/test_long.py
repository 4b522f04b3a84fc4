"""python -m pytest tests/runtime/answer/test_long.py

Beyond the trained length: numbers of the original implementation on tiny checkpoints that were "trained" on 64 tokens.

Dynamic NTK (InternLM2, Qwen2.5 in InternVL3) turns all positions of one forward by its length; Phi-3 has short and long factors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart, Part
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime.errors import PromptError
from runtime.parts import kv_cache
from tests.conftest import DATA, embeddings

REFERENCE, PARTS = 1e-5, 2e-4  # absolute
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
OPTIONS = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
LIMIT = 64


class Set:
    """One golden set, and both paths over its checkpoint."""

    def __init__(self, name: str, converted):
        self.folder = DATA / "golden" / name
        self.tensors = load_file(self.folder / "golden.safetensors")
        assert json.loads((self.folder / "golden.json").read_text())["trained_length"] == LIMIT
        self.reference = InternVLChatModel.from_checkpoint(Checkpoint(self.folder))
        self.converted: Path = converted(self.folder, weight_format="fp32")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def pixels(self, ids: str) -> torch.Tensor | None:
        return self["pixel_values"] if ids == "input_ids" else None

    def embeds(self, ids: str) -> torch.Tensor:
        tiles = self.pixels(ids)
        return embeddings(self.reference, self[ids], None if tiles is None else self.reference.extract_feature(tiles))


@pytest.fixture(scope="module", params=["dynamic-rope", "phi3-long"])
def long(request, converted):
    return Set(request.param, converted)


@pytest.fixture(scope="module", params=["CPU", "HETERO:CPU"], ids=["pages", "state"])
def model(request, long):
    return OVInternVLChatModel(long.converted, request.param, ov_config=EXACT)


def off(found, wanted: torch.Tensor) -> float:
    return float((torch.as_tensor(np.asarray(found)) - wanted).abs().max())


FORWARDS = [("input_ids", "logits"), ("limit_input_ids", "limit_logits"), ("over_input_ids", "over_logits")]


def test_one_forward_is_the_originals_also_after_a_longer_one(long):
    """In the original, limit_logits come out otherwise after the long prompt; nothing is left behind here."""
    for ids, logits in FORWARDS:
        assert off(long.reference.logits(long.embeds(ids)), long[logits]) < REFERENCE


def test_one_forward_of_the_parts_is_the_originals(long):
    part, table = LanguagePart(long.converted), Part(long.converted, "text_embeddings")
    for ids, logits in FORWARDS:
        embeds = np.array(table(long[ids].numpy()))
        if long.pixels(ids) is not None:
            rows = Part(long.converted, "vision")(long["pixel_values"].numpy())
            embeds[long[ids].numpy() == 5] = rows.reshape(-1, rows.shape[-1])
        assert off(part.logits(embeds, np.ones(embeds.shape[:2], np.int64)), long[logits]) < PARTS


def test_a_batch_goes_by_its_longest_row_in_one_forward(long):
    ids, mask = long["batch_input_ids"].numpy(), long["batch_attention_mask"].numpy()
    embeds = np.array(Part(long.converted, "text_embeddings")(ids))
    assert off(LanguagePart(long.converted).logits(embeds, mask)[:, -1], long["batch_last_logits"]) < PARTS


@pytest.mark.parametrize(("ids", "prefix"), [("input_ids", ""), ("cross_input_ids", "cross_")], ids=["long", "crossing"])
@pytest.mark.parametrize("path", ["reference", "parts"])
def test_cached_steps_are_the_originals(long, model, monkeypatch, ids, prefix, path):
    """Keys that were cached before the limit keep their rotation, as in the original's cached decoding."""
    monkeypatch.setattr(kv_cache, "PREFILL_AT_ONCE", 16)  # would cut a prompt in pieces that are each below the limit
    asked = model if path == "parts" else long.reference
    wanted = long[f"{prefix}greedy_ids"]
    found = asked.generate(long.pixels(ids), long[ids], max_new_tokens=wanted.shape[1], **OPTIONS)
    assert torch.equal(found.sequences, wanted)
    steps = long[f"{prefix}step_logits" if prefix else "greedy_step_logits"]
    assert off(torch.stack(found.logits, 1), steps) < (PARTS if path == "parts" else REFERENCE)


def test_what_a_longer_prompt_left_in_the_cache_is_not_used_for_a_shorter_one_or_the_other_way_round(long, model):
    features = long.reference.extract_feature(long["pixel_values"])
    for length in (90, 50, 64, 65, 60, 90, 89, 46):
        ids = long["input_ids"][:, :length]
        found = model.generate(long["pixel_values"], ids, max_new_tokens=1, **OPTIONS)
        assert off(found.logits[0], long.reference.logits(embeddings(long.reference, ids, features))[:, -1]) < PARTS, length


def test_a_conversation_that_grows_past_the_limit_says_what_the_reference_says(long, model):
    """The reference computes every turn from its beginning, as the original does."""
    ours, theirs = model.start_conversation("Be brief."), long.reference.start_conversation("Be brief.")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (56, 56, 3), np.uint8))
    for question, images in (("A?", [picture]), ("And?", []), ("So?", [])):
        assert ours.ask(question, images=images, max_new_tokens=6) == theirs.ask(question, images=images, max_new_tokens=6)


def test_rows_of_a_batch_are_answered_as_alone_also_across_the_limit(long):
    """On a CPU; OpenVINO's state turns all rows by the longest one, as the original does."""
    model = OVInternVLChatModel(long.converted, "CPU", ov_config=EXACT)
    ids, mask = long["batch_input_ids"][:, -62:].clone(), long["batch_attention_mask"][:, -62:]  # crosses after two tokens
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **OPTIONS)
    for row in range(2):
        alone = model.generate(input_ids=ids[row : row + 1, mask[row] == 1], max_new_tokens=8, **OPTIONS)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for both, one in zip(together.logits, alone.logits, strict=True):
            assert off(both[row], one[0]) < PARTS


def test_a_prompt_that_is_too_long_is_told(long, model):
    limit = model.config.context_length
    assert limit == {"dynamic": 2 * LIMIT}.get(model.config._rope_kind, limit)
    with pytest.raises(PromptError, match=f"the model reads {limit}"):
        model.generate(input_ids=torch.full((1, limit), 40), max_new_tokens=1)
