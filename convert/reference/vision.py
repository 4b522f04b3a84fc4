"""The vision part: InternViT, pixel shuffle and projector, tiles (N, 3, S, S) -> image features (N, P, D).

Module names are the published tensor names, so weights load without a rename. Knows nothing of prompts or language models.
Ported rules: OpenGVLab/InternVL@2410d1d internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py (transformer) and
modeling_internvl_chat.py (pixel shuffle, projector). Not ported: dropout and drop path, which are for training.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.folder.config import InternVLConfig, VisionConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def _norm(v: VisionConfig) -> nn.Module:
    return {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}[v.norm_type](v.hidden_size, eps=v.layer_norm_eps)


class Embeddings(nn.Module):
    """Tiles -> patch vectors with the class token first and positions added."""

    def __init__(self, v: VisionConfig, grid_side: int):
        super().__init__()
        self.table_side, self.grid_side = v.image_size // v.patch_size, grid_side
        self.class_embedding = nn.Parameter(torch.randn(1, 1, v.hidden_size))
        self.patch_embedding = nn.Conv2d(3, v.hidden_size, v.patch_size, v.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, self.table_side**2 + 1, v.hidden_size))

    def fit_position_table(self) -> None:
        """Resize the stored position table to the tile's grid, once; the class row stays (same file, _get_pos_embed)."""
        if self.grid_side == self.table_side:
            return
        class_row, table = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        square = rearrange(table.float(), "one (h w) c -> one c h w", h=self.table_side)
        square = F.interpolate(square, size=(self.grid_side, self.grid_side), mode="bicubic", align_corners=False)
        table = rearrange(square, "one c h w -> one (h w) c").to(class_row.dtype)
        self.position_embedding = nn.Parameter(torch.cat([class_row, table], dim=1))
        self.table_side = self.grid_side

    def forward(self, tiles: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, 1 + side * side, C)
        patches = rearrange(self.patch_embedding(tiles), "n c h w -> n (h w) c")
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding


class Attention(nn.Module):
    def __init__(self, v: VisionConfig):
        super().__init__()
        self.heads = v.num_attention_heads
        self.qkv = nn.Linear(v.hidden_size, 3 * v.hidden_size, bias=v.qkv_bias)
        self.proj = nn.Linear(v.hidden_size, v.hidden_size)
        self.normalise = v.qk_normalization
        if self.normalise:  # over all heads together, before the split
            self.q_norm = RMSNorm(v.hidden_size, v.layer_norm_eps)
            self.k_norm = RMSNorm(v.hidden_size, v.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, value = self.qkv(x).chunk(3, dim=-1)
        if self.normalise:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, value = (rearrange(t, "n t (heads d) -> n heads t d", heads=self.heads) for t in (q, k, value))
        mixed = F.scaled_dot_product_attention(q, k, value)
        return self.proj(rearrange(mixed, "n heads t d -> n t (heads d)"))


class FeedForward(nn.Module):
    def __init__(self, v: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(v.hidden_size, v.intermediate_size)
        self.fc2 = nn.Linear(v.intermediate_size, v.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, v: VisionConfig):
        super().__init__()
        self.attn, self.mlp = Attention(v), FeedForward(v)
        self.norm1, self.norm2 = _norm(v), _norm(v)
        self.ls1 = nn.Parameter(torch.ones(v.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(v.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, v: VisionConfig, grid_side: int):
        super().__init__()
        self.embeddings = Embeddings(v, grid_side)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(v) for _ in range(v.num_hidden_layers))

    def forward(self, tiles: Tensor, layers: int) -> Tensor:
        """Return the hidden state (N, 1 + side * side, C) after the first `layers` layers; there is no final norm."""
        hidden = self.embeddings(tiles)
        for layer in self.encoder.layers[:layers]:  # type: ignore[index]
            hidden = layer(hidden)
        return hidden

    def hidden_states(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """The embeddings and the output of each layer, (N, 1 + side * side, C) each."""
        states = [self.embeddings(tiles)]
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            states.append(layer(states[-1]))
        return tuple(states)


def pixel_shuffle(x: Tensor, side: int, factor: int, version: str) -> Tensor:
    """Join each factor x factor square of patches to one vector: (N, side * side, C) -> (N, P, factor * factor * C).

    v2 lists the squares row by row; v1 (InternVL-Chat-V1-2) column by column.
    """
    order = {"v2": "(h w)", "v1": "(w h)"}[version]
    return rearrange(x, f"n (h fh w fw) c -> n {order} (fh fw c)", h=side // factor, fh=factor, fw=factor, w=side // factor)


class VisionPart(nn.Module):
    """The traced part: tiles (N, 3, S, S), normalised -> image features (N, P, D)."""

    def __init__(self, config: InternVLConfig):
        super().__init__()
        v, factor = config.vision, config.shuffle_factor
        self.config = config
        self.vision_model = VisionTransformer(v, config.grid_side)
        joined = v.hidden_size * factor**2
        width = config.language["hidden_size"]
        self.mlp1 = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))
        # select_layer indexes the hidden states: the embeddings first, then one per layer
        states = v.num_hidden_layers + 1
        self.layers_run = config.select_layer % states

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Tiles (N, 3, S, S) -> patches (N, side * side, C), the class token dropped."""
        return self.vision_model(pixel_values, self.layers_run)[:, 1:]

    def context(self, patches: Tensor) -> Tensor:
        """Patches (N, side * side, C) -> image features (N, P, D)."""
        c = self.config
        return self.mlp1(pixel_shuffle(patches, c.grid_side, c.shuffle_factor, c.ps_version))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.context(self.patches(pixel_values))
