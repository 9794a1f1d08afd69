"""Dom-LR and Bulk-LR against Definition 4, written out with the dense projector; distances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim import ArgumentError, EigenBasis
from subspace_optim.diagnostics import bulk_lr, distance, dom_lr
from tests.optim.naive import dense_eigenbasis

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def draw_pair(size: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed + 1)
    update, gradient = torch.randn(2, size, generator=random).to(dtype)
    return update, gradient


@dtypes
@settings(max_examples=40)
@given(seed=st.integers(0, 999), size=st.integers(2, 30), data=st.data())
def test_rates_are_those_of_the_definition(
    dtype: torch.dtype, seed: int, size: int, data: st.DataObject
) -> None:
    """η = −⟨Δθ, Pg⟩ / ⟨Pg, Pg⟩, with P of the dominant subspace and with I − P."""
    basis = dense_eigenbasis(size, data.draw(st.integers(1, size - 1)), seed, dtype)
    update, gradient = draw_pair(size, seed, dtype)
    rows, u, g = basis.vectors.double(), update.double(), gradient.double()
    P = rows.T @ rows
    for rate, projector in ((dom_lr, P), (bulk_lr, torch.eye(size, dtype=torch.float64) - P)):
        component = projector @ g
        expected = -(u @ component) / (component @ component)
        found = rate(update, gradient, basis)
        assert (found.shape, found.dtype) == ((), dtype)
        # Relative to |Δθ| / |Pg|, by which the rounding of the inner product is bounded, and to
        # the part of the gradient that is left after the subtraction.
        scale = u.norm() / component.norm() * (g.norm() / component.norm())
        assert abs(float(found) - float(expected)) <= CLOSE[dtype] * float(scale)


@dtypes
def test_gradient_descent_has_its_rate_in_both(dtype: torch.dtype) -> None:
    """With + for descent: what the paper's text says, not its formula."""
    basis = dense_eigenbasis(20, 4, 0, dtype)
    _, gradient = draw_pair(20, 0, dtype)
    for eta in (0.01, 3.0, -0.5):
        for rate in (dom_lr, bulk_lr):
            assert rate(-eta * gradient, gradient, basis).item() == pytest.approx(
                eta, rel=CLOSE[dtype]
            )


@dtypes
def test_a_projected_update_has_its_rate_in_one_and_zero_in_the_other(dtype: torch.dtype) -> None:
    basis = dense_eigenbasis(20, 4, 0, dtype)
    _, gradient = draw_pair(20, 0, dtype)
    dominant, bulk = -0.1 * basis.project(gradient), -0.1 * basis.project_out(gradient)
    for update, rates in ((dominant, (0.1, 0.0)), (bulk, (0.0, 0.1))):
        found = dom_lr(update, gradient, basis).item(), bulk_lr(update, gradient, basis).item()
        assert found == pytest.approx(rates, abs=CLOSE[dtype])


@dtypes
@pytest.mark.parametrize("size", [1, 10, 60])
def test_without_a_component_there_is_no_rate(dtype: torch.dtype, size: int) -> None:
    """What rounding leaves of I − P for k = P is no bulk: NaN, not noise over noise."""
    everything = dense_eigenbasis(size, size, 0, dtype)
    for seed in range(20):
        update, gradient = draw_pair(size, seed, dtype)
        assert bulk_lr(update, gradient, everything).isnan()
        assert not dom_lr(update, gradient, everything).isnan()
    zero = torch.zeros(size, dtype=dtype)
    assert dom_lr(update, zero, everything).isnan()
    assert bulk_lr(update, zero, everything).isnan()
    assert dom_lr(zero, gradient, everything).item() == 0


@dtypes
def test_a_gradient_in_the_bulk_has_no_dominant_rate_until_it_has_a_component(
    dtype: torch.dtype,
) -> None:
    everything = dense_eigenbasis(12, 12, 0, dtype).vectors
    basis = dense_eigenbasis(12, 3, 0, dtype)
    update, _ = draw_pair(12, 0, dtype)
    assert dom_lr(update, everything[7], basis).isnan()
    assert bulk_lr(update, everything[1], basis).isnan()
    small = 1e3 * torch.finfo(dtype).eps
    assert not dom_lr(update, everything[7] + small * everything[1], basis).isnan()
    assert not bulk_lr(update, everything[1] + small * everything[7], basis).isnan()


@pytest.mark.parametrize("rate", [dom_lr, bulk_lr])
def test_vectors_of_another_dtype_are_taken_in_that_of_the_basis(rate: object) -> None:
    assert callable(rate)
    basis = dense_eigenbasis(10, 2, 1, torch.float32)
    update, gradient = draw_pair(10, 4, torch.float32)
    expected = rate(update, gradient, basis)
    found = rate(update.double(), gradient.double(), basis)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_small_bulk_part_keeps_its_rate_beside_a_large_dominant_update() -> None:
    """In float32 rounding of the dominant part is no part of the bulk: down to 1e-4 of it."""
    vectors = torch.linalg.qr(torch.randn(20_000, 10, generator=torch.Generator().manual_seed(0))).Q
    basis = EigenBasis(torch.ones(10), vectors.T.contiguous(), torch.zeros(10))
    v = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(1))
    inside, outside = basis.project(v[0]), basis.project_out(basis.project_out(v[1]))
    for share in (1e-2, 1e-3, 1e-4):
        gradient = inside / inside.norm() + share * outside / outside.norm()
        assert bulk_lr(-0.1 * gradient, gradient, basis).item() == pytest.approx(0.1, rel=1e-2)
        dominant = -0.1 * basis.project(gradient)
        assert bulk_lr(dominant, gradient, basis).item() == pytest.approx(0, abs=1e-2)
        assert dom_lr(dominant, gradient, basis).item() == pytest.approx(0.1, rel=1e-4)


def test_rates_and_distances_of_tiny_and_huge_vectors() -> None:
    basis = dense_eigenbasis(20, 4, 0, torch.float32)
    _, gradient = draw_pair(20, 0, torch.float32)
    for scale in (1e-25, 1e25):
        small = scale * gradient
        for rate in (dom_lr, bulk_lr):
            assert rate(-0.1 * small, small, basis).item() == pytest.approx(0.1, rel=1e-4)
        assert distance(small, 0 * small).item() == pytest.approx(scale * gradient.norm().item())


def test_distance_is_the_norm_of_the_difference() -> None:
    theta, start = draw_pair(30, 0, torch.float64)
    assert distance(theta, start).item() == pytest.approx(sum((theta - start) ** 2) ** 0.5)
    assert distance(start, start).item() == 0
    with pytest.raises(ArgumentError, match=r"^the shape of start is \(29,\)"):
        distance(theta, start[1:])
