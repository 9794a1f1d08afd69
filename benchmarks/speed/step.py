"""What a step costs while its basis serves, beside one of ``torch.optim.SGD``.

Of a few large tensors, by the time to read the basis; and of hundreds of small ones.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.speed.timing import in_turn, processor_timed, ratios, spread
from subspace_optim.curvature import CurvatureOperator, OperatorStats, ParameterSpace

BAR: Final = 2.5
"""Reads of the basis, in units of two, that a step may cost more than SGD's."""
SMALL_BAR: Final = 1.5
"""Steps of SGD that one with many small tensors may cost."""
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


def measure_small(layers: int, rounds: int) -> dict[str, Any]:
    """Times steps of a network of many small layers, whose Hessian has a kept basis.

    ``BulkSGD`` looks at each step for all that the loss depends on: at every module and tensor.

    Args:
        layers: of width 16, each with a matrix and a bias.
        rounds: repetitions.

    Returns:
        Raw seconds of the processor, on the CPU, and steps over SGD's.
    """
    inputs, targets = torch.randn(32, 16), torch.arange(32) % 3
    loss = nn.CrossEntropyLoss()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    lr = 1e-9  # the parameters change, and hardly move
    for name in ("SGD", "BulkSGD", "BulkSGD, refresh auto"):
        torch.manual_seed(0)
        hidden = (nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(layers - 1))
        model = nn.Sequential(*hidden, nn.Linear(16, 3))
        loss(model(inputs), targets).backward()
        if name == "SGD":
            optimizers[name] = torch.optim.SGD(model.parameters(), lr=lr)
            continue
        hessian = so.HessianOperator(model, loss, (inputs, targets))
        kept = so.DominantSubspace(hessian, 2, refresh="auto" if "auto" in name else 10**9)
        kept.update()
        optimizers[name] = so.BulkSGD(model.parameters(), lr=lr, subspace=kept)
    seconds = in_turn({n: o.step for n, o in optimizers.items()}, rounds, processor_timed)
    times = {n: ratios(found, seconds["SGD"]) for n, found in seconds.items() if n != "SGD"}
    return {
        "tensors": 2 * layers,
        "seconds": seconds,
        "times": times,
        "bar": SMALL_BAR,
        "met": {"BulkSGD": spread(times["BulkSGD"]).median <= SMALL_BAR},
    }
