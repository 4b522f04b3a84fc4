"""Random checkpoints in the published layout: tiny ones for tests, full-size ones by published name.

Writes config.json, safetensors and tokenizer files as OpenGVLab publishes them; knows nothing of how `convert` reads them, so
that the tensor names and shapes here are an independent statement of the layout. The values are random: such a model answers
nothing, but its sizes, speed and memory are those of the real one.

    python -m tests.checkpoints InternVL2-1B /tmp/InternVL2-1B --tokenizer DIR
    python -m tests.checkpoints tiny-internlm2 /tmp/tiny
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 5_000_000_000  # the published 8B files are cut at about 5 GB
POOL = 1 << 22  # random values are drawn once and reused at random offsets: an 8B model is written at the speed of the disk
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}

VIT_300M = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "num_channels": 3,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "use_flash_attn": True,
}
VIT_6B = VIT_300M | {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}
QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151655,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "attn_implementation": "flash_attention_2",
    "tie_word_embeddings": False,
    "max_length": 20,
}
INTERNLM2_1_8B = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 92553,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bias": False,
    "attn_implementation": "flash_attention_2",
}
PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32020,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0 + i / 48 for i in range(48)],
        "long_factor": [1.0 + i for i in range(48)],
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": 262144,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
LLAMA_YI = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "vocab_size": 64009,
    "max_position_embeddings": 4096,
    "rope_theta": 5e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
INTERNLM2_20B = INTERNLM2_1_8B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "rope_scaling": {"type": "dynamic", "factor": 3.0},
}
INTERNLM2_7B = INTERNLM2_1_8B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA3_70B = LLAMA_YI | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "vocab_size": 128265,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
}
QWEN3_30B_A3B = QWEN3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201097,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
}
TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56}
TINY_LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
TINY_PHI3 = TINY_LANGUAGE | {
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 2048,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0 + i / 50 for i in range(8)],
        "long_factor": [1.0 + i / 2 for i in range(8)],
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(vision: dict, language: dict, template: str, **top: Any) -> dict:
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"],
        "llm_config": language,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    } | top


def _qwen(base: dict, width: int, layers: int, heads: int, key_heads: int, inner: int, **others: Any) -> dict:
    """Qwen2 or Qwen3 of another size."""
    return base | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        **others,
    }


def _of_2_5(vision: dict, language: dict) -> dict:
    return _config(vision, language, "internvl2_5")


QWEN2_5 = QWEN2_05B | {"vocab_size": 151674}
PATCHES_ONLY = {"architectures": ["InternVisionPatchModel"], "model_type": "intern_vit_patch"}  # Mono-InternVL
INTERNLM3 = {  # InternVL3-9B
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "bias": False,
    "qkv_bias": False,
    "head_dim": 32,
    "rope_scaling": {"type": "dynamic", "factor": 6.0},
}
VISUAL_EXPERTS = {"architectures": ["InternLM2VEForCausalLM"]}
FLASH = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.0}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}  # InternVL3

CONFIGS: dict[str, dict] = {
    # published names: facts of the published config.json files, or of the language model they are built on
    "InternVL-Chat-V1-2": _config(
        VIT_6B, LLAMA_YI, "Hermes-2", ps_version="v1", dynamic_image_size=False, use_thumbnail=False, max_dynamic_patch=1
    ),
    "InternVL-Chat-V1-5": _config(VIT_6B, INTERNLM2_20B, "internlm2-chat"),
    "Mini-InternVL-Chat-2B-V1-5": _config(VIT_300M, INTERNLM2_1_8B, "internlm2-chat"),
    "Mini-InternVL-Chat-4B-V1-5": _config(VIT_300M, PHI3_MINI, "phi3-chat"),
    "InternVL2-1B": _config(VIT_300M, QWEN2_05B, "Hermes-2"),
    "InternVL2-2B": _config(VIT_300M, INTERNLM2_1_8B, "internlm2-chat"),
    "InternVL2-4B": _config(VIT_300M, PHI3_MINI, "phi3-chat"),
    "InternVL2-8B": _config(VIT_300M, INTERNLM2_7B, "internlm2-chat"),
    "InternVL2-26B": _config(VIT_6B, INTERNLM2_20B, "internlm2-chat"),
    "InternVL2-40B": _config(VIT_6B, LLAMA_YI, "Hermes-2"),
    "InternVL2-Llama3-76B": _config(VIT_6B, LLAMA3_70B, "internlm2-chat"),
    "Mono-InternVL-2B": _config(VIT_300M | PATCHES_ONLY, INTERNLM2_1_8B | VISUAL_EXPERTS, "internlm2-chat"),
    "InternVL2_5-1B": _of_2_5(VIT_300M, QWEN2_5),
    "InternVL2_5-2B": _of_2_5(VIT_300M, INTERNLM2_1_8B),
    "InternVL2_5-4B": _of_2_5(VIT_300M, _qwen(QWEN2_5, 2048, 36, 16, 2, 11008)),
    "InternVL2_5-8B": _of_2_5(VIT_300M, INTERNLM2_7B),
    "InternVL2_5-26B": _of_2_5(VIT_6B, INTERNLM2_20B),
    "InternVL2_5-38B": _of_2_5(VIT_6B, _qwen(QWEN2_5, 5120, 64, 40, 8, 27648)),
    "InternVL2_5-78B": _of_2_5(VIT_6B, _qwen(QWEN2_5, 8192, 80, 64, 8, 29568)),
    "InternVL3-1B": _of_2_5(VIT_300M, QWEN2_5 | DYNAMIC),
    "InternVL3-2B": _of_2_5(VIT_300M, _qwen(QWEN2_5, 1536, 28, 12, 2, 8960, **DYNAMIC)),
    "InternVL3-8B": _of_2_5(VIT_300M, _qwen(QWEN2_5, 3584, 28, 28, 4, 18944, **DYNAMIC)),
    "InternVL3-14B": _of_2_5(VIT_300M, _qwen(QWEN2_5, 5120, 48, 40, 8, 13824, **DYNAMIC)),
    "InternVL3-38B": _of_2_5(VIT_6B, _qwen(QWEN2_5, 5120, 64, 40, 8, 27648, **DYNAMIC)),
    "InternVL3-78B": _of_2_5(VIT_6B, _qwen(QWEN2_5, 8192, 80, 64, 8, 29568, **DYNAMIC)),
    "InternVL3_5-1B": _of_2_5(VIT_300M, QWEN3_06B),
    "InternVL3_5-2B": _of_2_5(VIT_300M, _qwen(QWEN3_06B, 2048, 28, 16, 8, 6144)),
    "InternVL3_5-4B": _of_2_5(VIT_300M, _qwen(QWEN3_06B, 2560, 36, 32, 8, 9728)),
    "InternVL3_5-8B": _of_2_5(VIT_300M, _qwen(QWEN3_06B, 4096, 36, 32, 8, 12288)),
    "InternVL3_5-14B": _of_2_5(VIT_300M, _qwen(QWEN3_06B, 5120, 40, 40, 8, 17408)),
    "InternVL3_5-38B": _of_2_5(VIT_6B, _qwen(QWEN3_06B, 5120, 64, 64, 8, 25600)),
    "InternVL3_5-30B-A3B": _of_2_5(VIT_300M, QWEN3_30B_A3B),
    "InternVL3_5-241B-A28B": _of_2_5(VIT_6B, _qwen(QWEN3_30B_A3B, 4096, 94, 64, 4, 12288, moe_intermediate_size=1536)),
    "InternVL3_5-1B-Flash": _of_2_5(VIT_300M, QWEN3_06B) | FLASH,
    "InternVL3_5-8B-Flash": _of_2_5(VIT_300M, _qwen(QWEN3_06B, 4096, 36, 32, 8, 12288)) | FLASH,
    "InternVL3_5-GPT-OSS-20B-A4B-Preview": _config(VIT_300M, GPT_OSS_20B, "internvl3_5_gpt_oss"),
    # one tiny checkpoint a kind
    "tiny-qwen2": _config(VIT_300M | TINY_VISION, QWEN2_05B | TINY_LANGUAGE, "Hermes-2"),
    "tiny-internlm2": _config(VIT_300M | TINY_VISION, INTERNLM2_1_8B | TINY_LANGUAGE, "internlm2-chat"),
    "tiny-phi3": _config(VIT_300M | TINY_VISION, PHI3_MINI | TINY_PHI3, "phi3-chat"),
    "tiny-llama": _config(VIT_6B | TINY_VISION, LLAMA_YI | TINY_LANGUAGE, "Hermes-2"),
    "tiny-qwen3": _of_2_5(VIT_300M | TINY_VISION, QWEN3_06B | TINY_LANGUAGE | {"head_dim": 32}),
    "tiny-qwen3-moe": _of_2_5(
        VIT_300M | TINY_VISION,
        QWEN3_30B_A3B | TINY_LANGUAGE | {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "tiny-gpt-oss": _config(
        VIT_300M | TINY_VISION,
        GPT_OSS_20B
        | TINY_LANGUAGE
        | {"head_dim": 32, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
        # the first layer looks back 16 tokens, the second to the beginning
        | {"sliding_window": 16, "rope_scaling": GPT_OSS_20B["rope_scaling"] | {"original_max_position_embeddings": 128}},
        "internvl3_5_gpt_oss",
    ),
    "tiny-internlm3": _of_2_5(VIT_300M | TINY_VISION, LLAMA_YI | TINY_LANGUAGE | INTERNLM3),
    "tiny-mono": _config(VIT_300M | TINY_VISION | PATCHES_ONLY, INTERNLM2_1_8B | TINY_LANGUAGE | VISUAL_EXPERTS, "internlm2-chat"),
    "tiny-chat-v1-2": _config(
        VIT_6B | TINY_VISION,
        LLAMA_YI | TINY_LANGUAGE,
        "Hermes-2",
        ps_version="v1",
        select_layer=-2,
        dynamic_image_size=False,
        use_thumbnail=False,
        max_dynamic_patch=1,
    ),
    "tiny-resized": _config(
        VIT_300M | TINY_VISION | {"image_size": 84}, QWEN2_05B | TINY_LANGUAGE, "internvl2_5", force_image_size=56
    ),
}

SPECIAL_TOKENS = [
    *["<pad>", "<s>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"],
    *["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"],
]


CHANNEL_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>"]  # of GPT-OSS; last, so that no other token moves


def tensor_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor of a checkpoint with this configuration, (name, shape), in file order."""
    yield from _vision_shapes(config["vision_config"])
    yield from _projector_shapes(config)
    if config.get("flash_mode"):
        yield from _router_shapes(config["vision_config"]["hidden_size"], config["llm_config"]["hidden_size"])
    kind = config["llm_config"]["architectures"][0]
    yield from (_internlm2_shapes if kind.startswith("InternLM2") else _transformers_shapes)(config["llm_config"])


