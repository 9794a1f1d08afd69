"""Arithmetic in the dtype's own precision, whatever autocast says: the same bits in and outside."""

import pytest
import torch
from torch import Tensor

from subspace_optim._validation import NonFiniteError
from subspace_optim.linalg import EigenBasis, LowRankCurvature, top_eigenpairs
from subspace_optim.linalg.products import own_precision
from subspace_optim.linalg.refinement import probe, refine
from subspace_optim.linalg.rows import (
    check_orthonormal,
    exact_gram,
    gram,
    largest_sine,
    orthonormalise_,
)
from subspace_optim.linalg.spectral_density import lanczos_quadrature
from subspace_optim.linalg.trace import hutch_plus_plus
from tests.dense import symmetric

SIZE, K = 40, 3
DENSE = symmetric(torch.linspace(-1, 3, SIZE)).float()
ROWS = torch.linalg.qr(torch.randn(SIZE, K, generator=torch.Generator().manual_seed(0))).Q.T
V = torch.linspace(-1, 2, SIZE)


def basis() -> EigenBasis:
    return EigenBasis(torch.tensor([3.0, 2.9, 2.8]), ROWS.contiguous(), torch.zeros(K))


def guard() -> EigenBasis:
    row = torch.linalg.qr(torch.cat([ROWS, V[None]]).T).Q.T[K:]
    return EigenBasis(torch.tensor([1.0]), row.contiguous(), torch.zeros(1))


def low_rank() -> LowRankCurvature:
    return LowRankCurvature(torch.tensor([2.0, 1.0, 0.5]), torch.nn.functional.normalize(ROWS + V))


def orthonormalised() -> Tensor:
    rows = ROWS + 1e-3 * V
    orthonormalise_(rows)
    return rows


def matmat(rows: Tensor) -> Tensor:
    return rows @ DENSE


CALLS = {
    "coefficients": lambda: basis().coefficients(V),
    "project": lambda: basis().project(V),
    "project_rows_into": lambda: basis().project(ROWS * 2, out=torch.empty_like(ROWS)),
    "project_out": lambda: basis().project_out(V),
    "low_rank": lambda: low_rank().coefficients(V),
    "orthogonalised": lambda: low_rank().orthogonalised(),
    "top_eigenpairs": lambda: top_eigenpairs(matmat, SIZE, K),
    "probe": lambda: probe(matmat, basis(), guard(), lowest=-1.0, mean=1.0, seed=0),
    "refine": lambda: refine(matmat, basis(), guard(), lowest=-1.0, mean=1.0),
    "quadrature": lambda: lanczos_quadrature(lambda v: DENSE @ v, SIZE, steps=10),
    "density": lambda: lanczos_quadrature(lambda v: DENSE @ v, SIZE).density(V),
    "trace": lambda: hutch_plus_plus(matmat, SIZE, 12),
    "gram": lambda: gram(ROWS, ROWS + V),
    "exact_gram": lambda: exact_gram(ROWS),
    "orthonormalise": orthonormalised,
    "largest_sine": lambda: largest_sine(ROWS, orthonormalised()),
    "check": lambda: check_orthonormal("vectors", ROWS, torch.finfo(torch.float32).eps),
}


def numbers(result: object) -> list[object]:
    """All tensors and numbers of a result, in order."""
    if isinstance(result, Tensor):
        return [result.dtype, *result.flatten().tolist()]
    if isinstance(result, tuple):
        return [n for part in result for n in numbers(part)]
    if hasattr(result, "__dataclass_fields__"):
        return [n for name in result.__dataclass_fields__ for n in numbers(getattr(result, name))]
    return [result]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_autocast_around_it_does_not_change_a_bit(call):
    expected = numbers(call())
    with torch.autocast("cpu", torch.bfloat16):
        assert numbers(call()) == expected
        assert torch.is_autocast_enabled("cpu")
        assert (DENSE @ V).dtype == torch.bfloat16  # what it would otherwise have been


def test_autocast_is_there_again_after_an_error():
    @own_precision
    def fails() -> None:
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError):
            fails()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "action",
    [
        lambda bad: top_eigenpairs(bad, SIZE, K),
        lambda bad: probe(bad, basis(), guard(), lowest=-1.0, mean=1.0, seed=0),
        lambda bad: refine(bad, basis(), guard(), lowest=-1.0, mean=1.0),
        lambda bad: lanczos_quadrature(bad, SIZE),
        lambda bad: hutch_plus_plus(bad, SIZE, 12),
    ],
)
def test_a_product_that_is_not_finite_tells_both_ways_out(action):
    """Loss and gradient may be finite where only the second derivative is not."""
    second = r"If loss and gradient are finite, .* epsilon .* FiniteDifferenceHessian\. If they are"
    with pytest.raises(NonFiniteError, match=second + " not finite, lower the learning rate"):
        action(lambda rows: rows * torch.nan)
