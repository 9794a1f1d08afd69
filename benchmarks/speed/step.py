"""What one step of ``DomSGD`` costs while its basis serves, beside one of ``torch.optim.SGD``."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.speed.timing import in_turn, spread
from subspace_optim.curvature import CurvatureOperator, OperatorStats, ParameterSpace

BAR: Final = 2.5
"""Reads of the basis, in units of two, that a step may cost more than SGD's."""
_LAYER: Final = (512, 512, 3, 3)


class _Outliers(CurvatureOperator):
    """A diagonal matrix with k large entries: its basis costs nothing to speak of."""

    def __init__(self, model: nn.Module, k: int) -> None:
        self.parameters = ParameterSpace(model)
        self.stats = OperatorStats()
        self._diagonal = torch.zeros(self.size, device=self.device)
        self._diagonal[:k] = torch.arange(2 * k, k, -1, device=self.device)

    def matvec(self, v: Tensor) -> Tensor:
        return v * self._diagonal

    def matmat(self, vectors: Tensor) -> Tensor:
        self.stats.products += len(vectors)
        return vectors * self._diagonal

    def gradient(self) -> Tensor:
        return torch.zeros_like(self._diagonal)

    def loss(self) -> float:
        return 0.0


def _model(size: int, device: str) -> nn.ParameterList:
    """Parameters in layers of ResNet-18's largest shape, and one for the rest, with gradients."""
    layer = torch.Size(_LAYER).numel()
    shapes = [torch.Size(_LAYER)] * (size // layer) + [torch.Size([size % layer])]
    generator = torch.Generator(device=device).manual_seed(0)
    model = nn.ParameterList()
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator, device=device))
        p.grad = torch.randn(shape, generator=generator, device=device)
        model.append(p)
    return model


def measure(size: int, k: int, rounds: int, device: str) -> dict[str, Any]:
    """Times steps in turn, and a sum over the basis: the machine's read bandwidth.

    ``DomSGD`` looks whether the parameters changed, gathers the update, projects it and adds it.
    With ``refresh="auto"`` it also measures how far they have moved, in the basis and outside.

    Args:
        size: P.
        k: dimension of the subspace.
        rounds: repetitions.
        device: where to compute.

    Returns:
        Raw seconds, and what a step costs more than SGD's, over the time to read the basis twice.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    lr = 1e-9  # the parameters change, and hardly move
    optimizers["SGD"] = torch.optim.SGD(_model(size, device).parameters(), lr=lr)
    for refresh in (10**9, "auto"):
        model = _model(size, device)
        subspace = so.DominantSubspace(_Outliers(model, k), k, refresh=refresh)
        vectors = subspace.update().vectors
        name = "DomSGD" if refresh != "auto" else "DomSGD, refresh auto"
        optimizers[name] = so.DomSGD(model.parameters(), lr=lr, subspace=subspace)
    seconds = in_turn(
        {"read of the basis": vectors.sum} | {n: o.step for n, o in optimizers.items()}, rounds
    )
    reads = {
        name: [
            (ours - sgd) / (2 * read)
            for ours, sgd, read in zip(
                seconds[name], seconds["SGD"], seconds["read of the basis"], strict=True
            )
        ]
        for name in seconds
        if name.startswith("DomSGD")
    }
    return {
        "size": size,
        "k": k,
        "seconds": seconds,
        "double_reads": reads,
        "bar": BAR,
        "met": {"DomSGD": spread(reads["DomSGD"]).median <= BAR},
    }
