"""The experts of a layer: many feed-forward networks, of which each token uses a few, as in Qwen3-MoE and GPT-OSS.

transformers joins the experts of a layer in its own tensor layout. Here each matrix has its outputs as rows, and gates and ups of
Qwen3-MoE stay separate, as OpenVINO takes them; matrices may stay mapped one by one from the checkpoint, so that comparing with a
large model takes little memory. Arithmetic: huggingface/transformers@v5.5.4 modeling_qwen3_moe.py, modeling_gpt_oss.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from convert.four_bits import Matrices

ALPHA, LIMIT = 1.702, 7.0  # of GPT-OSS


class Experts(nn.Module):
    """Tokens (T, D), the numbers of their experts (T, K) and their shares (T, K) -> (T, D)."""

    def __init__(self, count: int, **shapes: tuple[int, ...]):
        super().__init__()
        self.count = count
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(count, *shape)))

    def leave(self, name: str, matrices: Matrices) -> None:
        """Use matrices one by one as they are stored, in place of a parameter."""
        delattr(self, name)
        setattr(self, name, matrices)

    def one(self, number: int, x: Tensor) -> Tensor:
        """Tokens (T, D) through one expert."""
        raise NotImplementedError

    def each(self, x: Tensor) -> Tensor:
        """Tokens of every expert (E, T, D) through their experts."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, router_indices: Tensor | None = None, routing_weights: Tensor | None = None) -> Tensor:
        assert router_indices is not None
        assert routing_weights is not None
        if torch.jit.is_tracing():
            return self.all(hidden_states, router_indices, routing_weights)
        out = torch.zeros_like(hidden_states)
        for number in router_indices.unique().tolist():
            rows, places = torch.where(router_indices == number)
            found = self.one(number, hidden_states[rows]) * routing_weights[rows, places, None]
            out.index_add_(0, rows, found.to(out.dtype))
        return out

    def all(self, tokens: Tensor, numbers: Tensor, shares: Tensor) -> Tensor:
        """The same sum over all experts (T, 1, D), in the form in which OpenVINO recognises that most shares are zero.

        Form: huggingface/optimum-intel@e1de5bee optimum/exporters/openvino/model_patcher.py batched_mm_experts_forward_patched.
        """
        count, width = tokens.shape
        dense = torch.zeros(count, self.count, dtype=tokens.dtype).scatter_(1, numbers, shares)
        found = self.each(tokens.repeat(self.count, 1).view(self.count, -1, width))
        found = found.view(self.count, count, -1, width) * dense.transpose(0, 1).view(self.count, count, -1)[..., None]
        return found.sum(dim=0)


class QwenExperts(Experts):
    """Three matrices per expert: down(silu(gate(x)) * up(x))."""

    gate_proj: Tensor  # (E, I, D)
    up_proj: Tensor
    down_proj: Tensor  # (E, D, I)

    def __init__(self, c: PretrainedConfig):
        width, inner = c.hidden_size, c.moe_intermediate_size
        super().__init__(c.num_experts, gate_proj=(inner, width), up_proj=(inner, width), down_proj=(width, inner))

    def one(self, number: int, x: Tensor) -> Tensor:
        gate, up, down = (matrices[number].to(x.dtype) for matrices in (self.gate_proj, self.up_proj, self.down_proj))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def each(self, x: Tensor) -> Tensor:
        gate, up, down = (matrices.transpose(1, 2) for matrices in (self.gate_proj, self.up_proj, self.down_proj))
        return torch.bmm(F.silu(torch.bmm(x, gate)) * torch.bmm(x, up), down)


class GptOssExperts(Experts):
    """Two matrices with biases per expert; outputs of the first alternate between gates and ups."""

    gate_up_proj: Tensor  # (E, 2I, D)
    gate_up_proj_bias: Tensor
    down_proj: Tensor  # (E, D, I)
    down_proj_bias: Tensor

    def __init__(self, c: PretrainedConfig):
        width, inner = c.hidden_size, c.intermediate_size
        biases = {"gate_up_proj_bias": (2 * inner,), "down_proj_bias": (width,)}
        super().__init__(c.num_local_experts, gate_up_proj=(2 * inner, width), down_proj=(width, inner), **biases)

    def one(self, number: int, x: Tensor) -> Tensor:
        gates_and_ups = F.linear(x, self.gate_up_proj[number].to(x.dtype), self.gate_up_proj_bias[number].to(x.dtype))
        return F.linear(self._gated(gates_and_ups), self.down_proj[number].to(x.dtype), self.down_proj_bias[number].to(x.dtype))

    def each(self, x: Tensor) -> Tensor:
        gates_and_ups = torch.bmm(x, self.gate_up_proj.transpose(1, 2)) + self.gate_up_proj_bias[..., None, :]
        return torch.bmm(self._gated(gates_and_ups), self.down_proj.transpose(1, 2)) + self.down_proj_bias[..., None, :]

    @staticmethod
    def _gated(gates_and_ups: Tensor) -> Tensor:
        gate, up = gates_and_ups[..., ::2].clamp(min=None, max=LIMIT), gates_and_ups[..., 1::2].clamp(min=-LIMIT, max=LIMIT)
        return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))