def _vision_shapes(v: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, mlp, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    cells = (v["image_size"] // patch) ** 2
    yield "vision_model.embeddings.class_embedding", (1, 1, width)
    yield "vision_model.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield "vision_model.embeddings.patch_embedding.bias", (width,)
    yield "vision_model.embeddings.position_embedding", (1, cells + 1, width)
    for n in range(0 if v["model_type"] == "intern_vit_patch" else v["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{n}."
        yield layer + "attn.qkv.weight", (3 * width, width)
        if v["qkv_bias"]:
            yield layer + "attn.qkv.bias", (3 * width,)
        if v["qk_normalization"]:
            yield layer + "attn.q_norm.weight", (width,)
            yield layer + "attn.k_norm.weight", (width,)
        yield layer + "attn.proj.weight", (width, width)
        yield layer + "attn.proj.bias", (width,)
        for norm in ("norm1", "norm2"):
            yield layer + norm + ".weight", (width,)
            if v["norm_type"] == "layer_norm":
                yield layer + norm + ".bias", (width,)
        yield layer + "mlp.fc1.weight", (mlp, width)
        yield layer + "mlp.fc1.bias", (mlp,)
        yield layer + "mlp.fc2.weight", (width, mlp)
        yield layer + "mlp.fc2.bias", (width,)
        yield layer + "ls1", (width,)
        yield layer + "ls2", (width,)


def _projector_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner = config["vision_config"]["hidden_size"] * int(1 / config["downsample_ratio"]) ** 2
    width = config["llm_config"]["hidden_size"]
    yield "mlp1.0.weight", (inner,)
    yield "mlp1.0.bias", (inner,)
    yield "mlp1.1.weight", (width, inner)
    yield "mlp1.1.bias", (width,)
    yield "mlp1.3.weight", (width, width)
    yield "mlp1.3.bias", (width,)


def _router_shapes(c: int, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """InternVL3.5-Flash; attention and norm 3 and 4 are published and unused."""
    yield "mlp2.0.weight", (16 * c,)
    yield "mlp2.0.bias", (16 * c,)
    for place, rows, columns in ((1, 2 * d, 16 * c), (4, 2 * d, 2 * d), (7, d, 2 * d)):
        yield f"mlp2.{place}.weight", (rows, columns)
        yield f"mlp2.{place}.bias", (rows,)
    yield "pooling_before_gating.query_token", (1, c)
    for n in "1234":
        attention, norm, block = f"pooling_before_gating.attn{n}.", f"pooling_before_gating.norm{n}.", f"gating.block{n}."
        yield attention + "in_proj_weight", (3 * c, c)
        yield attention + "in_proj_bias", (3 * c,)
        yield attention + "out_proj.weight", (c, c)
        yield attention + "out_proj.bias", (c,)
        yield norm + "weight", (c,)
        yield norm + "bias", (c,)
        yield block + "0.weight", (4 * c, c)
        yield block + "0.bias", (4 * c,)
        yield block + "3.weight", (c, 4 * c)
        yield block + "3.bias", (c,)
        yield block + "5.weight", (c,)
        yield block + "5.bias", (c,)
    yield "gating.gate.0.weight", (c,)
    yield "gating.gate.0.bias", (c,)
    yield "gating.gate.1.weight", (2, c)
    yield "gating.gate.1.bias", (2,)


def _transformers_shapes(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Qwen2, Qwen3, Llama, Phi-3 and GPT-OSS: the names of transformers' classes; of Qwen3-MoE each expert apart."""
    width, mlp, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim", width // c["num_attention_heads"])
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    yield "language_model.model.embed_tokens.weight", (vocab, width)
    for n in range(c["num_hidden_layers"]):
        layer = f"language_model.model.layers.{n}."
        if c["model_type"] == "phi3":
            yield layer + "self_attn.qkv_proj.weight", (queries + 2 * keys, width)
        else:
            for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                yield layer + f"self_attn.{name}.weight", (rows, width)
                if c["model_type"] in ("qwen2", "gpt_oss"):
                    yield layer + f"self_attn.{name}.bias", (rows,)
        if c["model_type"].startswith("qwen3"):
            yield layer + "self_attn.q_norm.weight", (head,)
            yield layer + "self_attn.k_norm.weight", (head,)
        if c["model_type"] == "qwen3_moe":
            yield layer + "mlp.gate.weight", (c["num_experts"], width)
            for expert in range(c["num_experts"]):
                own = f"{layer}mlp.experts.{expert}."
                yield own + "gate_proj.weight", (c["moe_intermediate_size"], width)
                yield own + "up_proj.weight", (c["moe_intermediate_size"], width)
                yield own + "down_proj.weight", (width, c["moe_intermediate_size"])
        elif c["model_type"] == "gpt_oss":  # rows are inputs here, the gate's and the other's columns take turns
            experts = c["num_local_experts"]
            yield layer + "self_attn.sinks", (c["num_attention_heads"],)
            yield layer + "self_attn.o_proj.bias", (width,)
            yield layer + "mlp.router.weight", (experts, width)
            yield layer + "mlp.router.bias", (experts,)
            yield layer + "mlp.experts.gate_up_proj", (experts, width, 2 * mlp)
            yield layer + "mlp.experts.gate_up_proj_bias", (experts, 2 * mlp)
            yield layer + "mlp.experts.down_proj", (experts, mlp, width)
            yield layer + "mlp.experts.down_proj_bias", (experts, width)
        elif c["model_type"] == "phi3":
            yield layer + "mlp.gate_up_proj.weight", (2 * mlp, width)
        else:
            yield layer + "mlp.gate_proj.weight", (mlp, width)
            yield layer + "mlp.up_proj.weight", (mlp, width)
        yield layer + "self_attn.o_proj.weight", (width, queries)
        if c["model_type"] not in ("qwen3_moe", "gpt_oss"):
            yield layer + "mlp.down_proj.weight", (width, mlp)
        yield layer + "input_layernorm.weight", (width,)
        yield layer + "post_attention_layernorm.weight", (width,)
    yield "language_model.model.norm.weight", (width,)
    if not c.get("tie_word_embeddings"):
        yield "language_model.lm_head.weight", (vocab, width)


def _internlm2_shapes(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, mlp, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = width // c["num_attention_heads"]
    yield "language_model.model.tok_embeddings.weight", (vocab, width)
    for n in range(c["num_hidden_layers"]):
        layer = f"language_model.model.layers.{n}."
        yield layer + "attention.wqkv.weight", (width + 2 * c["num_key_value_heads"] * head, width)
        yield layer + "attention.wo.weight", (width, width)
        yield layer + "feed_forward.w1.weight", (mlp, width)
        yield layer + "feed_forward.w3.weight", (mlp, width)
        yield layer + "feed_forward.w2.weight", (width, mlp)
        if c["architectures"] == VISUAL_EXPERTS["architectures"]:
            yield layer + "feed_forward_ve.w1.weight", (mlp, width)
            yield layer + "feed_forward_ve.w3.weight", (mlp, width)
            yield layer + "feed_forward_ve.w2.weight", (width, mlp)
        yield layer + "attention_norm.weight", (width,)
        yield layer + "ffn_norm.weight", (width,)
    yield "language_model.model.norm.weight", (width,)
    yield "language_model.output.weight", (vocab, width)


class _RandomValues:
    """Normal values whose spread suits the tensor, so that activations stay of order one through every layer."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(POOL, generator=self.generator)
        self.dtype = dtype

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        scale, centre = self._spread(name, shape)
        left = math.prod(shape)
        while left:
            start = int(torch.randint(POOL, (1,), generator=self.generator))
            chunk = self.pool[start : start + left]
            yield (chunk * scale + centre).to(self.dtype)
            left -= len(chunk)

    @staticmethod
    def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        if name.endswith(
            (
                "norm.weight",
                "norm1.weight",
                "norm2.weight",
                "layernorm.weight",
                "mlp1.0.weight",
                "mlp2.0.weight",
                ".5.weight",
                "gate.0.weight",
            )
        ):
            return 0.1, 1.0
        if name.endswith((".ls1", ".ls2")):
            return 0.02, 0.2
        if name.endswith("sinks"):
            return 1.0, 0.0
        if len(shape) == 1 or name.endswith("_bias"):
            return 0.02, 0.0
        if ".mlp.experts." in name:
            return shape[1] ** -0.5, 0.0
        if "embed" in name and "patch" not in name:
            return 0.5, 0.0
        return math.prod(shape[1:]) ** -0.5, 0.0


def write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]], values: _RandomValues, dtype: str) -> None:
    """Write one safetensors file, streaming each tensor to disk."""
    size = DTYPES[dtype][0].itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": DTYPES[dtype][1], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            for chunk in values.chunks(name, shape):
                file.write(chunk.view(torch.uint8).numpy().tobytes())


def write_weights(folder: Path, config: dict, dtype: str, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards with their index when the weights pass `shard_bytes`."""
    size = DTYPES[dtype][0].itemsize
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensor_shapes(config):
        bytes_ = math.prod(shape) * size
        if shards[-1] and filled + bytes_ > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += bytes_
    values = _RandomValues(seed, DTYPES[dtype][0])
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], values, dtype)
        return
    index: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, values, dtype)
        index |= {name: file for name, _ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 19 special tokens, the 256 bytes, and the tokens of GPT-OSS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet, *CHANNEL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS + CHANNEL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")


def make_checkpoint(
    folder: Path,
    name: str,
    *,
    tokenizer: Path | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    **changes: Any,
) -> Path:
    """Write the checkpoint `name` of CONFIGS to `folder` and return the folder; `changes` replace top-level keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(CONFIGS[name]) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["llm_config"].get("eos_token_id", 2)}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 448, "crop_size": 448, "do_resize": True}))
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code must never run')\n")
    if tokenizer is None:
        tiny_tokenizer().save_pretrained(folder)
    else:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    write_weights(folder, config, dtype, seed, shard_bytes)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer files to copy (default: a tiny one)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    make_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
