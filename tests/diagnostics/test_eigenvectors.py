"""Eigenvectors against dense ones, and chance levels against what is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics import (
    chance_displacement,
    chance_localization,
    displacement,
    localization,
    lowest_eigenvalue,
)
from subspace_optim.linalg.eigenbasis import EigenBasis
from tests.dense import Problem, make_problem, problems


def drawn(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(rows)


@given(problems(), st.integers(0, 5))
def test_the_lowest_eigenvalue_is_the_dense_one(problem: Problem, seed: int) -> None:
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    eigenvalues = torch.linalg.eigvalsh(problem.dense().hessian)
    found = lowest_eigenvalue(operator, tol=1e-6, seed=seed)
    assert found == pytest.approx(
        float(eigenvalues[0]), rel=1e-5, abs=1e-9 * float(eigenvalues.abs().max())
    )


def test_it_is_the_smallest_and_not_that_of_the_largest_magnitude() -> None:
    problem = make_problem(dtype=torch.float32, seed=2)
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    eigenvalues = torch.linalg.eigvalsh(problem.dense().hessian)
    assert 0 < -eigenvalues[0] < eigenvalues[-1]
    assert lowest_eigenvalue(operator) == pytest.approx(float(eigenvalues[0]), rel=1e-2)
    for wrong in ({"tol": -1.0}, {"seed": -1}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            lowest_eigenvalue(operator, **wrong)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(-300, 300), st.integers(0, 99))
def test_localization_of_n_equal_entries_is_one_in_n(
    n: int, others: int, exponent: float, seed: int
) -> None:
    """Whatever their length, from 1e-150 to 1e150, their signs, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.zeros(n + others, dtype=torch.float64)
    signs = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    v[torch.randperm(n + others, generator=generator)[:n]] = signs.double() * 10 ** (exponent / 2)
    assert float(localization(v[None])[0]) == pytest.approx(1 / n)


@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 99))
def test_localization_is_the_sum_of_fourth_powers(k: int, size: int, seed: int) -> None:
    rows = drawn(k, size, seed)
    torch.testing.assert_close(localization(rows), rows.pow(4).sum(dim=1))
    torch.testing.assert_close(localization(3.0 * rows.float()).float(), rows.pow(4).sum(1).float())
    basis = EigenBasis(torch.zeros(k), rows, torch.zeros(k))
    assert torch.equal(localization(basis), localization(rows))


@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 99))
def test_displacement_is_one_less_the_cosine_whatever_the_signs(
    k: int, size: int, seed: int
) -> None:
    now, before = drawn(k, size, seed), drawn(k, size, seed + 100)
    exact = 1 - torch.stack([(a @ b).abs() for a, b in zip(now, before, strict=True)])
    torch.testing.assert_close(displacement(now, before), exact.clamp(min=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(displacement(-now, before), displacement(now, before))
    assert float(displacement(now, -now).max()) <= 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 10, 300])
def test_chance_levels_are_the_means_of_what_is_drawn(size: int) -> None:
    rows, others = drawn(40_000, size, 1), drawn(40_000, size, 2)
    for drawn_values, chance in (
        (localization(rows), chance_localization(size)),
        (displacement(rows, others), chance_displacement(size)),
    ):
        error = float(drawn_values.std()) / 200
        assert float(drawn_values.mean()) == pytest.approx(chance, abs=5 * error + 1e-12)


def test_chance_levels_of_large_models() -> None:
    assert chance_localization(10**9) == pytest.approx(3e-9)
    approximate = 1 - math.sqrt(2 / (math.pi * 10**6))
    assert chance_displacement(10**6) == pytest.approx(approximate, abs=1e-9)
    for chance in (chance_localization, chance_displacement):
        with pytest.raises(ArgumentError, match="size"):
            chance(0)


def test_vectors_that_swap_are_displaced_though_their_span_is_not() -> None:
    rows = torch.eye(4, dtype=torch.float64)[:2]
    assert displacement(rows, rows.flip(0)).tolist() == [1.0, 1.0]


def test_zeros_and_refusals() -> None:
    assert math.isnan(float(localization(torch.zeros(1, 3))[0]))
    with pytest.raises(ArgumentError, match="vectors"):
        localization(torch.ones(3))
    with pytest.raises(ArgumentError, match="vectors"):
        localization(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"before.*basis.first"):
        displacement(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ArgumentError, match="before"):
        displacement(torch.ones(3), torch.ones(3))
