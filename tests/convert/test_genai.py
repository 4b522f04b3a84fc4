"""python -m pytest tests/convert/test_genai.py

Others open our folders unchanged: openvino_genai with both attention backends, optimum-intel.
"""

import json

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart, Part
from convert.tokenizer import load_tokenizer, prompt_of
from runtime.answer.prompt import CONTEXT_TOKEN, IMAGE_END, IMAGE_START
from runtime.media.tiles import Tiling, cut_tiles

NEW_TOKENS = 6


@pytest.fixture(params=["tiny-qwen2", "tiny-internlm2", "tiny-phi3", "tiny-llama", "tiny-qwen3", "tiny-qwen3-moe", "tiny-gpt-oss"])
def checkpoint(request, tiny) -> Checkpoint:
    return Checkpoint(tiny(request.param))


@pytest.fixture
def folder(checkpoint, converted):
    return converted(checkpoint.folder, weight_format="fp32")


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 20, width // 20, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> ov.Tensor:
    return ov.Tensor(np.asarray(image)[None])


def prompt_ids(checkpoint, pictures, question: str) -> tuple[list[int], list[np.ndarray]]:
    """What the original would feed: each picture's tiles in one block, one block a line before the question."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    tiles = [cut_tiles(image, Tiling.of(checkpoint.config)) for image in pictures]
    blocks = [IMAGE_START + CONTEXT_TOKEN * (checkpoint.config.tokens_per_tile * len(n)) + IMAGE_END + "\n" for n in tiles]
    return tokenizer.encode(prompt_of(tokenizer, "".join(blocks) + question)), tiles


def greedy(folder, checkpoint, pictures, question: str) -> list[int]:
    """The tokens that our own float32 run of the parts picks."""
    ids, tiles = prompt_ids(checkpoint, pictures, question)
    text, language = Part(folder, "text_embeddings"), LanguagePart(folder)
    embeds = np.array(text(np.array([ids])))
    rows = Part(folder, "vision")(np.concatenate(tiles))
    embeds[0, np.array(ids) == 5] = rows.reshape(-1, rows.shape[-1])
    mask, picked = np.ones((1, len(ids)), np.int64), []
    logits = language.logits(embeds, mask)
    for _ in range(NEW_TOKENS):
        picked.append(int(logits[0, -1].argmax()))
        mask = np.ones((1, mask.shape[1] + 1), np.int64)
        logits = language.logits(np.array(text(np.array([[picked[-1]]]))), mask, reset=False)
    return picked


@pytest.fixture(params=["PA", "SDPA"])
def pipeline(request, folder):
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if request.param == "SDPA" else {}
    return openvino_genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=request.param, **exact)


def generation() -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = NEW_TOKENS, False, True
    return config


def test_genai_answers_one_picture_two_pictures_and_a_second_turn(pipeline, folder, checkpoint):
    wide, tall = picture(200, 100, 1), picture(100, 300, 2)
    answer = pipeline.generate("What is it?", images=[tensor(wide)], generation_config=generation())
    ids, tiles = prompt_ids(checkpoint, [wide], "What is it?")
    assert len(tiles[0]) > 1, "several tiles and a thumbnail"
    assert answer.perf_metrics.get_num_input_tokens() == len(ids)
    assert answer.perf_metrics.get_num_generated_tokens() == NEW_TOKENS

    both = pipeline.generate("Compare.", images=[tensor(wide), tensor(tall)], generation_config=generation())
    assert both.perf_metrics.get_num_input_tokens() == len(prompt_ids(checkpoint, [wide, tall], "Compare.")[0])

    history = openvino_genai.ChatHistory()
    history.append({"role": "user", "content": "What is it?"})
    first = pipeline.generate(history, images=[tensor(wide)], generation_config=generation())
    history.append({"role": "assistant", "content": first.texts[0]})
    history.append({"role": "user", "content": "And why?"})
    second = pipeline.generate(history, generation_config=generation())
    assert second.perf_metrics.get_num_input_tokens() > first.perf_metrics.get_num_input_tokens()


def test_genai_picks_the_tokens_of_our_own_run(folder, checkpoint):
    """Same tiles, same prompt, same weights, float32 on both sides: the tokens are the same."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipe = openvino_genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="SDPA", **exact)
    wide = picture(200, 100, 1)
    answer = pipe.generate("What is it?", images=[tensor(wide)], generation_config=generation())
    expected = greedy(folder, checkpoint, [wide], "What is it?")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    assert answer.texts[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_optimum_intel_opens_the_folder_and_picks_the_same_tokens(folder, checkpoint):
    from optimum.intel.openvino import OVModelForVisualCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForVisualCausalLM.from_pretrained(folder, trust_remote_code=True, ov_config=exact)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    wide = picture(200, 100, 1)
    inputs = model.preprocess_inputs(text="What is it?", image=wide, tokenizer=tokenizer, config=model.config)
    ids, _ = prompt_ids(checkpoint, [wide], "What is it?")
    assert inputs["input_ids"][0].tolist()[-len(ids) :] == ids
    found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    expected = greedy(folder, checkpoint, [wide], "What is it?")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    if not set(ends) & set(expected):  # min_new_tokens bans the end tokens
        assert found[0, -NEW_TOKENS:].tolist() == expected
    assert found.dtype == torch.int64
