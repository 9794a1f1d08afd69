"""``RoundedBasis`` against dense projectors in float64, of what is held and of what was found."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.memory import AllocationMeter
from subspace_optim.linalg import EigenBasis
from subspace_optim.linalg.rounded import RoundedBasis, rounded, stored
from subspace_optim.linalg.rows import largest_sine
from tests.dense import DTYPES, projector
from tests.linalg.test_eigenbasis import random_basis
from tests.split import alike, joined, on_ranks

BF16 = torch.bfloat16
UNIT = 2.0**-8
"""The most that rounding to 8 significant bits changes an entry by, relative to it."""


def draw(kind: str, k: int, size: int, seed: int) -> Tensor:
    """Orthonormal rows, in float64, whose entries are of one size, or of very many."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, size, generator=generator, dtype=torch.float64)
    if kind == "even":
        rows = rows.sign() * (1 + torch.rand(rows.shape, generator=generator).double())
    if kind == "heavy":
        rows *= torch.exp(3 * torch.randn(size, generator=generator).double())
    return torch.linalg.qr(rows.T).Q.T.contiguous()


def basis_of(rows: Tensor, dtype: torch.dtype = torch.float32) -> EigenBasis:
    values = torch.arange(len(rows), 0, -1).to(dtype)
    return EigenBasis(values, rows.to(dtype), torch.zeros_like(values))


def span(rows: Tensor) -> Tensor:
    """The dense projector onto the span of any rows, in float64."""
    return projector(torch.linalg.qr(rows.double().T).Q.T)


@given(
    size=st.integers(1, 40),
    data=st.data(),
    rows=st.none() | st.integers(0, 3),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 99),
)
def test_it_projects_onto_the_span_of_the_rows_that_are_held(size, data, rows, dtype, seed):
    k = data.draw(st.integers(1, size))
    basis = random_basis(k, size, dtype, seed)
    held = rounded(basis, BF16)
    assert torch.equal(held.rows, basis.vectors.bfloat16())
    assert (held.k, held.size, held.dtype, held.device) == (k, size, dtype, basis.device)
    assert torch.equal(held.eigenvalues, basis.eigenvalues)

    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
    P, V = span(held.rows), held.vectors.double()
    assert held.vectors.dtype == dtype
    torch.testing.assert_close(V @ V.T, torch.eye(k).double(), **tolerance)
    torch.testing.assert_close(V.T @ V, P, **tolerance)
    assert (V - basis.vectors.double()).norm(dim=1).max() <= 1.01 * UNIT * k**0.5

    shape = (size,) if rows is None else (rows, size)
    v = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    for result, expected in [
        (held.coefficients(v), v.double() @ V.T),
        (held.project(v), v.double() @ P),
        (held.project_out(v), v.double() - v.double() @ P),
        (held.combine(held.coefficients(v)), v.double() @ P),
    ]:
        assert (result.dtype, result.shape) == (dtype, expected.shape)
        torch.testing.assert_close(result.double(), expected, **tolerance)
    for name in ("project", "project_out"):
        project = getattr(held, name)
        once = project(v)
        torch.testing.assert_close(project(once), once, **tolerance)
        out = v.clone()
        assert project(out, out=out) is out
        torch.testing.assert_close(out, once, **tolerance)


