"""Vectors that are split over ranks: all that linalg finds is what it finds of whole ones.

The truth is the same function of all columns, which the other tests compare with dense matrices.
Numbers are the same on all ranks, bit for bit, since ranks that decide differently wait for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.linalg.control_variate import ControlVariate
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import top_eigenpairs
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.outside import look_outside
from subspace_optim.linalg.refinement import probe, refine
from subspace_optim.linalg.rows import (
    check_orthonormal,
    exact_gram,
    gram,
    largest_sine,
    norm,
    orthonormal_span,
    orthonormalise_,
)
from subspace_optim.linalg.sampling_error import Scatter
from subspace_optim.linalg.spectral_density import lanczos_quadrature
from subspace_optim.linalg.trace import hutch_plus_plus
from tests.dense import symmetric
from tests.split import (
    Either,
    SplitInnerProduct,
    Unsplit,
    alike,
    joined,
    on_ranks,
    splits,
    unlocked,
)

unlocked(LowRankCurvature)

Found = tuple[dict[str, Any], Tensor]
"""Numbers, which all ranks have to agree on, and rows, of which each has its columns."""
DTYPE: Any = {"dtype": torch.float64}


class Problem:
    """A matrix with a gap below ``λ_k``, and what is near its top eigenvectors; all columns."""

    def __init__(self, size: int, seed: int, k: int = 3) -> None:
        self.size, self.seed, self.k = size, seed, k
        top = torch.tensor([9.0, 7.0, 6.5, 3.0][: k + 1], **DTYPE)
        bulk = torch.linspace(-1.0, 1.0, size - k - 1, **DTYPE)
        self.matrix = symmetric(torch.cat([top, bulk]), seed)
        self.rows = torch.linalg.eigh(self.matrix).eigenvectors.T.flip(0)[: k + 1].contiguous()
        self.off = self.rows + 0.02 * self.random(k + 1) / math.sqrt(size)
        orthonormalise_(self.off)

    def random(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(count, self.size, generator=generator, **DTYPE)

    def matmat(self, inner: Either) -> Callable[[Tensor], Tensor]:
        return inner.products(lambda rows: rows @ self.matrix)

    def pairs(self, inner: Either) -> tuple[EigenBasis, EigenBasis]:
        """Those that are off, and the guard."""
        values = torch.linalg.vecdot(self.off, self.off @ self.matrix)
        residuals = torch.linalg.vector_norm(self.off @ self.matrix - values[:, None] * self.off)
        first, then = slice(0, self.k), slice(self.k, self.k + 1)
        return tuple(
            EigenBasis(values[s], inner.mine(self.off[s]), residuals.expand(self.k + 1)[s], inner)
            for s in (first, then)
        )

    @property
    def ends(self) -> dict[str, float]:
        values = torch.linalg.eigvalsh(self.matrix)
        return {"lowest": float(values[0]), "mean": float(values.mean())}


def arithmetic(inner: Either, problem: Problem) -> Found:
    rows, others = inner.mine(problem.off), inner.mine(problem.rows)
    check_orthonormal("rows", rows, torch.finfo(torch.float64).eps, inner)
    numbers = {
        "norm": norm(inner.mine(problem.random(1)[0]), inner),
        "gram": gram(rows, others, inner),
        "exact gram": exact_gram(inner.mine(problem.random(3)), inner),
        "sine": largest_sine(rows[:2], others[:2], inner),
    }
    nearly = rows + 0.01 * others.flip(0)
    orthonormalise_(nearly, inner)
    draws = problem.random(3)
    span = orthonormal_span(inner.mine(torch.cat([draws, draws[:1] - 2 * draws[2:]])), inner)
    assert len(span) == 3
    return numbers, torch.cat([nearly, gram(inner.mine(draws), span, inner) @ span])


def span_of(inner: Either, problem: Problem) -> Found:
    """Of two rows that depend on each other, and a third."""
    draws = problem.random(2)
    rows = torch.cat([draws, 1e-9 * draws[:1] - 2 * draws[1:]])
    span = orthonormal_span(inner.mine(rows), inner)
    assert len(span) == 2
    inside = gram(inner.mine(draws), span, inner)
    return {"gram": exact_gram(span, inner)}, inside @ span


def basis(inner: Either, problem: Problem) -> Found:
    pairs, _ = problem.pairs(inner)
    vectors = inner.mine(problem.random(2))
    numbers = {
        "size": (pairs.size, pairs.first(1).size),
        "of one": pairs.coefficients(vectors[0]),
        "of rows": pairs.first(2).coefficients(vectors),
    }
    ways = [
        pairs.project(vectors),
        pairs.project(vectors[0])[None],
        pairs.project(vectors, out=torch.empty_like(vectors)),
        pairs.project_out(vectors),
        pairs.project_out(vectors[1])[None],
        pairs.project_out(vectors, out=vectors.clone()),
    ]
    return numbers, torch.cat(ways)


def low_rank(inner: Either, problem: Problem) -> Found:
    vectors = problem.random(4)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    vectors[2] = 0.0
    vectors[3] = torch.nn.functional.normalize(vectors[0] + 1e-3 * vectors[1], dim=0)
    values = torch.tensor([2.0, 0.5, 4.0, 1.0], **DTYPE)
    curvature = LowRankCurvature(values, inner.mine(vectors), inner)
    eigen = curvature.orthogonalised()
    draws = inner.mine(problem.random(2, 1))
    numbers = {
        "size": (curvature.size, eigen.size, eigen.k),
        "largest": curvature.largest,
        "coefficients": curvature.coefficients(draws),
        "eigenvalues": eigen.eigenvalues,
    }
    return numbers, eigen.project(draws)


def corrected(inner: Either, problem: Problem) -> Found:
    other = problem.matrix + symmetric(torch.linspace(-1, 1, problem.size, **DTYPE), 7)
    offset = problem.off @ (other - problem.matrix)
    cheap = inner.products(lambda rows: rows @ other)
    both = ControlVariate(cheap, inner.mine(problem.off), inner.mine(offset), inner)
    return {}, both(inner.mine(problem.random(2)))


def solved(inner: Either, problem: Problem) -> Found:
    found = top_eigenpairs(
        problem.matmat(inner),
        problem.size,
        problem.k,
        tol=1e-8,
        max_angle=1e-4,
        seed=problem.seed,
        inner=inner,
        **DTYPE,
    )
    numbers = {
        "products": (found.products, found.ritz_steps, found.converged, found.basis.size),
        "eigenvalues": torch.cat([found.basis.eigenvalues, found.guard.eigenvalues]),
        "residuals": torch.cat([found.basis.residuals, found.guard.residuals]),
        "ends": torch.tensor([found.lowest, found.mean, found.asymmetry]),
    }
    return numbers, found.basis.project(inner.mine(problem.random(2)))


def probed(inner: Either, problem: Problem) -> Found:
    found = [
        probe(
            problem.matmat(inner),
            *problem.pairs(inner),
            seed=problem.seed,
            vectors=m,
            guarded=guarded,
            **problem.ends,
        )
        for m, guarded in ((1, True), (2, False), (3, True))
    ]
    numbers = {
        str(i): torch.tensor([each.staleness, each.bound, each.shrunk, each.effective_rank or -1])
        for i, each in enumerate(found)
    }
    guards = [each.guard for each in found]
    numbers |= {"guards": torch.stack([torch.cat([g.eigenvalues, g.residuals]) for g in guards])}
    return numbers, torch.cat([g.vectors for g in guards])


def refined(inner: Either, problem: Problem) -> Found:
    found = refine(problem.matmat(inner), *problem.pairs(inner), **problem.ends)
    told = [found.before, found.after, found.sine, found.effective_rank]
    numbers = {
        "told": torch.tensor(told),
        "values": torch.cat([found.basis.eigenvalues, found.guard.eigenvalues]),
        "residuals": torch.cat([found.basis.residuals, found.guard.residuals]),
        "sizes": (found.basis.size, found.guard.size),
    }
    draws = inner.mine(problem.random(2))
    return numbers, torch.cat([found.basis.project(draws), found.guard.project_out(draws)])


def looked(inner: Either, problem: Problem) -> Found:
    """Outside of the first two, with a guard of the bulk: the third is found."""
    pairs, _ = problem.pairs(inner)
    bulk = problem.random(1) - (problem.random(1) @ problem.off.T) @ problem.off
    guard = torch.nn.functional.normalize(bulk)
    value = torch.linalg.vecdot(guard, guard @ problem.matrix)
    found = look_outside(
        problem.matmat(inner),
        pairs.first(2),
        EigenBasis(value, inner.mine(guard), value.abs(), inner),
        lowest=problem.ends["lowest"],
        seed=problem.seed,
    )
    guard = found.guard
    numbers = {"missed": found.missed, "found": torch.cat([guard.eigenvalues, guard.residuals])}
    return numbers, guard.project(inner.mine(problem.random(1, 2)))


def density(inner: Either, problem: Problem) -> Found:
    found = lanczos_quadrature(
        problem.matmat(inner),
        problem.size,
        probes=3,
        steps=5,
        seed=problem.seed,
        inner=inner,
        **DTYPE,
    )
    return {"nodes": found.nodes, "weights": found.weights, "size": found.size}, torch.zeros(0)


def traced(inner: Either, problem: Problem, products: int = 12) -> Found:
    options: Any = {"seed": problem.seed, "inner": inner, **DTYPE}
    found = hutch_plus_plus(problem.matmat(inner), problem.size, products, **options)
    return {"trace": torch.tensor([found.value, found.standard_error])}, torch.zeros(0)


def traced_exactly(inner: Either, problem: Problem) -> Found:
    return traced(inner, problem, problem.size)


def scattered(inner: Either, problem: Problem) -> Found:
    pairs, guard = problem.pairs(inner)
    scatter = Scatter(pairs, guard, problem.seed)
    rows, total = inner.mine(problem.off), torch.zeros_like(inner.mine(problem.off))
    for seed in range(5):
        noise = 0.05 * problem.random(problem.size, seed)
        batch = (problem.matrix + (noise + noise.T) / 2) / 5
        products = inner.products(lambda rows, batch=batch: rows @ batch)(rows)
        scatter.see(products)
        total += products
    scatter.gather(lambda tensor: tensor)
    below = float(guard.eigenvalues)
    sine = scatter.sine(total, problem.matmat(inner), pairs.eigenvalues, below, 0.25)
    assert 0 < sine < 0.5
    return {"sine": sine}, torch.zeros(0)


CASES = [
    arithmetic,
    span_of,
    basis,
    low_rank,
    corrected,
    solved,
    probed,
    refined,
    looked,
    density,
    traced,
    traced_exactly,
    scattered,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@given(size=st.integers(30, 60), data=st.data(), seed=st.integers(0, 99))
def test_all_ranks_together_find_what_one_process_finds(case, size, data, seed):
    problem = Problem(size, seed)
    numbers, rows = case(Unsplit(), problem)
    sizes = data.draw(splits(size))
    found = on_ranks(sizes, lambda inner: case(inner, problem))
    for name, expected in numbers.items():
        value = alike([theirs[name] for theirs, _ in found])
        if isinstance(expected, tuple):
            assert value == expected, name
        else:
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(joined([theirs for _, theirs in found]), rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [[300, 0], [299, 0, 1], [100] * 3, [1] * 4 + [296]])
@pytest.mark.parametrize("k", [1, 5])
def test_a_solve_with_restarts_takes_the_same_products(sizes, k):
    """Of a size at which the rows do not all stay, in float32, with breakdowns: rank 40."""
    diagonal = torch.cat([torch.linspace(10.0, 1.0, 40), torch.zeros(260)])

    def solve(inner: Either) -> Any:
        matrix = inner.products(lambda rows: rows * diagonal)
        return top_eigenpairs(matrix, 300, k, tol=1e-4, seed=k, inner=inner)

    expected = solve(Unsplit())
    found = on_ranks(sizes, solve)
    for name in ("products", "ritz_steps", "converged", "lowest", "mean", "asymmetry"):
        value = alike([getattr(solution, name) for solution in found])
        assert value == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-5), name
    values = alike([solution.basis.eigenvalues for solution in found])
    torch.testing.assert_close(values, expected.basis.eigenvalues, rtol=1e-4, atol=0)
    rows = joined([solution.basis.vectors for solution in found])
    assert largest_sine(rows, expected.basis.vectors) < 2e-3
    check_orthonormal("rows", rows, torch.finfo(torch.float32).eps)


def calls(function: Callable[[SplitInnerProduct], Any]) -> tuple[Any, int]:
    def counted(inner: SplitInnerProduct) -> tuple[Any, int]:
        found = function(inner)
        return found, inner.calls

    return on_ranks([20, 0, 280], counted)[0]


def test_how_often_is_summed_over_ranks():
    """Each sum is a round trip; beside the products of a sharded model these few are nothing."""
    problem = Problem(300, 0)
    (numbers, _), found = calls(lambda inner: solved(inner, problem))
    products = numbers["products"][0]
    # Two start vectors, each twice outside of the rows before it and once over its norm; at the end
    # one Gram matrix, and the projection of this test.
    assert found <= 3 * products + 2 * 3 + 2
    bounds = {probed: 3 * 3, refined: 5 + 2, density: 3 * (1 + 2 * 5), scattered: 5 + 4}
    # The look takes two sums in each product beside the three of the Krylov space.
    bounds |= {looked: (3 + 2) * 12 + 8, traced: 5 + 1, traced_exactly: 1, corrected: 2, basis: 8}
    for case, most in bounds.items():
        assert calls(lambda inner, case=case: case(inner, problem))[1] <= most, case.__name__


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_on_one_rank_is_an_error_on_all(rank, bad):
    problem, errors = Problem(40, 0), []

    def spoiled(inner: SplitInnerProduct) -> Callable[[Tensor], Tensor]:
        matmat = problem.matmat(inner)

        def products(rows: Tensor) -> Tensor:
            found = matmat(rows)
            if inner.rank == rank:
                found[..., 0] = bad
            return found

        return products

    def each(inner: SplitInnerProduct) -> None:
        products, pairs = spoiled(inner), problem.pairs(inner)
        options: Any = {"inner": inner, **DTYPE}
        for attempt in (
            lambda: top_eigenpairs(products, 40, 3, **options),
            lambda: probe(products, *pairs, seed=0, **problem.ends),
            lambda: refine(products, *pairs, **problem.ends),
            lambda: lanczos_quadrature(products, 40, probes=2, steps=2, **options),
            lambda: hutch_plus_plus(products, 40, 12, **options),
            lambda: hutch_plus_plus(products, 40, 40, **options),
        ):
            with pytest.raises(NonFiniteError):
                attempt()
            errors.append(inner.rank)

    on_ranks([10, 0, 30], each)
    assert sorted(errors) == [0] * 6 + [1] * 6 + [2] * 6


def test_rows_that_are_not_orthonormal_are_refused_on_all_ranks():
    problem, refused = Problem(40, 0), []

    def each(inner: SplitInnerProduct) -> None:
        rows = inner.mine(problem.off)
        if inner.rank == 1:
            rows *= 1.1
        with pytest.raises(ArgumentError, match="orthonormal"):
            check_orthonormal("rows", rows, 1e-16, inner)
        refused.append(inner.rank)

    on_ranks([39, 1, 0], each)
    assert sorted(refused) == [0, 1, 2]
