"""The experts of a Qwen3-MoE layer: a few feed-forward networks a token, of many.

transformers joins the experts of a layer, gates above ups, in one tensor. Here gates, ups and downs stay apart, as OpenVINO takes
them apart again, and may stay where they lie in the checkpoint, one by one, so that a 30B model is compared with in little memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MATRICES = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """Tokens (T, D), the numbers of their experts (T, K) and their shares (T, K) -> (T, D)."""

    def __init__(self, count: int, width: int, inner: int):
        super().__init__()
        self.count = count
        for name, shape in zip(MATRICES, ((inner, width), (inner, width), (width, inner)), strict=True):
            setattr(self, name, nn.Parameter(torch.empty(count, *shape)))

    def leave(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Take matrices one by one, as they lie; they are no parameters then."""
        delattr(self, name)
        setattr(self, name, [*matrices])

    def forward(self, tokens: Tensor, numbers: Tensor, shares: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            return self._all(tokens, numbers, shares)
        out = torch.zeros_like(tokens)
        for number in numbers.unique().tolist():
            rows, places = torch.where(numbers == number)
            gate, up, down = (getattr(self, name)[number].to(tokens.dtype) for name in MATRICES)
            mixed = F.silu(F.linear(tokens[rows], gate)) * F.linear(tokens[rows], up)
            out.index_add_(0, rows, (F.linear(mixed, down) * shares[rows, places, None]).to(out.dtype))
        return out

    def _all(self, tokens: Tensor, numbers: Tensor, shares: Tensor) -> Tensor:
        """The same sum over all experts, in the form in which OpenVINO sees that most shares are zero.

        Form: huggingface/optimum-intel@e1de5bee optimum/exporters/openvino/model_patcher.py batched_mm_experts_forward_patched.
        """
        count, width = tokens.shape
        dense = torch.zeros(count, self.count, dtype=tokens.dtype).scatter_(1, numbers, shares)
        each = tokens.repeat(self.count, 1).view(self.count, -1, width)  # (E, T, D)
        gate, up, down = (getattr(self, name).transpose(1, 2) for name in MATRICES)
        found = torch.bmm(F.silu(torch.bmm(each, gate)) * torch.bmm(each, up), down)
        found = found.view(self.count, count, -1, width) * dense.transpose(0, 1).view(self.count, count, -1)[..., None]
        return found.sum(dim=0)
