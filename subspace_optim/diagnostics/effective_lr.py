"""How far an update goes along each part of the gradient, and how far training has come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import norm, square


def dom_lr(update: Tensor, gradient: Tensor, basis: EigenBasis) -> Tensor:
    r"""Returns the effective learning rate of an update in the dominant subspace.

    .. math:: \eta^{\mathrm{dom}}_t =
        -\frac{\langle \theta_{t+1} - \theta_t,\; P_k \nabla L(\theta_t) \rangle}
              {\| P_k \nabla L(\theta_t) \|^2}

    The paper's formula lacks the minus sign, and so gives −η for gradient descent, where its text
    says +η; here it is as in the text. Gradient descent at rate η has η in both subspaces, Dom-GD
    has η here and 0 in the bulk.

    Args:
        update: ``θ_{t+1} − θ_t``, ``(P,)``.
        gradient: ``∇L(θ_t)`` over all of the data, ``(P,)``.
        basis: the dominant subspace at ``θ_t``.

    Returns:
        A scalar tensor; NaN where the gradient has no dominant component beyond rounding. It nears
        the rate of the bulk where the angle of the basis to the true subspace is not well below
        χ_k.

    Reference:
        `song_2024`, Definition 4.
    """
    # ⟨Δθ, P g⟩ = ⟨U Δθ, U g⟩, in the k coordinates of the subspace, which all ranks have.
    inside, along = basis.coefficients(gradient), basis.coefficients(update)
    length = norm(gradient, basis.inner)
    return _rate(along, inside, norm(inside), length, basis.k, WHOLE)


def bulk_lr(update: Tensor, gradient: Tensor, basis: EigenBasis) -> Tensor:
    r"""Returns the effective learning rate of an update in the bulk subspace.

    .. math:: \eta^{\mathrm{bulk}}_t =
        -\frac{\langle \theta_{t+1} - \theta_t,\; P_k^\perp \nabla L(\theta_t) \rangle}
              {\| P_k^\perp \nabla L(\theta_t) \|^2}

    With the sign of ``dom_lr``. Among optimizers it goes with the speed of training
    (`song_2024`, appendix C).

    Args:
        update: ``θ_{t+1} − θ_t``, ``(P,)``.
        gradient: ``∇L(θ_t)`` over all of the data, ``(P,)``.
        basis: the dominant subspace at ``θ_t``.

    Returns:
        A scalar tensor; NaN where the gradient has no bulk component beyond rounding (as for
        ``k = P``).

    Reference:
        `song_2024`, Definition 4.
    """
    # Twice, and of the update too: what rounding leaves of a large dominant part in a small bulk
    # part would be multiplied by the large dominant part of the update.
    outside = basis.project_out(basis.project_out(gradient))
    inner = basis.inner
    lengths = torch.stack(inner.sums(square(outside), square(gradient))).sqrt()
    return _rate(basis.project_out(update), outside, lengths[0], lengths[1], basis.k, inner)


def distance(theta: Tensor, start: Tensor, *, inner: InnerProduct = WHOLE) -> Tensor:
    r"""Returns how far the parameters have come.

    .. math:: \|\theta_t - \theta_0\|

    Args:
        theta: ``(P,)``, as ``space.flatten(space.tensors)`` gives it of ``subspace.parameters``.
        start: ``(P,)``, where the distance is counted from, such as the switch to another
            optimizer.
        inner: completes sums over coordinates, of a model that is sharded: ``operator.inner``.

    Returns:
        A scalar tensor.

    Raises:
        ArgumentError: the shapes differ.

    Reference:
        `song_2024`, Figures 19 and 22.
    """
    if theta.shape != start.shape:
        found, allowed = tuple(start.shape), f"{tuple(theta.shape)}, as that of theta"
        raise ArgumentError("the shape of start", found, allowed)
    return norm(theta - start, inner).to(theta.dtype)


def _rate(
    update: Tensor,
    component: Tensor,
    length: Tensor,
    of_gradient: Tensor,
    k: int,
    inner: InnerProduct,
) -> Tensor:
    """Returns ``−⟨update, component⟩ / ‖component‖²``, NaN for a component that is rounding.

    Args:
        update: in the coordinates of the component.
        component: of the gradient.
        length: ``‖component‖``; both in float64, since the squares of tiny and of huge float32
            numbers are zeros and infinities.
        of_gradient: ``‖gradient‖``.
        k: of the basis.
        inner: completes sums over the coordinates of the component.
    """
    noise = (10 + math.sqrt(k)) * torch.finfo(component.dtype).eps
    unit = (component / length).to(component.dtype)
    rate = -inner.sum(torch.dot(update.to(component.dtype), unit)) / length
    return torch.where(length > noise * of_gradient, rate, torch.nan).to(component.dtype)
