"""Trainings of a small network by any optimizer, and what a row must tell of their steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import measures
from tests.optim.naive import Landscape, flat, landscape

STABILITY = [
    "step",
    "update_sharpness",
    "gradient_sharpness",
    "predicted_change",
    "actual_change",
    "critical_sharpness",
    "critical_multiple",
    "critical_threshold",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "gradients",
    "products",
    "forwards",
]
Optimizers = list[torch.optim.Optimizer]


class Setting:
    """A small network in float64, its operator, and the same loss as a plain function."""

    def __init__(self, seed: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        for p in self.model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=random))
        self.x = torch.randn(12, 3, generator=random).double()
        self.y = torch.randn(12, 2, generator=random).double()
        self.operator = self.of(self.x, self.y)

    def of(self, x: Tensor, y: Tensor, **options: Any) -> so.HessianOperator:
        return so.HessianOperator(
            self.model, nn.functional.mse_loss, (x, y), verify=False, **options
        )

    def dense(self, x: Tensor, y: Tensor) -> Landscape:
        return landscape(self.model, nn.functional.mse_loss, x, y)

    def step(self, optimizers: Optimizers, loss_fn: Any = nn.functional.mse_loss) -> None:
        def closure() -> Tensor:
            for each in optimizers:
                each.zero_grad()
            loss = loss_fn(self.model(self.x), self.y)
            loss.backward()
            return loss

        if isinstance(optimizers[0], so.SAM | torch.optim.LBFGS):
            optimizers[0].step(closure)
            return
        closure()
        for each in optimizers:
            each.step()

    @property
    def theta(self) -> Tensor:
        return flat(self.model.parameters())


def one(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    return lambda s: [kind(s.model.parameters(), **options)]


def muon_and_adamw(s: Setting) -> Optimizers:
    matrices = [p for p in s.model.parameters() if p.dim() == 2]
    others = [p for p in s.model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02)]


def projected(kind: Any) -> Any:
    def build(s: Setting) -> Optimizers:
        subspace = so.DominantSubspace(s.operator, 2, refresh=1)
        return [kind(s.model.parameters(), lr=0.05, subspace=subspace)]

    return build


TRAINED: dict[str, Callable[[Setting], Optimizers]] = {
    "SGD": one(torch.optim.SGD, lr=0.1),
    "momentum": one(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": one(torch.optim.Adam, lr=0.02),
    "AdamW foreach": one(torch.optim.AdamW, lr=0.02, foreach=True),
    "AdamW fused": one(torch.optim.AdamW, lr=0.02, fused=True),
    "Muon and AdamW": muon_and_adamw,
    "SAM": one(so.SAM, lr=0.05, rho=0.05),
    "DomSGD": projected(so.DomSGD),
    "BulkSGD": projected(so.BulkSGD),
    "LBFGS": one(torch.optim.LBFGS, lr=0.1, max_iter=3),
}


def crossing(dense: Landscape, theta: Tensor, u: Tensor) -> float:
    """The first point of a grid of half a percent at which the loss is above where it was."""
    grid = 0.02 * 1.005 ** torch.arange(1709, dtype=torch.float64)  # up to 100
    above = torch.func.vmap(dense.loss)(theta + grid[:, None] * u) > dense.loss(theta)
    return float(grid[above][0]) if above.any() else math.nan


def expected_row(dense: Landscape, theta: Tensor, following: Tensor) -> dict[str, float]:
    g, H, u = dense.gradient(theta), dense.hessian(theta), following - theta
    return {
        "update_sharpness": float(u @ H @ u / (u @ u)),
        "gradient_sharpness": float(g @ H @ g / (g @ g)),
        "predicted_change": float(g @ u + u @ H @ u / 2),
        "actual_change": float(dense.loss(following) - dense.loss(theta)),
    }


def by_products() -> list[so.measures.Measure]:
    """The columns of stability(), exactly."""
    return [measures.directional_sharpness(), measures.critical_sharpness(), measures.thresholds()]
