"""Probes and refinement of an eigenbasis against dense matrices, whose angles are known exactly."""

import functools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from subspace_optim._validation import NonFiniteError
from subspace_optim.linalg import EigenBasis
from subspace_optim.linalg.refinement import (
    FAILURE_PROBABILITY,
    Probe,
    Refinement,
    least_overlap,
    probe,
    refine,
    total_staleness,
    vectors_needed,
)
from subspace_optim.linalg.rows import largest_sine
from tests.dense import symmetric

SIZE, K = 80, 4
TOP = [10.0, 8.0, 6.0, 5.0, 2.0]
"""λ_1 … λ_4, then the guard's; the rest of the bulk is below."""


def bulk(low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, SIZE - len(TOP), dtype=torch.float64)


def matrix(rest: Tensor | None = None, seed: int = 0) -> Tensor:
    spectrum = torch.tensor(TOP, dtype=torch.float64)
    return symmetric(torch.cat([spectrum, bulk() if rest is None else rest]), seed)


def top(dense: Tensor, n: int = K) -> Tensor:
    """The top eigenvectors, one a row."""
    return torch.linalg.eigh(dense).eigenvectors.T.flip(0)[:n].contiguous()


def pairs(dense: Tensor) -> tuple[EigenBasis, EigenBasis]:
    """The exact basis and guard."""
    values, vectors = torch.linalg.eigvalsh(dense).flip(0), top(dense, K + 1)
    none = torch.zeros(K + 1, dtype=torch.float64)
    return (
        EigenBasis(values[:K], vectors[:K], none[:K]),
        EigenBasis(values[K : K + 1], vectors[K:], none[K:]),
    )


def perturbed(dense: Tensor, size: float, seed: int = 1) -> Tensor:
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed)).double()
    return dense + size * (noise + noise.T) / math.sqrt(8 * SIZE)


def outside(dense: Tensor, basis: EigenBasis) -> Tensor:
    """The rows ``(I − P) H v_i``."""
    V = basis.vectors
    return V @ dense - (V @ dense @ V.T) @ V


def ends(dense: Tensor) -> dict[str, float]:
    """What is known of the whole spectrum."""
    values = torch.linalg.eigvalsh(dense)
    return {"lowest": float(values[0]), "mean": float(values.mean())}


def look(
    dense: Tensor, basis: EigenBasis, guard: EigenBasis, seed: int = 0, vectors: int = 1
) -> Probe:
    return probe(lambda rows: rows @ dense, basis, guard, seed=seed, vectors=vectors, **ends(dense))


def renew(dense: Tensor, basis: EigenBasis, guard: EigenBasis) -> Refinement:
    return refine(lambda rows: rows @ dense, basis, guard, **ends(dense))


def sine(first: Tensor, second: Tensor) -> float:
    return float(np.sin(scipy.linalg.subspace_angles(first.T.numpy(), second.T.numpy())[0]))


# --- angles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 1.0, 30.0])
def test_the_largest_sine_is_that_of_scipys_subspace_angles(size):
    dense = matrix()
    first, second = top(dense), top(perturbed(dense, size))
    assert largest_sine(first, second) == pytest.approx(sine(first, second), rel=1e-6, abs=1e-15)


def test_the_staleness_bounds_the_sine_of_pairs_with_known_residuals():
    dense = matrix()
    _, guard = pairs(dense)
    for seed in range(20):
        V = torch.linalg.qr((top(dense) + 0.02 * torch.randn(K, SIZE).double()).T).Q.T
        values, rotation = torch.linalg.eigh(V @ dense @ V.T)
        values, V = values.flip(0), rotation.T.flip(0) @ V
        residuals = torch.linalg.vector_norm(V @ dense - values[:, None] * V, dim=1)
        staleness = total_staleness(EigenBasis(values, V, residuals), guard)
        assert sine(V, top(dense)) <= staleness * (1 + 1e-9), seed
        assert staleness <= 10 * sine(V, top(dense))


# --- probes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), [(2, 1), (3, 1), (3, 2), (10, 1), (10, 3), (10, 9), (99, 4)])
@pytest.mark.parametrize("probability", [0.01, 0.05, 0.2])
def test_a_random_subspace_overlaps_less_with_no_more_than_the_probability(k, m, probability):
    exact = scipy.stats.beta(m / 2, (k - m) / 2).cdf(least_overlap(k, m, probability))
    assert exact <= probability * (1 + 1e-9)
    if k >= 2 * m and probability < 0.1:
        assert exact >= 0.7 * probability


