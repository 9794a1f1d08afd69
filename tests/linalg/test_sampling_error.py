"""The expected sampling error, against sums written out, exact integrals, and drawn samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.linalg.sampling_error import Scatter, _radau


def symmetric(size: int, seed: int) -> Tensor:
    draw = torch.randn(
        size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return (draw + draw.T) / 2


def orthonormal(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(size, rows, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(draw).Q.T.contiguous()


def top(matrix: Tensor, k: int) -> tuple[EigenBasis, EigenBasis]:
    """The first k pairs, and the next."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.T.flip(0).contiguous()
    none = torch.zeros_like(values)
    first, then = slice(0, k), slice(k, k + 1)
    return (
        EigenBasis(values[first], vectors[first], none[first]),
        EigenBasis(values[then], vectors[then], none[then]),
    )


def scatter_of(batches: Tensor, k: int, seed: int = 0) -> tuple[Scatter, Tensor, Tensor]:
    """What is seen of equal batches; the products, and the matrix."""
    mean = batches.mean(0)
    basis, guard = top(mean, k)
    rows = torch.cat([basis.vectors, guard.vectors])
    scatter = Scatter(basis, guard, seed)
    for matrix in batches:
        scatter.see(rows @ matrix / len(batches))
    return scatter, rows @ mean, mean


def sine_of(batches: Tensor, k: int, share: float = 0.0, seed: int = 0) -> float:
    scatter, products, mean = scatter_of(batches, k, seed)
    scatter.gather(lambda tensor: tensor)
    basis, guard = top(mean, k)
    below = float(guard.eigenvalues)
    return scatter.sine(products, lambda v: v @ mean, basis.eigenvalues, below, share)


class Population:
    """Examples with matrices of their own: a common part with a gap, and one that is drawn."""

    def __init__(self, count: int, size: int, k: int, noise: float, seed: int) -> None:
        rotation = orthonormal(size, size, seed)
        bulk = torch.linspace(0.5, 0.0, size - k, dtype=torch.float64)
        common = torch.cat([torch.linspace(3.0, 2.0, k, dtype=torch.float64), bulk])
        draws = [noise * symmetric(size, 1000 * seed + i) for i in range(count)]
        self.examples = (rotation.T * common) @ rotation + torch.stack(draws)
        self.matrix = self.examples.mean(0)

    def sample(self, count: int, seed: int) -> Tensor:
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed))
        return self.examples[order[:count]]


@given(
    st.lists(st.tuples(st.floats(-5, 1), st.floats(0.01, 1)), min_size=1, max_size=6),
    st.floats(1e-3, 10),
)
def test_the_rule_bounds_the_integral(measure, gap):
    nodes, weights = np.array(measure).T
    weights = weights / weights.sum()
    value = 1 + gap
    exact = float(weights @ (value - nodes) ** -2.0)
    found = _radau(float(weights @ nodes), float(weights @ nodes**2), value, 1.0)
    assert found >= exact * (1 - 1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_rule_is_exact_for_a_weight_at_the_edge_and_one_below(share):
    exact = share / (3.0 - 1.0) ** 2 + (1 - share) / (3.0 + 2.0) ** 2
    mean, square = share - 2 * (1 - share), share + 4 * (1 - share)
    assert _radau(mean, square, 3.0, 1.0) == pytest.approx(exact)


def test_one_direction_written_out():
    # A_b = diag(2, 0, -1) + s_b c (e_1 e_2ᵀ + e_2 e_1ᵀ), s = ±1: the error of e_1 lies along e_2.
    c, signs = 0.1, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    off = torch.zeros(3, 3, dtype=torch.float64)
    off[0, 1] = off[1, 0] = c
    batches = torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)) + (
        signs[:, None, None] * off
    )
    scatter, *_ = scatter_of(batches, 1)
    scatter.gather(lambda tensor: tensor)
    for share in (0.0, 0.75):
        # (1 − f) 4/3 · Σ_b (c/4)² over e_2, divided by the gap 2, which does not scatter.
        expected = math.sqrt((1 - share) * 4 / 3 * 4 * (c / 4) ** 2) / 2
        assert sine_of(batches, 1, share) == pytest.approx(scatter.margin * expected)


def test_a_gap_that_scatters_is_taken_to_be_smaller():
    off = torch.zeros(3, 3, dtype=torch.float64)
    off[0, 1] = off[1, 0] = 0.1
    sines = []
    for spread in (0.0, 0.5):
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        pushed = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
        diagonal = torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64))
        first = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        batches = diagonal + signs[:, None, None] * off + spread * pushed[:, None, None] * first
        sines.append(sine_of(batches, 1))
    error = math.sqrt(4 / 3 * 4 * (0.5 / 4) ** 2)
    assert sines[1] / sines[0] == pytest.approx(2 / (2 - error))


