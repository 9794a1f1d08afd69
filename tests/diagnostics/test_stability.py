"""Thresholds against the iterations that they are thresholds of."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import subspace_optim as so
from subspace_optim.diagnostics import (
    adam_stability_threshold,
    preconditioned_sharpness,
    sam_edge,
    stability_threshold,
)
from subspace_optim.diagnostics.stability import thresholds
from tests.dense import make_problem

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "dampening": 0.4},
    {"dampening": 0.4},  # without momentum torch ignores it
    {"weight_decay": 3.0},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 1.5},
]


def descend(curvatures: list[float], steps: int, make: Any) -> list[float]:
    """``|x|`` after the steps on ``λ x² / 2`` from 1, for each λ: SGD takes each by itself."""
    x = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
    slopes = torch.tensor(curvatures, dtype=torch.float64)
    optimizer = make([x])
    for _ in range(steps):
        x.grad = slopes * x.detach()
        optimizer.step()
    return x.detach().abs().tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lr", [0.03, 2.0])
def test_sgd_converges_below_its_threshold_and_diverges_above(
    lr: float, options: dict[str, Any]
) -> None:
    threshold = stability_threshold(lr, **options)
    decay = options.get("weight_decay", 0.0)

    below, above = descend(
        [factor * (threshold + decay) - decay for factor in (0.995, 1.005)],
        2000,
        lambda params: torch.optim.SGD(params, lr=lr, **options),
    )
    assert below < 0.1
    assert above > 10


def test_special_cases() -> None:
    assert stability_threshold(0.01) == pytest.approx(200.0)
    assert stability_threshold(0.01, momentum=0.9) == pytest.approx(380.0)
    assert stability_threshold(0.01, momentum=0.9, nesterov=True) == pytest.approx(380 / 2.8)
    assert adam_stability_threshold(1e-3) == pytest.approx(38_000)
    assert stability_threshold(0.0) == math.inf


@settings(max_examples=50)
@given(lr=st.floats(1e-4, 10), beta=st.floats(0, 0.99))
def test_adam_s_threshold_is_where_the_spectral_radius_is_1(lr: float, beta: float) -> None:
    """Of ``m' = β m + (1 − β) λ x``, ``x' = x − η m'``, as a matrix of (m, x)."""

    def radius(curvature: float) -> float:
        gain = (1 - beta) * curvature
        matrix = np.array([[beta, gain], [-lr * beta, 1 - lr * gain]])
        return float(np.abs(np.linalg.eigvals(matrix)).max())

    threshold = adam_stability_threshold(lr, beta)
    assert radius(0.999 * threshold) < 1
    assert radius(1.001 * threshold) > 1


