"""The language part: a checkpoint's llm_config and tensors -> a transformers decoder.

The table LANGUAGE_MODELS lists the supported kinds and their tensor names. Knows nothing of pictures, except in
Mono-InternVL, whose feed-forward layers have separate weights for context tokens.
InternLM2 is Llama after a rename and a split of its packed attention matrix: OpenGVLab/InternVL@2410d1d
internvl_chat/internvl/model/internlm2/modeling_internlm2.py, and huggingface/transformers@v5.5.4
src/transformers/models/internvl/convert_internvl_weights_to_hf.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from convert.checkpoint import Shapes
from convert.four_bits import Ready
from convert.lora import Later
from convert.reference.experts import Experts, GptOssExperts, QwenExperts
from runtime.errors import CheckpointError, UnsupportedModelError
from runtime.folder.config import InternVLConfig

PREFIX = "language_model."
Empty = Callable[..., torch.Tensor]  # torch.empty's kind

# Architecture keys only: the published sections also contain generation defaults and an attention implementation.
CONFIG_KEYS = [
    *["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"],
    *["head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "partial_rotary_factor"],
    *["max_position_embeddings", "original_max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"],
    *["bos_token_id", "eos_token_id", "pad_token_id"],
    *["moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"],
]

REQUIRED_KEYS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]

INTERNLM2_NAMES = [  # (published, Llama's)
    ("model.tok_embeddings.", "model.embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    ("output.", "lm_head."),
]
VISUAL_NAMES = [  # of Mono-InternVL
    (".feed_forward_ve.w1.", ".mlp.visual.gate_proj."),
    (".feed_forward_ve.w2.", ".mlp.visual.down_proj."),
    (".feed_forward_ve.w3.", ".mlp.visual.up_proj."),
]
EXPERTS = ".mlp.experts."
PACKED, SPLIT = ".attention.wqkv.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


@dataclass(frozen=True)
class LanguageModel:
    """How one kind of language model is built: transformers' class, its fixed settings, its published tensor names."""

    model_type: str  # of transformers and of the exporter
    class_name: str
    settings: dict[str, Any] = field(default_factory=dict)
    names: list[tuple[str, str]] = field(default_factory=list)
    packed_attention: bool = False  # wqkv rows, group by group: query heads, one key head, one value head
    head: str = "lm_head.weight"
    visual_experts: bool = False
    experts: Callable[[PretrainedConfig], Experts] | None = None  # published one by one
    turned_experts: bool = False  # published joined, with outputs as columns
    keys: tuple[str, ...] = ()  # architecture keys of llm_config besides CONFIG_KEYS
    required: tuple[str, ...] = ()
    attention: str = "sdpa"


INTERNLM2: dict[str, Any] = {
    "settings": {"attention_bias": False, "mlp_bias": False},
    "names": INTERNLM2_NAMES,
    "packed_attention": True,
    "head": "output.weight",
}
LANGUAGE_MODELS = {
    "Qwen2ForCausalLM": LanguageModel("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": LanguageModel("qwen3", "Qwen3ForCausalLM"),
    "Qwen3MoeForCausalLM": LanguageModel("qwen3_moe", "Qwen3MoeForCausalLM", experts=QwenExperts),
    "GptOssForCausalLM": LanguageModel(
        "gpt_oss",
        "GptOssForCausalLM",
        keys=("num_local_experts", "layer_types"),
        required=("num_local_experts", "sliding_window", "max_position_embeddings"),
        attention="eager",
        experts=GptOssExperts,
        turned_experts=True,
    ),
    "LlamaForCausalLM": LanguageModel("llama", "LlamaForCausalLM"),
    "Phi3ForCausalLM": LanguageModel("phi3", "Phi3ForCausalLM"),
    "InternLM3ForCausalLM": LanguageModel("llama", "LlamaForCausalLM", settings={"attention_bias": False, "mlp_bias": False}),
    "InternLM2ForCausalLM": LanguageModel("llama", "LlamaForCausalLM", **INTERNLM2),
    "InternLM2VEForCausalLM": LanguageModel(
        "llama", "LlamaForCausalLM", **INTERNLM2 | {"names": INTERNLM2_NAMES + VISUAL_NAMES, "visual_experts": True}
    ),
}


class DynamicRope(nn.Module):
    """Rotary positions whose base grows once the sequence is longer than in training: dynamic NTK.

    With s = last position + 1, base' = base (f s / trained - (f - 1))^(d / (d - 2)), for all positions of one call; up to the
    trained length base' = base. Source: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internlm2/modeling_internlm2.py.
    There and in transformers a longer sequence changes the base of later, shorter ones too; here every call computes its own, and
    the choice is part of the traced graph.
    """

    inv_freq: torch.Tensor

    def __init__(self, rope: Any):
        super().__init__()
        parameters = rope.config.rope_parameters
        self.factor, self.trained = float(parameters["factor"]), rope.config.max_position_embeddings
        self.register_buffer("inv_freq", rope.original_inv_freq, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B, T) -> cosines and sines (B, T, head size) in the type of `x`."""
        pairs = torch.arange(len(self.inv_freq), device=x.device)
        length = (position_ids.max() + 1).float()
        growth = (self.factor * length / self.trained - (self.factor - 1)).clamp(min=1.0)  # of the base, to the power (d - 2) / d
        frequencies = self.inv_freq * torch.exp(-torch.log(growth) * pairs / (len(pairs) - 1))
        angles = (frequencies[None, :, None].expand(position_ids.shape[0], -1, 1) @ position_ids[:, None].float()).transpose(1, 2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Routing(threading.local):
    """The context tokens of a forward; each thread has its own mask."""

    mask: torch.Tensor | None = None  # (B, T), 1 on context tokens; None if all tokens are text


class VisualExperts(LlamaMLP):
    """A feed-forward layer with a second set of weights for context tokens.

    Source: OpenGVLab/Mono-InternVL@5b17ab4 internvl_chat/internvl/model/internlm2/modeling_internlm2_ve.py. There both sets
    compute every token of a prompt and a mask selects; here each token uses only its own set, with the same result.
    """

    def __init__(self, config: LlamaConfig, routing: Routing):
        super().__init__(config)
        self.visual = LlamaMLP(config)
        self.routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.routing.mask is None:
            return super().forward(x)
        tokens, mask = x.reshape(-1, x.shape[-1]), self.routing.mask.reshape(-1)
        out = torch.zeros_like(tokens)
        for expert, here in ((super().forward, mask == 0), (self.visual, mask != 0)):
            own = here.nonzero().reshape(-1)
            out = out.index_add(0, own, expert(tokens.index_select(0, own)))
        return out.reshape(x.shape)


class LlamaWithVisualExperts(LlamaForCausalLM):
    """InternLM2VE as a Llama: a prompt has a `visual_token_mask` (B, T) int64; new tokens are text."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.routing = Routing()
        for layer in self.model.layers:
            layer.mlp = VisualExperts(config, self.routing)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_token_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The parent's forward, with `visual_token_mask`."""
        length = (inputs_embeds if inputs_embeds is not None else input_ids).shape[1]  # type: ignore[union-attr]
        told = visual_token_mask is not None and visual_token_mask.shape[1] == length  # generate() passes a prompt's to every step
        self.routing.mask = visual_token_mask if told else None
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **options)


