"""python -m pytest tests/convert/test_golden.py

The original implementation's numbers on tiny checkpoints: the PyTorch path and the fp32 parts must reproduce them.
"""

import numpy as np
import pytest
import torch

from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart, Part
from convert.reference.model import InternVLChatModel, compute_in_float32, load_language, load_vision
from tests.conftest import embeddings

REFERENCE, PARTS = 1e-5, 2e-4  # absolute
NEW_TOKENS = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def difference(found, expected: torch.Tensor) -> float:
    return float((torch.as_tensor(np.asarray(found)) - expected).abs().max())


def visual(golden, ids: str) -> torch.Tensor:
    """1 on context tokens; language models without visual experts do not look at it."""
    return torch.eq(golden[ids], golden.context_id).long()


@pytest.fixture
def reference(golden) -> InternVLChatModel:
    return InternVLChatModel.from_checkpoint(Checkpoint(golden.folder))


def test_reference_reproduces_the_vision_transformer(golden, reference):
    layers = reference.config.vision.num_hidden_layers
    hidden = reference.vision.vision_model(golden["pixel_values"], layers)
    wanted = golden["vision_last_hidden_state"]
    assert difference(hidden[:, -wanted.shape[1] :], wanted) < REFERENCE  # Mono-InternVL's has no class token


def test_reference_reproduces_features_and_logits(golden, reference):
    assert difference(reference.extract_feature(golden["pixel_values"]), golden["image_features"]) < REFERENCE
    embeds = embeddings(reference, golden["input_ids"], reference.extract_feature(golden["pixel_values"]))
    assert difference(reference.logits(embeds, visual(golden, "input_ids")), golden["logits"]) < REFERENCE
    text = embeddings(reference, golden["text_input_ids"], None)
    assert difference(reference.logits(text), golden["text_logits"]) < REFERENCE


def test_reference_generates_the_original_tokens(golden, reference):
    wanted = golden["greedy_ids"]
    found = reference.generate(golden["pixel_values"], golden["input_ids"], max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)


def test_reference_generates_the_original_tokens_in_a_left_padded_batch(golden, reference):
    wanted = golden["batch_greedy_ids"]
    inputs = (golden["pixel_values"][:2], golden["batch_input_ids"], golden["batch_attention_mask"])
    found = reference.generate(*inputs, max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)


def test_reference_in_bfloat16_stays_near(golden):
    model = InternVLChatModel.from_checkpoint(Checkpoint(golden.folder), dtype=torch.bfloat16)
    embeds = embeddings(model, golden["input_ids"], model.extract_feature(golden["pixel_values"]))
    cosine = torch.cosine_similarity(
        model.logits(embeds, visual(golden, "input_ids")).float().flatten(), golden["logits"].flatten(), dim=0
    )
    assert cosine > 0.999


def test_computing_over_mapped_matrices_changes_nothing(golden):
    checkpoint = Checkpoint(golden.folder)
    vision, language = load_vision(checkpoint, None), load_language(checkpoint, None)
    compute_in_float32(vision)
    compute_in_float32(language)
    assert difference(vision(golden["pixel_values"]), golden["image_features"]) < REFERENCE
    embeds = language.get_input_embeddings()(golden["text_input_ids"])
    assert difference(language(inputs_embeds=embeds).logits, golden["text_logits"]) < REFERENCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_reference_on_cuda_reproduces_the_logits(golden):
    model = InternVLChatModel.from_checkpoint(Checkpoint(golden.folder), device="cuda")
    embeds = embeddings(model, golden["input_ids"], model.extract_feature(golden["pixel_values"]))
    assert difference(model.logits(embeds, visual(golden, "input_ids")).cpu(), golden["logits"]) < PARTS


@pytest.fixture
def folder(golden, converted):
    return converted(golden.folder, weight_format="fp32")


def embed(folder, golden, ids: str, tiles=None) -> np.ndarray:
    """Embeddings with tile rows over the context tokens, by the folder's own parts."""
    embeds = np.array(Part(folder, "text_embeddings")(golden[ids].numpy()))
    if tiles is not None:
        rows = Part(folder, "vision")(tiles.numpy())
        embeds[golden[ids].numpy() == golden.context_id] = rows.reshape(-1, rows.shape[-1])
    return embeds


def greedy(folder, golden, embeds: np.ndarray, mask: np.ndarray, count: int, ids: str) -> np.ndarray:
    language, table = LanguagePart(folder), Part(folder, "text_embeddings")
    logits, picked = language.logits(embeds, mask, visual=visual(golden, ids).numpy()), []
    for _ in range(count):
        picked.append(logits[:, -1].argmax(-1))
        mask = np.concatenate([mask, np.ones((len(mask), 1), mask.dtype)], axis=1)
        logits = language.logits(np.array(table(picked[-1][:, None])), mask, reset=False)
    return np.stack(picked, axis=1)


def test_fp32_parts_reproduce_features_and_logits(golden, folder):
    assert difference(Part(folder, "vision")(golden["pixel_values"].numpy()), golden["image_features"]) < PARTS
    for ids, tiles, logits in (("input_ids", golden["pixel_values"], "logits"), ("text_input_ids", None, "text_logits")):
        mask = np.ones(golden[ids].shape, np.int64)
        found = LanguagePart(folder).logits(embed(folder, golden, ids, tiles), mask, visual=visual(golden, ids).numpy())
        assert difference(found, golden[logits]) < PARTS


def test_fp32_parts_generate_the_original_tokens(golden, folder):
    embeds = embed(folder, golden, "input_ids", golden["pixel_values"])
    found = greedy(folder, golden, embeds, np.ones(embeds.shape[:2], np.int64), golden["greedy_ids"].shape[1], "input_ids")
    assert found.tolist() == golden["greedy_ids"].tolist()


def test_fp32_parts_generate_the_original_tokens_in_a_left_padded_batch(golden, folder):
    embeds = embed(folder, golden, "batch_input_ids", golden["pixel_values"][:2])
    mask, wanted = golden["batch_attention_mask"].numpy(), golden["batch_greedy_ids"]
    assert greedy(folder, golden, embeds, mask, wanted.shape[1], "batch_input_ids").tolist() == wanted.tolist()
