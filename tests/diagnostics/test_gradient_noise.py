"""Gradient noise against the dense covariance of the gradients of all batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.diagnostics import gradient_noise
from subspace_optim.linalg.eigenbasis import EigenBasis
from tests.dense import Problem, dense_curvature, make_problem, problems, projector, supervised


def random_basis(size: int, k: int, seed: int = 0) -> EigenBasis:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, k, dtype=torch.float64, generator=generator)).Q
    return EigenBasis(torch.ones(k), q.T.contiguous(), torch.zeros(k))


def gradients(problem: Problem) -> Tensor:
    each = [
        dense_curvature(problem.model, supervised(problem.loss_fn), [batch]).gradient
        for batch in problem.batches
    ]
    return torch.stack(each)


def hessian(problem: Problem) -> so.HessianOperator:
    return so.HessianOperator(problem.model, problem.loss_fn, problem.batches)


@given(problems(), st.integers(1, 6), st.integers(0, 9))
def test_all_batches_give_the_dense_covariance(problem: Problem, k: int, seed: int) -> None:
    if len(problem.batches) == 1:
        return
    basis = random_basis(hessian(problem).size, k, seed)
    covariance = torch.cov(gradients(problem).T)
    found = gradient_noise(hessian(problem), basis, seed=seed)
    V = basis.vectors
    scale = float(covariance.trace())
    torch.testing.assert_close(
        found.noise, (V @ covariance @ V.T).diagonal(), rtol=1e-6, atol=1e-9 * scale
    )
    assert found.total == pytest.approx(scale)
    assert found.batches == len(problem.batches)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    rank = min(k, int((eigenvalues > 1e-10 * eigenvalues[-1]).sum()))
    assert found.rank == rank
    next_one = float(eigenvalues[-rank - 1]) if rank < len(eigenvalues) else 0.0
    if float(eigenvalues[-rank]) - next_one > 1e-6 * float(eigenvalues[-1]):  # it is defined
        top = projector(vectors.T[-rank:])
        exact = float((top @ projector(V)).trace()) / (rank * k) ** 0.5
        assert found.covariance_overlap == pytest.approx(exact, abs=1e-6)


@pytest.mark.slow
def test_some_batches_are_unbiased_for_all() -> None:
    """The mean over all pairs of batches is the variance of all of them, exactly."""
    problem = make_problem(sizes=[2] * 5, seed=1)
    operator, rows = hessian(problem), gradients(problem)
    basis = random_basis(operator.size, 3)
    pairs: dict[tuple[int, int], Tensor] = {}
    coefficients = rows @ basis.vectors.T
    for seed in range(200):
        noise = gradient_noise(operator, basis, max_batches=2, seed=seed).noise
        for i, j in itertools.combinations(range(5), 2):
            if torch.allclose(noise, (coefficients[i] - coefficients[j]).square() / 2):
                pairs[i, j] = noise
    assert len(pairs) == 10
    mean = torch.stack(list(pairs.values())).mean(0)
    torch.testing.assert_close(mean, coefficients.var(dim=0))


@pytest.mark.slow
def test_drawn_rows_have_the_noise_of_their_size() -> None:
    """Of single rows the dense variance of all of them, and 1/B of that for B in one pass."""
    problem = make_problem(sizes=[30, 50], seed=4)
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in problem.batches for i in range(len(y))]
    single = gradients(Problem(problem.model, problem.loss_fn, rows))
    operator = hessian(problem)
    basis = random_basis(operator.size, 4)
    exact = (single @ basis.vectors.T).var(dim=0)
    found = gradient_noise(operator, basis, batch_size=1, max_batches=80)
    torch.testing.assert_close(found.noise, exact)
    many = [
        gradient_noise(operator, basis, batch_size=20, max_batches=4, seed=seed).noise
        for seed in range(150)
    ]
    # The mean square between groups of a random division is that of the rows (one-way analysis).
    torch.testing.assert_close(torch.stack(many).mean(0), exact / 20, rtol=0.2, atol=0)


def test_noise_in_the_basis_overlaps_and_noise_outside_does_not() -> None:
    """Linear losses ``⟨θ, x⟩``, whose gradients are x: in the span of the first two coordinates."""
    torch.manual_seed(0)
    x = torch.zeros(12, 6, dtype=torch.float64)
    x[:, :2] = torch.randn(12, 2, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    operator = so.HessianOperator.from_loss(
        model, lambda m, b: (m(b).mean(), len(b)), list(x.split(1)), verify=False
    )
    identity = torch.eye(6, dtype=torch.float64)
    inside, outside = (
        EigenBasis(torch.ones(2), rows, torch.zeros(2)) for rows in (identity[:2], identity[2:4])
    )
    found = gradient_noise(operator, inside)
    assert found.covariance_overlap == pytest.approx(1.0)
    torch.testing.assert_close(found.noise, x[:, :2].var(dim=0))
    assert gradient_noise(operator, outside).covariance_overlap == pytest.approx(0.0)
    wide = EigenBasis(torch.ones(4), identity[:4], torch.zeros(4))
    bounded = gradient_noise(operator, wide)
    assert bounded.rank == 2
    assert bounded.covariance_overlap == pytest.approx(math.sqrt(2 / 4))
    assert gradient_noise(operator, wide, max_batches=2).rank == 1


def test_float32_and_the_cost() -> None:
    problem = make_problem("cnn", sizes=[5] * 6, dtype=torch.float32, seed=3)
    operator = hessian(problem)
    basis = random_basis(operator.size, 3)
    basis = EigenBasis(basis.eigenvalues, basis.vectors.float(), basis.residuals)
    exact = (gradients(problem) @ basis.vectors.double().T).var(dim=0)
    found = gradient_noise(operator, basis)
    torch.testing.assert_close(found.noise, exact, rtol=1e-3, atol=0)
    assert operator.stats.full_gradients == pytest.approx(1.0)
    assert operator.stats.products == 0


def test_gradients_that_do_not_scatter() -> None:
    problem = make_problem(sizes=[3])
    same = Problem(problem.model, problem.loss_fn, problem.batches * 3)
    operator = hessian(same)
    found = gradient_noise(operator, random_basis(operator.size, 2))
    assert found.total == pytest.approx(0.0, abs=1e-25)
    assert found.noise.abs().max() < 1e-25


def test_refusals() -> None:
    problem = make_problem(sizes=[20])
    operator = hessian(problem)
    basis = random_basis(operator.size, 2)
    with pytest.raises(ArgumentError, match=r"batch_size is None.*one batch"):
        gradient_noise(operator, basis)
    with pytest.raises(ArgumentError, match=r"number of batches.*smaller batch_size"):
        gradient_noise(operator, basis, batch_size=20)
    with pytest.raises(ArgumentError, match="max_batches"):
        gradient_noise(operator, basis, batch_size=2, max_batches=1)
    with pytest.raises(ArgumentError, match="size of the basis"):
        gradient_noise(operator, random_basis(5, 2), batch_size=2)


def test_a_gradient_that_is_not_finite() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.square().sum().sqrt()

    data = [torch.ones(1), torch.ones(1)]
    loss = lambda m, b: (m(b).mean(), 1)  # noqa: E731
    operator = so.HessianOperator.from_loss(Root(), loss, data, verify=False)
    basis = EigenBasis(torch.ones(1), torch.eye(2)[:1], torch.zeros(1))
    with pytest.raises(NonFiniteError, match="gradient of a minibatch"):
        gradient_noise(operator, basis)