def test_all_dimensions_overlap_with_every_direction():
    assert least_overlap(5, 5, 0.05) == 1


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_a_probe_scatters_as_the_number_of_its_vectors_is_chosen_by(vectors):
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.1)
    rank = renew(moved, basis, guard).effective_rank
    squares = np.array([look(moved, basis, guard, s, vectors).staleness ** 2 for s in range(500)])
    variance = 2 * (K / rank - 1) / (vectors * (K + 2)) * (K - vectors) / (K - 1)
    assert squares.var() / squares.mean() ** 2 == pytest.approx(variance, rel=0.25)


def test_as_many_vectors_as_rows_are_exact_and_never_fewer_than_needed():
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.1)
    gaps = (basis.eigenvalues - guard.eigenvalues)[:, None]
    exact = float(torch.linalg.matrix_norm(outside(moved, basis) / gaps)) / shrinkage(moved)
    assert look(moved, basis, guard, 0, K).staleness == pytest.approx(exact, rel=1e-12)
    assert look(moved, basis, guard, 0, K).bound == pytest.approx(exact, rel=1e-12)
    assert [vectors_needed(K, K / (1 + u)) for u in (0.0, 0.1, 0.5, K - 1.0)] == [1, 1, 2, K]
    assert vectors_needed(1, 1.0) == 1


def test_the_square_of_a_probe_has_the_square_of_the_staleness_as_its_mean():
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.1)
    gaps = basis.eigenvalues - guard.eigenvalues
    expected = float((outside(moved, basis) / gaps[:, None]).square().sum())
    found = np.array([look(moved, basis, guard, seed).staleness ** 2 for seed in range(700)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - expected) <= 4 * error
    assert error < 0.04 * expected  # or the line above says nothing


@pytest.mark.parametrize("vectors", [2, 3, K])
def test_a_probe_of_several_vectors_tells_the_effective_rank(vectors):
    """``(k/r − 1) A⁴`` is a polynomial of the Gram matrix, estimated without bias."""
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.1)
    rows = outside(moved, basis) / (basis.eigenvalues - guard.eigenvalues)[:, None]
    squares = torch.linalg.svdvals(rows) ** 2
    expected = float(K * (squares**2).sum() - squares.sum() ** 2)
    probes = [look(moved, basis, guard, seed, vectors) for seed in range(700)]
    found = np.array(
        [(K / p.effective_rank - 1) * (p.staleness * min(1, p.shrunk)) ** 4 for p in probes]
    )
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - expected) <= 4 * error + 1e-9 * expected
    assert error < 0.1 * expected
    assert squares[0].sqrt() <= (expected / K + squares.sum() ** 2 / K) ** 0.25
    assert look(moved, basis, guard, 0, 1).effective_rank is None


@pytest.mark.parametrize("rank", [1, K])
def test_the_bound_of_a_probe_fails_no_more_often_than_stated(rank):
    """Rank 1: one direction of the subspace alone has turned, in any way it likes."""
    dense = matrix()
    basis, guard = pairs(dense)
    gaps = (basis.eigenvalues - guard.eigenvalues)[:, None]
    weights = torch.randn(K, rank, generator=torch.Generator().manual_seed(3)).double()
    away = torch.linalg.eigh(dense).eigenvectors.T[:rank]
    turned = 1e-3 * gaps * (weights @ away)  # the rows (I − P) H v_i
    moved = dense + turned.T @ basis.vectors + basis.vectors.T @ turned
    largest = float(torch.linalg.matrix_norm(turned / gaps, 2))
    tries = 800
    failed = sum(look(moved, basis, guard, seed).bound < largest for seed in range(tries)) / tries
    allowed = FAILURE_PROBABILITY + 3 * math.sqrt(FAILURE_PROBABILITY / tries)
    assert failed <= allowed
    if rank == 1:
        assert failed >= FAILURE_PROBABILITY / 2, "the bound is wider than it need be"


def shrinkage(moved: Tensor) -> float:
    """How much smaller the gaps of `pairs(matrix())` are at ``moved``, weighed by 1/g_i²."""
    basis, guard = pairs(matrix())
    gaps = basis.eigenvalues - guard.eigenvalues
    quotients = torch.einsum("ip,pq,iq->i", basis.vectors, moved, basis.vectors)
    last = guard.vectors[0] @ moved @ guard.vectors[0]
    below = max(float(guard.eigenvalues), float(last))
    return min(1.0, float(((quotients - below) / gaps**2).sum() / (1 / gaps).sum()))


