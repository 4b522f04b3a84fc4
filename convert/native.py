"""The transformers-native layout (`model_type: internvl`, the hub's -hf repositories) read as the published one.

Gives the configuration the published keys, and every tensor its published name; after that both layouts are the same.
Names of both layouts: huggingface/transformers@v5.5.4 src/transformers/models/internvl/convert_internvl_weights_to_hf.py, and the
older ones that transformers 4.52 to 4.57 wrote (`language_model.model.*` instead of `model.language_model.*`).
"""

from __future__ import annotations

import re
from typing import Any

from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.folder.config import MODEL_TYPE

NATIVE_TYPE = "internvl"
TEMPLATE = "internvl2_5"  # of InternVL2.5, 3 and 3.5, the models that were published in this layout
TEMPLATES = {"gpt_oss": "internvl3_5_gpt_oss"}  # by language model, the exceptions
MAX_TILES = 12  # default of GotOcr2ImageProcessor, where preprocessor_config.json has none

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # of the vision part, as published

RENAMES = [  # (transformers', published), applied in this order to the whole name
    (r"^model\.(?=vision_tower|multi_modal_projector|language_model)", ""),
    (r"^(?=lm_head\.)", "language_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_1$", ".ls1"),
    (r"\.lambda_2$", ".ls2"),
]
QUERY, OTHERS = ".attn.q_proj.", (".attn.k_proj.", ".attn.v_proj.")  # three matrices that are one in the published layout


def is_native(raw: dict[str, Any]) -> bool:
    """Whether a config.json has this layout; InternVL-14B, a model without chat, has the same model type."""
    return raw.get("model_type") == NATIVE_TYPE and "text_config" in raw


def published_config(raw: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The equivalent config.json of the published layout. Raises CheckpointError, UnsupportedModelError."""
    for key in ("vision_config", "text_config"):
        if not isinstance(raw.get(key), dict):
            raise CheckpointError(f"config.json has no {key}: it is not a complete InternVL configuration")
    vision, text = raw["vision_config"], raw["text_config"]
    for key, wanted in (("use_mean_pooling", True), ("use_absolute_position_embeddings", True)):
        if vision.get(key, wanted) != wanted:
            raise UnsupportedModelError(f"config.json: vision_config.{key} is {vision[key]}; only {wanted} is supported")
    absent = [key for key in SIZES if key not in vision]
    if absent:
        raise CheckpointError(f"config.json: vision_config lacks {', '.join(absent)}: it is not a complete InternVL configuration")
    side = _one(vision.get("image_size", 448))
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": MODEL_TYPE,
        "downsample_ratio": raw.get("downsample_ratio", 0.5),
        "dynamic_image_size": True,
        "force_image_size": side,
        "llm_config": text | {"architectures": text.get("architectures") or [_class_name(text)]},
        "max_dynamic_patch": preprocessor.get("max_patches", MAX_TILES),
        "min_dynamic_patch": preprocessor.get("min_patches", 1),
        "ps_version": "v2",
        "select_layer": raw.get("vision_feature_layer", -1),
        "template": TEMPLATES.get(str(text.get("model_type")), TEMPLATE),
        "torch_dtype": raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
        "use_thumbnail": True,
        "vision_config": {
            **{key: vision[key] for key in SIZES},
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": side,
            "patch_size": _one(vision.get("patch_size", 14)),
            "hidden_act": vision.get("hidden_act", "gelu"),
            "norm_type": vision.get("norm_type", "layer_norm"),
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            "qkv_bias": vision.get("attention_bias", False),
            "qk_normalization": vision.get("use_qk_norm", False),
        },
    }


def renamed(name: str) -> str:
    """The published name of a tensor of either generation of this layout; query, key and value stay separate."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_names(names: list[str]) -> dict[str, list[str]]:
    """Published name -> its stored tensors: one, or query, key and value rows in this order."""
    found: dict[str, list[str]] = {}
    for stored in names:
        name = renamed(stored)
        vision = name.startswith("vision_model.")
        if vision and any(part in name for part in OTHERS):
            continue
        if vision and QUERY in name:
            parts = [stored, *(stored.replace("q_proj", part) for part in ("k_proj", "v_proj"))]
            found[name.replace(QUERY, ".attn.qkv.")] = parts
        else:
            found[name] = [stored]
    return found


def _one(size: int | list[int]) -> int:
    """The side of a square size, given as one number or as height and width. Raises UnsupportedModelError."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UnsupportedModelError(f"config.json: tiles or patches of {size} pixels are not square")
    return size[0]


def _class_name(text: dict[str, Any]) -> str:
    """The language model's class by its type: some of these files name only the type."""
    import transformers

    kind = str(text.get("model_type"))
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in names:
        raise UnsupportedModelError(f"config.json: text_config.model_type is {kind!r}, which transformers does not know")
    return str(names[kind])
