"""A small problem whose dense Hessian is at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.speed.problems import Problem


def small_problem(*layers: nn.Module, y: Tensor | None = None, lr: float = 0.01) -> Problem:
    """A network on 30 examples of six numbers in three classes, all of it drawn."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(30, 6, generator=generator)
    y = torch.randint(3, (30,), generator=generator) if y is None else y
    made = Problem("small", model, x, y, 3, lr)
    made.states[0] = made.theta()
    return made