def test_a_probe_sees_eigenvalues_fall_though_no_vector_turns():
    dense = matrix()
    basis, guard = pairs(dense)
    V = basis.vectors
    shift = torch.diag(torch.tensor([0.0, 0.0, -1.5, -1.5], dtype=torch.float64))
    moved = dense + V.T @ shift @ V
    exact = look(moved, basis, guard, 0, K)
    assert exact.shrunk == pytest.approx(shrinkage(moved), rel=1e-10)
    assert exact.shrunk < 0.71
    assert exact.staleness < 1e-12
    seen = [look(moved, basis, guard, seed).shrunk for seed in range(200)]
    assert np.median(seen) == pytest.approx(exact.shrunk, abs=0.1)
    gone = look(dense - 4 * V.T @ V, basis, guard)  # λ_4 = 1, below the guard's 2
    assert gone.shrunk < 0.5


def diagonal_pairs(values: torch.Tensor, size: int) -> tuple[EigenBasis, EigenBasis]:
    """The first unit vectors as eigenvectors, and the next as a guard of eigenvalue 1."""
    k = len(values)
    basis = EigenBasis(values, torch.eye(k, size).double(), torch.zeros_like(values))
    guard = torch.eye(size)[k : k + 1].double()
    return basis, EigenBasis(values.new_ones(1), guard, values.new_zeros(1))


@pytest.mark.parametrize("fallen", range(3))
@pytest.mark.parametrize("top", [5.0, 40.0, 400.0])
def test_a_probe_shows_an_eigenvalue_that_has_fallen_whatever_the_gaps(top, fallen):
    basis, guard = diagonal_pairs(torch.tensor([top, 3, 2.9]).double(), 30)
    present = torch.cat([basis.eigenvalues, torch.ones(27)])
    present[fallen] = -5.0
    options = {"lowest": -5.0, "mean": 1.0, "level": 1.0}
    for vectors, least_often in ((1, 160), (2, 190), (3, 200)):
        seen = [
            probe(lambda v: v * present, basis, guard, seed=seed, vectors=vectors, **options).least
            for seed in range(200)
        ]
        assert sum(v == pytest.approx(-5.0, rel=1e-9) for v in seen) >= least_often


@pytest.mark.parametrize("seed", range(20))
def test_pairs_that_have_turned_among_each_other_have_not_fallen(seed):
    values = torch.tensor([40.0, 3.0, 2.9]).double()
    basis, guard = diagonal_pairs(values, 30)
    angle = torch.tensor([[0.0, 0.3, 0.2], [-0.3, 0.0, 0.1], [-0.2, -0.1, 0.0]]).double()
    turned = torch.linalg.matrix_exp(angle)
    matrix = torch.diag(torch.cat([values, torch.ones(27)]).double())
    matrix[:3, :3] = turned @ torch.diag(values) @ turned.T
    options = {"lowest": 1.0, "mean": 1.0, "level": 1.0}
    found = probe(lambda v: v @ matrix, basis, guard, seed=seed, **options)
    assert found.least >= 1.0, "no quotient of vectors in their span is lower than 2.9"


def test_a_probe_takes_two_products_and_leaves_the_basis_as_it_was():
    dense, calls = matrix(), []
    basis, guard = pairs(dense)
    before = basis.vectors.clone(), guard.vectors.clone()

    def count(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ dense

    probe(count, basis, guard, lowest=-1.0, mean=0.0, seed=0)
    assert calls == [2]
    assert torch.equal(basis.vectors, before[0])
    assert torch.equal(guard.vectors, before[1])


def test_the_guard_finds_a_direction_that_rises_from_the_bulk_within_a_few_probes():
    """It is no neighbour of the guard, and no row of the basis is coupled to it."""
    dense = matrix()
    basis, guard = pairs(dense)
    entering = torch.linalg.eigh(dense).eigenvectors[:, 3]
    moved = dense + 8 * torch.outer(entering, entering)
    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).double()
    mixed = guard.vectors[0] + 0.01 * noise
    guard = EigenBasis(guard.eigenvalues, (mixed / mixed.norm())[None], guard.residuals)
    for seed in range(8):
        guard = look(moved, basis, guard, seed).guard
    assert float(guard.eigenvalues) > TOP[K - 1], "nobody would notice"
    assert abs(float(guard.vectors[0] @ entering)) > 0.9
    assert look(moved, basis, guard).bound == 1


