"""The trace of a symmetric matrix in a few products, and what an estimate is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._progress import Progress
from subspace_optim._validation import NonFiniteError, check_integer
from subspace_optim.linalg.products import not_finite, own_precision
from subspace_optim.linalg.rows import orthonormal_span

_ROWS = 16
"""Rows that are multiplied at a time: what bounds the memory beside a sketch."""


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from random vectors.

    Attributes:
        value: the estimate, unbiased.
        standard_error: its standard deviation, as estimated from how much the random vectors
            scatter; 0 where none were needed. Rounding of the products is not in it.
        products: products with the matrix that it took.
    """

    value: float
    standard_error: float
    products: int


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of samples, one a row, and its standard error."""
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples))


@own_precision
def hutch_plus_plus(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    products: int = 60,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    inner: InnerProduct = WHOLE,
) -> Estimate:
    r"""Returns an estimate of the trace of the symmetric matrix behind ``matmat``.

    .. math::
        \operatorname{tr} H = \operatorname{tr} Q^\top H Q + \operatorname{tr} \bar H, \qquad
        \bar H = (I - QQ^\top) H (I - QQ^\top), \quad Q = \operatorname{orth}(H S)

    A third of the products sketches the range of ``H`` with random signs ``S``, a third takes the
    trace there as it is, and a third estimates what is left over by Hutchinson's ``zᵀH̄z`` with
    random signs ``z``. Only that part is random, once ``Q`` is there, and unbiased: the standard
    error is the standard deviation of its samples over the root of their number. Where a few
    eigenvalues are large, ``Q`` takes them, and the error falls like 1/products (for positive
    semidefinite matrices) instead of 1/√products.

    With as many products as rows, or more, the trace is summed up from the diagonal: exact, by P
    products, with a standard error of 0.

    Memory: about as many vectors as ``products``, two thirds of them for ``H S`` and ``Q``. The
    host is visited three times.

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, for j up to 16.
        size: P.
        products: how many to take at most; at least 4, for two samples beside a sketch.
        seed: of the random signs.
        dtype: of the vectors.
        device: of the vectors.
        inner: completes sums over coordinates, where the rows hold those that lie here.

    Returns:
        The trace.

    Raises:
        NonFiniteError: a product was NaN or infinite.

    Reference:
        Meyer, Musco, Musco & Woodruff 2021, *Hutch++: optimal stochastic trace estimation*,
        algorithm 1. What of ``products`` is no multiple of three goes to the last part, and so
        does what the sketch of a matrix of low rank leaves of the second.
    """
    check_integer("size", size, minimum=1)
    remedy = "Two samples tell a standard error, and a sketch of one vector takes two products."
    check_integer("products", products, minimum=4, remedy=remedy)
    products = min(products, size)
    device, taken = torch.device(device), 0

    def counted(rows: Tensor) -> Tensor:
        nonlocal taken
        result = matmat(rows)
        taken += len(rows)
        progress.tick(taken)
        return result

    with Progress("trace", "products", products) as progress:
        if products == size:
            estimate = _summed(counted, size, dtype, device, inner)
        else:
            estimate = _sketched(counted, size, products, seed, dtype, device, inner)
    value, error = torch.stack(estimate).tolist()
    if not (math.isfinite(value) and math.isfinite(error)):
        raise NonFiniteError(not_finite(products))
    return Estimate(value, error, products)


def identity_rows(
    size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    inner: InnerProduct = WHOLE,
) -> Iterator[tuple[int, Tensor]]:
    """Yields the rows of the identity in blocks.

    Each with the offset of the diagonal in it, of the coordinates that lie here: that of the
    whole matrix, in the order of the ranks.
    """
    before, here = inner.before(size), inner.here(size)
    for start in range(0, size, _ROWS):
        block = torch.zeros(min(_ROWS, size - start), here, dtype=dtype, device=device)
        block.diagonal(start - before).fill_(1)
        yield start - before, block


def _summed(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    inner: InnerProduct,
) -> tuple[Tensor, Tensor]:
    """Returns the trace by as many products as there are rows, and an error of 0."""
    blocks = identity_rows(size, dtype, device, inner)
    here = torch.cat([matmat(rows).diagonal(offset) for offset, rows in blocks])
    trace = inner.sum(here.sum(dtype=torch.float64))
    return trace, torch.zeros_like(trace)


def _sketched(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    inner: InnerProduct,
) -> tuple[Tensor, Tensor]:
    """Returns trace and standard error by fewer products than there are rows.

    Raises:
        NonFiniteError: a product of the sketch was NaN or infinite.
    """
    generator = torch.Generator(device=device).manual_seed(inner.seed(seed))
    here = inner.here(size)

    def signs(rows: int) -> Tensor:
        bits = torch.randint(2, (rows, here), generator=generator, device=device, dtype=torch.int8)
        return bits.to(dtype).mul_(2).sub_(1)

    def forms(rows: Tensor) -> Tensor:
        return (rows * matmat(rows)).sum(dim=1, dtype=torch.float64)

    sketch = products // 3
    range_ = torch.cat([matmat(signs(j)) for j in _blocks(sketch)])
    if not inner.sum(range_.sum(dtype=torch.float64)).isfinite():
        raise NonFiniteError(not_finite(sketch))
    Q = orthonormal_span(range_, inner)
    del range_
    samples = [forms(rows) for rows in Q.split(_ROWS)]
    for j in _blocks(products - sketch - len(Q)):
        z = signs(j)
        samples.append(forms(z.addmm_(inner.sum(z @ Q.T), Q, alpha=-1)))
    inside, outside = inner.sum(torch.cat(samples)).tensor_split([len(Q)])
    mean, error = mean_and_error(outside)
    return inside.sum() + mean, error


def _blocks(count: int) -> list[int]:
    return [min(_ROWS, count - start) for start in range(0, count, _ROWS)]