@settings(max_examples=60)
@given(lr=st.floats(1e-3, 1), rho=st.floats(1e-3, 1), at=st.floats(1e-3, 10), down=st.booleans())
def test_sam_oscillates_at_its_edge(lr: float, rho: float, at: float, down: bool) -> None:
    """On ``λ x² / 2`` the step from x is to −x exactly where ``ηλ(1 + ρ/|x|) = 2``."""
    curvature = 2 / (lr * (1 + rho / at))
    edge = sam_edge(curvature * at, lr, rho)
    assert float(edge) == pytest.approx(curvature, rel=1e-9)
    x = nn.Parameter(torch.tensor(-at if down else at, dtype=torch.float64))
    sam = so.SAM([x], lr=lr, rho=rho)

    def closure() -> torch.Tensor:
        sam.zero_grad()
        loss = curvature * x.square() / 2
        loss.backward()
        return loss

    sam.step(closure)
    assert float(x.detach()) == pytest.approx(at if down else -at, rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sam_s_edge_tends_to_the_threshold_and_grows_with_the_gradient(
    options: dict[str, Any],
) -> None:
    threshold = stability_threshold(0.1, **options)
    for rho, norm in ((0.0, 1.0), (1e-14, 1.0), (0.1, 1e16)):
        assert float(sam_edge(norm, 0.1, rho, **options)) == pytest.approx(threshold)
    edges = [float(sam_edge(norm, 0.1, 0.5, **options)) for norm in (0.0, 1e-9, 1e-3, 1.0, 1e3)]
    assert edges[0] == 0
    assert edges == sorted(edges)
    assert edges[-1] < threshold
    assert float(sam_edge(2.0, 0.1, 0.5)) == pytest.approx(2 * (math.sqrt(1 + 20) - 1))


# Adam's own sharpness.


def adam_problem(kind: type[torch.optim.Adam] = torch.optim.Adam, **options: Any) -> Any:
    problem = make_problem("mlp", "mse")
    optimizer = kind(problem.model.parameters(), lr=0.05, **options)
    for x, y in problem.batches * 2:
        optimizer.zero_grad()
        problem.loss_fn(problem.model(x), y).backward()
        optimizer.step()
    return problem, optimizer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"betas": (0.5, 0.8), "eps": 0.1}),
        (torch.optim.AdamW, {"betas": (0.5, 0.8), "eps": 0.1}),
        (torch.optim.AdamW, {"betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.5}),
        (torch.optim.Adam, {"betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.5}),
        (torch.optim.Adam, {"betas": (0.5, 0.3), "eps": 0.01, "amsgrad": True}),
    ],
)
def test_preconditioned_sharpness_is_that_of_the_dense_matrix(
    kind: Any, options: dict[str, Any]
) -> None:
    """Second moments from their recursion, written out over the gradients."""
    problem = make_problem("mlp", "mse")
    optimizer = kind(problem.model.parameters(), lr=0.05, **options)
    (beta1, beta2), eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    second = torch.zeros(sum(p.numel() for p in problem.model.parameters()), dtype=torch.float64)
    coupled = options.get("weight_decay", 0.0) if kind is torch.optim.Adam else 0.0
    largest, steps = second, 0
    for x, y in problem.batches * 2:
        optimizer.zero_grad()
        problem.loss_fn(problem.model(x), y).backward()
        theta = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])
        gradient = torch.cat([p.grad.reshape(-1) for p in problem.model.parameters()])
        gradient = gradient + coupled * theta
        second = beta2 * second + (1 - beta2) * gradient.square()
        largest = torch.maximum(largest, second)
        steps += 1
        optimizer.step()
    second = largest if options.get("amsgrad") else second
    scale = (1 - beta1**steps) * ((second / (1 - beta2**steps)).sqrt() + eps)
    H = problem.dense().hessian
    H = H + coupled * torch.eye(len(H), dtype=H.dtype)
    expected = torch.linalg.eigvalsh(H / (scale.sqrt()[:, None] * scale.sqrt()))[-1]
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
    before = copy.deepcopy(optimizer.state_dict())
    found = preconditioned_sharpness(operator, optimizer, tol=1e-10)
    assert found == pytest.approx(float(expected), rel=1e-8)
    assert str(optimizer.state_dict()) == str(before)


def test_parameters_that_adam_does_not_move_do_not_count() -> None:
    problem, _ = adam_problem()
    last = list(problem.model.parameters())[-2:]
    optimizer = torch.optim.Adam(last, lr=0.05)
    for x, y in problem.batches:
        optimizer.zero_grad()
        problem.loss_fn(problem.model(x), y).backward()
        optimizer.step()
    whole = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    part = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, params=last)
    found = preconditioned_sharpness(whole, optimizer, tol=1e-9)
    assert found == pytest.approx(preconditioned_sharpness(part, [optimizer], tol=1e-9), rel=1e-7)


def test_adam_on_a_quadratic_diverges_above_its_threshold_and_not_below() -> None:
    """From near the minimum, with second moments that gradients of this size do not move."""

    def path(factor: float) -> list[float]:
        lr, scale, beta2 = 0.1, 3.0, 1 - 1e-12
        curvature = factor * adam_stability_threshold(lr) * scale
        x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        adam = torch.optim.Adam([x], lr=lr, eps=0.0, betas=(0.9, beta2))
        x.grad = torch.ones_like(x)
        adam.step()
        state = adam.state[x]
        state["step"].fill_(1e6)  # no bias of the first moment is left
        state["exp_avg_sq"].fill_(scale**2 * (1 - beta2**1e6))
        state["exp_avg"].zero_()
        x.data.fill_(1e-9)
        sizes = []
        for _ in range(2000):
            x.grad = curvature * x.detach()
            adam.step()
            sizes.append(abs(float(x.detach())))
        return sizes

    below = path(0.97)
    assert max(below) < 1e-8
    assert below[-1] < 1e-11
    assert max(path(1.03)) > 1e-5  # until the second moments grow too


# What a monitor asks for.


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


def changed(optimizer: torch.optim.Optimizer, **options: Any) -> torch.optim.Optimizer:
    """As a schedule, or an optimizer that finds its own rate, leaves them."""
    optimizer.param_groups[0].update(options)
    return optimizer


