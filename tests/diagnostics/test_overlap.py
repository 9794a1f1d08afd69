"""Subspaces beside each other: dense projectors, angles that were put in, and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import subspace_optim as so
from subspace_optim.diagnostics import (
    chance_cosine,
    class_gradient_cosines,
    intersection_rank,
    overlap_matrix,
    principal_angles,
    subspace_overlap,
)
from tests.optim.naive import dense_eigenbasis

CLOSE = {torch.float32: 2e-6, torch.float64: 1e-14}
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)
sizes = st.integers(2, 25)


def basis_of(rows: Tensor) -> so.EigenBasis:
    zeros = torch.zeros(len(rows), dtype=rows.dtype)
    return so.EigenBasis(zeros, rows, zeros)


def projector(basis: so.EigenBasis) -> Tensor:
    rows = basis.vectors.double()
    return rows.T @ rows


@dtypes
@settings(max_examples=40)
@given(size=sizes, seed=st.integers(0, 999), data=st.data())
def test_overlap_is_the_trace_of_the_product_of_projectors(
    dtype: torch.dtype, size: int, seed: int, data: st.DataObject
) -> None:
    """Eq. 5, its left side with dense projectors, for dimensions that may differ."""
    a, b = (
        dense_eigenbasis(size, data.draw(st.integers(1, size)), seed + i, dtype) for i in range(2)
    )
    expected = torch.trace(projector(a) @ projector(b)) / math.sqrt(a.k * b.k)
    found = subspace_overlap(a, b)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert float(found) == pytest.approx(float(expected), abs=CLOSE[dtype] * size)
    assert float(subspace_overlap(a.vectors, b)) == float(found)
    assert float(subspace_overlap(a, a)) == pytest.approx(1.0, abs=CLOSE[dtype] * size)
    assert 0 <= found <= 1


def test_overlap_of_equal_dimensions_is_the_mean_of_squared_cosines_of_the_angles() -> None:
    a, b = dense_eigenbasis(20, 5, 0, torch.float64), dense_eigenbasis(20, 5, 1, torch.float64)
    cosines = principal_angles(a, b).cos()
    assert float(subspace_overlap(a, b)) == pytest.approx(float(cosines.square().mean()))


def test_random_subspaces_overlap_as_their_dimensions_do() -> None:
    """Tr(P_A P_B) is k_A k_B / P in the mean over random subspaces."""
    random = torch.Generator().manual_seed(0)

    def draw(k: int) -> Tensor:
        return torch.linalg.qr(torch.randn(60, k, generator=random, dtype=torch.float64)).Q.T

    overlaps = [float(subspace_overlap(draw(3), draw(7))) for _ in range(400)]
    expected, spread = math.sqrt(21) / 60, np.std(overlaps) / 20
    assert abs(np.mean(overlaps) - expected) < 4 * spread


def test_overlap_matrix_holds_every_pair() -> None:
    bases = [dense_eigenbasis(15, k, seed, torch.float32) for seed, k in enumerate((2, 5, 5, 15))]
    matrix = overlap_matrix(bases)
    assert matrix.shape == (4, 4)
    for i, j in itertools.product(range(4), repeat=2):
        expected = torch.trace(projector(bases[i]) @ projector(bases[j]))
        expected /= math.sqrt(bases[i].k * bases[j].k)
        assert float(matrix[i, j]) == pytest.approx(float(expected), abs=1e-5)
    assert matrix.equal(matrix.T)


@dtypes
@pytest.mark.parametrize("angles", [(0.3, 1.2), (1e-5, 0.7, 1.5), (0.0, math.pi / 2), (1e-3,)])
@pytest.mark.parametrize("extra", [0, 2])
def test_angles_are_those_that_were_put_in(
    dtype: torch.dtype, angles: tuple[float, ...], extra: int
) -> None:
    """Pairs of vectors turned by known angles; one of the spaces has ``extra`` rows beside them."""
    k = len(angles)
    frame = dense_eigenbasis(2 * k + extra, 2 * k + extra, 3, torch.float64).vectors
    first, second, others = frame[:k], frame[k : 2 * k], frame[2 * k :]
    phi = torch.tensor(angles, dtype=torch.float64)[:, None]
    turned = phi.cos() * first + phi.sin() * second
    mix = dense_eigenbasis(k, k, 5, torch.float64).vectors
    a = torch.cat([first, others]).to(dtype)
    b = (mix @ turned).to(dtype)
    for found in (principal_angles(a, b), principal_angles(b, a), principal_angles(basis_of(a), b)):
        assert found.dtype == torch.float64
        # Small angles too: their cosine is 1 to rounding, and their sine is not.
        close = 3e-7 if dtype == torch.float32 else 1e-15
        torch.testing.assert_close(found, phi[:, 0], rtol=1e-6, atol=4 * close)


@settings(max_examples=40)
@given(size=sizes, seed=st.integers(0, 999), data=st.data())
def test_angles_are_scipy_s(size: int, seed: int, data: st.DataObject) -> None:
    a, b = (
        dense_eigenbasis(size, data.draw(st.integers(1, size)), seed + i, torch.float64)
        for i in range(2)
    )
    expected = scipy.linalg.subspace_angles(a.vectors.T.numpy(), b.vectors.T.numpy())
    found = principal_angles(a, b).numpy()
    np.testing.assert_allclose(found, np.sort(expected), atol=1e-7)
    assert (np.diff(found) >= 0).all()


@settings(max_examples=40)
@given(classes=st.integers(1, 5), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_the_assignment_is_the_best_of_all(classes: int, k: int, seed: int) -> None:
    """Every assignment is tried."""
    basis = dense_eigenbasis(12, k, seed, torch.float64)
    vectors = torch.randn(classes, 12, generator=torch.Generator().manual_seed(seed)).double()
    found = class_gradient_cosines(5 * vectors, basis)
    cosines = (vectors @ basis.vectors.T).abs() / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.cosines, cosines)
    count = min(classes, k)
    best = max(
        sum(float(cosines[c, u]) for c, u in zip(some, others, strict=True)) / count
        for some in itertools.combinations(range(classes), count)
        for others in itertools.permutations(range(k), count)
    )
    assert found.mean == pytest.approx(best)
    matched = [u for u in found.assignment.tolist() if u >= 0]
    assert len(set(matched)) == len(matched) == count
    assert float(found.assigned.mean()) == found.mean


def test_class_gradients_come_as_any_of_their_forms() -> None:
    basis = dense_eigenbasis(12, 3, 0, torch.float32)
    vectors = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(vectors)
    curvature = so.LowRankCurvature(torch.ones(3), unit)
    expected = class_gradient_cosines(vectors, basis).cosines
    for form in (vectors.double(), unit, -vectors, curvature):
        torch.testing.assert_close(class_gradient_cosines(form, basis).cosines, expected)
    own = class_gradient_cosines(basis, basis)
    assert own.mean == pytest.approx(1.0)
    assert own.assignment.tolist() == [0, 1, 2]
    vectors[1] = 0
    assert class_gradient_cosines(vectors, basis).cosines[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("classes", "k", "size"), [(3, 3, 8), (2, 4, 50), (4, 2, 4)])
def test_chance_is_what_random_directions_reach(classes: int, k: int, size: int) -> None:
    """Against directions that are drawn in all P dimensions and matched by the function itself."""
    mean, deviation = chance_cosine(classes, k, size, draws=2000)
    random = torch.Generator().manual_seed(1)
    basis = basis_of(torch.eye(size, dtype=torch.float64)[:k])
    drawn = [
        class_gradient_cosines(
            torch.randn(classes, size, generator=random, dtype=torch.float64), basis
        ).mean
        for _ in range(1000)
    ]
    assert abs(mean - np.mean(drawn)) < 4 * deviation / math.sqrt(1000)
    assert deviation == pytest.approx(np.std(drawn), rel=0.15)
    assert chance_cosine(classes, k, size, draws=50) == chance_cosine(classes, k, size, draws=50)
    assert chance_cosine(classes, k, size, draws=50, seed=1) != chance_cosine(
        classes, k, size, draws=50
    )


def test_chance_of_the_assignment_is_above_that_of_a_pair() -> None:
    """For large P a single cosine is |N(0, 1/P)|, √(2/πP) in the mean."""
    single, _ = chance_cosine(1, 1, 60_000, draws=4000)
    assert single == pytest.approx(math.sqrt(2 / (math.pi * 60_000)), rel=0.05)
    assigned, _ = chance_cosine(10, 10, 60_000, draws=200)
    assert assigned > 1.5 * single


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [0, 2, 4])
def test_rank_counts_what_is_not_shared(dtype: torch.dtype, shared: int) -> None:
    frame = dense_eigenbasis(30, 8, 0, torch.float64).vectors
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = mix @ torch.cat([frame[:shared], frame[4 : 8 - shared]])
    vectors *= torch.tensor([1e-20, 1.0, 1e6, 1e20], dtype=torch.float64)[:, None]
    basis = basis_of(frame[:4].to(dtype))
    assert intersection_rank(vectors.to(dtype), basis) == 8 - shared


def test_the_rank_s_tolerance_is_that_of_the_argument() -> None:
    """A vector that leaves the span by a sine of 1e-3."""
    frame = torch.eye(5, dtype=torch.float64)
    vector = torch.tensor([[1.0, 0, 1e-3, 0, 0]], dtype=torch.float64)
    basis = basis_of(frame[:2])
    assert intersection_rank(vector, basis) == 3
    assert intersection_rank(vector, basis, rtol=1e-4) == 3
    assert intersection_rank(1e6 * vector, basis, rtol=0.9e-3) == 3
    assert intersection_rank(vector, basis, rtol=1.1e-3) == 2
    zero = torch.zeros(1, 5, dtype=torch.float64)
    assert intersection_rank(zero, basis) == 2


BAD = [
    (lambda a, b: subspace_overlap(a, b.vectors * 2), r"^b is 'off by 3', but must be orthonormal"),
    (lambda a, b: subspace_overlap(a, 3), "^b is 'int', but must be an EigenBasis"),
    (lambda a, b: principal_angles(torch.ones(3), b), r"^a is \(3,\), but must be an EigenBasis"),
    (lambda a, b: principal_angles(a, dense_eigenbasis(9, 2, 0, torch.float64)), "of 6 and 9 para"),
    (lambda a, b: overlap_matrix([]), "^bases is 'an empty sequence'"),
    (lambda a, b: overlap_matrix([a, b.vectors + 1]), r"^bases\[1\] is 'off by"),
    (
        lambda a, b: class_gradient_cosines(torch.ones(2, 5), a),
        r"^the shape of vectors is \(2, 5\)",
    ),
    (lambda a, b: intersection_rank(torch.ones(6), a), r"^the shape of vectors is \(6,\)"),
    (lambda a, b: intersection_rank(torch.ones(2, 6), a, rtol=-1), "^rtol is -1"),
    (lambda a, b: chance_cosine(2, 7, 6), "^k is 7, but must be an integer from 1 to 6"),
    (lambda a, b: chance_cosine(0, 2, 6), "^num_classes is 0"),
    (lambda a, b: chance_cosine(2, 2, 6, draws=1), "^draws is 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message: str) -> None:
    a, b = dense_eigenbasis(6, 2, 0, torch.float64), dense_eigenbasis(6, 3, 1, torch.float64)
    with pytest.raises(so.ArgumentError, match=message):
        call(a, b)
