"""Complementarity problems, whose conditions tell a solution from anything else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls

from subspace_optim.linalg.complementarity import solve_complementarity

dimensions, seeds = st.integers(1, 5), st.integers(0, 2**16)


def symmetric(matrices):
    return (matrices + matrices.swapaxes(-1, -2)) / 2


def semidefinite_map(rng, k, rank):
    """``B[X] = Σ_n ⟨M_n, X⟩ M_n``, of this rank at most."""
    M = symmetric(rng.standard_normal((rank, k, k)))
    return np.einsum("nij,nlm->ijlm", M, M)


def applied(B, X):
    return np.einsum("ijlm,lm->ij", B, X)


def violation(A, B, X):
    """By how much the three conditions are missed, each relative to what it is about."""
    S = A + applied(B, X)
    size, scale = np.linalg.norm(A), np.linalg.norm(X) or 1.0
    assert np.allclose(X, X.T, rtol=0, atol=1e-12 * scale)
    lowest_x, lowest_s = np.linalg.eigvalsh(X)[0], np.linalg.eigvalsh(symmetric(S))[0]
    return max(-lowest_x / scale, -lowest_s / size, abs(np.vdot(X, S)) / (size * scale))


@given(k=dimensions, rank=st.integers(1, 20), positive=st.integers(0, 5), seed=seeds)
def test_what_has_a_solution_is_solved(k, rank, positive, seed):
    """A is made from a pair X, S that fulfils the conditions: of any ranks, and any rank of B."""
    rng = np.random.default_rng(seed)
    Q, r = np.linalg.qr(rng.standard_normal((k, k)))[0], min(positive, k)
    X = (Q[:, :r] * rng.exponential(size=r)) @ Q[:, :r].T
    S = (Q[:, r:] * rng.exponential(size=k - r)) @ Q[:, r:].T
    B = 10 ** rng.uniform(-6, 6) * semidefinite_map(rng, k, rank)
    A = symmetric(S - applied(B, X))
    found = solve_complementarity(A, B)
    assert violation(A, B, found) < 1e-7
    if rank >= k * (k + 1) / 2:  # B is definite, and there is one solution
        condition = np.linalg.cond(B.reshape(k * k, k * k)[np.ix_(*2 * [upper(k)])])
        assert np.linalg.norm(found - X) <= 1e-6 * condition * max(1.0, np.linalg.norm(X))


def upper(k):
    i, j = np.triu_indices(k)
    return k * i + j


@given(k=dimensions, seed=seeds)
def test_commuting_matrices_are_a_problem_of_numbers(k, seed):
    """Of diagonal matrices the solution is the nonnegative least squares of another library."""
    rng = np.random.default_rng(seed)
    factor, a = rng.standard_normal((k, k)) + 2 * np.eye(k), rng.standard_normal(k)
    B = np.einsum("ij,lm,il->ijlm", np.eye(k), np.eye(k), factor.T @ factor)
    expected, _ = nnls(factor, -np.linalg.solve(factor.T, a))
    found = solve_complementarity(np.diag(a), B)
    scale = max(1.0, np.abs(expected).max()) * np.linalg.cond(factor) ** 2
    np.testing.assert_allclose(found, np.diag(expected), rtol=0, atol=1e-6 * scale)


@given(seed=seeds)
def test_the_minimum_by_brute_force(seed):
    """``X = RRᵀ`` is searched without any condition, from several starts."""
    rng = np.random.default_rng(seed)
    B, A = semidefinite_map(rng, 2, 8) / 8, symmetric(rng.standard_normal((2, 2)))

    def objective(X):
        return np.vdot(X, applied(B, X)) / 2 + np.vdot(A, X)

    def at_root(r):
        return objective(r.reshape(2, 2) @ r.reshape(2, 2).T)

    searched = min(minimize(at_root, rng.standard_normal(4)).fun for _ in range(5))
    found = objective(solve_complementarity(A, B))
    assert found == pytest.approx(searched, rel=1e-4, abs=1e-6)
    assert found <= searched + 1e-7


@given(k=dimensions, seed=seeds)
def test_a_definite_matrix_needs_nothing(k, seed):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((k, k))
    assert not solve_complementarity(root @ root.T, semidefinite_map(rng, k, 3)).any()


@pytest.mark.parametrize("negative", [1e-12, 1e-3, 1.0, 1e9])
def test_one_number_is_a_quotient(negative):
    found = solve_complementarity(np.array([[-negative]]), np.full((1, 1, 1, 1), 7e-5))
    assert found.item() == pytest.approx(negative / 7e-5, rel=1e-8)


def test_what_has_no_solution_is_told():
    """``B[X]`` is never larger than zero where A is −1: in the second direction, or anywhere."""
    A, B = np.diag([1.0, -1.0]), np.zeros((2, 2, 2, 2))
    assert solve_complementarity(A, B) is None
    B[0, 0, 0, 0] = 1.0
    assert solve_complementarity(A, B) is None
    indefinite = np.diag([1.0, -1.0])  # Σ⟨M, X⟩M with the sign of ⟨M, X⟩ cannot lift both
    assert solve_complementarity(-np.eye(2), np.einsum("ij,lm", *2 * [indefinite])) is None
