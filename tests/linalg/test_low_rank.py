"""``LowRankCurvature`` against the dense matrix that it stands for."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.linalg import EigenBasis, LowRankCurvature
from tests.dense import DTYPES, projector


def random_terms(C: int, size: int, dtype: torch.dtype, seed: int = 0) -> LowRankCurvature:
    """Unit rows that share a direction, so that none is orthogonal to another."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(C, size, dtype=torch.float64, generator=generator) + 0.5
    values = torch.rand(C, dtype=torch.float64, generator=generator) + 0.1
    rows /= rows.norm(dim=1, keepdim=True)
    return LowRankCurvature(values.to(dtype), rows.to(dtype))


def dense(terms: LowRankCurvature) -> Tensor:
    """The sum, written out."""
    total = torch.zeros(terms.size, terms.size, dtype=torch.float64)
    for value, v in zip(terms.eigenvalues.double(), terms.vectors.double(), strict=True):
        total += value * torch.outer(v, v)
    return total


def check_orthonormal(basis: EigenBasis, ulps: float = 8) -> None:
    V = basis.vectors.double()
    deviation = (V @ V.T - torch.eye(basis.k, dtype=torch.float64)).abs().max()
    assert deviation <= ulps * torch.finfo(basis.dtype).eps


@given(
    C=st.integers(1, 8),
    size=st.integers(1, 20),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 99),
)
def test_the_pairs_are_those_of_the_dense_matrix(C, size, dtype, seed):
    terms = random_terms(C, size, dtype, seed)
    basis = terms.orthogonalised()
    assert (basis.dtype, basis.size) == (dtype, size)
    assert basis.k <= min(C, size)
    assert (basis.eigenvalues.diff() <= 0).all()
    assert not basis.residuals.any()
    check_orthonormal(basis)
    matrix, eps = dense(terms), torch.finfo(dtype).eps
    values = torch.linalg.eigvalsh(matrix).flip(0)
    V, found = basis.vectors.double(), basis.eigenvalues.double()
    assert (found - values[: basis.k]).abs().max() <= 30 * eps * values[0]
    assert values[basis.k :].abs().sum() <= 30 * eps * values[0]
    assert (V.T @ (found[:, None] * V) - matrix).abs().max() <= 50 * eps * values[0]


@given(data=st.data(), dtype=st.sampled_from(list(DTYPES.values())))
def test_coefficients_are_inner_products(data, dtype):
    terms = random_terms(3, 7, dtype)
    shape = data.draw(st.sampled_from([(7,), (1, 7), (4, 7)]))
    v = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = terms.coefficients(v)
    assert (found.shape, found.dtype) == ((*shape[:-1], 3), dtype)
    expected = torch.stack([(v.double() * w).sum(-1) for w in terms.vectors.double()], dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-5, 1e-7, 0.0])
def test_nearly_parallel_terms_give_orthonormal_rows(angle, dtype):
    """Three gradients around one direction: ``μ`` is 3, and about ``angle²`` twice."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(500, 3, dtype=torch.float64, generator=generator)).Q.T
    turns = torch.tensor([[1, 0], [-0.5, 0.75], [-0.5, -0.75]], dtype=torch.float64)
    rows = frame[0] + angle * turns @ frame[1:]
    rows /= rows.norm(dim=1, keepdim=True)
    terms = LowRankCurvature(torch.ones(3, dtype=dtype), rows.to(dtype))
    basis = terms.orthogonalised()
    check_orthonormal(basis)
    eps = torch.finfo(dtype).eps
    resolved = angle**2 > 4 * eps
    assert basis.k == (3 if resolved else 1)
    # Rounding turns a row by ε, and so the small pairs by ε / angle.
    tolerance = 2 * eps / angle if resolved else 2 * eps + angle
    expected = projector(frame[: basis.k])
    assert (projector(basis.vectors.double()) - expected).abs().max() <= tolerance


def test_the_order_of_the_terms_does_not_matter():
    terms = random_terms(5, 30, torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = LowRankCurvature(terms.eigenvalues[order], terms.vectors[order]).orthogonalised()
    basis = terms.orthogonalised()
    torch.testing.assert_close(turned.eigenvalues, basis.eigenvalues, rtol=1e-12, atol=0)
    P, Q = projector(turned.vectors[:2]), projector(basis.vectors[:2])
    torch.testing.assert_close(P, Q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_terms_that_are_not_there_take_part_in_nothing(dtype):
    """A class never seen has v = 0 and λ = 1; a λ of 0 is no direction either."""
    terms = random_terms(4, 9, dtype)
    rows, values = terms.vectors.clone(), terms.eigenvalues.clone()
    rows[1], values[1], values[2] = 0, 1, 0
    basis = LowRankCurvature(values, rows).orthogonalised()
    alone = LowRankCurvature(values[[0, 3]], rows[[0, 3]]).orthogonalised()
    assert basis.k == 2
    tolerance = {"rtol": 0, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(basis.eigenvalues, alone.eigenvalues, **tolerance)
    torch.testing.assert_close(projector(basis.vectors), projector(alone.vectors), **tolerance)


def test_nothing_has_no_pair():
    basis = LowRankCurvature(torch.ones(3), torch.zeros(3, 5)).orthogonalised()
    assert (basis.k, basis.size) == (0, 5)
    v = torch.arange(5.0)
    assert not basis.project(v).any()
    assert torch.equal(basis.project_out(v), v)


def test_it_is_a_value_and_no_projector():
    terms = random_terms(2, 5, torch.float32)
    assert (terms.k, terms.size, terms.dtype) == (2, 5, torch.float32)
    assert terms.device == torch.device("cpu")
    assert not hasattr(terms, "project")
    assert not hasattr(terms, "project_out")
    with pytest.raises(dataclasses.FrozenInstanceError):
        terms.vectors = terms.vectors
    before = terms.eigenvalues.clone(), terms.vectors.clone()
    terms.orthogonalised()
    assert torch.equal(terms.eigenvalues, before[0])
    assert torch.equal(terms.vectors, before[1])


@pytest.mark.parametrize(
    ("values", "rows", "message"),
    [
        (torch.ones(2), torch.ones(5), r"vectors is \(5,\), but must be of shape \(C, P\)"),
        (torch.ones(3), torch.ones(2, 5), r"the shape of eigenvalues is \(3,\), but must be \(2,"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(values, rows, message):
    with pytest.raises(ArgumentError, match=message):
        LowRankCurvature(values, rows)


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["eigenvalues", "vectors"])
def test_what_has_no_pairs_is_refused(where, wrong):
    if where == "vectors" and wrong == -1.0:
        wrong = -torch.inf
    terms = random_terms(2, 5, torch.float32)
    getattr(terms, where)[1] = wrong
    with pytest.raises(ArgumentError, match="at least 0 and finite"):
        terms.orthogonalised()
