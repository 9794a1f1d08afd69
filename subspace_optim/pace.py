r"""``Pace``: how fast a basis ages, learned from probes and told by how far the parameters moved.

Between two probes nothing is known of the Hessian, but the displacement ``δ = θ − θ_r`` since the
refresh is. On real networks the ageing ``A`` (``linalg.refinement``) follows it closely,

.. math:: A^2 \approx a^2 \|P_k \delta\|^2 + b^2 \|P_k^\perp \delta\|^2

with rates that drift slowly: a step in the dominant subspace ages the basis five to ten times as
fast as one of the same length in the bulk. So the pace follows a new learning rate, a first step
and a spike at once, where counting steps would have to be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

Observation = tuple[float, float, float]

_MEMORY = 8
"""Observations that the rates are fitted to: the latest, since rates drift."""
_SURPRISE = 1.25
"""An ageing that is more than this many times what was expected: the pace has changed."""
_RIDGE = 0.3
"""Weight of what is assumed of a rate, against one observation of it."""
_NOTHING = 1e-12
"""Stands for a rate, or for the inverse of one, that is 0."""


@dataclass(frozen=True)
class Pace:
    """The ageing that a displacement brings, as far as the observations tell; a value.

    Each observation bounds both rates from above, ``a ≤ A/‖Pδ‖`` and ``b ≤ A/‖P⊥δ‖``. The squares
    of the rates are fitted to all observations, each relative to its own ``A²``, by least squares
    with a pull to their least bounds: a movement of a kind that has not been seen is
    expected to age the basis as much as it may.

    Attributes:
        start: the ageing that the basis began with, from its last refresh.
        observed: ``(‖Pδ‖, ‖P⊥δ‖, A)``, the latest last.
        trust: what the fit is multiplied by, so that it goes half of the way to the latest probe
            of this basis, which scatters; 1 before there is one.
    """

    start: float = 0.0
    observed: tuple[Observation, ...] = ()
    trust: float = 1.0

    def growth(self, inside: float, outside: float) -> float:
        """Returns the ageing that a displacement of these two lengths is expected to add."""
        return self.trust * _fitted(self.observed, inside, outside)

    def observe(self, inside: float, outside: float, ageing: float) -> Pace:
        """Returns what a probe teaches. A surprise makes all that was learned before worthless."""
        expected = math.hypot(self.start, self.growth(inside, outside))
        before = self.observed if ageing <= _SURPRISE * expected else ()
        observed = (*before, (inside, outside, ageing))[-_MEMORY:]
        fitted = _fitted(observed, inside, outside)
        trust = (1 + ageing / fitted) / 2 if fitted > 0 else 1.0
        return replace(self, observed=observed, trust=trust)

    def refreshed(self, start: float) -> Pace:
        """Returns the pace of a new basis of ageing ``start``. The rates are remembered."""
        return replace(self, start=start, trust=1.0)


def _fitted(observed: tuple[Observation, ...], inside: float, outside: float) -> float:
    if inside == outside == 0:
        return 0.0
    if not observed:
        return math.inf
    # A Hessian that does not change, up to rounding, has a rate of almost nothing.
    rows = [(i, o, max(a, _NOTHING * math.hypot(i, o))) for i, o, a in observed]
    *lengths, ageings = np.array(rows).T
    relative = np.square(np.array(lengths) / ageings)
    bounds = 1 / np.maximum(relative.max(axis=1), _NOTHING**2)
    shares = (relative * bounds[:, None]).T
    ridge = _RIDGE * np.eye(2)
    fit = np.linalg.solve(shares.T @ shares + ridge, (shares.sum(axis=0) + _RIDGE))
    squared_rates = np.clip(fit, 0.0, 1.0) * bounds
    return float(np.sqrt(squared_rates @ np.square([inside, outside])))
