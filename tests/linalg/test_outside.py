"""A look outside of a basis: what has come to the top is found, and how likely it was missed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.outside import MISS_PROBABILITY, Outside, look_outside


def _rotated(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix of these eigenvalues, descending, and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(draws).Q.T.contiguous()
    return rows.T @ torch.diag(values) @ rows, rows


def _pairs(matrix: Tensor, rows: Tensor) -> EigenBasis:
    values = torch.linalg.vecdot(rows, rows @ matrix)
    residuals = torch.linalg.vector_norm(rows @ matrix - values[:, None] * rows, dim=1)
    return EigenBasis(values, rows, residuals)


def _look(
    matrix: Tensor, rows: Tensor, guard: Tensor, seed: int, lowest: float | None = None
) -> tuple[Outside, list[int]]:
    taken = []

    def matmat(block: Tensor) -> Tensor:
        taken.append(len(block))
        return block @ matrix

    lowest = float(torch.linalg.eigvalsh(matrix)[0]) if lowest is None else lowest
    basis = _pairs(matrix, rows)
    found = look_outside(matmat, basis, _pairs(matrix, guard), lowest=lowest, seed=seed)
    return found, taken


BULK = torch.linspace(0.9, -0.5, 60, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("entered", [2.1, 3.0, 50.0])
def test_what_has_come_to_the_top_is_found(seed: int, entered: float) -> None:
    values = torch.cat([torch.tensor([3.5, 2.0, entered], dtype=torch.float64), BULK])
    matrix, rows = _rotated(values, seed)
    found, _ = _look(matrix, rows[:2], rows[3:4], seed)  # the guard is of the bulk
    assert float(found.guard.eigenvalues) > 2.0
    assert float((found.guard.vectors @ rows[:2].T).abs().max()) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_where_nothing_has_the_next_eigenvalue_is_known_better(seed: int) -> None:
    values = torch.cat([torch.tensor([3.5, 2.0], dtype=torch.float64), BULK])
    matrix, rows = _rotated(values, seed)
    found, taken = _look(matrix, rows[:2], rows[-1:], seed)  # the guard is the worst that there is
    assert found.missed <= MISS_PROBABILITY
    assert 0.7 < float(found.guard.eigenvalues) <= 0.9 + 1e-12
    assert sum(taken) <= 12


@pytest.mark.slow
def test_how_likely_it_is_to_miss_a_direction_is_no_promise_too_much() -> None:
    """An eigenvalue just above the basis: of the looks that are done, few have not seen it."""
    size, looks = 400, 1000
    top = torch.tensor([2.0, 2.02])
    values = torch.cat([top, torch.linspace(0.1, -0.02, size - 2)]).double()
    rows = torch.eye(size, dtype=torch.float64)
    missed = 0
    for seed in range(looks):
        found, _ = _look(torch.diag(values), rows[:1], rows[2:3], seed, lowest=-0.02)
        missed += found.missed <= MISS_PROBABILITY and float(found.guard.eigenvalues) < 2.0
    assert missed > 0, "none was ever hidden from a random vector: the test tells nothing"
    assert binomtest(missed, looks, MISS_PROBABILITY, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("bulk", [1, 2])
def test_a_complement_of_few_dimensions_is_known_altogether(bulk: int) -> None:
    values = torch.linspace(3.0, 1.0, 2 + bulk, dtype=torch.float64)
    matrix, rows = _rotated(values, 0)
    found, _ = _look(matrix, rows[:2], rows[-1:], 0)
    assert found.missed < 1e-10
    np.testing.assert_allclose(float(found.guard.eigenvalues), float(values[2]), rtol=1e-10)


@pytest.mark.parametrize("flat", [0.0, 1.0, -2.0])
def test_a_guard_of_a_flat_bulk_is_outside_of_the_basis(flat: float) -> None:
    matrix, rows = _rotated(torch.tensor([10.0, flat, flat], dtype=torch.float64), 0)
    found, _ = _look(matrix, rows[:1], rows[1:2], 0)
    assert float((found.guard.vectors @ rows[0]).abs()) < 1e-12
    np.testing.assert_allclose(float(found.guard.eigenvalues), flat, atol=1e-12)


def test_without_a_bulk_there_is_nothing_to_miss() -> None:
    matrix, rows = _rotated(torch.tensor([2.0, 1.0], dtype=torch.float64), 0)
    found, taken = _look(matrix, rows, rows[:0], 0)
    assert found.missed == 0.0
    assert found.guard.k == 0
    assert taken == []