# --- refinement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 1.0])
def test_a_refinement_turns_the_basis_to_the_new_eigenvectors(size):
    dense = matrix()
    moved = perturbed(dense, size)
    basis, guard = pairs(dense)
    result = renew(moved, basis, guard)
    before = sine(basis.vectors, top(moved))
    after = sine(result.basis.vectors, top(moved))
    gram = result.basis.vectors @ result.basis.vectors.T
    assert (gram - torch.eye(K)).abs().max() < 1e-13
    assert before <= result.before * (1 + 0.1 * size)
    assert after <= result.after * (1 + size)
    assert after <= before / 3
    assert result.sine == pytest.approx(sine(basis.vectors, result.basis.vectors), rel=1e-6)


@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_eigenvalues_are_better_than_those_of_rayleigh_and_ritz(size):
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, size)
    true = torch.linalg.eigvalsh(moved).flip(0)[:K]
    V = torch.cat([basis.vectors, guard.vectors])
    ritz = torch.linalg.eigvalsh(V @ moved @ V.T).flip(0)[:K]
    found = renew(moved, basis, guard).basis.eigenvalues
    assert (found.diff() <= 0).all()
    assert (found - true).abs().max() < (ritz - true).abs().max() / 3


def test_what_remains_is_what_the_shift_leaves_of_each_direction():
    """A residual along an eigenvector of the bulk is left with (μ − ρ)/(λ − ρ) of the angle."""
    dense = matrix()
    basis, guard = pairs(dense)
    values, vectors = torch.linalg.eigh(dense)
    rho = float(values[: SIZE - K].mean())
    for index in (0, 20, SIZE - K - 2):  # anywhere in the bulk but at the guard
        mu, angle = float(values[index]), 1e-3
        old = basis.vectors.clone()
        old[0] = math.cos(angle) * old[0] + math.sin(angle) * vectors[:, index]
        result = renew(dense, EigenBasis(basis.eigenvalues, old, basis.residuals), guard)
        left = sine(result.basis.vectors, basis.vectors) / angle
        assert left == pytest.approx(abs(mu - rho) / (TOP[0] - rho), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_adding_a_multiple_of_the_identity_changes_no_vector(shift):
    dense = matrix()
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.1)
    plain = renew(moved, basis, guard)
    shifted = renew(moved + shift * torch.eye(SIZE), basis, guard)
    assert sine(plain.basis.vectors, shifted.basis.vectors) < 1e-9
    assert torch.allclose(plain.basis.eigenvalues + shift, shifted.basis.eigenvalues)
    assert plain.after == pytest.approx(shifted.after, rel=1e-6)


@pytest.mark.parametrize("low", [-30.0, -1000.0])
def test_a_spectrum_that_reaches_far_down_does_not_take_the_basis_with_it(low):
    """Plain power iteration would turn to the eigenvalue of the largest magnitude."""
    rest = bulk()
    rest[0] = low
    dense = matrix(rest)
    basis, guard = pairs(dense)
    moved = perturbed(dense, 0.05)
    for _ in range(6):
        result = renew(moved, basis, guard)
        basis, guard = result.basis, result.guard
    assert sine(basis.vectors, top(moved)) <= sine(top(dense), top(moved))


def test_a_direction_that_has_overtaken_the_last_one_takes_its_place():
    dense = matrix()
    basis, guard = pairs(dense)
    entering, leaving = guard.vectors[0], basis.vectors[-1]
    moved = dense + 4 * torch.outer(entering, entering)  # 2 → 6 against 5
    result = renew(moved, basis, guard)
    assert sine(result.basis.vectors, top(moved)) < 1e-7
    assert abs(float(result.guard.vectors[0] @ leaving)) > 1 - 1e-12
    assert result.sine == pytest.approx(1.0)


def test_all_of_the_space_needs_no_guard():
    dense = symmetric(torch.tensor([3.0, 1.0, -2.0]).double())
    values = torch.linalg.eigvalsh(dense).flip(0)
    whole = EigenBasis(values, top(dense, 3), torch.zeros(3).double())
    none = EigenBasis(values[:0], whole.vectors[:0], values[:0])
    assert total_staleness(whole, none) == 0
    assert look(dense, whole, none).bound == 0
    moved = dense + torch.diag(torch.tensor([0.5, -0.2, 0.1]).double())
    result = renew(moved, whole, none)
    assert (result.before, result.after) == pytest.approx((0, 0), abs=1e-12)
    assert torch.allclose(result.basis.eigenvalues, torch.linalg.eigvalsh(moved).flip(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("action", [functools.partial(probe, seed=0), refine])
def test_a_product_that_is_not_finite_is_an_error(action, bad):
    dense = matrix()
    basis, guard = pairs(dense)
    with pytest.raises(NonFiniteError, match="not finite"):
        action(lambda rows: rows * bad, basis, guard, lowest=0.0, mean=0.0)
