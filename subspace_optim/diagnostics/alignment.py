"""How much of a gradient or an update lies in a subspace, and how the Hessian turns it."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import norm, square


def alignment(v: Tensor, basis: EigenBasis) -> Tensor:
    r"""Returns the fraction of ``v`` that lies in the dominant subspace.

    .. math:: \chi_k(v) = \|P_k v\| / \|v\|, \qquad \chi_k(0) = 0

    Its square is the f_top of `gur_ari_2018` (eq. 2), which does square.

    Args:
        v: ``(P,)``, such as a gradient or an update.
        basis: the subspace.

    Returns:
        A scalar tensor from 0 to 1 on the basis' device.

    Reference:
        `song_2024`, Definition 2.
    """
    # In float64: the squares of tiny and of huge float32 numbers are zeros and infinities.
    length = norm(v.to(basis.dtype), basis.inner)
    fraction = torch.linalg.vector_norm(basis.coefficients(v), dtype=torch.float64) / length
    return torch.where(length == 0, 0.0, fraction.clamp(max=1.0)).to(basis.dtype)


def gradient_fraction(gradient: Tensor, basis: EigenBasis) -> Tensor:
    r"""Returns the fraction of the squared gradient that lies in the top subspace.

    .. math:: f_{\mathrm{top}} = \|g_{\mathrm{top}}\|^2 / \|g\|^2 = \chi_k(g)^2, \qquad
              f_{\mathrm{top}}(0) = 0

    Args:
        gradient: ``(P,)``.
        basis: the top subspace.

    Returns:
        A scalar tensor from 0 to 1.

    Reference:
        `gur_ari_2018`, eq. 2.
    """
    return alignment(gradient, basis).square()


def eigenvector_fractions(gradient: Tensor, basis: EigenBasis) -> Tensor:
    r"""Returns the fraction of the squared gradient along each eigenvector.

    .. math:: c_i^2 = \langle u_i, g \rangle^2 / \|g\|^2, \qquad c_i^2(0) = 0

    Their sum is ``gradient_fraction``.

    Args:
        gradient: ``(P,)``.
        basis: the eigenvectors.

    Returns:
        ``(k,)``, each from 0 to 1.

    Reference:
        `gur_ari_2018`, eq. 12.
    """
    length = norm(gradient.to(basis.dtype), basis.inner)
    fractions = (basis.coefficients(gradient) / length).square().clamp(max=1.0)
    return torch.where(length == 0, 0.0, fractions).to(basis.dtype)


def hessian_gradient_overlap(
    gradient: Tensor, product: Tensor, *, inner: InnerProduct = WHOLE
) -> Tensor:
    r"""Returns the cosine between a gradient and its product with the Hessian.

    .. math:: \mathrm{overlap}(g, Hg) = \frac{g^\top H g}{\|g\| \, \|Hg\|}

    It costs one product where ``gradient_fraction`` costs an eigensolve, and is near 1 where the
    gradient lies in the span of a few eigenvectors of like eigenvalues.

    Args:
        gradient: ``g``, ``(P,)``.
        product: ``Hg``, ``(P,)``: ``operator.matvec(gradient)``.
        inner: completes sums over coordinates, of a model that is sharded: ``operator.inner``.

    Returns:
        A scalar tensor from -1 to 1; NaN where ``g`` or ``Hg`` is 0.

    Raises:
        ArgumentError: the shapes differ.

    Reference:
        `gur_ari_2018`, eq. 3.
    """
    if gradient.shape != product.shape:
        found, allowed = tuple(product.shape), f"{tuple(gradient.shape)}, as the gradient's"
        raise ArgumentError("the shape of product", found, allowed)
    both = gradient.to(product.dtype), product
    squares = inner.sums(*map(square, both))
    units = [(v / of_v.sqrt()).to(v.dtype) for v, of_v in zip(both, squares, strict=True)]
    return inner.sum(torch.dot(*units)).clamp(-1.0, 1.0)


def expected_overlap(eigenvalues: Tensor) -> Tensor:
    r"""Returns the overlap of ``w`` and ``Hw`` for a ``w`` with equal weight on the eigenvectors.

    .. math:: \mathrm{overlap}(w, Hw) = \frac{\sum_i \lambda_i}{\sqrt{k \sum_i \lambda_i^2}},
              \qquad w = \sum_i \pm u_i

    What to hold ``hessian_gradient_overlap`` against: about :math:`\sqrt{3/4}` for eigenvalues
    that grow like 1, 2, …, k, and 1 for equal ones.

    Args:
        eigenvalues: ``(k,)``.

    Returns:
        A scalar tensor from -1 to 1; NaN where all are 0, or there is none.

    Reference:
        `gur_ari_2018`, eq. 4.
    """
    scaled = eigenvalues / eigenvalues.abs().max() if len(eigenvalues) else eigenvalues
    overlap = scaled.sum() / (len(scaled) * scaled.square().sum()).sqrt()
    return overlap.clamp(-1.0, 1.0)
