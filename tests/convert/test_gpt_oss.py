"""python -m pytest tests/convert/test_gpt_oss.py

InternVL3.5 on GPT-OSS: attention sinks, layers that look back a few tokens only, joined experts, answers in a channel.
No numbers of the original here: transformers' own class of the language model is what both paths are compared with.
"""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from convert.tokenizer import load_tokenizer
from runtime import OVInternVLChatModel
from runtime.answer.decode import Decoding, Token
from runtime.answer.prompt import get_template, render
from runtime.answer.stream import Statistics, TextStream, stream_text, whole_answer
from runtime.folder.tokenizer import Tokenizer
from runtime.parts import kv_cache
from tests.checkpoints import CONFIGS
from tests.conftest import embeddings

NAME = "tiny-gpt-oss"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
OPTIONS = {"max_new_tokens": 10, "min_new_tokens": 10}
TEMPLATE = get_template("internvl3_5_gpt_oss")
SYSTEM = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
)


@pytest.fixture(scope="module")
def reference(tiny):
    return InternVLChatModel.from_checkpoint(Checkpoint(tiny(NAME)))


@pytest.fixture(scope="module", params=["CPU", "HETERO:CPU"], ids=["pages", "state"])
def model(request, tiny, converted):
    return OVInternVLChatModel(converted(tiny(NAME), weight_format="fp32"), request.param, ov_config=EXACT)


@pytest.fixture(scope="module")
def oracle(tiny):
    """transformers' class with the tensors of the file, renamed by taking the prefix off."""
    config = GptOssConfig(**{k: v for k, v in CONFIGS[NAME]["llm_config"].items() if k != "architectures"})
    config._attn_implementation = "eager"
    language = GptOssForCausalLM(config).eval()
    tensors = load_file(tiny(NAME) / "model.safetensors")
    prefix = "language_model."
    own = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
    language.load_state_dict(own)
    return language


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, 270, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [12, 60], ids=["inside the window", "past it"])
def test_logits_equal_those_of_transformers(reference, oracle, length):
    ids = prompt(length)
    with torch.no_grad():
        wanted = oracle(input_ids=ids).logits
    assert (reference.logits(embeddings(reference, ids)) - wanted).abs().max() < 1e-5


def test_the_window_and_the_sinks_matter(oracle):
    """Else the comparisons could not fail on them."""
    ids = prompt(60)
    with torch.no_grad():
        wanted = oracle(input_ids=ids).logits
        windows = [layer.self_attn.sliding_window for layer in oracle.model.layers]
        assert windows == [16, None]
        sinks = oracle.model.layers[1].self_attn.sinks
        kept = sinks.clone()
        sinks.fill_(-50.0)
        assert (oracle(input_ids=ids).logits - wanted).abs().max() > 0.05
        sinks.copy_(kept)
        far = ids.clone()
        far[0, 0] = 21
        first = oracle.model(input_ids=far, output_hidden_states=True).hidden_states[1][0, -1]
        assert torch.equal(first, oracle.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1])


@pytest.mark.parametrize("length", [12, 60])
def test_tokens_and_logits_equal_those_of_transformers(model, oracle, length):
    ids = prompt(length, 1)
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2}
    wanted = oracle.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options)
    found = model.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options)
    assert found.sequences[0].tolist() == wanted.sequences[0, length:].tolist()
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        assert (ours - theirs).abs().max() < 2e-4


def test_a_left_padded_batch_says_what_each_row_says_alone(model, oracle):
    rows = [prompt(40, 2)[0], prompt(23, 3)[0]]
    ids = torch.stack([torch.nn.functional.pad(row, (40 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (40 - len(row), 0)) for row in rows])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 2}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, found in zip(rows, together, strict=True):
        assert found.tolist() == oracle.generate(input_ids=row[None], **options)[0, len(row) :].tolist()


def test_a_conversation_says_what_the_reference_says(reference, model, monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL_AT_ONCE", 7)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 200, 3), np.uint8))
    ours, theirs = model.start_conversation(), reference.start_conversation()
    for question, images in (("What is it?", [picture]), ("Why?", [])):
        assert ours.ask(question, images=images, **OPTIONS) == theirs.ask(question, images=images, **OPTIONS)
    # Random weights write no channel, so that the history is not what was generated: what is kept is cut there.
    assert ours.statistics.reused_tokens > 0.4 * ours.statistics.prompt_tokens


@pytest.mark.parametrize("answer", ["A cat.", "<|channel|>final<|message|>A cat."], ids=["ours", "as upstream returns it"])
def test_the_prompt_is_the_originals(answer):
    """MPT_TWO with the channel that the model wrote, as it stands in upstream's histories."""
    assert TEMPLATE.system_message == SYSTEM
    assert render(TEMPLATE, SYSTEM, [("What?", answer)], "Why?") == (
        f"<|start|>system<|message|>{SYSTEM}<|end|><|start|>user<|message|>What?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A cat.<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant"
    )


def test_the_chat_template_is_the_prompt(tiny):
    tokenizer = load_tokenizer(tiny(NAME), Checkpoint(tiny(NAME)).config)
    messages = [{"role": role, "content": text} for role, text in (("user", "What?"), ("assistant", "A cat."), ("user", "Why?"))]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render(TEMPLATE, SYSTEM, [("What?", "A cat.")], "Why?")


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<|channel|>final<|message|>A big cat.<|return|>", "A big cat."),
        ("<|channel|>final<|message|>A big", "A big"),
        ("A cat.<|return|>", "A cat."),  # no channel: everything is the answer
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A cat.<|return|>", "A cat."),
    ],
)
def test_the_channel_is_not_shown(tiny, written, answer):
    tokenizer = Tokenizer(load_tokenizer(tiny(NAME), Checkpoint(tiny(NAME)).config).backend_tokenizer)
    ids = tokenizer.encode(written, add_special_tokens=False)
    stop = tokenizer.convert_tokens_to_ids("<|return|>")
    assert whole_answer(tokenizer, [i for i in ids if i != stop], TEMPLATE) == answer
    text, statistics, kept = TextStream(tokenizer, TEMPLATE), Statistics(), []
    said, before_the_end = [], []

    def tokens(progress):
        for token in ids:
            yield Token(token)

    def listen(add):
        def added(token):
            said.append(add(token))
            return said[-1]

        return added

    end = text.end
    text.add = listen(text.add)
    text.end = lambda: before_the_end.append("".join(said)) or end()
    decoding = Decoding(eos_token_ids=(stop,))
    pieces = stream_text(tokens, text, decoding, statistics, kept, cancelled=threading.Event(), cancel=lambda: None)
    assert "".join(pieces) == answer
    assert before_the_end == [answer if "<|message|>" in written else ""], "it comes as soon as the channel is there"
