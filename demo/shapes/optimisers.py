"""How weights move: Muon for the matrices inside the transformers, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices: K. Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (2024), with the step scaled to the size of Adam's: J. Liu et al., "Muon is scalable for LLM training" (2025).

    torch's own computes in bfloat16, which takes more time on a CPU than the rest of the step.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                moved = []
                for parameter in parameters:
                    memory = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    memory.lerp_(parameter.grad, 1 - group["momentum"])
                    moved.append(parameter.grad.lerp(memory, group["momentum"]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, orthogonal(torch.stack(moved)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """The nearest (half-)orthogonal matrices to (B, rows, columns), roughly, by Newton-Schulz iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimisers(student: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for the rest."""
    inner, rest = [], []
    for name, parameter in student.named_parameters():
        (inner if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        Muon(inner, lr=rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
