"""``FixedSubspace``: the user's own basis, as it was given."""

import copy

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.subspaces import Subspace
from tests.dense import DTYPES, projector


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


P = sum(p.numel() for p in model_of().parameters())


def rows_of(k: int, size: int = P, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.linalg.qr(torch.randn(size, k, dtype=dtype, generator=generator)).Q.T


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("k", [1, 3, P])
def test_the_basis_is_the_one_that_was_given(k, dtype):
    subspace = so.FixedSubspace(model_of(dtype), rows_of(k, dtype=dtype))
    assert isinstance(subspace, Subspace)
    basis = subspace.update()
    assert (basis.k, basis.size, basis.dtype) == (k, P, dtype)
    expected = projector(rows_of(k, dtype=dtype).double())
    torch.testing.assert_close(projector(basis.vectors.double()), expected, rtol=0, atol=1e-6)
    assert torch.equal(basis.eigenvalues, torch.ones(k, dtype=dtype))
    assert not basis.residuals.any()


def test_it_is_always_the_same_object():
    model = model_of()
    subspace = so.FixedSubspace(model, rows_of(2))
    basis = subspace.update()
    before = basis.vectors.clone()
    with torch.no_grad():
        model[0].weight += 1
    assert subspace.update() is basis
    assert subspace.basis is basis
    assert torch.equal(basis.vectors, before)


def test_the_users_tensors_are_neither_changed_nor_kept():
    rows, values = rows_of(2), torch.tensor([2.0, 1.0])
    expected = rows.clone()
    basis = so.FixedSubspace(model_of(), rows, values).update()
    assert torch.equal(rows, expected)
    rows.zero_()
    values.zero_()
    assert (basis.vectors - expected).abs().max() <= 1e-6
    assert basis.eigenvalues.tolist() == [2, 1]


def test_axes_stay_axes():
    rows = torch.eye(P)[[4, 1]]
    assert torch.equal(so.FixedSubspace(model_of(), rows).update().vectors, rows)


def test_pairs_come_in_descending_order():
    rows = rows_of(3)
    basis = so.FixedSubspace(model_of(), rows, torch.tensor([1.0, -2.0, 5.0])).update()
    assert basis.eigenvalues.tolist() == [5, 1, -2]
    torch.testing.assert_close(basis.vectors, rows[[2, 0, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_orthonormal_to_a_few_ulps_of_the_models_dtype(given, dtype):
    """Whatever was lost before: a basis that was saved in bf16 is a good one nevertheless."""
    size = 3000
    model = nn.Linear(size, 1, bias=False).to(dtype)
    rows = rows_of(3, size, torch.float64).to(given)
    basis = so.FixedSubspace(model, rows).update()
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    V = basis.vectors.double()
    deviation = (V @ V.T - torch.eye(3, dtype=torch.float64)).abs().max()
    assert deviation <= 8 * torch.finfo(basis.dtype).eps


def test_what_qr_gives_for_many_parameters_is_orthonormal_enough():
    """LAPACK's rows of 300,000 numbers are off by tens of ε, which is no error of the user's."""
    size = 300_000
    model = nn.Linear(size, 1, bias=False)
    assert so.FixedSubspace(model, rows_of(3, size)).update().k == 3


def test_params_are_the_coordinates():
    model = model_of()
    chosen = [model[2].weight, model[0].bias]
    subspace = so.FixedSubspace(model, rows_of(2, 12), params=chosen)
    assert [id(p) for p in subspace.parameters.tensors] == [id(p) for p in chosen]


def test_wrapped_models_are_unwrapped():
    model = model_of()
    wrapped = torch.compile(model)
    assert so.FixedSubspace(wrapped, rows_of(2)).parameters.model is model


def test_a_copy_belongs_to_the_copied_model():
    model = model_of()
    subspace = so.FixedSubspace(model, rows_of(2))
    other_model, other = copy.deepcopy((model, subspace))
    assert other.parameters.tensors[0] is other_model[0].weight
    assert torch.equal(other.update().vectors, subspace.update().vectors)


def test_an_optimizer_moves_in_it():
    """In the plane of two axes, two coordinates move, and no other."""
    model = model_of()
    subspace = so.FixedSubspace(model, torch.eye(P)[[0, 5]])
    optimizer = so.DomSGD(model.parameters(), lr=0.1, subspace=subspace)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.zeros(P)
    expected[[0, 5]] = -0.1
    torch.testing.assert_close(after - before, expected)


SKEWED = rows_of(2).clone()
SKEWED[1] += 0.25 * SKEWED[0]
ERRORS = {
    "not orthogonal": (SKEWED, None, r"vectors is 'off by 0\.25', but must be orthonormal rows"),
    "the way out": (SKEWED, None, r"torch\.linalg\.qr\(vectors\.T\)\.Q\.T"),
    "not normal": (2 * rows_of(2), None, "off by 3"),
    "nearly": (rows_of(2) * 1.001, None, r"off by 0\.002"),
    "zero": (torch.zeros(1, P), None, "off by 1"),
    "short": (rows_of(2, P - 1), None, rf"shape of vectors is \(2, {P - 1}\), .*\(k, {P}\)"),
    "one vector": (rows_of(1)[0], None, "the shape of vectors"),
    "none": (torch.zeros(0, P), None, "k from 1 to"),
    "too many": (torch.zeros(P + 1, P), None, "k from 1 to"),
    "nan": (rows_of(1) * torch.nan, None, "vectors is 'not finite'"),
    "no tensor": ([[1.0]], None, "vectors is 'list'"),
    "integers": (torch.eye(P).long(), None, "a tensor of real numbers"),
    "values": (rows_of(2), torch.ones(3), r"the shape of eigenvalues is \(3,\), .* \(2,\)"),
    "nan value": (rows_of(1), torch.tensor([torch.nan]), "eigenvalues is 'not finite'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_basis_is_refused(case):
    vectors, eigenvalues, message = ERRORS[case]
    with pytest.raises(so.ArgumentError, match=message):
        so.FixedSubspace(model_of(), vectors, eigenvalues)


def test_a_model_is_asked_for():
    with pytest.raises(so.ArgumentError, match="model is 'list'"):
        so.FixedSubspace([], rows_of(2))