def language_kind(config: InternVLConfig) -> LanguageModel:
    """Return the row of LANGUAGE_MODELS for this checkpoint; raises UnsupportedModelError naming the supported ones."""
    found = config.language_architecture
    if found not in LANGUAGE_MODELS:
        raise UnsupportedModelError(
            f"config.json: the language model {found} is not supported; supported are {', '.join(LANGUAGE_MODELS)}"
        )
    missing = [key for key in (*REQUIRED_KEYS, *LANGUAGE_MODELS[found].required) if key not in config.language]
    if missing:
        raise CheckpointError(f"config.json: llm_config has no {', '.join(missing)}: it is not complete; fetch it again")
    return LANGUAGE_MODELS[found]


def language_config(config: InternVLConfig) -> PretrainedConfig:
    """Build transformers' configuration of the language model."""
    kind = language_kind(config)
    keys = (*CONFIG_KEYS, *kind.keys)
    chosen = {key: config.language[key] for key in keys if config.language.get(key) is not None} | kind.settings
    rope = chosen.pop("rope_parameters", None)  # transformers 5 joins the two keys in it
    if rope:
        chosen["rope_theta"] = rope.get("rope_theta", chosen.get("rope_theta"))
        chosen["rope_scaling"] = (
            {k: v for k, v in rope.items() if k != "rope_theta"} if rope.get("rope_type") != "default" else None
        )
    scaling = chosen.get("rope_scaling")
    if scaling and scaling.get("type", scaling.get("rope_type")) == "su":  # Phi-3's first name for it
        chosen["rope_scaling"] = {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": "longrope"}
    chosen["sliding_window"] = config.window  # None if no shorter than the context: transformers would mask for it
    try:
        built = getattr(transformers, kind.class_name).config_class(**chosen)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: llm_config cannot be read as {config.language_architecture}: {error}") from None
    if "sliding_attention" in (getattr(built, "layer_types", None) or ()) and config.window is None:
        raise CheckpointError("config.json: llm_config has sliding layers and no sliding_window below its context; fetch it again")
    built._attn_implementation = kind.attention
    return built


def build_language(config: InternVLConfig, *, tied: bool) -> PreTrainedModel:
    """Build the decoder without weights, on the meta device; `tied` says that the head is the embedding table."""
    hf_config = language_config(config)
    hf_config.tie_word_embeddings = tied
    kind = language_kind(config)
    build: Any = LlamaWithVisualExperts if kind.visual_experts else getattr(transformers, kind.class_name)
    with torch.device("meta"):
        model = build(hf_config)
    if kind.experts is not None:
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                with torch.device("meta"):
                    layer.mlp.experts = kind.experts(hf_config)
    # Rotary tables are computed, not stored: those made on the meta device are empty.
    rope: nn.Module = type(model.model.rotary_emb)(hf_config)
    model.model.rotary_emb = DynamicRope(rope) if rope.rope_type == "dynamic" else rope
    return model.eval()


def published_shapes(config: InternVLConfig, *, tied: bool) -> Shapes:
    """Every tensor that a checkpoint holds for its language model, by its published name."""
    kind = language_kind(config)
    shapes: Shapes = {}
    for name, tensor in build_language(config, tied=tied).state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        shape = tuple(tensor.shape)
        if kind.packed_attention and SPLIT[0] in name:
            rows = sum(build_rows(config))
            shapes[PREFIX + name.replace(SPLIT[0], PACKED)] = (rows, *shape[1:])
        elif kind.turned_experts and EXPERTS in name and len(shape) == 3:
            shapes[PREFIX + name] = (shape[0], shape[2], shape[1])
        elif kind.experts is not None and not kind.turned_experts and EXPERTS in name:
            experts, _, matrix = name.rpartition(".")
            shapes |= {f"{PREFIX}{experts}.{expert}.{matrix}.weight": shape[1:] for expert in range(shape[0])}
        elif not (kind.packed_attention and any(part in name for part in SPLIT)):
            shapes[PREFIX + _rename(name, [(ours, theirs) for theirs, ours in kind.names])] = shape
    return shapes


def build_rows(config: InternVLConfig) -> tuple[int, int, int]:
    """Rows of the query, key and value matrices."""
    c = language_config(config)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.num_attention_heads * head, c.num_key_value_heads * head, c.num_key_value_heads * head


def to_transformers(
    config: InternVLConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    empty: Empty = torch.empty,
    later: Later | None = None,
    ready: Ready | None = None,
) -> dict[str, torch.Tensor]:
    """Give published tensors the names (and, for packed attention, the split) of transformers' class.

    Copies go to memory from `empty`; joined experts become `dtype`, or float32 if it is None, unless `ready` takes them. If a
    packed matrix is registered in `later` or `ready`, its query, key and value matrices take its place there.
    """
    kind = language_kind(config)
    state: dict[str, torch.Tensor] = {}
    gather = _turn_experts if kind.turned_experts else _join_experts
    joined = tensors if kind.experts is None else gather(tensors, dtype or torch.float32, empty, ready)
    for published, tensor in joined.items():
        name = published.removeprefix(PREFIX)
        if kind.packed_attention and PACKED in name:
            split = partial(_split_packed, config, empty=torch.empty)
            matrices = (ready.split(tensor, split) if ready is not None else None) or _split_packed(config, tensor, empty)
            state |= zip((name.replace(PACKED, part) for part in SPLIT), matrices, strict=True)
            if later is not None:
                later.move(tensor, matrices, split)
        else:
            state[_rename(name, kind.names)] = tensor
    return state


def _join_experts(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, empty: Empty, ready: Ready | None
) -> dict[str, torch.Tensor]:
    """Join the matrices of single experts to (E, rows, columns), by kind and layer; other tensors are not changed."""
    joined, kinds = apart(tensors)
    for name, matrices in kinds.items():
        if ready is not None:
            joined[name] = ready.join(matrices)
            continue
        joined[name] = empty((len(matrices), *matrices[0].shape), dtype=dtype)
        for number, matrix in enumerate(matrices):
            joined[name][number] = matrix
    return joined


def _turn_experts(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, empty: Empty, ready: Ready | None
) -> dict[str, torch.Tensor]:
    """Transpose joined experts (E, columns, rows) to (E, rows, columns); other tensors are not changed."""

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        if ready is not None:
            return ready.turn(tensor)
        experts, columns, rows = tensor.shape
        return empty((experts, rows, columns), dtype=dtype).copy_(tensor.transpose(1, 2))

    return {name: turned(tensor) if EXPERTS in name and tensor.ndim == 3 else tensor for name, tensor in tensors.items()}


def apart(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Separate tensors that belong to no single expert from those that do: by kind and layer, in order of experts."""
    others: dict[str, torch.Tensor] = {}
    kinds: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, here, rest = name.partition(EXPERTS)
        if not here:
            others[name] = tensor
            continue
        number, matrix, _ = rest.split(".")
        kinds.setdefault(f"{layer}{EXPERTS}{matrix}", {})[int(number)] = tensor
    return others, {name: [own[number] for number in sorted(own)] for name, own in kinds.items()}


def _rename(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old in name if old.startswith(".") else name.startswith(old):
            return name.replace(old, new, 1)
    return name


def _split_packed(config: InternVLConfig, packed: torch.Tensor, empty: Empty) -> list[torch.Tensor]:
    """wqkv ((heads + 2 groups) * head, D) -> q, k, v; rows go group by group: its query heads, one key head, one value head."""
    groups = config.language["num_key_value_heads"]
    per_group = config.language["num_attention_heads"] // groups
    heads = rearrange(packed, "(g slots d) w -> g slots d w", g=groups, slots=per_group + 2)
    matrices = []
    for part in heads.split([per_group, 1, 1], dim=1):
        matrix = empty((part.shape[:3].numel(), part.shape[3]), dtype=packed.dtype)
        matrix.view(part.shape).copy_(part)
        matrices.append(matrix)
    return matrices
