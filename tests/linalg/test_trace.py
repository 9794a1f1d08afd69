"""Hutch++ against dense matrices, and against its own error bars."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.linalg.trace import Estimate, hutch_plus_plus
from tests.dense import spectra, symmetric
from tests.linalg.test_lanczos import _Watch
from tests.linalg.test_spectral_density import ROUNDING, Matrix, assert_calibrated, dtypes, uniform


@given(spectrum=spectra(40), seed=st.integers(0, 99), more=st.integers(0, 50))
def test_as_many_products_as_rows_give_the_trace(spectrum, seed, more):
    matrix = Matrix(symmetric(spectrum, seed))
    estimate = matrix.trace(max(4, len(spectrum) + more), dtype=torch.float64, seed=seed)
    scale = float(spectrum.abs().max())
    assert estimate.value == pytest.approx(float(spectrum.sum()), abs=1e-12 * scale * len(spectrum))
    assert (estimate.standard_error, estimate.products) == (0.0, len(spectrum))
    assert len(matrix.seen) == len(spectrum)


@pytest.mark.parametrize("products", [4, 5, 6, 7, 50, 100, 149])
def test_the_products_are_those_that_were_asked_for(products):
    matrix = Matrix(symmetric(uniform(-1, 2, 150)))
    estimate = matrix.trace(products)
    assert estimate.products == len(matrix.seen) == products
    assert abs(estimate.value - 75) <= 6 * estimate.standard_error


SPECTRA = {
    "decaying": 10 / torch.arange(1, 61).double() ** 1.5,
    "indefinite": torch.cat([torch.tensor([9.0, 5.0, -7.0]), uniform(-1, 1, 57)]),
    "flat": uniform(0.5, 1.5, 60),
    "negative": -uniform(0.0, 1.0, 60),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_error_bars_of_a_trace_are_calibrated(spectrum):
    """Over 300 matrices and seeds, with 12 samples beside a sketch of 12."""
    estimates = [
        Matrix(symmetric(spectrum, seed)).trace(36, dtype=torch.float64, seed=seed)
        for seed in range(300)
    ]
    pairs = [(estimate.value, estimate.standard_error) for estimate in estimates]
    assert_calibrated(pairs, float(spectrum.sum()))


def test_it_beats_hutchinson_on_a_decaying_spectrum_at_equal_products():
    spectrum = 1 / torch.arange(1, 201).double() ** 2
    dense = symmetric(spectrum)
    errors: dict[str, list[float]] = {"hutch++": [], "hutchinson": []}
    for seed in range(40):
        estimate = Matrix(dense).trace(30, dtype=torch.float64, seed=seed)
        errors["hutch++"].append(estimate.value - float(spectrum.sum()))
        z = torch.randn(30, 200, generator=torch.Generator().manual_seed(seed)).sign().double()
        errors["hutchinson"].append(float(((z @ dense) * z).sum() / 30 - spectrum.sum()))
    plus, plain = (torch.tensor(e).square().mean().sqrt() for e in errors.values())
    assert plus < plain / 10


@dtypes
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_matrix_of_low_rank_is_seen_whole(scale, dtype):
    spectrum = torch.cat([scale * torch.tensor([5.0, 3.0, -2.0, 1.0]).double(), torch.zeros(96)])
    estimate = Matrix(symmetric(spectrum)).trace(30, dtype=dtype)
    assert estimate.value / scale == pytest.approx(7, rel=10 * ROUNDING[dtype])
    assert estimate.standard_error / scale <= 10 * ROUNDING[dtype]


@dtypes
def test_the_trace_of_nothing_is_0(dtype):
    assert Matrix(torch.zeros(50)).trace(12, dtype=dtype) == Estimate(0.0, 0.0, 12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("products", "call"), [(12, 0), (12, 5), (12, 10), (40, 11)])
def test_a_trace_that_is_not_finite_is_an_error(bad, products, call):
    count = 0

    def matmat(rows: Tensor) -> Tensor:
        nonlocal count
        result = rows.clone()
        if count <= call < count + len(rows):
            result[call - count] = bad
        count += len(rows)
        return result

    with pytest.raises(NonFiniteError, match="not finite"):
        hutch_plus_plus(matmat, 40, products)


@pytest.mark.parametrize("products", [3, 0, True, 12.0, None])
def test_fewer_products_than_a_standard_error_takes_are_refused(products):
    matrix = Matrix(torch.ones(20))
    with pytest.raises(ArgumentError, match=f"^products is {products!r}, but must be an integer"):
        matrix.trace(products)
    with pytest.raises(ArgumentError, match=r"^size is 0"):
        hutch_plus_plus(matrix, 0)
    assert not matrix.seen


def test_the_host_is_visited_as_often_for_many_products_as_for_few():
    visits = []
    for products in (10, 60, 99):
        with _Watch() as watch:
            Matrix(symmetric(uniform(-1, 1, 100)).float()).trace(products)
        visits.append(watch.to_host)
    assert len(set(visits)) == 1


def test_the_memory_of_a_trace_is_about_its_products_in_vectors():
    diagonal = torch.linspace(-1, 1, 1 << 14)
    with _Watch() as watch:
        hutch_plus_plus(lambda v: diagonal * v, len(diagonal), 150)
    assert watch.peak <= 4 * len(diagonal) * (150 + 4 * 16)
