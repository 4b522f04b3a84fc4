"""The router part of InternVL3.5-Flash: patches of a tile -> few image features, and how likely they suffice.

Module names are the published tensor names. Knows nothing of thresholds, which depend on all tiles of a prompt.
Ported rules: modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash, and InternLM/lmdeploy@1263d5c
lmdeploy/pytorch/models/internvl.py. Not ported: attn3, attn4, norm3, norm4, which are published and unused.
"""

from __future__ import annotations

import re

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from convert.reference.vision import pixel_shuffle
from runtime.folder.config import InternVLConfig

TENSORS = re.compile(r"^(mlp2|pooling_before_gating|gating)\.")  # names of this part's tensors
UNUSED = re.compile(r"^pooling_before_gating\.(attn|norm)[34]\.")
KEPT_EXACT = r".*(pooling_before_gating|gating).*"  # nodes of the router itself, which is never compressed
HEADS = 16
BLOCKS = ("block1", "block2", "block3", "block4")
ROUNDS = 3  # of the second attention, whose keys and values are the same each time


class CrossAttention(nn.Module):
    """torch.nn.MultiheadAttention over its tensors: one query (N, 1, C) attends to the patches (N, side * side, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def keys_and_values(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        width = patches.shape[-1]
        both = F.linear(patches, self.in_proj_weight[width:], self.in_proj_bias[width:])
        keys, values = (rearrange(t, "n t (heads d) -> n heads t d", heads=HEADS) for t in both.chunk(2, dim=-1))
        return keys, values

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width = query.shape[-1]
        asked = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
        asked = rearrange(asked, "n t (heads d) -> n heads t d", heads=HEADS)
        mixed = F.scaled_dot_product_attention(asked, keys, values)
        return self.out_proj(rearrange(mixed, "n heads t d -> n t (heads d)"))


class Pooling(nn.Module):
    """Patches (N, side * side, C) -> one vector per tile (N, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.query_token = nn.Parameter(torch.zeros(1, width))
        self.attn1, self.attn2 = CrossAttention(width), CrossAttention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        query = self.query_token.expand(patches.shape[0], 1, -1)
        query = self.norm1(self.attn1(query, *self.attn1.keys_and_values(patches)))
        keys, values = self.attn2.keys_and_values(patches)
        for _ in range(ROUNDS):
            query = self.norm2(self.attn2(query, keys, values))
        return query[:, 0]


class Gating(nn.Module):
    """One vector per tile (N, C) -> probabilities (N, 2): few tokens suffice, all are needed."""

    def __init__(self, width: int):
        super().__init__()
        for name in BLOCKS:  # dropout is for training
            hidden = 4 * width
            block = (
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.Identity(),
                nn.Linear(hidden, width),
                nn.Identity(),
                nn.LayerNorm(width),
            )
            setattr(self, name, nn.Sequential(*block))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, pooled: Tensor) -> Tensor:
        for name in BLOCKS:
            pooled = pooled + getattr(self, name)(pooled)
        return self.gate(pooled).softmax(-1)


class RouterPart(nn.Module):
    """The traced part: patches (N, side * side, C) -> few image features (N, P', D) and probabilities (N, 2)."""

    def __init__(self, config: InternVLConfig):
        super().__init__()
        self.config = config
        c, width = config.vision.hidden_size, config.language["hidden_size"]
        joined = c * config.few_shuffle_factor**2
        self.pooling_before_gating, self.gating = Pooling(c), Gating(c)
        self.mlp2 = nn.Sequential(
            *(nn.LayerNorm(joined), nn.Linear(joined, 2 * width), nn.GELU(), nn.Identity()),
            *(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Identity(), nn.Linear(2 * width, width)),
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        few = self.mlp2(pixel_shuffle(patches, c.grid_side, c.few_shuffle_factor, c.ps_version))
        return few, self.gating(self.pooling_before_gating(patches))
