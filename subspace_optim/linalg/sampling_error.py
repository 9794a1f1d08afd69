r"""How far the top eigenvectors of a sampled matrix are from those of the whole.

A matrix that is a mean over examples, ``H = Σ_b A_b``, is known by some of its batches. With
``E``, the error of the sample's mean, its eigenvectors are off, to first order, by

.. math:: d_i = (\lambda_i - H)^{-1} (I - P)\, E v_i

and the sine of the largest angle is ``λ_max(D)^½``, ``D_ij = ⟨d_i, d_j⟩``. The sample tells what to
expect of both factors:

- how the products ``A_b v_i`` of its m batches scatter about their mean ``ā_i`` estimates the error
  of their sum (Cochran 1977, *Sampling Techniques*, 2.6; ``1 − f`` of it if the sample is a share f
  of all, drawn without replacement),

  .. math:: \mathbb{E} \langle E v_i, E v_j \rangle \approx \frac{m}{m - 1}
            \sum_b \langle A_b v_i - \bar a_i,\, A_b v_j - \bar a_j \rangle

- and how much the resolvent lengthens it is ``∫ (λ_i − μ)^{-2} dα(μ)``, α being how the error is
  spread over the spectrum below. Its first moments ``⟨e, He⟩`` and ``‖He‖²`` cost one product with
  one error ``e`` drawn at random. No measure with these moments and no weight above ``λ_{k+1}``
  gives more than the Gauss-Radau rule with a node there (Golub & Meurant 2010, *Matrices, Moments
  and Quadrature*, 6.2: all derivatives of the integrand are positive).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import gram

MARGIN = 1.25
"""What the expected sine is multiplied by. The true one scatters about it by a tenth, of a sample
of a few hundred examples by a fifth."""


class Scatter:
    """How the products with a basis scatter over the batches of a sample.

    Args:
        basis: k eigenpairs of the sample's matrix, or nearly.
        below: ``λ_{k+1}``.
        seed: of the error that is drawn.

    Attributes:
        batches: how many were seen.
    """

    def __init__(self, basis: EigenBasis, below: float, seed: int) -> None:
        self.basis, self.below, self.batches = basis, below, 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        vectors = basis.vectors
        options = {"dtype": torch.float64, "device": vectors.device}
        self._overlaps = torch.zeros(basis.k, basis.k, **options)
        self._error = torch.zeros_like(vectors[0])
        # The error that is drawn weighs rows as the sine does.
        gaps = (basis.eigenvalues - below).clamp_min(1e-3 * float(basis.largest))
        self._weights = 1 / gaps

    def see(self, products: Tensor) -> None:
        """Adds what one batch adds to the products with the basis; further rows are left out."""
        part = products[: self.basis.k]
        self.batches += 1
        self._overlaps += self._outside(part)
        draws = torch.randn(len(part), generator=self._generator, device="cpu").to(part)
        self._error.addmv_(part.T, draws * self._weights)

    def _outside(self, part: Tensor) -> Tensor:
        inside = gram(part, self.basis.vectors)
        return gram(part, part) - inside @ inside.T

    def gather(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Adds up what several processes have seen, each of batches of its own."""
        sum_(self._overlaps)
        sum_(self._error)
        count = torch.tensor([self.batches], device=self._error.device)
        self.batches = int(sum_(count))

    def sine(self, products: Tensor, matmat: Callable[[Tensor], Tensor]) -> float:
        r"""Returns the expected sine of the largest angle, with a margin, for ``f = 0``.

        It is proportional to ``(1 − f)^½``, and infinite where it is not defined: from a single
        batch, or without a gap.

        Args:
            products: with the basis, the sum of all that was seen.
            matmat: products with the sample's matrix, here with one row.
        """
        m, values = self.batches, self.basis.eigenvalues.double().cpu().numpy()
        if m < 2 or values.min() <= self.below:
            return math.inf
        covariance = self._overlaps - self._outside(products[: self.basis.k]) / m
        covariance = covariance.cpu().numpy() * m / (m - 1)
        e = self.basis.project_out(self._error)
        length = torch.linalg.vector_norm(e)
        if not length > 0:
            return 0.0
        e /= length
        product = self.basis.project_out(matmat(e[None])[0])
        mean, square = torch.stack([e @ product, product @ product]).double().tolist()
        factors = np.sqrt([_radau(mean, square, value, self.below) for value in values])
        sines = covariance * factors[:, None] * factors
        largest = float(np.linalg.eigvalsh((sines + sines.T) / 2)[-1])
        return MARGIN * math.sqrt(max(0.0, largest))


def _radau(mean: float, square: float, value: float, below: float) -> float:
    """Returns ``∫ (λ − μ)^{-2} dα(μ)`` by two nodes, one of them at ``below``: an upper bound.

    Args:
        mean: ``∫ μ dα``.
        square: ``∫ μ² dα``.
        value: λ.
        below: no weight lies above it.
    """
    if mean >= below:
        return (value - below) ** -2
    node = (below * mean - square) / (below - mean)
    weight = (mean - node) / (below - node)
    return weight * (value - below) ** -2 + (1 - weight) * (value - node) ** -2
