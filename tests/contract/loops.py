"""One model, and the ways in which loops take a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from tests.contract.others import OtherSAM, Twice
from tests.optim.naive import DenseOperator, Quartic


def make(seed: int = 0) -> tuple[Quartic, so.DominantSubspace]:
    model = Quartic(seed=seed)
    return model, so.DominantSubspace(DenseOperator(model), 2, refresh=1, tol=1e-12)


def sgd(model: nn.Module) -> Optimizer:
    Twice(model.parameters(), lr=0.1)  # so that torch has wrapped the step of SGD too
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = model()
        loss.backward()
        return loss

    return closure


def by_gradients(model: nn.Module, optimizer: Any) -> None:
    closure_of(model)()
    optimizer.step()


def by_closure(model: nn.Module, optimizer: Any) -> None:
    optimizer.step(closure_of(model))


def in_two_calls(model: nn.Module, optimizer: Any) -> None:
    closure_of(model)()
    optimizer.first_step()
    closure_of(model)()
    optimizer.second_step()


def other_sam(model: nn.Module) -> Optimizer:
    return OtherSAM(model.parameters(), torch.optim.SGD, lr=0.05)
