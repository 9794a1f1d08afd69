"""χ_k, f_top, c_i² and overlaps against their definitions, with dense projectors and matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_optim import ArgumentError
from subspace_optim.diagnostics import (
    alignment,
    eigenvector_fractions,
    expected_overlap,
    gradient_fraction,
    hessian_gradient_overlap,
)
from tests.dense import spectra, symmetric
from tests.optim.naive import dense_eigenbasis

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-13}
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@dtypes
@settings(max_examples=40)
@given(seed=st.integers(0, 999), size=st.integers(1, 30), data=st.data())
def test_alignment_is_the_norm_of_the_projection_over_the_norm(
    dtype: torch.dtype, seed: int, size: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, size))
    basis = dense_eigenbasis(size, k, seed, dtype)
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    rows = basis.vectors.double()
    dense = (rows.T @ rows @ v.double()).norm() / v.double().norm()
    fraction = alignment(v, basis)
    assert fraction.shape == ()
    assert fraction.dtype == dtype
    torch.testing.assert_close(fraction.double(), dense, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert 0 <= fraction <= 1
    torch.testing.assert_close(alignment(-3 * v, basis), fraction)
    assert bool(fraction == 1) or k < size or abs(float(fraction) - 1) < CLOSE[dtype]


@dtypes
def test_alignment_of_special_vectors(dtype: torch.dtype) -> None:
    basis = dense_eigenbasis(12, 3, 0, dtype)
    everything = dense_eigenbasis(12, 12, 0, dtype)
    zero = torch.zeros(12, dtype=dtype)
    assert alignment(zero, basis).item() == 0.0
    assert alignment(zero, everything).item() == 0.0
    inside = torch.tensor([1.0, -2.0, 0.5], dtype=dtype) @ basis.vectors
    assert alignment(inside, basis).item() == pytest.approx(1.0, abs=CLOSE[dtype])
    outside = everything.vectors[5]
    assert alignment(outside, basis).item() == pytest.approx(0.0, abs=CLOSE[dtype])
    mixed = 3 * everything.vectors[1] + 4 * everything.vectors[7]
    assert alignment(mixed, basis).item() == pytest.approx(0.6, abs=CLOSE[dtype])


def test_rounding_never_lifts_alignment_above_1() -> None:
    basis = dense_eigenbasis(40, 40, 3, torch.float32)
    draws = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    raw = basis.coefficients(draws).norm(dim=1) / draws.norm(dim=1)
    assert bool((raw > 1).any()), "the case does not round upwards"
    assert all(alignment(v, basis) <= 1 for v in draws)


def test_a_vector_of_another_dtype_is_taken_in_that_of_the_basis() -> None:
    basis = dense_eigenbasis(10, 2, 1, torch.float32)
    v = torch.randn(10, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert alignment(v, basis).dtype == torch.float32
    torch.testing.assert_close(alignment(v, basis), alignment(v.float(), basis))
    torch.testing.assert_close(alignment(v.double(), basis), alignment(v.float(), basis))


# The measures of gur_ari_2018.


@dtypes
@settings(max_examples=40)
@given(seed=st.integers(0, 999), size=st.integers(1, 30), data=st.data())
def test_fractions_of_the_squared_gradient(
    dtype: torch.dtype, seed: int, size: int, data: st.DataObject
) -> None:
    """f_top is the squared norm of a dense projection; the c_i² are its parts."""
    k = data.draw(st.integers(1, size))
    basis = dense_eigenbasis(size, k, seed, dtype)
    g = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    rows, v = basis.vectors.double(), g.double()
    top = rows.T @ (rows @ v)
    expected = top.square().sum() / v.square().sum()
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(gradient_fraction(g, basis).double(), expected, **close)
    parts = eigenvector_fractions(g, basis)
    assert (parts.shape, parts.dtype) == ((k,), dtype)
    each = torch.stack([(row @ v).square() for row in rows]) / v.square().sum()
    torch.testing.assert_close(parts.double(), each, **close)
    torch.testing.assert_close(parts.sum(), gradient_fraction(g, basis), **close)


def test_fractions_of_no_gradient_are_0_and_of_a_tiny_one_are_those_of_its_direction() -> None:
    basis = dense_eigenbasis(12, 3, 0, torch.float32)
    assert eigenvector_fractions(torch.zeros(12), basis).tolist() == [0.0, 0.0, 0.0]
    assert gradient_fraction(torch.zeros(12), basis).item() == 0.0
    g = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1e-22, 1e-15, 1e15, 1e30):
        torch.testing.assert_close(
            eigenvector_fractions(scale * g, basis), eigenvector_fractions(g, basis)
        )
        torch.testing.assert_close(alignment(scale * g, basis), alignment(g, basis))
        torch.testing.assert_close(hessian_gradient_overlap(scale * g, g), torch.tensor(1.0))
    nothing = torch.full((12,), torch.nan)
    assert alignment(nothing, basis).isnan()
    assert eigenvector_fractions(nothing, basis).isnan().all()


@dtypes
@settings(max_examples=40)
@given(spectrum=spectra(), seed=st.integers(0, 999))
def test_hessian_gradient_overlap_is_a_cosine(
    dtype: torch.dtype, spectrum: torch.Tensor, seed: int
) -> None:
    """Against gᵀHg / ‖g‖‖Hg‖ with a dense matrix of that spectrum."""
    H = symmetric(spectrum, seed)
    g = torch.randn(len(H), generator=torch.Generator().manual_seed(seed)).double()
    product = H @ g
    found = hessian_gradient_overlap(g.to(dtype), product.to(dtype))
    assert (found.shape, found.dtype) == ((), dtype)
    if float(product.norm()) < 1e-6:
        return
    expected = (g @ H @ g) / (g.norm() * product.norm())
    assert float(found) == pytest.approx(float(expected), abs=10 * CLOSE[dtype])
    assert -1 <= found <= 1


def test_hessian_gradient_overlap_of_special_vectors() -> None:
    H, zero = torch.diag(torch.tensor([3.0, -2.0, 0.0])), torch.zeros(3)
    e1, e2, e3 = torch.eye(3)
    assert hessian_gradient_overlap(e1, H @ e1).item() == 1
    assert hessian_gradient_overlap(e2, H @ e2).item() == -1
    assert hessian_gradient_overlap(e3, H @ e3).isnan()
    assert hessian_gradient_overlap(zero, H @ zero).isnan()
    assert hessian_gradient_overlap(1e-18 * e1, 1e-18 * H @ e1).item() == pytest.approx(1)
    with pytest.raises(ArgumentError, match=r"^the shape of product is \(2,\)"):
        hessian_gradient_overlap(e1, torch.ones(2))


@given(eigenvalues=st.lists(st.floats(0.1, 100), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_expected_overlap_is_that_of_every_corner(eigenvalues: list[float], seed: int) -> None:
    """Eq. 4 holds for each w = Σ ±u_i, not in the mean only."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    k = len(values)
    vectors = dense_eigenbasis(k + 2, k, seed, torch.float64).vectors
    signs = torch.randint(2, (k,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    w = signs.double() @ vectors
    HW = (values * (vectors @ w)) @ vectors
    expected = (w @ HW) / (w.norm() * HW.norm())
    assert float(expected_overlap(values)) == pytest.approx(float(expected))


def test_expected_overlap_of_known_spectra() -> None:
    """λ_i ∝ i gives √(3/4) for many; the paper's estimate."""
    many = torch.arange(1, 10_001, dtype=torch.float64)
    assert float(expected_overlap(many)) == pytest.approx((3 / 4) ** 0.5, rel=1e-4)
    assert float(expected_overlap(torch.full((5,), 1e-30))) == pytest.approx(1.0)
    assert float(expected_overlap(torch.tensor([1.0, -1.0]))) == 0.0
    assert expected_overlap(torch.zeros(3)).isnan()
    assert expected_overlap(torch.zeros(0)).isnan()
