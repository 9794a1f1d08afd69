r"""``Staleness``: the angle between a kept basis and the true subspace, while parameters move.

Between two looks at the Hessian nothing is known of it, but the *drift* is: the displacement
``δ = θ − θ_r`` since the refresh, inside of the subspace and outside. On real networks the
staleness ``A`` (``linalg.refinement``) follows it closely,

.. math:: A^2 \approx a^2 \|P_k \delta\|^2 + b^2 \|P_k^\perp \delta\|^2

with rates ``a`` and ``b`` that change slowly: a step in the dominant subspace makes the basis stale
five to ten times as fast as one of the same length in the bulk. So a new learning rate, a first
step and a spike are followed at once, where counting steps would have to be told of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.refinement import SCATTER, Probe, Refinement
from subspace_optim.subspaces.checkpoints import SavedState

_MEMORY = 8
"""Observations that the rates are fitted to: the latest, since rates change."""
_SURPRISE = 1.25
"""A staleness of more than this many times what was expected: the rates have changed."""
_RIDGE = 0.3
"""Weight of what is assumed of a rate, against one observation of it."""
_NOTHING = 1e-12
"""Stands for a rate, or for the inverse of one, that is 0."""
_ROUNDED = 0.5
"""The share of a squared staleness that is put down to rounding, at most: probes scatter."""
_MARGIN = 1.75
"""What an estimate is multiplied by: probes scatter, and the ratio of sine to staleness changes."""


class Drift(NamedTuple):
    """The displacement of the parameters since a refresh: ``‖P_k δ‖`` and ``‖P_k^⊥ δ‖``."""

    inside: float
    outside: float

    @property
    def length(self) -> float:
        """``‖δ‖``."""
        return math.hypot(self.inside, self.outside)


Observation = tuple[float, float, float]
"""A drift, and the staleness that was found there."""


@dataclass(frozen=True)
class Rates:
    """How fast a basis becomes stale with drift, as far as the observations tell; a value.

    Each observation bounds both rates from above, ``a ≤ A/‖P_k δ‖`` and ``b ≤ A/‖P_k^⊥ δ‖``. The
    squares of the rates are fitted to all observations, each relative to its own ``A²``, by least
    squares with a pull to their least bounds: a drift of a kind that has not been seen is expected
    to make the basis as stale as it may.

    Attributes:
        start: the staleness that the basis had after its last refresh.
        observed: ``(‖P_k δ‖, ‖P_k^⊥ δ‖, A)``, the latest last.
        trust: what the fit is multiplied by, so that it goes half of the way to the latest probe
            of this basis, which scatters; 1 before there is one.
    """

    start: float = 0.0
    observed: tuple[Observation, ...] = ()
    trust: float = 1.0

    def growth(self, drift: Drift) -> float:
        """Returns the staleness that a drift is expected to add."""
        return self.trust * _fitted(self.observed, drift)

    def observe(self, drift: Drift, staleness: float) -> Rates:
        """Returns what a probe teaches; after a surprise, that alone."""
        expected = math.hypot(self.start, self.growth(drift))
        before = self.observed if staleness <= _SURPRISE * expected else ()
        observed = (*before, (*drift, staleness))[-_MEMORY:]
        fitted = _fitted(observed, drift)
        trust = (1 + staleness / fitted) / 2 if fitted > 0 else 1.0
        return replace(self, observed=observed, trust=trust)

    @property
    def longest(self) -> float:
        """The longest drift that was observed; infinite before there is one."""
        return max((math.hypot(i, o) for i, o, _ in self.observed), default=math.inf)

    def refreshed(self, start: float) -> Rates:
        """Returns the same rates, for a new basis of staleness ``start``."""
        return replace(self, start=start, trust=1.0)


def _fitted(observed: tuple[Observation, ...], drift: Drift) -> float:
    if drift.inside == drift.outside == 0:
        return 0.0
    if not observed:
        return math.inf
    # A Hessian that does not change, up to rounding, has a rate of almost nothing.
    rows = [(i, o, max(a, _NOTHING * math.hypot(i, o))) for i, o, a in observed]
    *lengths, found = np.array(rows).T
    relative = np.square(np.array(lengths) / found)
    bounds = 1 / np.maximum(relative.max(axis=1), _NOTHING**2)
    shares = (relative * bounds[:, None]).T
    ridge = _RIDGE * np.eye(2)
    fit = np.linalg.solve(shares.T @ shares + ridge, (shares.sum(axis=0) + _RIDGE))
    squared_rates = np.clip(fit, 0.0, 1.0) * bounds
    return float(np.sqrt(squared_rates @ np.square(drift)))


@dataclass(frozen=True)
class Staleness:
    """What is known of the angle between a basis and the true subspace; a value.

    Attributes:
        k: dimension of the subspace.
        anchor: ``(P,)``, the parameters of the last refresh; ``None`` before the first.
        rates: how fast the basis becomes stale.
        effective_rank: of the rows that ``A`` sums up, as last seen: from 1, where one direction
            of the subspace is off alone, to k, where all are equally.
        ratios: the largest sine over the staleness, at the last refinements.
        rounding: the staleness that the basis shows because its vectors were rounded: it does not
            grow with drift, and the sine of it is known and in ``rates.start``.
    """

    k: int
    anchor: Tensor | None = None
    rates: Rates = Rates()
    effective_rank: float | None = None
    ratios: tuple[float, ...] = ()
    rounding: float = 0.0

    def drift(self, basis: EigenBasis, space: ParameterSpace) -> Drift:
        """Returns how far the parameters have moved since the last refresh."""
        assert self.anchor is not None  # noqa: S101 (there was one)
        delta = space.flatten(space.tensors).sub_(self.anchor)
        square = basis.inner.sum(torch.linalg.vector_norm(delta).double().square())
        within = torch.linalg.vector_norm(basis.coefficients(delta)).double()
        inside, length = torch.stack([within, square.sqrt()]).tolist()
        outside = math.sqrt(max(0.0, length**2 - inside**2)) if inside < length else 0.0
        return Drift(inside, outside)

    def sine(self, drift: Drift) -> float:
        """Returns the expected sine of the largest angle after a drift, on the safe side."""
        return self._sine(self.rates.growth(drift))

    @property
    def sine_at_refresh(self) -> float:
        """The same at the last refresh."""
        return self._sine(0.0)

    @property
    def ratio(self) -> float:
        """The largest sine over what the staleness has grown by, on the safe side.

        The staleness adds up k rows, and divides by the gaps to ``λ_{k+1}`` what is mostly further
        down: the largest sine is a third of it or less, as the last refinements tell. Before there
        is one, the sine is bounded by ``A r^{-1/4}``, r the effective rank of the rows.
        """
        if self.ratios:
            return _MARGIN * max(self.ratios)
        rank = max(1.0, self.effective_rank or 1.0)  # an estimate of it may be below
        return min(1.0, (1 + SCATTER) * math.sqrt(math.sqrt(1 / rank)))

    def _sine(self, growth: float) -> float:
        # What a refresh has left over is near λ_{k+1}, so that it counts in full.
        sine = math.hypot(self.rates.start, self.ratio * growth)
        return min(1.0, sine) if math.isfinite(sine) else 1.0

    # --- what a look at the Hessian teaches ------------------------------------------------------

    def probed(self, drift: Drift, found: Probe, *, drifted: bool) -> Staleness:
        """Returns what is known after a probe.

        Args:
            drift: since the last refresh.
            found: by the probe.
            drifted: all of the staleness came with the drift; else something beside the
                parameters has changed too, and what was found counts in full from here on.
        """
        known, rates = self, self.rates
        if found.effective_rank is not None and not self.ratios:
            known = replace(known, effective_rank=found.effective_rank)
        if math.isfinite(found.staleness):
            observed = rates.observe(drift, self._of_drift(found.staleness))
            known = replace(known, rates=observed if drifted else rates.refreshed(found.staleness))
        return known

    def before_refinement(self, drift: Drift, staleness: float) -> Staleness:
        """Returns what is known once a refinement has told how stale the basis was."""
        if not 0 < staleness < math.inf:
            return self
        return replace(self, rates=self.rates.observe(drift, self._of_drift(staleness)))

    def _of_drift(self, staleness: float) -> float:
        """Returns what of a staleness does not come from rounding."""
        square = staleness**2
        return math.sqrt(max(square - self.rounding**2, (1 - _ROUNDED) * square))

    def refined(self, result: Refinement, after: float) -> Staleness:
        """Returns what is known after a refinement that has left a staleness of ``after``."""
        if not 0 < result.before < math.inf:
            return self
        # The old basis was off by the angle to the new one and what that one is off by.
        off = result.sine + self.ratio * after
        ratios = (*self.ratios[-1:], min(1.0, off / self._of_drift(result.before)))
        return replace(self, ratios=ratios, effective_rank=result.effective_rank)

    def refreshed(self, left: float) -> Staleness:
        """Returns what is known of a new basis, of which a staleness of ``left`` remains."""
        return replace(self, rates=self.rates.refreshed(left), rounding=0.0)

    def rounded(self, sine: float, rounding: float) -> Staleness:
        """Returns what is known once the vectors were rounded.

        Args:
            sine: that this turned them by, in a random direction.
            rounding: the staleness that it shows.
        """
        start = math.hypot(self.rates.start, sine)
        return replace(self, rates=replace(self.rates, start=start), rounding=rounding)

    def narrowed(self, share: float) -> Staleness:
        """Returns what is known once the gaps are seen to be that share of what they were."""
        return replace(self, rates=replace(self.rates, start=self.rates.start / share))

    # --- checkpoints -----------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Returns all but the anchor, for a state dict."""
        return {
            "rates": asdict(self.rates),
            "effective_rank": self.effective_rank,
            "ratios": list(self.ratios),
            "rounding": self.rounding,
        }

    def loaded(self, state: SavedState, anchor: Tensor | None) -> Staleness:
        """Returns what was saved; ``ArgumentError`` where it cannot be."""
        saved = state.inside("rates", [field.name for field in fields(Rates)])
        observed = saved.lists("observed", 3, minimum=0, infinite=True)
        rates = Rates(
            start=saved.number("start", minimum=0, infinite=True),
            observed=tuple((inside, outside, found) for inside, outside, found in observed),
            trust=saved.number("trust", minimum=0.5, infinite=True),
        )
        ratios = tuple(state.numbers("ratios", minimum=0, maximum=1))
        rank = state.optional("effective_rank", minimum=0, maximum=self.k)
        rounding = state.number("rounding", minimum=0, infinite=True)
        return Staleness(self.k, anchor, rates, rank, ratios, rounding)
