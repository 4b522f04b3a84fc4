"""python -m pytest tests/convert/test_mono.py

Mono-InternVL: prompts whose context tokens take the visual experts, in pieces, after what a KV cache holds, in batches and beams.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from convert.checkpoint import Checkpoint
from convert.reference.language import Routing, VisualExperts, language_config
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime.folder.config import InternVLConfig
from runtime.parts import kv_cache
from tests.checkpoints import CONFIGS
from tests.conftest import embeddings

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
OPTIONS = {"max_new_tokens": 10, "min_new_tokens": 10}


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def reference(tiny):
    return InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-mono")))


@pytest.fixture(scope="module", params=["CPU", "HETERO:CPU"], ids=["pages", "state"])
def model(request, tiny, converted):
    return OVInternVLChatModel(converted(tiny("tiny-mono"), weight_format="fp32"), request.param, ov_config=EXACT)


def test_each_token_takes_its_own_expert():
    """The original lets both see all tokens and adds them up under the mask."""
    torch.manual_seed(0)
    routing = Routing()
    layer = VisualExperts(language_config(InternVLConfig.from_dict(CONFIGS["tiny-mono"])), routing)
    tokens, mask = torch.randn(2, 5, 64), torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1]])
    text, visual = layer(tokens), layer.visual(tokens)
    routing.mask = mask
    assert torch.allclose(layer(tokens), text * (1 - mask[..., None]) + visual * mask[..., None], atol=1e-6)
    routing.mask = torch.zeros_like(mask)
    assert torch.allclose(layer(tokens), text, atol=1e-6)


def test_a_conversation_says_what_the_reference_says(reference, model, monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL_AT_ONCE", 7)  # pieces begin and end inside pictures
    ours, theirs = model.start_conversation(), reference.start_conversation()
    for question, images in (
        ("What is it?", [picture(1, 200, 60)]),
        ("Why?", []),
        ("And <image> beside <image>?", [picture(2, 60, 60), picture(3, 56, 112)]),
    ):
        assert ours.ask(question, images=images, **OPTIONS) == theirs.ask(question, images=images, **OPTIONS)
    assert ours.statistics.reused_tokens > 0.4 * ours.statistics.prompt_tokens


def test_the_visual_experts_matter(reference):
    """Else none of the comparisons here could fail."""
    ids = torch.tensor([[5] * 4 + [40, 41, 42]])
    embeds = embeddings(reference, ids, reference.extract_feature(torch.randn(1, 3, 56, 56)))
    seen = reference.logits(embeds, torch.eq(ids, 5).long())
    assert (seen - reference.logits(embeds)).abs().max() > 0.1


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_batch_says_what_the_reference_says(reference, model, more):
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0, 40, 5, 5, 5, 5, 41], [42, 5, 5, 5, 5, 43, 44, 45]])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **more}
    wanted = reference.generate(pixels[:2], ids, mask, **options)
    assert model.generate(pixels[:2], ids, mask, **options).tolist() == wanted.tolist()
