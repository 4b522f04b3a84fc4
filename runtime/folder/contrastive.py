"""What config.json says of InternVL-C and -G (model_type `internvl` with a `qllama_config`) and of InternViT alone.

Dataclasses with the published defaults; knows nothing of weights, tokens or devices. Chat models are read by config.py.
Defaults of missing keys: OpenGVLab/InternVL@2410d1d clip_benchmark/clip_benchmark/models/internvl_huggingface/
configuration_internvl.py, and transformers' LlamaConfig for `qllama_config`, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import CheckpointError, OptionError, UnsupportedModelError
from runtime.folder.config import VisionConfig

CHAT, CONTRASTIVE, FEATURES = "chat", "contrastive", "features"  # kinds of checkpoints and of model folders
ANSWERS = {  # what each kind is, and the command or class for it
    CHAT: "a chat model, which answers questions (python -m runtime chat)",
    CONTRASTIVE: "InternVL-C and -G, which compare pictures and texts (python -m runtime embed, search, classify, caption)",
    FEATURES: "InternViT alone, which gives features of pictures (runtime.OVInternViT)",
}
VISION_TYPES = ("intern_vit_6b", "internvl_vision")
MODES = ("InternVL-C", "InternVL-G")
TEXT_PREFIX = "summarize:"  # stands before every text that is compared
CAPTION_PROMPT = "English caption:"
TEXT_TOKENS = 80  # of a text at most, with its first and last token


def kind_of(raw: dict[str, Any]) -> str:
    """Which kind of model a parsed config.json describes; chat where it is neither of the others."""
    if "qllama_config" in raw:
        return CONTRASTIVE
    return FEATURES if raw.get("model_type") in VISION_TYPES else CHAT


def check_mode(mode: str) -> None:
    """Raise OptionError for a mode that is not one of the two."""
    if mode not in MODES:
        raise OptionError(f"mode {mode!r} is not known; known are {' and '.join(MODES)}")


@dataclass(frozen=True)
class QLlamaConfig:
    """QLLaMA of InternVL-C and -G: Llama with cross-attention to a picture in every `cross_attention_frequency`-th layer."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_act != "silu":
            raise UnsupportedModelError(f"config.json: qllama_config.hidden_act is {self.hidden_act!r}; only silu is supported")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config.json: qllama_config.hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ContrastiveConfig:
    """One checkpoint or model folder of InternVL-C and -G."""

    vision: VisionConfig
    qllama: QLlamaConfig
    image_size: int  # S, side of a picture in pixels
    embed_dim: int = 768  # E, width of the embeddings that are compared
    pool_heads: int = 16
    queries: int = 96  # Q
    cross_attention_frequency: int = 2

    @property
    def grid_side(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.vision.patch_size

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ContrastiveConfig:
        """Read a parsed config.json. Raises CheckpointError for missing or contradictory keys, UnsupportedModelError."""
        for key in ("vision_config", "qllama_config"):
            if not isinstance(raw.get(key), dict):
                raise CheckpointError(f"config.json has no {key}: it is not a complete InternVL-C/-G configuration")
        vision, section = _vision(raw["vision_config"]), raw["qllama_config"]
        heads = section.get("num_attention_heads")
        if section.get("num_key_value_heads") not in (None, heads):
            raise UnsupportedModelError("config.json: qllama_config.num_key_value_heads is not num_attention_heads: not supported")
        if section.get("rope_scaling"):
            raise UnsupportedModelError("config.json: qllama_config.rope_scaling is not supported")
        known = {key: value for key, value in section.items() if key in QLlamaConfig.__dataclass_fields__ and value is not None}
        names = {
            "clip_embed_dim": "embed_dim",
            "attn_pool_num_heads": "pool_heads",
            "num_query_token": "queries",
            "cross_attention_frequency": "cross_attention_frequency",
        }
        own = {ours: raw[theirs] for theirs, ours in names.items() if raw.get(theirs) is not None}
        config = cls(vision, QLlamaConfig(**known), raw.get("force_image_size") or vision.image_size, **own)
        _check_side(config.image_size, vision)
        for width, what in ((vision.hidden_size, "vision_config"), (config.qllama.hidden_size, "qllama_config")):
            if width % config.pool_heads:
                raise CheckpointError(
                    f"config.json: {what}.hidden_size {width} is not a multiple of attn_pool_num_heads {config.pool_heads}"
                )
        return config


@dataclass(frozen=True)
class FeaturesConfig:
    """One checkpoint or model folder of InternViT alone: config.json is the vision configuration itself."""

    vision: VisionConfig
    image_size: int  # S

    @property
    def grid_side(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.vision.patch_size

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FeaturesConfig:
        """Read a parsed config.json. Raises CheckpointError, UnsupportedModelError."""
        vision = _vision(raw)
        _check_side(vision.image_size, vision)
        return cls(vision, vision.image_size)


def _vision(section: dict[str, Any]) -> VisionConfig:
    return VisionConfig(**{key: value for key, value in section.items() if key in VisionConfig.__dataclass_fields__})


def _check_side(side: int, vision: VisionConfig) -> None:
    if side % vision.patch_size:
        raise CheckpointError(f"config.json: a picture of {side} pixels is not a whole number of {vision.patch_size}-pixel patches")
