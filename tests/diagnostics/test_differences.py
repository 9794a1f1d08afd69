"""Curvature by losses alone: how far differences reach, against products and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import measures
from subspace_optim.diagnostics.directional_sharpness import differences
from subspace_optim.diagnostics.measures.base import Measure, Row
from subspace_optim.diagnostics.measures.step import Step

Build = Callable[[nn.Module], torch.optim.Optimizer]


class Dense(Measure):
    """The same by the dense Hessian of a plain function, in float64."""

    columns = ("dense_update", "dense_gradient", "dense_change")

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self.loss = loss

    def after(self, step: Step) -> Row:
        theta, u = step.theta.double(), step.update.double()
        with torch.enable_grad():
            hessian = torch.func.hessian(self.loss)(theta)
            g = torch.func.grad(self.loss)(theta)
        return {
            "dense_update": u @ hessian @ u / (u @ u),
            "dense_gradient": g @ hessian @ g / (g @ g),
            "dense_change": g @ u + u @ hessian @ u / 2,
        }


def plain(x: Tensor, y: Tensor, activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss of a network of widths 4, 6 and 3 as a function of its flat parameters."""

    def loss(theta: Tensor) -> Tensor:
        w, b, v, c = theta.split([24, 6, 18, 3])
        hidden = activation(x.double() @ w.view(6, 4).T + b)
        return nn.functional.cross_entropy(hidden @ v.view(3, 6).T + c, y)

    return loss


OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.03),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [(nn.Tanh, torch.float64), (nn.ReLU, torch.float64), (nn.Tanh, torch.float32)],
)
def test_along_a_training_they_are_those_of_the_dense_hessian(
    name: str, activation: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(30, 4, dtype=dtype), torch.randint(3, (30,))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model)
    operator = so.HessianOperator(model, loss_fn, (x, y), verify=False)
    by_losses = measures.directional_sharpness(by="losses")
    monitor = so.Monitor(
        optimizer, operator, measures=[by_losses, Dense(plain(x, y, activation()))]
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
    history = monitor.history
    # Rounding of a difference that is 64 times its bound, or 8 in a row that follows another scale.
    pairs = (("update_sharpness", "dense_update"), ("gradient_sharpness", "dense_gradient"))
    for found, dense in pairs:
        scale = max(map(abs, history["dense_gradient"]))
        rows = list(zip(history[found], history[dense], strict=True))
        assert all(abs(a - b) <= 0.15 * abs(b) + 0.01 * scale for a, b in rows)
        assert median(abs(a / b - 1) for a, b in rows) <= 1 / 64
    for a, b in zip(history["predicted_change"], history["dense_change"], strict=True):
        assert a == pytest.approx(b, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("reach", [1.0, 1e-2, 1e-5])
def test_a_reach_that_is_far_too_long_is_mended_at_once(reach: float) -> None:
    """L(c) = −c + c² / 2 + c⁴: differences of length 1 tell three times the curvature."""
    asked: list[float] = []

    def rise(c: float) -> float:
        asked.append(c)
        return -c + c * c / 2 + c**4

    line = differences(rise, reach, noise=1e-15)
    assert line.curvature == pytest.approx(1.0, rel=1 / 16)
    assert line.slope == pytest.approx(-1.0, rel=1e-6)
    assert len(asked) <= 4
    # The second difference is 64 times the rounding there: it need be no longer.
    assert line.reach == pytest.approx(math.sqrt(64e-15), rel=0.5)


def test_it_does_not_reach_beyond_a_quarter_of_the_crossing() -> None:
    def rise(c: float) -> float:
        return -0.01 * c + c * c / 2  # as high again at 0.02

    line = differences(rise, 0.004, noise=1e-6)
    assert line.reach == pytest.approx(0.005)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.layer(x) * self.gate
        return gated


def test_a_loss_that_was_flat_for_long_is_measured_again_once_it_is_not() -> None:
    model = Gated()
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = so.Monitor(
        optimizer,
        so.HessianOperator(model, loss_fn, (x, y), verify=False),
        measures=[
            measures.directional_sharpness(by="losses"),
            Dense(lambda theta: flat_loss(theta, x, y)),
        ],
    )
    for step in range(60):
        if step == 50:
            model.gate.fill_(1.0)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    assert all(map(math.isnan, monitor.history["update_sharpness"][:50]))
    for found, dense in (
        ("update_sharpness", "dense_update"),
        ("gradient_sharpness", "dense_gradient"),
    ):
        assert monitor.history[found][56:] == pytest.approx(monitor.history[dense][56:], rel=0.05)


def flat_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w, b = theta.split([12, 3])
    return nn.functional.cross_entropy(x.double() @ w.view(3, 4).T + b, y)
