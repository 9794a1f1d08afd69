"""When a basis is renewed, and how: rules of ``DominantSubspace``, each with its state.

``EveryNSteps`` counts training steps. ``ByAngle`` follows the angle between the basis and the true
subspace; how it is estimated is in ``staleness``, what a rule is, also one of your own, in
``rule``, and how a basis of a sample is followed in ``on_sample``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, NoGapWarning, check_integer, check_number
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.outside import MISS_PROBABILITY, look_outside
from subspace_optim.linalg.refinement import (
    Probe,
    probe,
    refine,
    total_staleness,
    vectors_needed,
)
from subspace_optim.subspaces import eigenpairs, put_aside
from subspace_optim.subspaces.checkpoints import SavedState
from subspace_optim.subspaces.eigenpairs import TopPairs
from subspace_optim.subspaces.put_aside import Aside, are_back
from subspace_optim.subspaces.rule import RefreshRule, Situation
from subspace_optim.subspaces.staleness import Drift, Staleness
from subspace_optim.subspaces.unseen import Unseen


class EveryNSteps(RefreshRule):
    """A new basis after every n training steps: ``refresh=n``.

    Parameters that are not finite make it due at once, so that the error of the solve tells of a
    training that has diverged.

    Args:
        n: the training steps that a basis serves for.

    Raises:
        ArgumentError: ``n`` is no integer of at least 1.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        remedy = "Or 'auto', which keeps a basis for as long as it serves, or a RefreshRule."
        self.n = check_integer("refresh", n, minimum=1, remedy=remedy)

    def options(self) -> dict[str, Any]:
        """Returns n."""
        return {"refresh": self.n}

    def is_due(self, seen: Situation) -> bool:
        """Returns whether the basis has served for n steps."""
        return seen.steps >= self.n or not self.operator.parameters.is_finite()


_ROOM = 0.8
"""A basis that a probe finds this near to ``max_angle`` is refreshed at once."""
_REFINABLE = 0.5
"""The sine above which a cold solve costs no more than refinements."""
_SHRUNK = 0.5
"""Gaps that are less than this times what they were: the eigenvalues are no longer known."""
_FALLEN = 0.75
"""Gaps less than this times what they were: in the mean, so that one of them may be gone."""
_FURTHER = 2.0
"""Times the drift of a probe, or after a refresh the longest that is known, where one is due."""
_REFINEMENTS = 2
"""Refinements at one parameter state, at most; a cold solve comes after them."""