@pytest.mark.parametrize("noise", [0.2, 0.6])
@pytest.mark.parametrize("k", [1, 3])
def test_the_true_sine_is_what_is_expected(k, noise):
    count, drawn, found, true = 240, 48, [], []
    for seed in range(12):
        population = Population(count, 30, k, noise, seed)
        whole, _ = top(population.matrix, k)
        for draw in range(5):
            batches = population.sample(drawn, draw).view(8, 6, 30, 30).mean(1)
            found.append(sine_of(batches, k, drawn / count, draw))
            basis, _ = top(batches.mean(0), k)
            true.append(largest_sine(basis.vectors, whole.vectors))
    ratio = np.array(found) / np.array(true)
    assert (ratio >= 1).mean() >= 0.95
    assert 1 <= np.median(ratio) <= 3


@pytest.mark.parametrize("dimensions", [1, 4, 60])
def test_in_how_many_dimensions_the_error_varies(dimensions):
    generator = torch.Generator().manual_seed(dimensions)
    found = []
    for seed in range(20):
        batches = torch.diag(torch.tensor([3.0] + [0.0] * 80, dtype=torch.float64)).repeat(16, 1, 1)
        part = 0.1 * torch.randn(16, dimensions, generator=generator, dtype=torch.float64)
        batches[:, 0, 1 : 1 + dimensions] += part
        batches[:, 1 : 1 + dimensions, 0] += part
        scatter, *_ = scatter_of(batches, 1, seed)
        scatter.gather(lambda tensor: tensor)
        found.append(scatter.dimensions)
    assert dimensions / 1.5 <= np.median(found) <= 1.5 * dimensions


def test_without_a_gap_or_from_one_batch_nothing_is_certain():
    population = Population(16, 10, 2, 0.3, 0)
    assert sine_of(population.matrix[None], 2) == 1
    scatter, products, mean = scatter_of(population.examples, 2)
    scatter.gather(lambda tensor: tensor)
    basis, _ = top(mean, 2)
    last = float(basis.eigenvalues[-1])
    assert scatter.sine(products, lambda v: v @ mean, basis.eigenvalues, last, 0.0) == 1


def test_all_of_the_data_have_no_error():
    population = Population(16, 10, 2, 0.3, 0)
    assert sine_of(population.examples, 2, 1.0) == 0


def test_equal_batches_have_no_error():
    assert sine_of(symmetric(8, 3).expand(4, 8, 8), 2) <= 1e-7


def test_what_a_rough_basis_is_off_by_is_no_scatter():
    matrix = symmetric(12, 4)
    exact, guard = top(matrix, 2)
    turned = torch.linalg.qr((exact.vectors + 0.2 * orthonormal(2, 12, 5)).T).Q.T.contiguous()
    basis = EigenBasis(exact.eigenvalues, turned, exact.residuals)
    rows = torch.cat([turned, guard.vectors])
    scatter = Scatter(basis, guard, 0)
    for _ in range(8):
        scatter.see(rows @ matrix / 8)
    scatter.gather(lambda tensor: tensor)
    known = exact.eigenvalues, float(guard.eigenvalues)
    assert scatter.sine(rows @ matrix, lambda v: v @ matrix, *known, 0.0) <= 1e-6


def test_processes_see_what_one_does():
    # With one direction to err along, the error that is drawn is the same whatever is drawn.
    population = Population(16, 3, 2, 0.3, 1)
    mean = population.matrix
    basis, guard = top(mean, 2)
    rows = torch.cat([basis.vectors, guard.vectors])
    one, first, second = (Scatter(basis, guard, seed) for seed in (0, 1, 2))
    for index, matrix in enumerate(population.examples):
        one.see(rows @ matrix / 16)
        (first if index < 8 else second).see(rows @ matrix / 16)
    # What an all-reduce of the two does, one tensor after the other.
    others: list[Tensor] = []
    second.gather(lambda tensor: others.append(tensor.clone()) or tensor)
    first.gather(lambda tensor: tensor.add_(others.pop(0)))
    one.gather(lambda tensor: tensor)

    def sine(scatter: Scatter) -> float:
        known = basis.eigenvalues, float(guard.eigenvalues)
        return scatter.sine(rows @ mean, lambda v: v @ mean, *known, 0.0) / scatter.margin

    assert sine(first) == pytest.approx(sine(one), rel=1e-9)
