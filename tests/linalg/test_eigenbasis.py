"""``EigenBasis`` against the closed form of a projection."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspace_optim._validation import ArgumentError
from subspace_optim.linalg import EigenBasis
from tests.dense import DTYPES, projector, symmetric


def random_basis(k: int, size: int, dtype: torch.dtype, seed: int = 0) -> EigenBasis:
    spectrum = torch.linspace(2, -1, size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(symmetric(spectrum, seed))
    top = vectors.T.flip(0)[:k].contiguous()
    return EigenBasis(values.flip(0)[:k].to(dtype), top.to(dtype), torch.zeros(k, dtype=dtype))


@given(
    size=st.integers(1, 12),
    data=st.data(),
    rows=st.none() | st.integers(0, 3),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 99),
)
def test_projections_are_the_closed_form(size, data, rows, dtype, seed):
    k = data.draw(st.integers(1, size))
    basis = random_basis(k, size, dtype, seed)
    shape = (size,) if rows is None else (rows, size)
    v = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    P = projector(basis.vectors.double())
    exact, tolerance = v.double(), {"rtol": 0, "atol": 50 * torch.finfo(dtype).eps}

    for result, expected in [
        (basis.coefficients(v), exact @ basis.vectors.double().T),
        (basis.project(v), exact @ P),
        (basis.project_out(v), exact @ (torch.eye(size, dtype=torch.float64) - P)),
    ]:
        assert result.dtype == dtype
        assert result.shape == expected.shape
        torch.testing.assert_close(result.double(), expected, **tolerance)


def test_projection_onto_axes_keeps_those_coordinates_and_no_others():
    basis = EigenBasis(torch.tensor([3.0, 2.0]), torch.eye(4)[[2, 0]], torch.zeros(2))
    v = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert basis.coefficients(v).tolist() == [3, 1]
    assert basis.project(v).tolist() == [1, 0, 3, 0]
    assert basis.project_out(v).tolist() == [0, 2, 0, 4]


@given(size=st.integers(1, 8), data=st.data(), seed=st.integers(0, 99))
def test_the_first_pairs_are_those_of_the_largest_eigenvalues(size, data, seed):
    whole = data.draw(st.integers(1, size))
    kept = data.draw(st.integers(0, whole))
    basis = random_basis(whole, size, torch.float64, seed)
    basis = dataclasses.replace(basis, residuals=torch.arange(whole, dtype=torch.float64))
    part = basis.first(kept)
    assert part.k == kept
    for name in ("eigenvalues", "vectors", "residuals"):
        ours, theirs = getattr(part, name), getattr(basis, name)
        assert torch.equal(ours, theirs[:kept])
        assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    expected = v @ projector(basis.vectors[:kept])
    torch.testing.assert_close(part.project(v), expected, rtol=0, atol=1e-14)
    assert not kept or part.eigenvalues.min() >= basis.eigenvalues[kept - 1 :].max()


@pytest.mark.parametrize("k", [-1, 4, 1.0, True, None])
def test_a_basis_has_no_other_number_of_first_pairs(k):
    with pytest.raises(ArgumentError, match=rf"k is {k}, but must be an integer from 0 to 3"):
        random_basis(3, 5, torch.float32).first(k)


def test_shape_dtype_and_device_are_those_of_the_vectors():
    basis = random_basis(2, 5, torch.float64)
    assert (basis.k, basis.size, basis.dtype) == (2, 5, torch.float64)
    assert basis.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vectors_of_another_dtype_are_converted_to_that_of_the_basis(dtype):
    basis = random_basis(2, 5, torch.float32)
    v = torch.arange(10).view(2, 5).to(dtype)  # whole numbers: exact in every dtype
    for method in (basis.coefficients, basis.project, basis.project_out):
        result = method(v)
        assert result.dtype == torch.float32
        assert torch.equal(result, method(v.float()))


@pytest.mark.parametrize("name", ["project", "project_out"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 5)], ids=str)
def test_out_receives_the_result_and_may_be_the_argument(name, shape):
    basis = random_basis(2, 5, torch.float64)
    v = torch.randn(shape, dtype=torch.float64)
    expected, before = getattr(basis, name)(v), v.clone()
    out = torch.full_like(v, torch.nan)
    assert getattr(basis, name)(v, out=out) is out
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    assert torch.equal(v, before)
    assert getattr(basis, name)(v, out=v) is v
    assert torch.allclose(v, expected, rtol=0, atol=1e-14)


def test_projections_leave_their_argument_and_the_basis_as_they_were():
    basis = random_basis(2, 5, torch.float32)
    v = torch.randn(5)
    before, vectors = v.clone(), basis.vectors.clone()
    basis.project(v).zero_()
    basis.project_out(v).zero_()
    basis.coefficients(v).zero_()
    assert torch.equal(v, before)
    assert torch.equal(basis.vectors, vectors)


@pytest.mark.parametrize("name", ["eigenvalues", "vectors", "residuals"])
def test_it_is_a_value_that_nothing_can_be_set_on(name):
    basis = random_basis(2, 5, torch.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(basis, name, getattr(basis, name))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2,), (6,), (2,)), r"vectors is \(6,\), but must be of shape \(k, P\)"),
        (((2,), (1, 2, 6), (2,)), r"vectors is \(1, 2, 6\), but must be of shape \(k, P\)"),
        (((3,), (2, 6), (2,)), r"shape of eigenvalues is \(3,\), but must be \(2,\)"),
        (((2,), (2, 6), (2, 1)), r"shape of residuals is \(2, 1\), but must be \(2,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(shapes, message):
    with pytest.raises(ArgumentError, match=message):
        EigenBasis(*map(torch.zeros, shapes))


@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_combinations_are_those_of_the_vectors(shape):
    basis = random_basis(2, 7, torch.float64)
    c = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, close = c @ basis.vectors, {"rtol": 0, "atol": 1e-15}
    out = torch.full_like(expected, torch.nan)
    assert basis.combine(c, out=out) is out
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(basis.combine(c), expected, **close)
    for columns in (slice(None), slice(2, 5), slice(3, 3)):
        start = torch.ones_like(expected[..., columns])
        out = start.clone()
        assert basis.add_to(out, c, alpha=-2, columns=columns) is out
        torch.testing.assert_close(out, start - 2 * expected[..., columns], **close)
