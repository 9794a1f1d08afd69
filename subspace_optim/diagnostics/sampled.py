r"""What a sample tells of a gradient: squares without the noise in them, and standard errors.

The examples of a sample, a share f of all, were dealt to J groups at random. Group j has the weight
``w_j`` and the mean ``x_j``; with ``p_j = w_j / Σ w`` the mean of the sample is
``x̄ = Σ_j p_j x_j``, and how the groups scatter about it tells how far it is from that of all data
(Cochran 1977; ``1 − f`` for a sample without replacement):

.. math:: v = (1 - f)\, \frac{\sum_j p_j^2 \|x_j - \bar x\|^2}{1 - \sum_j p_j^2}, \qquad
          \mathbb{E}\, v = \mathbb{E} \|\bar x - X\|^2

- The square of the mean holds that noise: ``E‖x̄‖² = ‖X‖² + E v``. So ``‖x̄‖² − v`` is the
  estimate of ``‖X‖²``, without bias for groups of equal weights, or whose variances go with
  ``1/w_j``.
- The standard error of what is made of the means is that of the jackknife that leaves a group out,
  which is ``v`` itself for a mean (Efron & Stein 1981):

.. math:: s^2 = (1 - f)\, \frac{\sum_j (1 - p_j)^2 (T_{-j} - T)^2}{1 - \sum_j p_j^2}

All of it in float64. Where a single group tells nothing of the scatter, it is NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import exact_gram, gram


class Sampled(NamedTuple):
    """A number as a sample tells it, and its standard error: scalar tensors in float64."""

    value: Tensor
    error: Tensor


class Groups:
    r"""The weights of the groups of a sample, and what follows from them for means and squares.

    Methods return a number for the whole sample and one for each that is left when a group is
    taken out, ``(J + 1,)``; ``estimate`` makes of such numbers a value and its standard error.

    Args:
        weights: ``(J,)``, of the groups.
        share: f, of all data that the sample is.
    """

    def __init__(self, weights: Tensor, share: float) -> None:
        J = len(weights)
        weights = weights.double()
        self.share = share
        self._present = torch.ones(J + 1, J, dtype=torch.float64, device=weights.device)
        self._present[1:].fill_diagonal_(0)
        kept = self._present * weights
        self._p = kept / kept.sum(dim=1, keepdim=True)
        self._unsampled = 1 - share * kept.sum(dim=1) / weights.sum()
        self._spread = 1 - self._p.square().sum(dim=1)

    def means(self, values: Tensor) -> Tensor:
        """Returns ``x̄`` of the numbers ``(J,)`` of the groups."""
        return self._p @ values.double()

    def squares(self, gram: Tensor) -> Tensor:
        """Returns ``‖x̄‖² − v``, the unbiased estimates of the square of the mean over all data.

        Args:
            gram: ``(J, J)``, the inner products of the vectors of the groups.
        """
        gram = gram.double()
        along = self._p @ gram
        square = (along * self._p).sum(dim=1)
        deviations = gram.diagonal() - 2 * along + square[:, None]
        scatter = (self._p.square() * deviations).sum(dim=1) / self._spread
        return square - self._unsampled * scatter

    def estimate(self, values: Tensor) -> Sampled:
        """Returns the value of the whole sample, and the jackknife's standard error of it."""
        whole, without = values[0], values[1:]
        squares = ((1 - self._p[0]) * (without - whole)).square().sum() / self._spread[0]
        return Sampled(whole, (self._unsampled[0] * squares).sqrt())

    def root(self, squares: Tensor) -> Sampled:
        """Returns the root of an estimate, ``s(√T) = s(T) / 2√T``; NaN where it is not positive."""
        value, error = self.estimate(squares)
        root = torch.where(value > 0, value, torch.nan).sqrt()
        return Sampled(root, error / (2 * root))


class SampledGradient:
    r"""The gradient of the mean loss in groups of a sample, in parts: in a subspace and outside.

    What depends on squares is NaN where these come out as zero or less: the sample is too small to
    tell them from noise.

    Args:
        gradients: ``(J, P)``, one group a row; overwritten by their parts outside.
        weights: ``(J,)``, of the groups.
        share: of all data that the sample is.
        basis: the subspace.
    """

    def __init__(self, gradients: Tensor, weights: Tensor, share: float, basis: EigenBasis) -> None:
        self._basis, self._groups = basis, Groups(weights, share)
        self._inside = basis.coefficients(gradients).double()
        self._outside = gradients.to(basis.dtype)
        for _ in range(2):  # twice, as in ``bulk_lr``
            basis.project_out(self._outside, out=self._outside)
        self._square_inside = self._groups.squares(self._inside @ self._inside.T)
        self._square_outside = self._groups.squares(exact_gram(self._outside, basis.inner))
        self._square = self._square_inside + self._square_outside
        noise = (10 + math.sqrt(basis.k)) * torch.finfo(basis.dtype).eps
        self._rounding = noise**2  # of a component whose square is less, nothing is known

    def norm(self) -> Sampled:
        r"""Returns ``‖∇L‖``."""
        return self._groups.root(self._square)

    def alignment(self) -> Sampled:
        r"""Returns ``χ_k = ‖P_k ∇L‖ / ‖∇L‖``, at most 1."""
        value, error = self._groups.root(self._square_inside / self._square)
        return _if(self._square[0] > 0, value.clamp(max=1.0), error)

    def dom_lr(self, update: Tensor) -> Sampled:
        """Returns the effective learning rate of an update in the subspace."""
        along = self._inside @ self._basis.coefficients(update).double()
        return self._rate(along, self._square_inside)

    def bulk_lr(self, update: Tensor) -> Sampled:
        """Returns the effective learning rate of an update outside of the subspace."""
        update = self._basis.project_out(update)
        update = update.to(self._outside)[None]
        along = gram(self._outside, update, self._basis.inner)[:, 0]
        return self._rate(along, self._square_outside)

    def _rate(self, along: Tensor, squares: Tensor) -> Sampled:
        """Returns ``−⟨Δθ, component⟩ / ‖component‖²``.

        Args:
            along: ``(J,)``, the inner products of the update with the components of the groups.
            squares: of the component.
        """
        value, error = self._groups.estimate(-self._groups.means(along) / squares)
        return _if(squares[0] > self._rounding * self._square[0].abs(), value, error)


def _if(seen: Tensor, value: Tensor, error: Tensor) -> Sampled:
    """Returns an estimate, or NaN where nothing is seen."""
    return Sampled(torch.where(seen, value, torch.nan), torch.where(seen, error, torch.nan))
