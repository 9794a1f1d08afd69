"""What the tests of the current batch share: a model that is called, its calls, a step's end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.curvature.forwards import Call
from tests.dense import probes

KINDS = [so.HessianOperator, so.GaussNewtonOperator, so.FiniteDifferenceHessian]


def assert_same(operator: so.CurvatureOperator, other: so.CurvatureOperator) -> None:
    """The same loss, gradient and products, to the last bit: the same batches in one order."""
    v = probes(other.size, other.dtype)
    assert operator.loss() == other.loss()
    assert torch.equal(operator.gradient(), other.gradient())
    assert torch.equal(operator.matmat(v), other.matmat(v))
    assert operator.stats.examples == other.stats.examples


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


class Named(nn.Module):
    """Takes an input by position, another by name, and a flag; its loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, *, scale: Tensor, square: bool = False) -> Tensor:
        found = self.head(torch.tanh(self.body(x)) * scale)
        return found.square().mean() if square else found.mean()


def of_call(model: Callable[..., Tensor], call: Call) -> tuple[Tensor, int]:
    return call(model), len(call.args[0])


def named(seed: int = 0) -> Named:
    torch.manual_seed(seed)
    return Named().double()


def inputs(n: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    scale = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return x, {"scale": scale, "square": seed % 2 == 0}


def end_step(operator: Any) -> None:
    """A step at the end of which the operator is told of it, as a monitor does."""
    optimizer = torch.optim.SGD(operator.parameters.tensors, lr=0.0)
    optimizer.register_step_post_hook(lambda *_: operator.step_ended())
    optimizer.step()