@pytest.mark.parametrize("size", [16384, 16385, 50_000])
def test_pieces_of_many_columns_are_one_projection(size):
    """The pieces are of 16,384 columns; some of them are asked for by themselves too."""
    held = rounded(basis_of(draw("normal", 3, size, 0)), BF16)
    generator = torch.Generator().manual_seed(1)
    for v in (*torch.randn(2, 5, size, generator=generator), torch.ones(size)):
        coefficients = v.double() @ held.vectors.double().T
        expected = coefficients @ held.vectors.double()
        torch.testing.assert_close(held.project(v).double(), expected, rtol=0, atol=1e-5)
        out = (v.double() - expected).float()
        torch.testing.assert_close(held.project_out(v), out, rtol=0, atol=1e-5)
    for columns in (slice(7, 11), slice(100, 16_384), slice(9_000, size), slice(5, 5)):
        out = v[columns].clone()
        assert held.add_to(out, coefficients.float(), alpha=-2, columns=columns) is out
        expected_part = v[columns].double() - 2 * expected[columns]
        torch.testing.assert_close(out.double(), expected_part, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "low", "high"), [
    ("normal", 0.00160, 0.00173),
    ("heavy", 0.00113, 0.0023),
    ("even", 0.00113, 0.0023),
])  # fmt: skip
def test_the_sine_of_rounding_is_told_and_is_what_uniform_errors_make(kind, low, high, seed):
    """From ``2^-8/√12`` to ``2^-8/√3``, by where the entries lie between two powers of two.

    For normal entries ``E[ulp²/12]/E[x²]`` is 0.00166 squared.
    """
    rows = draw(kind, 4, 20_000, seed)
    held = rounded(basis_of(rows), BF16)
    true = largest_sine(rows, torch.linalg.qr(held.rows.double().T).Q.T.contiguous())
    assert held.rounding == pytest.approx(true, rel=1e-3)
    assert low <= true <= high
    errors = float(torch.linalg.matrix_norm(held.rows.double() - rows, 2))
    assert true <= errors
    if kind != "heavy":  # a few entries make such rows longer or shorter, which turns nothing
        assert true == pytest.approx(errors, rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_the_sine_is_told_of_a_few_parameters_too(seed):
    rows = draw("normal", 3, 8, seed)
    held = rounded(basis_of(rows, torch.float64), BF16)
    true = largest_sine(rows, torch.linalg.qr(held.rows.double().T).Q.T.contiguous())
    assert held.rounding == pytest.approx(true, rel=1e-9)
    assert true <= 1.01 * UNIT * 3**0.5


class Peak(AllocationMeter):
    """Notes the most that was held at a time."""

    most = 0

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__torch_dispatch__(*args, **kwargs)
        self.most = max(self.most, self.alive())
        return result


def test_no_call_makes_all_of_the_rows_in_another_dtype():
    k, size = 8, 1 << 19
    basis = basis_of(draw("normal", k, size, 0))
    with Peak() as meter:
        held = rounded(basis, BF16)
    row = 4 * size
    assert meter.alive() <= 1.01 * k * row / 2, "what is held"
    assert meter.most <= k * row / 2 + 2.1 * row, "what is needed to make it"
    v, many = torch.ones(size), torch.ones(3, size)
    coefficients = held.coefficients(v)
    for call, result in [
        (lambda: held.coefficients(v), 0),
        (lambda: held.coefficients(many), 0),
        (lambda: held.project(v), row),
        (lambda: held.project_out(v), row),
        (lambda: held.project_out(v, out=v), 0),
        (lambda: held.project_out(many), 3 * row),
        (lambda: held.combine(coefficients), row),
        (lambda: held.add_to(v, coefficients), 0),
        (lambda: held.first(3).project(v), row),
    ]:
        with Peak() as meter:
            call()
        assert meter.most <= result + row / 2
    with Peak() as meter:
        assert len(held.vectors) == k
    assert meter.most >= k * row, "the meter sees what is made"


def test_the_first_pairs_share_the_rows():
    held = rounded(basis_of(draw("normal", 4, 50, 0)), BF16)
    for k in (0, 1, 3, 4):
        part = held.first(k)
        assert (part.k, part.size, part.rounding) == (k, 50, held.rounding)
        assert part.rows is held.rows
        torch.testing.assert_close(part.vectors, held.vectors[:k], rtol=0, atol=1e-6)
        assert torch.equal(part.eigenvalues, held.eigenvalues[:k])
        v = torch.ones(50)
        expected = v @ projector(held.vectors[:k])
        torch.testing.assert_close(part.project(v), expected, rtol=0, atol=1e-6)
    with pytest.raises(ArgumentError, match="k is 5, but must be an integer from 0 to 4"):
        held.first(5)


def test_what_is_held_as_it_should_be_stays_and_the_sines_add_up():
    basis = basis_of(draw("normal", 3, 5_000, 0))
    held = stored(basis, BF16)
    assert isinstance(held, RoundedBasis)
    assert stored(basis, None) is basis
    assert stored(held, BF16) is held
    none = basis.first(0)
    assert stored(none, BF16) is none
    wide = stored(held, None)
    assert type(wide) is EigenBasis
    assert wide.rounding == held.rounding > 0
    assert torch.equal(wide.vectors, held.vectors)
    again = stored(wide, BF16)
    turned = largest_sine(basis.vectors.double(), again.vectors.double())
    assert turned <= again.rounding <= 2.1 * held.rounding


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_are_the_same_value(copied):
    held = rounded(basis_of(draw("normal", 3, 50, 0)), BF16)
    other = copied(held)
    v = torch.ones(50)
    assert torch.equal(other.project(v), held.project(v))
    assert (other.rounding, other.rows.dtype) == (held.rounding, BF16)
    for name in ("rows", "mixing", "rounding", "eigenvalues"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(other, name, getattr(held, name))
    assert repr(other) == repr(held)
    assert "held in torch.bfloat16" in repr(held)


def test_autocast_changes_nothing():
    held = rounded(basis_of(draw("normal", 3, 50, 0)), BF16)
    v = torch.randn(50, generator=torch.Generator().manual_seed(1))
    expected = [held.vectors, held.coefficients(v), held.project(v), held.project_out(v)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [held.vectors, held.coefficients(v), held.project(v), held.project_out(v)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sizes", [[30, 20], [0, 50], [7, 13, 30]], ids=str)
def test_all_ranks_together_round_as_one_process(sizes):
    rows = draw("normal", 3, 50, 0)
    whole = rounded(basis_of(rows, torch.float64), BF16)
    v = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def each(inner: Any) -> tuple[Any, ...]:
        basis = basis_of(rows, torch.float64)
        basis = EigenBasis(basis.eigenvalues, inner.mine(rows), basis.residuals, inner)
        held = rounded(basis, BF16)
        own = inner.mine(v)
        return held.rounding, held.mixing, held.coefficients(own), held.project_out(own), held.size

    found = on_ranks(sizes, each)
    assert alike([f[0] for f in found]) == pytest.approx(whole.rounding, rel=1e-9)
    exactly = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(alike([f[1] for f in found]), whole.mixing, **exactly)
    torch.testing.assert_close(alike([f[2] for f in found]), whole.coefficients(v), **exactly)
    torch.testing.assert_close(joined([f[3] for f in found]), whole.project_out(v), **exactly)
    assert {f[4] for f in found} == {50}
