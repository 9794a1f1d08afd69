"""How much of a vector lies in a subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis


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
    norm = torch.linalg.vector_norm(v.to(basis.dtype))
    fraction = torch.linalg.vector_norm(basis.coefficients(v)) / norm
    return torch.where(norm > 0, fraction.clamp(max=1.0), 0.0)
