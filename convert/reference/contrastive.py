"""InternVL-C and -G: InternViT with attention pooling, and QLLaMA, whose queries and texts are pooled to embeddings.

Module names are the published tensor names. Each class whose name ends in Part is traced as one part of the model folder. Knows
nothing of tokens or files.
Ported rules: OpenGVLab/InternVL@2410d1d clip_benchmark/clip_benchmark/models/internvl_huggingface/modeling_internvl.py (pooling,
heads) and modeling_qllama.py (decoder). Differences: queries may attend to a picture at any position, the KV cache is an argument
and a result, and a text's embedding is that of the last column, so shorter texts of a batch are padded on the left.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from convert.reference.vision import RMSNorm, VisionTransformer
from runtime.folder.contrastive import ContrastiveConfig, FeaturesConfig, QLlamaConfig

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, heads, past, head size) of each layer


class PoolAttention(nn.Module):
    """Attention of one query per picture, and an output projection."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # (B, 1, C), (B, T, C) -> (B, 1, E)
        projected = (self.q(query) + self.q_bias, self.k(keys) + self.k_bias, self.v(values) + self.v_bias)
        q, k, v = (rearrange(t, "b t (heads d) -> b heads t d", heads=self.heads) for t in projected)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads t d -> b t (heads d)"))


class AttentionPool(nn.Module):
    """Token vectors (B, T, C) -> one embedding (B, E); the query is the mean of all tokens."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attn = PoolAttention(width, heads, out)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)


class SelfAttention(nn.Module):
    """Llama's attention, with rotary positions."""

    def __init__(self, q: QLlamaConfig):
        super().__init__()
        self.heads = q.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(q.hidden_size, q.hidden_size, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, D), mask (B, 1, T, past + T) added to scores -> (B, T, D), and all keys and values."""
        q, k, v = (
            rearrange(proj(x), "b t (heads d) -> b heads t d", heads=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = torch.cat([past[0], _turned(k, *turn)], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(_turned(q, *turn), k, v, attn_mask=mask)
        return self.o_proj(rearrange(mixed, "b heads t d -> b t (heads d)")), (k, v)


class CrossAttention(nn.Module):
    """Queries attend to all tokens of a picture, without positions and without a mask."""

    def __init__(self, q: QLlamaConfig, image_width: int):
        super().__init__()
        self.heads = q.num_attention_heads
        self.norm1, self.norm2 = RMSNorm(q.hidden_size, q.rms_norm_eps), RMSNorm(image_width, q.rms_norm_eps)
        self.q_proj, self.o_proj = (nn.Linear(q.hidden_size, q.hidden_size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(image_width, q.hidden_size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:  # (B, K, D), (B, N, C) -> (B, K, D)
        image = self.norm2(image)
        q, k, v = (
            rearrange(t, "b t (heads d) -> b heads t d", heads=self.heads)
            for t in (self.q_proj(self.norm1(x)), self.k_proj(image), self.v_proj(image))
        )
        # two products instead of one operation: both may be empty if there is no picture
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3), dim=-1)
        return self.o_proj(rearrange(weights @ v, "b heads t d -> b t (heads d)"))


class FeedForward(nn.Module):
    def __init__(self, q: QLlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(q.hidden_size, q.intermediate_size, bias=False)
        self.up_proj = nn.Linear(q.hidden_size, q.intermediate_size, bias=False)
        self.down_proj = nn.Linear(q.intermediate_size, q.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ContrastiveConfig, number: int):
        super().__init__()
        q = config.qllama
        self.self_attn, self.mlp = SelfAttention(q), FeedForward(q)
        self.cross_attn = None
        if number % config.cross_attention_frequency == 0:
            self.cross_attn = CrossAttention(q, config.vision.hidden_size)
        self.input_layernorm = RMSNorm(q.hidden_size, q.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(q.hidden_size, q.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        image: Tensor | None,
        looking: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, present = self.self_attn(self.input_layernorm(x), turn, mask, past)
        x = x + mixed
        if self.cross_attn is not None and image is not None:
            x = x.index_add(1, looking, self.cross_attn(x.index_select(1, looking), image).to(x.dtype))  # type: ignore[arg-type]
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Layers and final norm, under the published name `model`."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        q = config.qllama
        self.layers = nn.ModuleList(DecoderLayer(config, number) for number in range(q.num_hidden_layers))
        self.norm = RMSNorm(q.hidden_size, q.rms_norm_eps)


class QLlama(nn.Module):
    """Decoder and head, under the published name `qllama`."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.qllama.hidden_size, config.qllama.vocab_size, bias=False)


class QLlamaPart(nn.Module):
    """Embeddings of queries and tokens -> next-token logits, the text embedding of the last column, and hidden states."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.qllama = QLlama(config)
        self.text_projection = nn.Parameter(torch.zeros(config.qllama.hidden_size, config.embed_dim))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_bias: Tensor,
        position_ids: Tensor,
        vision_hidden_states: Tensor | None = None,
        looking: Tensor | None = None,
        past: Cache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Run the decoder.

        inputs_embeds (B, T, D); attention_bias (B, 1, T, past + T) is added to scores; position_ids (B, T); the columns `looking`
        (K) attend to vision_hidden_states (B, N, C). Returns logits (B, 1, V) after the last column, text embeddings (B, E) of the
        last column, hidden states (B, T, D) after the final norm, and the cache.
        """
        q, batch = self.config.qllama, inputs_embeds.shape[0]
        frequencies = q.rope_theta ** -(torch.arange(0, q.head_size, 2, device=inputs_embeds.device).float() / q.head_size)
        angles = position_ids[..., None].float() * frequencies  # (B, T, d / 2)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        turn = angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype)
        empty = inputs_embeds.new_zeros(batch, q.num_attention_heads, 0, q.head_size) if past is None else None
        x, presents = inputs_embeds, []
        for number, layer in enumerate(self.qllama.model.layers):
            known = (empty, empty) if past is None else past[number]
            x, present = layer(x, turn, attention_bias, known, vision_hidden_states, looking)
            presents.append(present)
        hidden = self.qllama.model.norm(x)
        last = hidden[:, -1]
        return self.qllama.lm_head(last[:, None]), last @ self.text_projection, hidden, presents


class VisionEmbeddingPart(nn.Module):
    """Pictures (B, 3, S, S), normalised -> InternViT's tokens (B, N, C), class token first, and InternVL-C's embedding (B, E)."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config.vision, config.grid_side)
        self.clip_projector = AttentionPool(config.vision.hidden_size, config.pool_heads, config.embed_dim)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vision_model(pixel_values, self.config.vision.num_hidden_layers)
        return tokens, self.clip_projector(tokens)


class QueryPoolPart(nn.Module):
    """Hidden states of the queries (B, Q, D) -> their summand of InternVL-G's embedding (B, E)."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.clip_projector2 = AttentionPool(config.qllama.hidden_size, config.pool_heads, config.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.clip_projector2(hidden_states)


class FeaturesPart(nn.Module):
    """InternViT alone: pictures (B, 3, S, S), normalised -> L + 1 hidden states (B, N, C), the embeddings first."""

    def __init__(self, config: FeaturesConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config.vision, config.grid_side)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.vision_model.hidden_states(pixel_values)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
