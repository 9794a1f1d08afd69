"""How subspaces lie to each other: overlaps, angles, and class gradients beside eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import check_orthonormal, largest_entries, singular_values


def subspace_overlap(
    a: EigenBasis | Tensor, b: EigenBasis | Tensor, *, inner: InnerProduct = WHOLE
) -> Tensor:
    r"""Returns the normalised inner product of two projectors.

    .. math:: \mathrm{overlap}(A, B) =
        \frac{\mathrm{Tr}(P_A P_B)}{\sqrt{\mathrm{Tr}(P_A) \, \mathrm{Tr}(P_B)}}
        = \frac{1}{\sqrt{k_A k_B}} \sum_{ij} \langle a_i, b_j \rangle^2

    1 for a subspace and itself, 0 for orthogonal ones, :math:`\sqrt{k_A k_B} / P` for random
    ones. Rows that are not orthonormal, or of another length, raise ``ArgumentError``.

    Args:
        a: a basis, or orthonormal rows ``(k_A, P)``.
        b: the same, ``(k_B, P)``.
        inner: completes sums over coordinates, of a model that is sharded: ``operator.inner``. A
            basis has its own.

    Returns:
        A scalar tensor from 0 to 1, in float64.

    Reference:
        `gur_ari_2018`, eq. 5.
    """
    inner = _inner_of([a, b], inner)
    rows, others = _rows("a", a, inner), _rows("b", b, inner)
    return _overlap(rows, others, inner)


def overlap_matrix(bases: Sequence[EigenBasis | Tensor], *, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns the overlaps of every basis with every other, ``(n, n)``, in float64 on the CPU.

    Of bases that were saved in the course of training it is the evolution of the top subspace:
    an overlap that stays high for late rows says that the subspace is kept.

    Args:
        bases: n of them, of the same model; each may have a dimension of its own.
        inner: as of ``subspace_overlap``.

    Raises:
        ArgumentError: there is none, or one is not orthonormal or of another length.

    Reference:
        `gur_ari_2018`, Figure 2 (eq. 5).
    """
    if not bases:
        raise ArgumentError("bases", "an empty sequence", "at least one basis")
    inner = _inner_of(bases, inner)
    rows = [_rows(f"bases[{i}]", basis, inner) for i, basis in enumerate(bases)]
    matrix = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[: i + 1]):
            matrix[i, j] = matrix[j, i] = _overlap(a, b, inner)
    return matrix


def principal_angles(
    a: EigenBasis | Tensor, b: EigenBasis | Tensor, *, inner: InnerProduct = WHOLE
) -> Tensor:
    r"""Returns the principal angles between two subspaces, in radians.

    .. math:: \cos \phi_i = \sigma_i(A B^\top), \qquad 0 \le \phi_1 \le \dots \le \pi / 2

    The sine of the last one is what ``max_angle`` of ``DominantSubspace`` bounds. Angles below
    π/4 come from their sines, which rounding spares: an angle is right to a few units in the last
    place of the rows' dtype, also where its cosine is 1 to rounding. Rows that are not
    orthonormal, or of another length, raise ``ArgumentError``.

    Args:
        a: a basis, or orthonormal rows ``(k_A, P)``.
        b: the same, ``(k_B, P)``.
        inner: as of ``subspace_overlap``.

    Returns:
        ``(min(k_A, k_B),)``, ascending, in float64.
    """
    inner = _inner_of([a, b], inner)
    rows, others = _rows("a", a, inner), _rows("b", b, inner)
    _check_lengths(rows, others)
    if len(rows) < len(others):
        rows, others = others, rows
    others = others.to(rows)
    along = inner.sum(others @ rows.T)
    cosines = torch.linalg.svdvals(along).double().clamp(max=1.0)
    sines = singular_values(others - along @ rows, inner).flip(0).clamp(max=1.0)
    return torch.where(sines < cosines, sines.asin(), cosines.acos())


@dataclass(frozen=True)
class ClassGradientCosines:
    """Class gradients beside eigenvectors, each matched with the one that suits it best.

    Attributes:
        cosines: ``(C, k)``, ``|⟨v_c, u_i⟩| / ‖v_c‖``: signs mean nothing, since eigenvectors have
            none. 0 for a class without a gradient.
        assignment: ``(C,)``, the eigenvector of each class, none of them used twice; -1 for the
            classes that are left over where k < C.
    """

    cosines: Tensor
    assignment: Tensor

    @property
    def assigned(self) -> Tensor:
        """The cosines of the pairs that were matched, ``(min(C, k),)``."""
        matched = self.assignment >= 0
        return self.cosines[matched, self.assignment[matched]]

    @property
    def mean(self) -> float:
        """Their mean, which the assignment makes as large as it can be."""
        return float(self.assigned.mean())


def class_gradient_cosines(
    vectors: Tensor | LowRankCurvature | EigenBasis, basis: EigenBasis
) -> ClassGradientCosines:
    r"""Returns the cosines of class gradients and eigenvectors, and the optimal assignment.

    .. math:: \max_\pi \frac{1}{\min(C, k)} \sum_c |\cos(v_c, u_{\pi(c)})|

    over all assignments π that use no eigenvector twice. What chance would reach, which is more
    than the cosine of one random pair, is ``chance_cosine``. Vectors of another length than the
    eigenvectors raise ``ArgumentError``.

    Args:
        vectors: class gradients ``(C, P)``, of any length, or what a ``ClassGradientSubspace``
            returns.
        basis: the eigenvectors.

    Returns:
        Cosines and assignment, on the CPU in float64.

    Reference:
        `class_gradient_2020`, appendix C.
    """
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (a tenth of a second)

    rows = _class_rows(vectors, basis)
    cosines = basis.coefficients(rows).abs().clamp(max=1.0).double().cpu()
    assignment = torch.full((len(cosines),), -1)
    classes, eigenvectors = linear_sum_assignment(cosines.numpy(), maximize=True)
    assignment[torch.from_numpy(classes)] = torch.from_numpy(eigenvectors)
    return ClassGradientCosines(cosines, assignment)


def chance_cosine(
    num_classes: int, k: int, size: int, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns what ``class_gradient_cosines(...).mean`` is for random directions.

    Drawn, not approximated: the coefficients of a random unit vector along k orthonormal ones are
    k normal numbers over the root of their squares and a χ² of the other ``P − k``.

    Args:
        num_classes: C.
        k: eigenvectors.
        size: P.
        draws: repetitions.
        seed: of the draws.

    Returns:
        The mean over the draws and their standard deviation: a measured mean that lies many of
        these above is no chance.
    """
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (a tenth of a second)

    check_integer("num_classes", num_classes, minimum=1)
    check_integer("size", size, minimum=1)
    check_integer("k", k, minimum=1, maximum=size)
    check_integer("draws", draws, minimum=2)
    random = np.random.default_rng(check_integer("seed", seed, minimum=0))
    inside = random.standard_normal((draws, num_classes, k))
    outside = random.chisquare(size - k, inside.shape[:2]) if size > k else 0.0
    lengths = np.sqrt(np.square(inside).sum(-1) + outside)
    cosines = np.abs(inside) / lengths[..., None]
    means = []
    for drawn in cosines:
        rows, columns = linear_sum_assignment(drawn, maximize=True)
        means.append(drawn[rows, columns].mean())
    return float(np.mean(means)), float(np.std(means, ddof=1))


def intersection_rank(
    vectors: Tensor | LowRankCurvature | EigenBasis,
    basis: EigenBasis,
    *,
    rtol: float | None = None,
) -> int:
    r"""Returns the rank of class gradients and eigenvectors taken together.

    .. math:: \mathrm{rank}\,[v_1, \dots, v_C, u_1, \dots, u_k]

    From k, where the eigenvectors span all of it, to ``C + k``, where nothing is shared. The
    paper's matrix ends at ``e_C`` but begins at ``e_0``; its text counts to 2C, so that C
    eigenvectors are meant. Vectors of another length than these raise ``ArgumentError``.

    Args:
        vectors: class gradients ``(C, P)``, of any length, or what a ``ClassGradientSubspace``
            returns. They count at length 1; those of length 0 do not count.
        basis: the eigenvectors.
        rtol: class gradients add to the rank as far as the singular values of what they have,
            at length 1, outside the eigenvectors are above this: the sine of their angle
            (default: ``10 (C + k)`` units in the last place, below which it is rounding).

    Returns:
        The rank.

    Reference:
        `class_gradient_2020`, eq. 18.
    """
    if rtol is not None:
        check_number("rtol", rtol)
    rows, span = _class_rows(vectors, basis).double(), basis.vectors.double()
    if rtol is None:
        rtol = 10 * (len(rows) + len(span)) * torch.finfo(basis.dtype).eps
    for _ in range(2):  # the eigenvectors are orthonormal to their own rounding
        rows = rows - basis.inner.sum(rows @ span.T) @ span
    return basis.k + int((singular_values(rows, basis.inner) > rtol).sum())


def _inner_of(bases: Sequence[EigenBasis | Tensor], given: InnerProduct) -> InnerProduct:
    """Returns what completes the sums of those that are bases, or what was given for tensors."""
    return next((basis.inner for basis in bases if isinstance(basis, EigenBasis)), given)


def _rows(name: str, basis: EigenBasis | Tensor, inner: InnerProduct) -> Tensor:
    """Returns the orthonormal rows of a basis.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(basis, EigenBasis):
        return basis.vectors
    if not isinstance(basis, Tensor) or basis.dim() != 2 or not basis.is_floating_point():
        found = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise ArgumentError(name, found, "an EigenBasis, or orthonormal rows (k, P)")
    check_orthonormal(name, basis, torch.finfo(basis.dtype).eps, inner)
    return basis


def _check_lengths(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        found = f"of {a.shape[1]} and {b.shape[1]} parameters"
        raise ArgumentError("the two bases", found, "of the same model")


def _overlap(a: Tensor, b: Tensor, inner: InnerProduct) -> Tensor:
    _check_lengths(a, b)
    cosines = inner.sum(a @ b.to(a).T)
    overlap: Tensor = cosines.double().square().sum() / (len(a) * len(b)) ** 0.5
    return overlap.clamp(max=1.0)


def _class_rows(vectors: Tensor | LowRankCurvature | EigenBasis, basis: EigenBasis) -> Tensor:
    """Returns the vectors at length 1 (or 0), in dtype and on the device of the basis.

    Raises:
        ArgumentError: they are of another length than the eigenvectors.
    """
    rows = vectors if isinstance(vectors, Tensor) else vectors.vectors
    here = basis.vectors.shape[1]
    if rows.dim() != 2 or rows.shape[1] != here:
        found, allowed = tuple(rows.shape), f"(C, {here}), one class a row"
        raise ArgumentError("the shape of vectors", found, allowed)
    rows = rows.to(basis.vectors)
    # By the largest first: the squares of tiny and huge numbers are zeros and infinities.
    largest = largest_entries(rows, basis.inner)[:, None]
    rows = torch.where(largest == 0, 0.0, rows / largest)
    squares = basis.inner.sum(torch.linalg.vector_norm(rows, dim=1, keepdim=True).square())
    return rows / torch.where(squares > 0, squares, 1.0).sqrt()
