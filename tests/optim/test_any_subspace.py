"""`DomSGD` and `BulkSGD` on every kind of subspace, beside dense projectors onto the same span."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacrev

import subspace_optim as so
from tests.optim.naive import assert_near, flat, outputs
from tests.optim.naive import projector as dense_projector

K = 2


@pytest.fixture
def problem() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(20, 4).double(), torch.arange(20) % 3


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    operator = so.GaussNewtonOperator(model, F.cross_entropy, (x, y))

    def projector(theta: Tensor) -> Tensor:
        J = jacrev(lambda t: outputs(model, t, x).flatten())(theta)
        z = outputs(model, theta, x).detach()
        H = hessian(lambda f: F.cross_entropy(f.view(z.shape), y))(z.flatten())
        return dense_projector(J.T @ H @ J, K)

    return so.DominantSubspace(operator, K, refresh=1, tol=1e-12), projector


def class_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    subspace = so.ClassGradientSubspace(model, 3, decay=0.0, orthogonal=True)

    def projector(theta: Tensor) -> Tensor:
        subspace.observe(x, y)
        rows = [
            jacrev(lambda t, k=k: outputs(model, t, x[y == k])[:, k].mean())(theta)
            for k in range(3)
        ]
        Q = torch.linalg.qr(torch.stack(rows).T).Q
        return Q @ Q.T

    return subspace, projector


def fixed(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    size = sum(p.numel() for p in model.parameters())
    Q = torch.linalg.qr(torch.randn(size, K).double()).Q
    return so.FixedSubspace(model, Q.T), lambda _: Q @ Q.T


class Own:
    """A user's own: the direction of the parameters themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = so.ParameterSpace(model)

    def update(self) -> so.EigenBasis:
        theta = self.parameters.flatten(self.parameters.tensors)
        ones = torch.ones(1, dtype=theta.dtype)
        return so.EigenBasis(ones, theta[None] / theta.norm(), 0 * ones)


def own(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    return Own(model), lambda theta: torch.outer(theta, theta) / (theta @ theta)


@pytest.mark.parametrize("kind", [gauss_newton, class_gradients, fixed, own])
@pytest.mark.parametrize("part", ["dominant", "bulk"])
@pytest.mark.parametrize("projected", [False, True], ids=["of ours", "project_updates"])
def test_steps_are_projected_onto_the_span(
    problem: Any, kind: Any, part: str, projected: bool
) -> None:
    model, x, y = problem
    subspace, projector = kind(model, x, y)
    lr = 0.3
    optimizer: torch.optim.Optimizer
    if projected:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        so.project_updates(optimizer, subspace, part)  # type: ignore[arg-type]
    else:
        cls = {"dominant": so.DomSGD, "bulk": so.BulkSGD}[part]
        optimizer = cls(model.parameters(), lr=lr, subspace=subspace)
    for _ in range(5):
        theta = flat(model.parameters())
        P = projector(theta)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        g = flat(p.grad for p in model.parameters())
        step = P @ g if part == "dominant" else g - P @ g
        optimizer.step()
        assert_near(flat(model.parameters()), theta - lr * step, 1e-8)
        assert float((P @ g).norm()) > 1e-3 * float(g.norm()), "nothing was projected"
