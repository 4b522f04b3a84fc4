"""The tokenizer and config.json of the built-in model, in the published layout of OpenGVLab/InternVL2-1B."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.shapes.maker import SIDE
from demo.shapes.texts import literals
from runtime.answer.prompt import get_template

SPECIAL_TOKENS = [
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"],
    *["<ref>", "</ref>", "<box>", "</box>"],
]
# How Qwen2 splits text before its merges: huggingface/transformers@v5.5.4 src/transformers/models/qwen2/tokenization_qwen2.py
QWEN2_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = "Hermes-2"


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; every matrix has a multiple of 128 columns, as int4 groups need."""

    vision_width: int = 128
    vision_inner: int = 512
    vision_layers: int = 6
    vision_heads: int = 4
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    key_heads: int = 2


PRESETS = {"cpu": Sizes(), "gpu": Sizes(256, 512, 5, 8, 256, 512, 4, 8, 2)}  # gpu: as large as 12 MB hold


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the generator's own texts: its words are one token, printed letters and digits one each."""
    template = get_template(TEMPLATE)
    fixed = [*re.split("[A-Z]+", template.system_message), "system\n", "user\n", "assistant\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*literals(), *fixed], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192
    )


def config_json(sizes: Sizes, vocabulary: int, end: int) -> dict[str, Any]:
    """config.json as OpenGVLab/InternVL2-1B has it, with other sizes."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "num_channels": 3,
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_inner,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": SIDE,
        "patch_size": 14,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
    }
    language = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "llm_config": language,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATE,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }
