"""What config.json says, as frozen dataclasses with the numbers derived from it.

Reads the published `internvl_chat` layout and knows its defaults; knows nothing of weights, tokens or devices. The language
model's own section stays a plain dictionary here: only `convert` builds a language model from it.
Defaults of missing keys: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/configuration_*.py
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError, UnsupportedModelError

MODEL_TYPE = "internvl_chat"


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer: InternViT-300M (layer norm, biased qkv) or InternViT-6B (RMS norm, normalised q and k)."""

    hidden_size: int = 3200
    intermediate_size: int = 12800
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    image_size: int = 224  # side of the stored position table, in pixels
    patch_size: int = 14
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise UnsupportedModelError(
                f"config.json: vision_config.norm_type is {self.norm_type!r}; layer_norm and rms_norm are supported"
            )
        if self.hidden_act != "gelu":
            raise UnsupportedModelError(f"config.json: vision_config.hidden_act is {self.hidden_act!r}; only gelu is supported")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config.json: vision_config.hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )


@dataclass(frozen=True)
class FlashConfig:
    """InternVL3.5-Flash: the thresholds on the router's probabilities above which a tile gets few context tokens.

    Both in 0..1: `relative` is the share of a prompt's tiles that keep all of theirs, `absolute` the least probability.
    """

    relative: float
    absolute: float


@dataclass(frozen=True)
class InternVLConfig:
    """One checkpoint or model folder: the vision transformer, the language model's section, tiling, template."""

    vision: VisionConfig
    language: dict[str, Any]  # llm_config as published
    template: str
    system_message: str | None  # None: the template's
    tile_size: int  # S, side of a tile in pixels
    tokens_per_tile: int  # P
    select_layer: int = -1  # which hidden state of the vision transformer feeds the projector
    ps_version: str = "v1"  # order of the context tokens of a tile: v2 row by row, v1 column by column
    downsample_ratio: float = 0.5
    min_tiles: int = 1
    max_tiles: int = 6
    use_thumbnail: bool = False
    dynamic_image_size: bool = False
    flash: FlashConfig | None = None  # None: there is no router

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.vision.patch_size

    @property
    def shuffle_factor(self) -> int:
        """Patches along one side of the square that a context token covers."""
        return int(1 / self.downsample_ratio)

    @property
    def few_shuffle_factor(self) -> int:
        """The same for a tile with few context tokens."""
        return self.shuffle_factor**2

    @property
    def few_per_tile(self) -> int:
        """Context tokens of a tile with few of them."""
        return (self.grid_side // self.few_shuffle_factor) ** 2

    @property
    def context_length(self) -> int | None:
        """The longest sequence in tokens: the length in training, or what dynamic RoPE extends it to."""
        trained = self.language.get("max_position_embeddings")
        return int(trained * self._rope.get("factor", 1.0)) if trained and self.has_dynamic_rope else trained

    @property
    def plain_length(self) -> int | None:
        """The longest sequence whose rotary positions do not depend on its length; None where there is no limit.

        Longer sequences rotate all of their tokens in another way: Phi-3 by long factors, dynamic RoPE by the length itself.
        """
        if self.has_dynamic_rope:
            return self.language.get("max_position_embeddings")
        if self._rope_kind in ("su", "longrope"):
            return self.language.get("original_max_position_embeddings") or self._rope.get("original_max_position_embeddings")
        return None

    @property
    def has_dynamic_rope(self) -> bool:
        return self._rope_kind == "dynamic"

    @property
    def window(self) -> int | None:
        """Sliding attention window of some layers in tokens; None where it is off or not shorter than the context."""
        if self.language_architecture not in ("Phi3ForCausalLM", "GptOssForCausalLM"):
            return None  # Qwen's config.json names a window that is off
        window = self.language.get("sliding_window")
        return window if window and window < (self.context_length or math.inf) else None

    @property
    def _rope(self) -> dict[str, Any]:
        return self.language.get("rope_scaling") or self.language.get("rope_parameters") or {}

    @property
    def _rope_kind(self) -> str | None:
        return self._rope.get("type", self._rope.get("rope_type"))

    @property
    def language_architecture(self) -> str:
        """The class name of the language model in config.json, like `Qwen2ForCausalLM`."""
        return str((self.language.get("architectures") or ["(none)"])[0])

    @property
    def has_visual_experts(self) -> bool:
        """Whether context tokens have expert weights of their own (Mono-InternVL); only our own runtime feeds those."""
        return self.language_architecture == "InternLM2VEForCausalLM"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> InternVLConfig:
        """Read a parsed config.json.

        Raises UnsupportedModelError for another model type, CheckpointError for missing or contradictory keys.
        """
        other = _another_kind(raw)
        if other:
            raise UnsupportedModelError(f"config.json: {other}: give an InternVL chat checkpoint")
        for key in ("vision_config", "llm_config"):
            if not isinstance(raw.get(key), dict):
                raise CheckpointError(f"config.json has no {key}: it is not a complete InternVL configuration")
        if not raw.get("template"):
            raise CheckpointError("config.json has no template: the prompt of this checkpoint is unknown")
        section = raw["vision_config"]
        if section.get("model_type") == "intern_vit_patch":  # Mono-InternVL: patch embedding alone, whatever number it names
            section = section | {"num_hidden_layers": 0}
        vision = VisionConfig(**{k: v for k, v in section.items() if k in VisionConfig.__dataclass_fields__})
        tile_size = raw.get("force_image_size") or vision.image_size
        ratio = raw.get("downsample_ratio", 0.5)
        side = tile_size // vision.patch_size
        config = cls(
            vision=vision,
            language=raw["llm_config"],
            template=raw["template"],
            system_message=raw.get("system_message"),
            tile_size=tile_size,
            tokens_per_tile=int(side**2 * ratio**2),
            select_layer=raw.get("select_layer", -1),
            ps_version=raw.get("ps_version", "v1"),
            downsample_ratio=ratio,
            min_tiles=raw.get("min_dynamic_patch", 1),
            max_tiles=raw.get("max_dynamic_patch", 6),
            use_thumbnail=raw.get("use_thumbnail", False),
            dynamic_image_size=raw.get("dynamic_image_size", False),
            flash=_flash(raw),
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.ps_version not in ("v1", "v2"):
            raise UnsupportedModelError(f"config.json: ps_version is {self.ps_version!r}; v1 and v2 are supported")
        if self.tile_size % self.vision.patch_size or self.grid_side % self.shuffle_factor:
            raise CheckpointError(
                f"config.json: a tile of {self.tile_size} pixels is not a whole number of "
                f"{self.shuffle_factor} x {self.shuffle_factor} squares of {self.vision.patch_size}-pixel patches"
            )
        if self.flash is not None and self.grid_side % self.few_shuffle_factor:
            raise CheckpointError(
                f"config.json: flash_mode joins {self.few_shuffle_factor} x {self.few_shuffle_factor} patches, "
                f"a tile has {self.grid_side} x {self.grid_side}"
            )
        layers = self.vision.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise CheckpointError(
                f"config.json: select_layer {self.select_layer} is outside a vision transformer of {layers} layers"
            )


def _flash(raw: dict[str, Any]) -> FlashConfig | None:
    """The thresholds of a checkpoint with a router. Raises CheckpointError where one is missing or outside 0..1."""
    if not raw.get("flash_mode"):
        return None
    keys = ("flash_relative_threshold", "flash_absolute_threshold")
    for key in keys:
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            found = "is missing" if value is None else f"is {value!r}"
            raise CheckpointError(f"config.json: flash_mode is on, and {key} {found}: a number from 0 to 1 is needed")
    return FlashConfig(*(float(raw[key]) for key in keys))


def _another_kind(raw: dict[str, Any]) -> str | None:
    """What the checkpoint is, where it is not a chat model of this family; else None."""
    kind = raw.get("model_type")
    code = " ".join(str(name).rpartition("--")[2] for name in (raw.get("auto_map") or {}).values())  # REPOSITORY--file.Class
    if kind in ("intern_vit_6b", "intern_vit_patch", "internvl_vision"):
        return "this is InternViT, a vision transformer alone, for embeddings, without a language model"
    if "qllama_config" in raw:
        return "this is InternVL-14B (InternVL-C and -G), a contrastive model for retrieval, without chat"
    if "hico" in code or "video" in f"{kind} {code}".lower():
        return "this is a video-only model of the InternVideo kind, which joins tokens over time"
    if "audio_config" in raw:
        return "this is an audio model of the InternOmni kind"
    if raw.get("rope_pos_id_version", "default") != "default":
        return "this is a V2PE model, whose positions grow by less than one a context token"
    if kind == "internvl":
        return "model_type is 'internvl' and there is no text_config"
    if kind != MODEL_TYPE:
        return f"model_type is {kind!r}, expected {MODEL_TYPE!r} or 'internvl' of transformers"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Parse the config.json at `path`; raises CheckpointError when it is missing or not a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: give a checkpoint folder or a hub id") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, expected a JSON object")
    return raw