class ByAngle(RefreshRule):
    """A basis is kept while its angle to the true subspace is small: ``refresh="auto"``.

    The sine of the largest angle is estimated from the drift of the parameters. The basis is due
    once that is above ``max_angle`` (half of it, if no probe has come since the refresh), or the
    drift is twice as long as those at which the estimate was checked (after a state without a gap,
    as long as the drift since then). Then it is

    1. *probed*: two products tell how stale it is, and whether a direction of the bulk has come to
       the top;
    2. *refined*, if it has too little room below ``max_angle``: one step of subspace iteration,
       k + 1 products, twice at most;
    3. *looked around*, where something outside may have come to the top (``unseen``): at most 12
       products from a random vector;
    4. *solved* for anew, if that is not enough.

    Where something else than the parameters has changed that the loss depends on, no drift tells
    of it: the basis is probed at once, and solved for where a mode has changed, which makes
    another matrix. Without a gap below ``λ_k`` no angle is defined: each state gets a solve.

    Args:
        max_angle: the sine up to which a basis is kept.

    Attributes:
        gapless: ``λ_k`` and ``λ_{k+1}`` could not be told apart, so that no angle is defined.

    Raises:
        ArgumentError: ``max_angle`` is no number above 0 and at most 1.
    """

    def __init__(self, max_angle: float = 0.05) -> None:
        super().__init__()
        check_number("max_angle", max_angle, exclusive=True)
        if max_angle > 1:
            raise ArgumentError("max_angle", max_angle, "at most 1", "It is the sine of an angle.")
        self.max_angle = float(max_angle)
        self.gapless = False
        self._probe_at = (0.0, math.inf)  # the estimate and the drift from which on it is probed
        self._warned = False
        self._unseen = Unseen()
        self._aside: Aside | None = None  # a second basis, where parameters jump to and fro
        self._earlier: Tensor | None = None  # the parameters of the refresh before the last

    def attach(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        tol: float,
        seed: int,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what it is to find.

        Raises:
            ArgumentError: rounding to ``basis_dtype`` leaves too little of ``max_angle``.
        """
        least = 0.0 if basis_dtype is None else torch.finfo(basis_dtype).eps
        if self.max_angle < least:
            remedy = "To round the vectors turns them by up to half of that: basis_dtype=None."
            allowed = f"at least {least} with basis_dtype={basis_dtype}"
            raise ArgumentError("max_angle", self.max_angle, allowed, remedy)
        super().attach(operator, k, tol=tol, seed=seed, basis_dtype=basis_dtype)
        self._staleness = Staleness(k)

    def options(self) -> dict[str, Any]:
        """Returns the limit."""
        return {"refresh": "auto", "max_angle": self.max_angle}

    # --- when -----------------------------------------------------------------------------------

    def is_due(self, seen: Situation) -> bool:
        """Carries the estimate forward, and returns whether it is too large to go by.

        It may exchange the basis for one that was put aside, if that serves, or is nearer.
        """
        same, drift = seen.now[1:] == seen.then[1:], self._drift()
        serves = self._serves(drift)
        if same and not serves and self._aside is not None:
            self._exchange(self._aside)
            other = self._drift()
            serves = self._serves(other)
            if not serves and other.length >= drift.length:
                self._exchange(self._aside)
                self._serves(drift)
        return not serves or not same

    def _serves(self, drift: Drift) -> bool:
        """Notes the estimate, and returns whether the basis is good enough for that."""
        self.stats.estimate = 1.0 if self.gapless else self._staleness.sine(drift)
        estimate, distance = self._probe_at
        return self.stats.estimate <= estimate and drift.length <= distance

    def _exchange(self, other: Aside) -> None:
        self._aside = self._as_aside(self._probe_at)
        other = other.taught_by(self._staleness)
        self.pairs, self._staleness, self._unseen = other.pairs, other.staleness, other.unseen
        self._probe_at = other.probe_at

    def _as_aside(self, probe_at: tuple[float, float]) -> Aside:
        return Aside(self._present(), self._staleness, self._unseen, probe_at)

    def plan(self, seen: Situation, *, forced: bool) -> str:
        """Returns the name of the method that fits what has changed."""
        if seen.now[1:] != seen.then[1:]:
            self._keep_none()
        if seen.now.modes != seen.then.modes:
            return "solve"
        if forced:
            return "refresh"
        return "reconsider" if seen.now.elsewhere != seen.then.elsewhere else "renew"

    # --- how ------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Probes the basis; refines it, or solves for it, until it has room below ``max_angle``."""
        self._probe_and_improve(drifted=True)

    def reconsider(self) -> None:
        """Does the same where something else than the parameters has changed."""
        self._probe_and_improve(drifted=False)

    def refresh(self, *, drifted: bool = True) -> None:
        """Refines the basis without a probe before, and does the same.

        Args:
            drifted: as of ``probe``.
        """
        if self.gapless:
            self.solve()
            return
        self.refine(drifted=drifted)
        self._improve()

    def _probe_and_improve(self, *, drifted: bool) -> None:
        if not self.gapless:
            fallen = self.probe(drifted=drifted)
            if fallen and self._estimate <= _REFINABLE:
                self.refine(verify=True, drifted=drifted)
        self._improve()

    def _improve(self) -> None:
        self._refine_until_good()
        if not self.gapless and self._has_room() and self._unseen.is_due:
            self.look()
            self._refine_until_good()
        if not self._has_room():
            self.solve()
        # Nobody has looked outside since, where there is an outside: no bound is known.
        if self._unseen.refined and self._present().guard.k:
            self.stats.bound = 1.0

    def _refine_until_good(self) -> None:
        for _ in range(_REFINEMENTS):
            if self.gapless or self._estimate > _REFINABLE or self._has_room():
                break
            self.refine(verify=True)

    def look(self) -> None:
        """Looks for directions outside of the basis that have come to the top.

        The estimate is 1 where one has, or where none could be ruled out. Else it is corrected:
        the eigenvalue that comes next is known better than it was.
        """
        pairs = self._present()
        self.stats.looks += 1
        found = look_outside(
            self.operator.matmat,
            pairs.basis,
            pairs.guard,
            lowest=pairs.lowest,
            seed=self.seed + self.stats.looks,
        )
        self.pairs = looked = replace(pairs, guard=found.guard)
        gap, before = looked.gap, pairs.gap
        if gap is None or before is None:  # no bulk
            return
        if found.missed > MISS_PROBABILITY or gap <= 0:
            self.stats.bound = self.stats.estimate = 1.0
            return
        self._unseen = self._unseen.looked(looked.below)
        if gap < before:
            self._staleness = self._staleness.narrowed(gap / before)
            self.stats.estimate = min(1.0, self._estimate * before / gap)
            self.stats.bound = min(1.0, (self.stats.bound or 0.0) * before / gap)

    def probe(self, *, drifted: bool) -> bool:
        """Estimates the angle: 1 where the pairs are others than were known.

        They are if a direction of the bulk has come to the top, or the gaps have shrunk to less
        than half. Which pair comes next is then not known either.

        Args:
            drifted: all of the staleness came with the drift of the parameters.

        Returns:
            Whether the gaps have shrunk much, or an eigenvalue has fallen to those that came next.
        """
        pairs, drift = self._present(), self._drift()
        found = self._probed(guarded=True)
        fallen = found.shrunk < _FALLEN or found.least < self._unseen.level
        self._unseen = self._unseen.probed(drift, found.staleness, self._vectors + 1, fallen=fallen)
        self.pairs = replace(pairs, guard=found.guard)
        self._staleness = self._staleness.probed(drift, found, drifted=drifted)
        sine = self._staleness.sine(drift) if math.isfinite(found.staleness) else 1.0
        entered = bool((found.guard.eigenvalues >= pairs.basis.eigenvalues[-1]).any())
        entered = entered or found.shrunk < _SHRUNK
        self.stats.bound = 1.0 if entered else found.bound
        self.stats.estimate = 1.0 if entered else sine
        # Next at twice the drift, at the latest: rates change, and what enters from the bulk is in
        # no estimate. Sooner where the gaps shrink to half before.
        further = min(_FURTHER, (1 - _SHRUNK) / max(1 - found.shrunk, 1e-12))
        self._probe_at = self.max_angle, max(1.0, further) * drift.length
        return fallen

    def _probed(self, *, guarded: bool) -> Probe:
        pairs = self._present()
        self.stats.probes += 1
        return probe(
            self.operator.matmat,
            pairs.basis,
            pairs.guard,
            lowest=pairs.lowest,
            mean=pairs.mean,
            seed=self.seed + self.stats.probes,
            vectors=self._vectors,
            guarded=guarded,
            level=self._unseen.level if guarded else -math.inf,
        )

    def refine(self, *, verify: bool = False, drifted: bool = True) -> None:
        """Refines the basis by one step of subspace iteration.

        One that turns by a large angle is not taken: the estimate is then 1.

        Args:
            verify: probe what has become of it, also where the bound of subspace iteration would
                do: that one takes the smallest eigenvalue to be no lower than it was last seen.
            drifted: as of ``probe``: only then does it teach how fast a basis becomes stale.
        """
        pairs = self._present()
        result = refine(
            self.operator.matmat, pairs.basis, pairs.guard, lowest=pairs.lowest, mean=pairs.mean
        )
        if result.sine > _REFINABLE:  # too far, or the guard has changed places: nothing to keep
            self.stats.bound = self.stats.estimate = 1.0
            return
        drift = self._drift()
        self._unseen = self._unseen.turned_by(drift, result.before, self.k + 1, drifted=drifted)
        if drifted:
            self._staleness = self._staleness.before_refinement(drift, result.before)
        else:
            self._keep_none()
        refined = replace(pairs, basis=result.basis, guard=result.guard)
        self._settle(refined)
        if self.gapless:
            return
        after, bound = result.after, result.after
        if verify or after > _ROOM * self.max_angle:
            measured = self._probed(guarded=False)
            # A bound that the probe is above was made with a smallest eigenvalue of long ago.
            bound = measured.bound if measured.staleness > after else min(after, measured.bound)
            after = measured.staleness
        self._staleness = self._staleness.refined(result, after)
        self._certify(after, bound=bound, until=_half_gap(pairs, refined, drift))

    def solve(self) -> None:
        """Finds the top k eigenpairs at the present parameters, by a cold solve."""
        pairs = eigenpairs.solve(
            self.operator, self.k, tol=self.tol, max_angle=self.max_angle / 2, seed=self.seed
        )
        self.stats.cold += 1
        known = self.pairs if self.fits() else None
        until = math.inf
        if known is not None:
            drift = self._drift()
            # Out of a state without a gap, how the eigenvalues move is known of this drift alone.
            until = drift.length if self.gapless else _half_gap(known, pairs, drift)
        self.settle(pairs)
        if not self.gapless:
            left = total_staleness(pairs.basis, pairs.guard)
            self._certify(left, bound=left, until=until)

    def store(self) -> float:
        """Holds the vectors in ``basis_dtype``, also of the basis that was put aside."""
        turned = super().store()
        if turned:
            rounding = self._present().staleness_of_rounding
            self._staleness = self._staleness.rounded(turned, rounding)
        if self._aside is not None:
            self._aside = self._aside.stored(self.basis_dtype)
        return turned

    def settle(self, pairs: TopPairs) -> None:
        """Takes new pairs, of the present parameters, that a solve has found: a refresh."""
        self._unseen = self._unseen.looked(pairs.below)
        self._settle(pairs)

    def _settle(self, pairs: TopPairs) -> None:
        space = self.operator.parameters
        theta = space.flatten(space.tensors)
        self._put_aside(theta)
        super().settle(pairs)
        self._staleness = replace(self._staleness, anchor=theta)
        if pairs.gap is None:
            return
        largest = pairs.basis.largest
        floor = max(50 * torch.finfo(pairs.basis.dtype).eps, self.operator.accuracy)
        accuracy = max(self.tol * largest, floor * max(largest, abs(pairs.lowest)))
        self.gapless = pairs.gap <= accuracy
        if self.gapless:
            self.stats.bound = self.stats.estimate = 1.0
            self._keep_none()

    def _keep_none(self) -> None:
        """Forgets the basis that was put aside: it is of another matrix than the present one."""
        self._aside = self._earlier = None

    def _put_aside(self, theta: Tensor) -> None:
        """Keeps the basis that is replaced, where the parameters have come back to those before."""
        before = self._staleness.anchor if self.fits() else None
        inner = self.operator.inner
        if before is not None:
            differs = theta.new_tensor(0.0 if torch.equal(theta, before) else 1.0)
            if float(inner.sum(differs)) == 0:
                return  # the basis of this state is only made better
        aside = self._aside
        if aside is None or not are_back(theta, aside.staleness.anchor, before, inner):
            back = are_back(theta, before, self._earlier, inner) and not self.gapless
            self._aside = self._as_aside(self._first_probe_at) if back else None
        self._earlier = before

    @property
    def holds_two(self) -> bool:
        """Whether a second basis was put aside."""
        return self._aside is not None

    @property
    def _first_probe_at(self) -> tuple[float, float]:
        """When a basis is probed for the first time after its refresh, at the latest."""
        # What is known of a drift says little of one that is far longer.
        return self.max_angle / 2, _FURTHER * self._staleness.rates.longest

    def _certify(self, left: float, *, bound: float, until: float) -> None:
        """Notes how stale a new basis is still, and the drift to probe it at, at the latest."""
        self._staleness = self._staleness.refreshed(left)
        self.stats.bound = min(1.0, bound)
        self.stats.estimate = self._staleness.sine_at_refresh
        estimate, distance = self._first_probe_at
        self._probe_at = estimate, min(distance, until)

    def warn(self) -> None:
        """Warns, once, where ``λ_k`` and ``λ_{k+1}`` cannot be told apart."""
        if not self.gapless or self._warned:
            return
        self._warned = True
        pairs = self._present()
        last, below = float(pairs.basis.eigenvalues[-1]), float(pairs.guard.eigenvalues[0])
        message = (
            f"λ_{self.k} = {last:.4g} and λ_{self.k + 1} = {below:.4g} cannot be told "
            f"apart at tol={self.tol:g}: the dominant subspace of dimension {self.k} is "
            "not defined, and every parameter state gets a new solve as long as this "
            "lasts. Choose a k with a gap below it, or refresh=n."
        )
        warnings.warn(message, NoGapWarning, stacklevel=5)

    @property
    def _vectors(self) -> int:
        """Of a probe."""
        return vectors_needed(self.k, self._staleness.effective_rank)

    @property
    def _estimate(self) -> float:
        return 1.0 if self.stats.estimate is None else self.stats.estimate

    def _has_room(self) -> bool:
        return self._estimate <= _ROOM * self.max_angle

    def _drift(self) -> Drift:
        return self._staleness.drift(self._present().basis, self.operator.parameters)

    # --- checkpoints ----------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Returns what is known of the angle."""
        own = {
            "gapless": self.gapless,
            "came_back": self._earlier is not None,
            "aside_known": put_aside.numbers(self._aside, self.k),
        }
        return own | put_aside.known(self._staleness, self._unseen, self._probe_at)

    def tensors(self) -> dict[str, Any]:
        """Returns the parameters of the last refreshes, and the basis that was put aside."""
        operator = self.operator
        return {
            "anchor": put_aside.copied(self._staleness.anchor, operator),
            "earlier": put_aside.copied(self._earlier, operator),
            "aside": put_aside.saved(self._aside, operator, self.k, self.basis_dtype),
        }

    def take(self, saved: SavedState) -> None:
        """Takes what ``numbers`` and ``tensors`` gave."""
        operator = self.operator
        anchor, earlier = (
            saved.rows(name, (), operator.parameters) for name in ("anchor", "earlier")
        )
        self._staleness, self._unseen, probe_at = put_aside.loaded_known(saved, anchor, self.k)
        self._probe_at = min(probe_at[0], self.max_angle), probe_at[1]
        self.gapless = saved.flag("gapless")
        self._earlier = earlier if saved.flag("came_back") else None
        self._aside = put_aside.loaded(saved, operator, self.k)

    def adopt(self) -> None:
        """Leaves the basis of another rule out: how stale it is is not known, so a solve is due."""
        super().adopt()
        self.pairs = None


def _half_gap(before: TopPairs, now: TopPairs, drift: Drift) -> float:
    """Returns the drift at which half of the gap is left, if it goes on to shrink as it did."""
    if before.gap is None or now.gap is None or not before.gap > now.gap:
        return math.inf
    return (1 - _SHRUNK) * now.gap / (before.gap - now.gap) * drift.length
