"""The river under the hill: closed forms on quadratics, and the dense Newton step on models."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics import Valley, hill_share, valley
from subspace_optim.linalg.eigenbasis import EigenBasis
from tests.dense import Problem, problems, symmetric


def dense_basis(matrix: Tensor, k: int) -> EigenBasis:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    rows = vectors.T.flip(0)[:k].contiguous()
    return EigenBasis(eigenvalues.flip(0)[:k], rows, torch.zeros(k, dtype=torch.float64))


class Bowl(nn.Module):
    """``½ (θ − a)ᵀ H (θ − a) + bᵀθ``."""

    def __init__(self, matrix: Tensor, slope: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix, self.slope = matrix, slope
        size = len(matrix)
        self.theta = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.theta @ self.matrix @ self.theta / 2 + self.slope @ self.theta


def bowl(spectrum: Tensor, seed: int = 0) -> tuple[Bowl, so.HessianOperator]:
    generator = torch.Generator().manual_seed(seed + 1)
    slope = torch.randn(len(spectrum), generator=generator, dtype=torch.float64)
    model = Bowl(symmetric(spectrum, seed), slope, seed)
    return model, so.HessianOperator.from_loss(model, lambda m, _: (m(), 1), [torch.zeros(1)])


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=9), st.data())
def test_of_a_quadratic_it_is_the_minimum_over_the_subspace(
    values: list[float], data: st.DataObject
) -> None:
    """And with k = P the minimum of all; the height is what the quadratic model says."""
    spectrum = torch.tensor(sorted(values), dtype=torch.float64)
    model, operator = bowl(spectrum, seed=data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, len(values)))
    basis = dense_basis(model.matrix, k)
    found = valley(operator, basis)
    theta, V = model.theta.detach(), basis.vectors
    coefficients = torch.linalg.solve(
        V @ model.matrix @ V.T, -V @ (model.matrix @ theta + model.slope)
    )
    lowest = theta + coefficients @ V
    exact = float(lowest @ model.matrix @ lowest / 2 + model.slope @ lowest)
    assert found.river_loss == pytest.approx(exact, rel=1e-7, abs=1e-7)
    assert found.loss == pytest.approx(operator.loss())
    assert found.hill_height == pytest.approx(found.predicted_height, rel=1e-6, abs=1e-7)
    assert found.hill_height >= -1e-9


@given(problems(), st.integers(1, 5))
def test_of_models_it_is_the_loss_after_the_dense_step(problem: Problem, k: int) -> None:
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    before = copy.deepcopy(problem.model.state_dict())
    dense = problem.dense()
    basis = dense_basis(dense.hessian, k)
    floor = torch.full_like(basis.residuals, 1e-6 * basis.largest)
    basis = EigenBasis(basis.eigenvalues, basis.vectors, floor)
    found = valley(operator, basis)
    step = torch.zeros_like(dense.gradient)
    for value, vector in zip(basis.eigenvalues, basis.vectors, strict=True):
        if value > 1e-6 * basis.largest:
            step += (vector @ dense.gradient) / value * vector
    moved = copy.deepcopy(problem.model)
    flat = nn.utils.parameters_to_vector(moved.parameters()).detach() - step
    nn.utils.vector_to_parameters(flat, moved.parameters())
    exact = Problem(moved, problem.loss_fn, problem.batches).dense().loss
    assert found.river_loss == pytest.approx(exact, rel=1e-6)
    assert found.loss == pytest.approx(dense.loss)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_pairs_that_are_not_known_to_be_positive_are_left_alone() -> None:
    model, operator = bowl(torch.tensor([-3.0, 0.0, 1.0, 5.0], dtype=torch.float64))
    basis = dense_basis(model.matrix, 4)
    assert valley(operator, basis) == pytest.approx(valley(operator, basis.first(2)))
    unsure = EigenBasis(basis.eigenvalues, basis.vectors, torch.tensor([0.1, 1.5, 0.1, 0.1]))
    assert valley(operator, unsure) == pytest.approx(valley(operator, basis.first(1)))
    nothing = valley(operator, EigenBasis(-torch.ones(2), basis.vectors[2:], torch.zeros(2)))
    assert nothing.hill_height == 0


def test_it_costs_a_gradient() -> None:
    model, operator = bowl(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    valley(operator, dense_basis(model.matrix, 2))
    assert (operator.stats.gradients, operator.stats.products) == (1, 0)
    assert operator.stats.passes == 2


def test_shares_of_hill_and_river_along_gradient_descent_on_a_quadratic() -> None:
    """In closed form: the hill is the part of the loss along the sharp direction."""
    model, operator = bowl(torch.tensor([0.1, 4.0], dtype=torch.float64), seed=3)
    basis = dense_basis(model.matrix, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    points = []
    for _ in range(3):
        points.append((valley(operator, basis), model.theta.detach().clone()))
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    u = basis.vectors[0]

    def along(theta: Tensor) -> float:
        return float(2 * (u @ theta) ** 2 + (model.slope @ u) * (u @ theta))

    def loss(theta: Tensor) -> float:
        return float(theta @ model.matrix @ theta / 2 + model.slope @ theta)

    for (before, a), (after, b) in itertools.pairwise(points):
        exact = (along(a) - along(b)) / (loss(a) - loss(b))
        assert hill_share(before, after) == pytest.approx(exact)
        assert 0 < exact < 1


def test_shares_at_their_ends() -> None:
    start = Valley(2.0, 1.0, 0.0)
    assert hill_share(start, Valley(1.5, 1.0, 0.0)) == 1.0  # the hill alone
    assert hill_share(start, Valley(1.5, 0.5, 0.0)) == 0.0  # the river alone
    assert hill_share(start, Valley(1.5, 0.25, 0.0)) == -0.5  # the height has grown
    assert hill_share(start, Valley(2.5, 0.5, 0.0)) == 2.0  # the loss has, for the height has more
    assert math.isnan(hill_share(start, Valley(2.0, 0.5, 0.0)))
    assert math.isnan(hill_share(start, Valley(math.inf, 0.5, 0.0)))


def test_a_basis_of_another_model_is_refused() -> None:
    _, operator = bowl(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(ArgumentError, match="size of the basis is 2"):
        valley(operator, dense_basis(torch.eye(2, dtype=torch.float64), 1))
