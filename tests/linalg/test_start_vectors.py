"""What start vectors would have shown, against eigenvectors whose part in them is prescribed.

The truth is an identity: the parts ``ω`` of the start vectors in an eigenvector ``u`` are ``M d``,
``d`` its parts in the pending rows.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_optim.linalg.start_vectors import SmallProblem, StartVectors

SIZE = 60


def lanczos(matrix, starts, products):
    """Band Lanczos by plain Gram-Schmidt: the multiplied rows and the pending ones."""
    rows, pending = [], list(np.linalg.qr(starts.T)[0].T)
    for _ in range(products):
        q = pending.pop(0)
        rows.append(q)
        w = matrix @ q
        for _ in range(3):
            w = w - np.array([*rows, *pending]).T @ (np.array([*rows, *pending]) @ w)
        pending.append(w / np.linalg.norm(w))
    return np.array(rows), np.array(pending)


def small_problem(matrix, rows, pending, first):
    values, ritz = np.linalg.eigh(rows @ matrix @ rows.T)
    known = np.concatenate([first @ rows.T @ ritz, first @ pending.T], axis=1)
    return SmallProblem(values, known, pending @ matrix @ rows.T @ ritz)


def random_matrix(seed, top=5.0):
    """Symmetric, with one eigenvalue ``top`` above a bulk from −1 to 1."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]
    spectrum = np.linspace(-1, 1, SIZE)
    spectrum[0] = top
    return (q * spectrum) @ q.T, q[:, 0]


@given(seed=st.integers(0, 99), products=st.integers(2, 5), starts=st.integers(1, 2))
def test_the_parts_of_the_start_vectors_are_those_of_the_pending_rows_transferred(
    seed, products, starts
):
    matrix, u = random_matrix(seed)
    first = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(SIZE, starts)))[0].T
    rows, pending = lanczos(matrix, first, products)
    problem = small_problem(matrix, rows, pending, first)
    parts = problem.transfer(5.0, 1e-12) @ (pending @ u)
    np.testing.assert_allclose(parts, first @ u, rtol=1e-6, atol=1e-10)


@given(seed=st.integers(0, 99))
def test_a_restart_multiplies_the_transfers(seed):
    """A second process that begins with the pending rows of the first: the identity, chained."""
    matrix, u = random_matrix(seed)
    first = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(SIZE, 2)))[0].T
    rows, pending = lanczos(matrix, first, 4)
    before = small_problem(matrix, rows, pending, first)
    again, later = lanczos(matrix, pending, 4)
    after = small_problem(matrix, again, later, pending)
    parts = before.transfer(5.0, 1e-12) @ after.transfer(5.0, 1e-12) @ (later @ u)
    np.testing.assert_allclose(parts, first @ u, rtol=1e-6, atol=1e-10)
    chained = StartVectors(SIZE, 1e-16, [(before, np.arange(2))])
    axes = np.linalg.svd(before.transfer(5.0, 1e-12) @ after.transfer(5.0, 1e-12), compute_uv=False)
    expected = math.prod(math.erf(a * math.sqrt(SIZE / 2)) for a in axes)
    assert chained.overlooked(after, 5.0, 1e-12) == pytest.approx(expected, rel=1e-6)


def test_a_row_that_a_restart_leaves_behind_may_hold_anything():
    """What it can hide no later product makes smaller."""
    transfer = SmallProblem(np.zeros(2), np.eye(2, 4), 0.5 * np.eye(2))
    nothing = SmallProblem(np.zeros(1), np.eye(1, 2), np.zeros((1, 1)))
    both = StartVectors(SIZE, 1e-16, [(transfer, np.array([0, 1]))])
    one = StartVectors(SIZE, 1e-16, [(transfer, np.array([0]))])
    fine = SmallProblem(np.zeros(2), np.eye(2, 4), 1e-6 * np.eye(2))
    assert both.overlooked(fine, 1.0, 0.1) < 1e-9
    assert one.overlooked(nothing, 1.0, 0.1) == pytest.approx(math.erf(0.5 * math.sqrt(SIZE / 2)))


@pytest.mark.parametrize("starts", [1, 2])
@pytest.mark.parametrize("products", [2, 4])
def test_hidden_eigenvectors_are_no_likelier_than_told(starts, products):
    """The eigenvector is hidden where all its parts in the start vectors fit into ``M(μ) d``.

    Of a matrix that does not have it: then the small problem is the one that would be found if
    the start vectors had no part in it at all, and the parts that stay hidden are counted.
    """
    generator = np.random.default_rng(0)
    bulk = np.diag(np.linspace(-1, 1, SIZE))
    first = np.linalg.qr(generator.normal(size=(SIZE, starts)))[0].T
    rows, pending = lanczos(bulk, first, products)
    problem = small_problem(bulk, rows, pending, first)
    for at in (1.2, 1.5, 2.0):
        inverse = np.linalg.pinv(problem.transfer(at, 1e-12))
        draws = generator.normal(size=(20_000, starts)) / math.sqrt(SIZE)
        hidden = (np.linalg.norm(draws @ inverse.T, axis=1) <= 1).mean()
        told = StartVectors(SIZE, 1e-16).overlooked(problem, at, 1e-12)
        assert hidden <= told + 0.01
        assert told <= 2 * hidden + 0.02  # a box for an ellipse, no more
