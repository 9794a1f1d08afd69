"""χ_k against the definition, written out with the dense projector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_optim.diagnostics import alignment
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
