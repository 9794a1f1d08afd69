r"""How likely it is that random start vectors have hidden an eigenvector from a Krylov space.

The rows of a band Lanczos process are multiplied, ``Q``, or pending, ``D``, and
``H Qᵀ = Qᵀ T + Dᵀ B``. An eigenvector ``(μ, u)`` of ``H`` therefore has

.. math:: Q u = (\mu - T)^{-1} B^\top d, \qquad d = D u, \quad \|d\| \le 1,

and of these coordinates the first are those of the start vectors:

.. math:: \omega = M(\mu)\, d, \qquad M(\mu) = E^\top (\mu - T)^{-1} B^\top .

If the Ritz values do not show ``μ``, this is how small its part in every start vector has to be:
``M(μ)``, the transfer function of the small problem, falls with each product, and the further
``μ`` is from the Ritz values the faster. A random start vector has a part of about ``1/√P`` in
every direction, so a part that small soon becomes too unlikely. (The same is behind the bounds of
Kuczyński & Woźniakowski 1992, *Estimating the largest eigenvalue by the power and Lanczos
algorithms with a random start*; they know of no Ritz values, and are far more careful.)

A restart begins with the pending rows, and their parts in ``u`` are to the next what those of the
start vectors were: the ``M`` of one restart after the other are multiplied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class SmallProblem:
    """Ritz values, the first rows in the Ritz vectors, and what couples those to pending rows.

    Attributes:
        values: ``(m,)``, the Ritz values.
        first: ``(s, m + p)``, the rows that it began with, one a row, in the Ritz vectors and the
            pending rows (one that was never multiplied is pending still).
        coupling: ``(p, m)``, ``⟨d_i, H y_j⟩`` of the pending rows and the Ritz vectors.
    """

    values: _Array
    first: _Array
    coupling: _Array

    def transfer(self, at: float, resolution: float) -> _Array:
        """Returns ``M(μ)``, ``(s, p)``; no Ritz value is taken to be nearer than ``resolution``."""
        m = len(self.values)
        distance = at - self.values
        distance = np.copysign(np.maximum(np.abs(distance), resolution), distance)
        result: _Array = (self.first[:, :m] / distance) @ self.coupling.T + self.first[:, m:]
        return result


@dataclass
class StartVectors:
    """What is known of the parts that the start vectors of a solve have in an eigenvector.

    Attributes:
        size: P.
        epsilon: of the dtype that the products are in.
        restarts: the small problems at the restarts, each with the pending rows that stayed.
    """

    size: int
    epsilon: float
    restarts: list[tuple[SmallProblem, NDArray[np.intp]]] = field(default_factory=list)

    def overlooked(self, last: SmallProblem, at: float, resolution: float) -> float:
        r"""Returns how likely an eigenvector of eigenvalue ``μ`` is to be hidden; a bound.

        The parts that s Gaussian start vectors have in it are ``N(0, 1/P)``, and the ellipsoid of
        the ``M(μ) d`` lies in a box of its half-axes ``σ_i``:

        .. math:: \prod_i \operatorname{erf}(\sigma_i \sqrt{P/2})

        Args:
            last: the small problem since the last restart.
            at: μ.
            resolution: how near to a Ritz value nothing is told apart.
        """
        known = np.eye(len(self.restarts[0][0].first if self.restarts else last.first))
        gone = []  # rows that a restart had no room for: of any part in the eigenvector
        for problem, stayed in self.restarts:
            parts = known @ problem.transfer(at, resolution)
            gone.append(np.delete(parts, stayed, axis=1))
            known = parts[:, stayed]
        parts = np.concatenate([*gone, known @ last.transfer(at, resolution)], axis=1)
        axes = np.linalg.svd(parts, compute_uv=False)
        # Beyond rounding an axis tells nothing: a remainder that small was not followed.
        told = axes[axes > self.epsilon * axes.max(initial=0.0)]
        if not len(told):  # an invariant subspace: it holds all that the start vectors touch
            return 0.0
        return math.prod(math.erf(float(axis) * math.sqrt(self.size / 2)) for axis in told)
