"""Batch sharpness against the dense sum over all batches, and its thresholds against iterations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.diagnostics import (
    batch_sharpness,
    batch_sharpness_thresholds,
    gradient_sharpness,
    stability_threshold,
)
from tests.dense import Problem, dense_curvature, make_problem, problems, supervised


def quotient(problem: Problem, batch: tuple[Tensor, Tensor]) -> float:
    dense = dense_curvature(problem.model, supervised(problem.loss_fn), [batch])
    g = dense.gradient
    return float(g @ dense.hessian @ g / (g @ g))


def hessian(problem: Problem, data: Any = None) -> so.HessianOperator:
    return so.HessianOperator(problem.model, problem.loss_fn, data or problem.batches)


@given(problems(), st.integers(0, 9))
def test_all_batches_give_the_dense_mean_without_an_error(problem: Problem, seed: int) -> None:
    if len(problem.batches) == 1:
        problem = Problem(problem.model, problem.loss_fn, problem.batches * 2)
    found = batch_sharpness(hessian(problem), relative_error=0.0, seed=seed)
    exact = [quotient(problem, batch) for batch in problem.batches]
    assert found.value == pytest.approx(sum(exact) / len(exact), rel=1e-7, abs=1e-9)
    assert found.standard_error == 0.0
    assert found.products == len(exact)


def test_float32_agrees() -> None:
    problem = make_problem("cnn", sizes=[5] * 6, dtype=torch.float32, seed=3)
    found = batch_sharpness(hessian(problem), relative_error=0.0)
    exact = [quotient(problem, batch) for batch in problem.batches]
    assert found.value == pytest.approx(sum(exact) / 6, rel=1e-4)


@pytest.mark.parametrize("m", [3, 8])
@pytest.mark.slow
def test_the_error_is_that_of_a_finite_population(m: int) -> None:
    """Over many orders the mean squared deviation from the mean of all is the squared error."""
    problem = make_problem(sizes=[2] * 12, seed=1)
    operator = hessian(problem)
    exact = [quotient(problem, batch) for batch in problem.batches]
    deviations, errors = [], []
    for seed in range(100):
        found = batch_sharpness(operator, relative_error=0.0, max_batches=m, seed=seed)
        assert found.products == m
        deviations.append((found.value - sum(exact) / 12) ** 2)
        errors.append(found.standard_error**2)
    expected = torch.tensor(exact).var() * (1 - m / 12) / m
    # Known beforehand, exactly: both are unbiased for it. 100 orders tell it within a fifth or so.
    assert sum(errors) / 100 == pytest.approx(float(expected), rel=0.4)
    assert sum(deviations) / 100 == pytest.approx(float(expected), rel=0.4)


def test_drawn_rows_are_unbiased_for_the_mean_over_all_subsets() -> None:
    """Batches of 1 of all rows: the subsets are the rows, and one pass of them is exact."""
    problem = make_problem(sizes=[4, 7, 9], seed=5)
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in problem.batches for i in range(len(y))]
    exact = [quotient(problem, row) for row in rows]
    found = batch_sharpness(hessian(problem), batch_size=1, relative_error=0.0, max_batches=20)
    assert found.value == pytest.approx(sum(exact) / 20)
    # ... but nothing is known of other ways to draw larger ones, so that an error is left.
    assert found.standard_error == pytest.approx(float(torch.tensor(exact).std()) / 20**0.5)


def test_the_batch_of_all_data_gives_the_curvature_along_the_gradient() -> None:
    problem = make_problem(sizes=[4, 7, 9], seed=5)
    dense = problem.dense()
    g = dense.gradient
    exact = float(g @ dense.hessian @ g / (g @ g))
    found = batch_sharpness(hessian(problem), batch_size=20)
    assert (found.value, found.standard_error) == (pytest.approx(exact), 0.0)
    assert gradient_sharpness(hessian(problem)) == pytest.approx(exact)


def test_it_stops_where_the_error_is_small_enough() -> None:
    problem = make_problem(sizes=[4] * 100, seed=2)
    operator = hessian(problem)
    taken = []
    for relative_error in (1e9, 0.1, 0.03):
        found = batch_sharpness(operator, relative_error=relative_error, max_batches=100)
        assert found.standard_error <= relative_error * abs(found.value)
        taken.append(found.products)
    assert taken[0] == 8  # of fewer no error is believed
    assert taken[0] < taken[1] < taken[2] <= 100
    fewer = batch_sharpness(operator, relative_error=0.03, max_batches=9)
    assert fewer.products == 9
    assert fewer.standard_error > 0.03 * abs(fewer.value)


def test_smaller_batches_are_sharper_on_least_squares() -> None:
    """Where it is known in closed form: ``g_B ∝ x`` for one example, and its Hessian is xxᵀ."""
    torch.manual_seed(0)
    x = torch.randn(64, 5, dtype=torch.float64)
    y = torch.randn(64, 1, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    operator = so.HessianOperator(model, lambda out, y: F.mse_loss(out, y) / 2, (x, y))
    found = batch_sharpness(operator, batch_size=1, relative_error=0.0, max_batches=64)
    assert found.value == pytest.approx(float(x.square().sum(1).mean()))
    assert found.value > float(torch.linalg.eigvalsh(x.T @ x / 64)[-1])


def test_the_gauss_newton_matrix_has_it_too() -> None:
    problem = make_problem(loss="mse", sizes=[3, 4], seed=4)
    operator = so.GaussNewtonOperator(problem.model, problem.loss_fn, problem.batches)
    found = batch_sharpness(operator)
    quotients = []
    for batch in problem.batches:
        view = so.GaussNewtonOperator(problem.model, problem.loss_fn, [batch])
        g = view.gradient()
        quotients.append(float(g @ view.matvec(g) / (g @ g)))
    assert found.value == pytest.approx(sum(quotients) / 2)


def test_gradients_of_zero_do_not_count_and_tiny_ones_do() -> None:
    def scaled(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).mean()

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.square().sum() / 2

    ones = torch.ones(1)
    data = [(ones, ones * scale) for scale in (0.0, 1.0, 1e-30, 0.0)]
    operator = so.HessianOperator(Square(), scaled, data, verify=False)
    found = batch_sharpness(operator)
    assert found.value == pytest.approx(0.5)  # of 1 and of 1e-30
    nothing = batch_sharpness(so.HessianOperator(Square(), scaled, data[:1] * 2, verify=False))
    assert math.isnan(nothing.value)


def test_refusals() -> None:
    problem = make_problem(sizes=[50])
    with pytest.raises(ArgumentError, match=r"batch_size is None.*one batch"):
        batch_sharpness(hessian(problem, problem.batches[0]))
    operator = hessian(problem)
    with pytest.raises(ArgumentError, match="relative_error"):
        batch_sharpness(operator, relative_error=-1)
    with pytest.raises(ArgumentError, match="max_batches"):
        batch_sharpness(operator, batch_size=4, max_batches=1)
    with pytest.raises(ArgumentError, match="seed"):
        batch_sharpness(operator, batch_size=4, seed=-1)
    gauss_newton = so.GaussNewtonOperator(problem.model, problem.loss_fn, problem.batches)
    residual = so.ResidualOperator(operator, gauss_newton)
    with pytest.raises(ArgumentError, match=r"operator is 'ResidualOperator'.*HessianOperator"):
        batch_sharpness(residual, batch_size=4)


def test_a_product_that_is_not_finite() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.abs().pow(1.5).sum() + self.weight.sum()

    data = [(torch.ones(1), torch.ones(1))] * 2
    operator = so.HessianOperator(Root(), lambda out, _: out.mean(), data, verify=False)
    with pytest.raises(NonFiniteError, match="curvature along the gradient"):
        batch_sharpness(operator)


@settings(max_examples=40)
@given(lr=st.floats(1e-3, 10), momentum=st.floats(0, 0.99))
def test_thresholds(lr: float, momentum: float) -> None:
    small, large = batch_sharpness_thresholds(lr, momentum=momentum)
    assert large == pytest.approx(stability_threshold(lr, momentum=momentum))
    # 2/η' at the rate that a constant gradient moves with in the long run, η' = η/(1 − μ).
    assert small == pytest.approx(stability_threshold(lr / (1 - momentum)))
    assert small <= large


def test_thresholds_at_the_ends() -> None:
    assert batch_sharpness_thresholds(0.1) == (pytest.approx(20), pytest.approx(20))
    assert batch_sharpness_thresholds(0.0) == (math.inf, math.inf)
    with pytest.raises(ArgumentError, match="momentum"):
        batch_sharpness_thresholds(0.1, momentum=1.0)


def test_sgd_on_single_examples_turns_at_2_over_eta() -> None:
    """Least squares on examples of equal length that are orthogonal: batch sharpness is ‖x‖²."""
    x = 3.0 * torch.eye(4, dtype=torch.float64)
    y = torch.zeros(4, 1, dtype=torch.float64)
    for factor, grows in ((0.98, False), (1.02, True)):
        model = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(model.weight)
        loss = lambda out, y: F.mse_loss(out, y) / 2  # noqa: E731
        operator = so.HessianOperator(model, loss, (x, y))
        sharpness = batch_sharpness(operator, batch_size=1).value
        assert sharpness == pytest.approx(9.0)
        lr = factor * 2 / sharpness
        assert batch_sharpness_thresholds(lr).small_batches == pytest.approx(9.0 / factor)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for step in range(400):
            optimizer.zero_grad()
            loss(model(x[step % 4 : step % 4 + 1]), y[:1]).backward()
            optimizer.step()
        assert (float(model.weight.detach().norm()) > 2.0) == grows
