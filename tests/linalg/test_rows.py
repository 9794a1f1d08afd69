"""The arithmetic of tall bases: what rounding makes of rows, and what passes for orthonormal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.linalg.rows import (
    check_orthonormal,
    exact_gram,
    norm,
    orthonormal_span,
    orthonormalise_,
)
from tests.dense import DTYPES


def rows_of(kind: str, k: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, size, generator=generator, dtype=torch.float64)
    if kind == "equal":  # every addition rounds to the same side for a while
        rows = torch.full((k, size), 0.1 * (1 + seed), dtype=torch.float64)
    elif kind == "heavy":
        rows = rows**9
    elif kind == "positive":
        rows = rows.abs() + 1
    return rows.to(dtype)


NORMALISED = {
    "norm": lambda v: v / v.norm(),
    "sum_of_squares": lambda v: v / (v * v).sum().sqrt(),
    "dot": lambda v: v / torch.dot(v[0], v[0]).sqrt(),
    "functional": lambda v: torch.nn.functional.normalize(v, eps=0.0),
    "in_place": lambda v: v.clone().div_(torch.linalg.vector_norm(v)),
}


@settings(max_examples=400)
@given(
    kind=st.sampled_from(["normal", "equal", "heavy", "positive"]),
    normalise=st.sampled_from(list(NORMALISED.values())),
    size=st.integers(1, 60) | st.sampled_from([1000, 10_000, 100_000]),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 9999),
)
def test_a_row_over_its_norm_is_orthonormal(kind, normalise, size, dtype, seed):
    row = normalise(rows_of(kind, 1, size, dtype, seed))
    check_orthonormal("vectors", row, torch.finfo(dtype).eps)


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["normal", "positive"]),
    size=st.integers(1, 60) | st.sampled_from([1000, 30_000]),
    data=st.data(),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 9999),
)
def test_rows_that_qr_or_the_library_made_are_orthonormal(kind, size, data, dtype, seed):
    k = data.draw(st.integers(1, min(size, 12)))
    rows = torch.linalg.qr(rows_of(kind, k, size, dtype, seed).T).Q.T.contiguous()
    check_orthonormal("vectors", rows, torch.finfo(dtype).eps)
    rows += 1e-3 * rows_of("normal", k, size, dtype, seed + 1) / math.sqrt(size)
    orthonormalise_(rows)
    check_orthonormal("vectors", rows, torch.finfo(dtype).eps)


@given(
    k=st.integers(1, 8),
    rank=st.integers(0, 8),
    decay=st.sampled_from([1.0, 1e-2, 1e-5]),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 9999),
)
def test_the_span_of_rows_that_depend_on_each_other(k, rank, decay, dtype, seed):
    """Combinations of ``rank`` orthonormal rows, the last of them ``decay`` as strong."""
    rank = min(k, rank)
    frame = torch.linalg.qr(rows_of("normal", rank, 200, torch.float64, seed).T).Q.T
    mixed = torch.linalg.qr(rows_of("normal", rank, k, torch.float64, seed + 1).T).Q
    strengths = torch.logspace(0, math.log10(decay), rank, dtype=torch.float64)
    span = orthonormal_span(((mixed * strengths) @ frame).to(dtype))
    assert len(span) >= rank
    if rank:
        check_orthonormal("vectors", span, torch.finfo(dtype).eps)
    # All that was there is in it; in float32 rounding of the rows has turned the weakest.
    outside = frame - frame @ span.double().T @ span.double()
    assert outside.norm() <= 1e2 * torch.finfo(dtype).eps / decay if rank else len(span) == 0


@given(
    k=st.integers(1, 8),
    size=st.sampled_from([8, 100, 5000]),
    dtype=st.sampled_from(list(DTYPES.values())),
    data=st.data(),
)
def test_rows_that_are_off_by_more_than_rounding_are_refused(k, size, dtype, data):
    """Off by a known amount: a row that is too long, or one that leans towards another."""
    epsilon = torch.finfo(dtype).eps
    rows = torch.linalg.qr(rows_of("normal", k, size, torch.float64, 0).T).Q.T.to(dtype)
    off = 3 * epsilon * (k * (32 + 2 * math.sqrt(size)) + size / 16)
    i, j = (data.draw(st.integers(0, k - 1)) for _ in range(2))
    rows[i] += (off / 2 if i == j else off) * rows[j]
    with pytest.raises(ArgumentError, match=r"^vectors is 'off by .*orthonormal rows, up to"):
        check_orthonormal("vectors", rows, epsilon)


@pytest.mark.parametrize("size", [1, 10, 10**7])
@pytest.mark.parametrize("bad", [0.0, 0.9, 1.1, math.nan, math.inf])
def test_no_size_and_no_dtype_lets_everything_pass(size, bad):
    rows = torch.full((1, size), bad / math.sqrt(size))
    with pytest.raises(ArgumentError, match="orthonormal"):
        check_orthonormal("vectors", rows, torch.finfo(torch.bfloat16).eps)


@given(k=st.integers(1, 6), size=st.integers(6, 200), seed=st.integers(0, 99))
def test_the_gram_matrix_of_float32_rows_is_that_of_float64(k, size, seed):
    rows = rows_of("normal", k, size, torch.float32, seed)
    expected = rows.double() @ rows.double().T
    torch.testing.assert_close(exact_gram(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1.0, 1e20, 1e34])
@pytest.mark.parametrize("size", [1, 7, 200_000])
def test_a_length_neither_overflows_nor_vanishes(size, scale, dtype):
    """Of entries whose squares would, in float32; and it is no less exact for being long."""
    v = (scale * rows_of("positive", 1, size, torch.float64, 0)[0]).to(dtype)
    expected = math.sqrt(math.fsum(x * x for x in v.double().tolist()))
    assert norm(v).dtype == torch.float64
    assert float(norm(v)) == pytest.approx(expected, rel=1e-12)
