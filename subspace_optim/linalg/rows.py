"""The arithmetic of tall bases: k orthonormal rows of P numbers, k small and P large.

What is k×k is computed in float64. What is k×P is taken some columns at a time, so that nothing
allocates as much as another vector. The columns are the coordinates that lie here; ``inner``
completes what is summed over them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.linalg.products import own_precision

_COLUMNS = 1 << 16
"""Columns that are taken at a time, at most."""
GRAM_DIGITS = 4 * torch.finfo(torch.float64).eps
"""The relative error, for each row, of an eigenvalue of a Gram matrix in float64."""
_DEPENDENT = 1e-12
"""An eigenvalue of a Gram matrix below this, relative to the largest, is hardly more than rounding:
in float64 the row that it makes is still orthogonal to the others within a hundredth."""


def column_blocks(size: int) -> list[slice]:
    """The columns in blocks that are small beside all of them."""
    width = min(_COLUMNS, max(1, size // 16))
    return [slice(start, start + width) for start in range(0, size, width)]


@own_precision
def square(v: Tensor) -> Tensor:
    """Returns the sum of the squares of the coordinates of a vector that lie here, in float64.

    Squares of float32 overflow from 1e19 on, and vanish below 1e-22.
    """
    if v.device.type != "cpu":
        length: Tensor = torch.linalg.vector_norm(v, dtype=torch.float64)
        return length.square()
    # The same would make a copy of all of it on a CPU, which takes five times as long.
    total = torch.zeros((), dtype=torch.float64, device=v.device)
    for columns in column_blocks(len(v)):
        piece = v[columns].double()
        total += piece.dot(piece)
    return total


def is_finite(tensor: Tensor, inner: InnerProduct = WHOLE) -> bool:
    """Whether all coordinates are finite, those on other ranks too."""
    bad = tensor.isfinite().all().logical_not()
    return float(inner.sum(bad.double())) == 0


def largest_entries(rows: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the largest ``|v_i|`` of each row: what to divide by before squares are taken.

    Of a row on several ranks up to as many times as much; 0 for a row of zeros alone.
    """
    here = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
    return inner.sum(here)


def norm(v: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the length of a vector, in float64."""
    return inner.sum(square(v)).sqrt()


@own_precision
def gram(first: Tensor, second: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the inner products of the rows, summed up in float64 from blocks of columns."""
    result = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for columns in column_blocks(first.shape[1]):
        result += first[:, columns] @ second[:, columns].T
    return inner.sum(result)


@own_precision
def exact_gram(rows: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the inner products of the rows with each other, all in float64."""
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in column_blocks(rows.shape[1]):
        piece = rows[:, columns].double()
        result.addmm_(piece, piece.T)
    return inner.sum(result)


@own_precision
def orthonormalise_(rows: Tensor, inner: InnerProduct = WHOLE) -> None:
    """Makes nearly orthonormal rows orthonormal: one Cholesky step, its k×k part in float64."""
    factor, _ = torch.linalg.cholesky_ex(exact_gram(rows, inner))
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(rows.dtype)
    for columns in column_blocks(rows.shape[1]):
        rows[:, columns] = inverse @ rows[:, columns]


@own_precision
def orthonormal_span(rows: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns orthonormal rows of the span of any finite ones, as new ones.

    Fewer than these, where they depend on each other within ``√_DEPENDENT`` of the longest
    combination.
    """
    values, combinations = torch.linalg.eigh(exact_gram(rows, inner).cpu())
    kept = values > _DEPENDENT * values[-1:].clamp(min=0)
    weights = (combinations[:, kept] / values[kept].sqrt()).T.to(rows.device)
    result = rows.new_empty(len(weights), rows.shape[1])
    for columns in column_blocks(rows.shape[1]):
        result[:, columns] = (weights @ rows[:, columns].double()).to(rows.dtype)
    # Rounding of the Gram matrix makes rows that are not orthogonal by this much.
    epsilon = torch.finfo(rows.dtype).eps
    if len(result) and len(rows) * GRAM_DIGITS * values[-1] > values[kept][0] * epsilon:
        orthonormalise_(result, inner)
    return result


@own_precision
def singular_values(rows: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the singular values of rows, descending, in float64; each within rounding of them.

    The roots of a Gram matrix's eigenvalues are half as exact. So its eigenvectors only turn the
    rows, so that these are nearly orthogonal, each as long as a singular value or as a few of them
    that are all tiny; what they are to each other at length 1 is then known to rounding.
    """
    turned = rows.new_empty(rows.shape, dtype=torch.float64)
    _, combinations = torch.linalg.eigh(exact_gram(rows, inner))
    for columns in column_blocks(rows.shape[1]):
        turned[:, columns] = combinations.T @ rows[:, columns].double()
    lengths = inner.sum(torch.linalg.vector_norm(turned, dim=1).square()).sqrt()
    turned /= torch.where(lengths > 0, lengths, 1.0)[:, None]
    values, vectors = torch.linalg.eigh(exact_gram(turned, inner))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    found: Tensor = torch.linalg.svdvals(root * lengths)
    return found


@own_precision
def largest_sine(first: Tensor, second: Tensor, inner: InnerProduct = WHOLE) -> float:
    """Returns the sine of the largest angle between the spans of orthonormal rows.

    From the part of ``first`` outside ``second``: small sines are as accurate as large ones.
    """
    overlaps = gram(first, second, inner).to(first)
    outside = torch.zeros(len(first), len(first), dtype=torch.float64, device=first.device)
    for columns in column_blocks(first.shape[1]):
        part = first[:, columns] - overlaps @ second[:, columns]
        outside += part @ part.T
    outside = inner.sum(outside)
    return min(1.0, math.sqrt(max(0.0, float(torch.linalg.eigvalsh(outside)[-1]))))


def check_orthonormal(
    name: str, rows: Tensor, accuracy: float, inner: InnerProduct = WHOLE
) -> None:
    r"""Checks that rows are orthonormal, as exactly as rounding lets anybody make them.

    .. math:: |\langle v_i, v_j \rangle - \delta_{ij}| \le
              \varepsilon \left( k\, (32 + 2 \sqrt{P}) + P/16 \right), \quad\text{or}\quad 0.01

    A row over its norm is off by as much as the sum of P squares is: at most ``P ε/16`` where it
    runs in eight lanes or more, nearly reached where all entries are equal (0.034 P ε measured in
    float32, for P up to 100,000). A Householder QR rounds each row k times, at random: 1600 ε for
    k = 5 and P = 2,000,000, a ninth of the second term. The 32 are the few operations on each entry
    where P is small.

    Args:
        name: of the argument.
        rows: ``(k, P)``.
        accuracy: ε of what they were computed in.
        inner: completes sums over coordinates.

    Raises:
        ArgumentError: they are not orthonormal.
    """
    k, size = len(rows), inner.size(rows.shape[1])
    identity = torch.eye(k, dtype=torch.float64, device=rows.device)
    off = float((exact_gram(rows, inner) - identity).abs().max())
    tolerance = min(accuracy * (k * (32 + 2 * math.sqrt(size)) + size / 16), 0.01)
    if not off <= tolerance:  # NaN too
        found = f"off by {off:.3g}"
        allowed = f"orthonormal rows, up to {tolerance:.3g} in every inner product"
        remedy = "Their span has such a basis: torch.linalg.qr(vectors.T).Q.T"
        raise ArgumentError(name, found, allowed, remedy)