def groups(params: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": lr}]


NAN = math.nan
CASES = [
    (lambda p: torch.optim.SGD(p, lr=0.1), (20.0, NAN, NAN)),
    (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), (20.0, NAN, NAN)),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), (38 / 2.8, NAN, NAN)),
    (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), (NAN, NAN, NAN)),
    (lambda p: so.SAM(p, lr=0.1, rho=0.5), (20.0, float(sam_edge(2.0, 0.1, 0.5)), NAN)),
    (
        lambda p: so.SAM(p, lr=0.1, rho=0.5, momentum=0.9),
        (38.0, float(sam_edge(2.0, 0.1, 0.5, momentum=0.9)), NAN),
    ),
    (lambda p: so.SAM(p, lr=0.1, rho=0.5, adaptive=True), (20.0, NAN, NAN)),
    (lambda p: torch.optim.Adam(p, lr=0.1), (NAN, NAN, 380.0)),
    (lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)), (NAN, NAN, 180.0)),
    (lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9), (NAN, NAN, NAN)),
    (lambda p: torch.optim.Adagrad(p, lr=0.1), (NAN, NAN, NAN)),
    (torch.optim.LBFGS, (NAN, NAN, NAN)),
    (lambda p: torch.optim.SGD(groups(p, 0.2)), (NAN, NAN, NAN)),
    (lambda p: changed(torch.optim.SGD(p, lr=0.1), lr=None), (NAN, NAN, NAN)),
    (lambda p: changed(torch.optim.SGD(p, lr=0.1), lr=math.inf), (NAN, NAN, NAN)),
    (lambda p: changed(torch.optim.SGD(p, lr=0.1), lr=-0.1), (NAN, NAN, NAN)),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=1.0), (NAN, NAN, NAN)),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=-0.5), (NAN, NAN, NAN)),
    (lambda p: changed(torch.optim.SGD(p, lr=0.1), nesterov=True), (NAN, NAN, NAN)),
    (lambda p: changed(torch.optim.SGD(p, lr=0.1), momentum=torch.tensor(0.9)), (38.0, NAN, NAN)),
    (lambda p: torch.optim.SGD(groups(p, 0.0)), (20.0, NAN, NAN)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_thresholds_of_optimizers(make: Any, expected: tuple[float, ...]) -> None:
    found = thresholds([make(parameters())], 2.0)
    assert list(found) == ["threshold", "sam_edge", "adam_threshold"]
    assert tuple(found.values()) == pytest.approx(expected, nan_ok=True)


def test_several_optimizers_have_a_threshold_if_they_agree() -> None:
    first, second = ([p] for p in parameters())
    same = [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(second, lr=0.1)]
    mixed = [torch.optim.SGD(first, lr=0.1), torch.optim.Adam(second, lr=0.1)]
    assert thresholds(same, 1.0)["threshold"] == pytest.approx(20)
    assert all(math.isnan(value) for value in thresholds(mixed, 1.0).values())


BAD = [
    (lambda: stability_threshold(-1), "^lr is -1, but must be a finite number of at least 0"),
    (lambda: stability_threshold(1, momentum=-0.1), "^momentum is -0.1"),
    (lambda: stability_threshold(1, momentum=0.5, dampening=1.0), "^dampening is 1.0.* below 1"),
    (lambda: stability_threshold(1, nesterov=True), "^nesterov is True, but must be with moment"),
    (lambda: stability_threshold(1, momentum=0.5, dampening=0.1, nesterov=True), "^nesterov"),
    (lambda: adam_stability_threshold(1, 1.0), "^beta1 is 1.0, but must be below 1"),
    (lambda: sam_edge(1.0, 0.1, -1), "^rho is -1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_options_are_named(call: Any, message: str) -> None:
    with pytest.raises(so.ArgumentError, match=message):
        call()


def test_an_optimizer_without_second_moments_is_named() -> None:
    problem, _ = adam_problem()
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
    fresh = torch.optim.Adam(problem.model.parameters())
    with pytest.raises(so.ArgumentError, match=r"without second moments.* after the first step"):
        preconditioned_sharpness(operator, fresh)
    sgd = torch.optim.SGD(problem.model.parameters())
    with pytest.raises(so.ArgumentError, match=r"^optimizer is 'SGD', but must be Adam or AdamW"):
        preconditioned_sharpness(operator, sgd)
    assert operator.stats.products == 0
