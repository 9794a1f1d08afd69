"""``AgeingBasis``: an eigenbasis, and what is known of its angle while the parameters move on."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    InconsistentDerivativeError,
    NoGapWarning,
)
from subspace_optim.curvature.checkpoints import SavedState, checksum
from subspace_optim.curvature.operator import CurvatureOperator, rounding_at
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import top_eigenpairs
from subspace_optim.linalg.refinement import (
    Probe,
    probe,
    refine,
    total_ageing,
    vectors_needed,
)
from subspace_optim.pace import Pace

_MARGIN = 1.75
"""What an estimate is multiplied by: probes scatter, and the ratio of sine to ageing drifts."""
_SCATTER = 1.25
"""The part of it that stands for probes alone."""
_ROOM = 0.8
"""A basis that a probe finds this near to ``max_angle`` is refreshed at once."""
_ASYMMETRIC = 1e-2
"""The asymmetry of products that rounding does not explain: at most 1e-5 in sound matrices."""
_REFINABLE = 0.5
"""The sine above which a cold solve costs no more than refinements."""
_SHRUNK = 0.5
"""Gaps that are less than this times what they were: the eigenvalues are no longer known."""
_REFINEMENTS = 2
"""Refinements at one parameter state, at most; a cold solve comes after them."""


@dataclass
class SubspaceStats:
    """What a basis has cost so far, and how good it is.

    Attributes:
        refreshes: times that it was made anew.
        cold: those of them that were cold solves; the others refined the basis that was there.
        probes: looks at it that did not change it.
        bound: of the sine of the largest angle between the basis and the true subspace, to first
            order in the ageing, at the last refresh or probe. After a probe it is too small with
            a probability of at most 5 %.
        estimate: of that sine at the last update: measured there, or carried forward since. Both
            are known for ``refresh="auto"`` alone, and are 1 where there is no gap.
        failures: refreshes and probes that failed, and left the last basis in use.
        products: curvature products of all refreshes and probes.
        gradients: gradients over the data that the kept graphs of all of these began with.
        seconds: wall time of all of these.
    """

    refreshes: int = 0
    cold: int = 0
    probes: int = 0
    bound: float | None = None
    estimate: float | None = None
    failures: int = 0
    products: int = 0
    gradients: int = 0
    seconds: float = 0.0


class AgeingBasis:
    """The top k eigenpairs of an operator, solved for, refined, and probed.

    What it holds is replaced and never written into, so that a refresh is made on a ``trial``,
    which takes the place of the original when all of it has succeeded.

    Args:
        operator: the operator.
        k: how many pairs.
        tol: relative residual of a solve.
        max_angle: the sine up to which the basis is good; ``None`` to follow no angle.
        seed: of the random vectors.

    Attributes:
        basis: the pairs; ``None`` before the first solve.
        stats: the counts of refreshes and probes are kept here, the costs by who holds it.
        gapless: ``λ_k`` and ``λ_{k+1}`` could not be told apart, so that no angle is defined.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        tol: float,
        max_angle: float | None,
        seed: int,
    ) -> None:
        self.operator, self.k = operator, k
        self.tol, self.max_angle, self.seed = tol, max_angle, seed
        self.stats = SubspaceStats()
        self.basis: EigenBasis | None = None
        self.gapless = False
        self._guard: EigenBasis | None = None  # the pair that comes next
        self._lowest = self._mean = 0.0  # of all eigenvalues
        self._anchor: Tensor | None = None  # the parameters of the last refresh
        self._pace = Pace()
        self._unevenness: float | None = None  # of the rows of the ageing, as last seen
        self._ratios: list[float] = []  # the sine over the ageing, at the last refinements
        self._probe_at = (0.0, math.inf)  # the estimate and the distance from which on it is probed
        self._warned = False

    @property
    def gap(self) -> float | None:
        """``λ_k − λ_{k+1}`` as the last refresh left them; ``None`` for k = P."""
        if self.basis is None or self._guard is None or self._guard.k == 0:
            return None
        return float(self.basis.eigenvalues[-1] - self._guard.eigenvalues[0])

    def trial(self) -> Self:
        """Returns a copy to work on: what fails half-way leaves the original as it is."""
        trial = copy.copy(self)
        trial.stats = replace(self.stats)
        return trial

    def fingerprint(self) -> int:
        """Returns a number that ranks which hold the same basis have in common."""
        values = None if self.basis is None else self.basis.eigenvalues
        stats = replace(self.stats, products=0, gradients=0, seconds=0.0)
        return checksum(self._numbers() | {"eigenvalues": values, "stats": asdict(stats)})

    # --- while the parameters move ---------------------------------------------------------------

    def carried_forward(self) -> tuple[float, bool]:
        """Returns the estimate at the present parameters, and whether it is small enough."""
        moved = self._moved()
        estimate = 1.0 if self.gapless else self._sine(self._pace.growth(*moved))
        largest, distance = self._probe_at
        return estimate, estimate <= largest and math.hypot(*moved) <= distance

    def renew(self) -> None:
        """Probes the basis; refines it, or solves for it anew, until its angle is small enough."""
        if not self.gapless:
            self.probe()
        self._improve()

    def reconsider(self) -> None:
        """Renews the basis where something else than the parameters has changed.

        No displacement tells how much that ages it: what a probe finds counts in full from then on.
        """
        if not self.gapless:
            self.probe(displaced=False)
        self._improve()

    def refresh(self) -> None:
        """Refines the basis, due or not, and goes on as ``renew`` where that is not enough."""
        if self.basis is None or self.max_angle is None or self.gapless:
            self.solve()
            return
        self.refine()
        self._improve()

    def _improve(self) -> None:
        for _ in range(_REFINEMENTS):
            if self.gapless or self._estimate > _REFINABLE or self._has_room():
                break
            self.refine(verify=True)
        if not self._has_room():
            self.solve()

    def probe(self, *, displaced: bool = True) -> None:
        """Estimates the angle: 1 where the pairs are others than were known.

        They are if a direction of the bulk has come to the top, or the gaps have shrunk to less
        than half. Which pair comes next is then not known either.

        Args:
            displaced: all that the basis has aged since its refresh came with the displacement.
        """
        basis, _ = self._present()
        result, moved = self._probed(guarded=True), self._moved()
        self._guard, found = result.guard, result.ageing
        if result.unevenness is not None and not self._ratios:
            self._unevenness = result.unevenness
        if math.isfinite(found) and displaced:
            self._pace = self._pace.observe(*moved, found)
            found = self._pace.growth(*moved)
        elif math.isfinite(found):
            self._pace = self._pace.refreshed(found)
            found = self._pace.growth(*moved)
        entered = bool((result.guard.eigenvalues >= basis.eigenvalues[-1]).any())
        entered = entered or result.shrunk < _SHRUNK
        self.stats.bound = 1.0 if entered else result.bound
        self.stats.estimate = 1.0 if entered else self._sine(found)
        # Next at twice the distance, at the latest: rates drift, and what enters from the bulk is
        # in no estimate. Sooner where the gaps shrink to half before.
        further = min(2.0, (1 - _SHRUNK) / max(1 - result.shrunk, 1e-12))
        self._probe_at = self._limit, max(1.0, further) * math.hypot(*moved)

    def _probed(self, *, guarded: bool) -> Probe:
        basis, guard = self._present()
        self.stats.probes += 1
        return probe(
            self.operator.matmat,
            basis,
            guard,
            lowest=self._lowest,
            mean=self._mean,
            seed=self.seed + self.stats.probes,
            vectors=vectors_needed(self.k, 1.0 if self._unevenness is None else self._unevenness),
            guarded=guarded,
        )

    # --- refreshes -------------------------------------------------------------------------------

    def solve(self) -> None:
        """Finds the top k eigenpairs at the present parameters, by a cold solve."""
        operator = self.operator
        solution = top_eigenpairs(
            operator.matmat,
            operator.size,
            self.k,
            tol=self.tol,
            max_angle=None if self.max_angle is None else self.max_angle / 2,
            seed=self.seed,
            dtype=operator.dtype,
            device=operator.device,
            accuracy=operator.accuracy,
        )
        self._check_symmetry(solution.asymmetry)
        self.stats.cold += 1
        self._lowest, self._mean = solution.lowest, solution.mean
        self._settle(solution.basis, solution.guard)
        if self.max_angle is not None and not self.gapless:
            ageing = total_ageing(solution.basis, solution.guard)
            self._certify(ageing, bound=ageing)

    def _check_symmetry(self, asymmetry: float) -> None:
        """Looks at what the products of a solve tell for nothing: whether the matrix is symmetric.

        Raises:
            InconsistentDerivativeError: it is not, by far more than its products are rounded.
        """
        operator = self.operator
        exact = operator.accuracy <= torch.finfo(operator.dtype).eps
        if not exact or not asymmetry > _ASYMMETRIC:
            return
        loss = operator.loss()
        if asymmetry <= rounding_at(loss, operator.dtype):
            warnings.warn(
                f"At a loss of {loss:.2g} rounding makes the products asymmetric by "
                f"{asymmetry:.2g}: the eigenpairs are no more accurate than that. "
                "model.double() has accurate ones.",
                ConvergenceWarning,
                stacklevel=2,
            )
        else:
            message = (
                f"The matrix is not symmetric: ⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {asymmetry:.2g} of "
                "its products, so it is no Hessian. Some part of the model has a wrong second "
                "derivative, or a gradient that is not that of a function, such as gradient "
                "reversal. hessian.check() tells more; FiniteDifferenceHessian needs gradients "
                "only."
            )
            raise InconsistentDerivativeError(message)

    def refine(self, *, verify: bool = False) -> None:
        """Refines the basis that is there by one step of subspace iteration.

        One that turns by a large angle is not taken: the estimate is then 1.

        Args:
            verify: probe what has become of it, also where the bound of subspace iteration would
                do: that one takes the smallest eigenvalue to be no lower than it was last seen.
        """
        basis, guard = self._present()
        result = refine(self.operator.matmat, basis, guard, lowest=self._lowest, mean=self._mean)
        if result.sine > _REFINABLE:  # too far, or the guard has changed places: nothing to keep
            self.stats.bound = self.stats.estimate = 1.0
            return
        if 0 < result.before < math.inf:
            self._pace = self._pace.observe(*self._moved(), result.before)
        self._settle(result.basis, result.guard)
        if self.gapless:
            return
        after, bound = result.after, result.after
        if verify or after > _ROOM * self._limit:
            measured = self._probed(guarded=False)
            # A bound that the probe is above was made with a smallest eigenvalue of long ago.
            bound = measured.bound if measured.ageing > after else min(after, measured.bound)
            after = measured.ageing
        if 0 < result.before < math.inf:
            # The old basis was off by the angle to the new one and what that one is off by.
            off = result.sine + self._ratio() * after
            self._ratios = [*self._ratios[-1:], min(1.0, off / result.before)]
            self._unevenness = result.unevenness
        self._certify(after, bound=bound)

    def _settle(self, basis: EigenBasis, guard: EigenBasis) -> None:
        self.basis, self._guard = basis, guard
        self.stats.refreshes += 1
        if self.max_angle is None:
            return
        self._anchor = self.operator.parameters.flatten(self.operator.parameters.tensors)
        if guard.k == 0:
            return
        last, below = float(basis.eigenvalues[-1]), float(guard.eigenvalues[0])
        floor = max(50 * torch.finfo(basis.dtype).eps, self.operator.accuracy)
        accuracy = max(self.tol * basis.largest, floor * max(basis.largest, abs(self._lowest)))
        self.gapless = last - below <= accuracy
        if self.gapless:
            self.stats.bound = self.stats.estimate = 1.0

    def warn_of_no_gap(self) -> None:
        """Warns, once, where ``λ_k`` and ``λ_{k+1}`` cannot be told apart."""
        if not self.gapless or self._warned:
            return
        self._warned = True
        basis, guard = self._present()
        last, below = float(basis.eigenvalues[-1]), float(guard.eigenvalues[0])
        message = (
            f"λ_{self.k} = {last:.4g} and λ_{self.k + 1} = {below:.4g} cannot be told "
            f"apart at tol={self.tol:g}: the dominant subspace of dimension {self.k} is "
            "not defined, and every parameter state gets a new solve as long as this "
            "lasts. Choose a k with a gap below it, or refresh=n."
        )
        warnings.warn(message, NoGapWarning, stacklevel=5)

    def _certify(self, ageing: float, *, bound: float) -> None:
        self._pace = self._pace.refreshed(ageing)
        self.stats.bound = min(1.0, bound)
        self.stats.estimate = self._sine(0.0)
        self._probe_at = self._limit / 2, math.inf

    # --- numbers ---------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return 1.0 if self.max_angle is None else self.max_angle

    @property
    def _estimate(self) -> float:
        return 1.0 if self.stats.estimate is None else self.stats.estimate

    def _has_room(self) -> bool:
        return self._estimate <= _ROOM * self._limit

    def _present(self) -> tuple[EigenBasis, EigenBasis]:
        assert self.basis is not None  # noqa: S101 (a solve comes first)
        assert self._guard is not None  # noqa: S101
        return self.basis, self._guard

    def _ratio(self) -> float:
        """The largest sine over what the ageing has grown by, on the safe side.

        The ageing adds up k rows, and divides by the gaps to ``λ_{k+1}`` what is mostly further
        down: the largest sine is a third of it or less, as the last refinements tell. Before
        there is one, it is bounded by how evenly the ageing is spread over the subspace.
        """
        if self._ratios:
            return _MARGIN * max(self._ratios)
        u = self.k - 1.0 if self._unevenness is None else self._unevenness
        return min(1.0, _SCATTER * math.sqrt(math.sqrt((1 + u) / self.k)))

    def _sine(self, growth: float) -> float:
        """The sine that goes with an ageing that has grown by so much, on the safe side.

        What a refresh has left is near ``λ_{k+1}``: it counts in full.
        """
        sine = math.hypot(self._pace.start, self._ratio() * growth)
        return min(1.0, sine) if math.isfinite(sine) else 1.0

    def _moved(self) -> tuple[float, float]:
        """Returns ``‖Pδ‖`` and ``‖P⊥δ‖`` of the displacement since the last refresh."""
        basis, _ = self._present()
        assert self._anchor is not None  # noqa: S101 (an angle is followed)
        space = self.operator.parameters
        delta = space.flatten(space.tensors).sub_(self._anchor)
        norms = torch.stack(
            [
                torch.linalg.vector_norm(basis.coefficients(delta)),
                torch.linalg.vector_norm(delta),
            ]
        )
        inside, length = norms.tolist()
        return inside, math.sqrt(max(0.0, length**2 - inside**2)) if inside < length else 0.0

    # --- checkpoints -----------------------------------------------------------------------------

    def fits(self) -> bool:
        """Whether there is a basis, in the dtype and on the device that the parameters have now."""
        basis, operator = self.basis, self.operator
        return basis is not None and (basis.dtype, basis.device) == (
            operator.dtype,
            operator.device,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of basis and guard, and all that is known of them, as plain numbers.

        What is not there is zeros of the same shape, so that a state can be read into another.
        """
        operator = self.operator

        def saved(found: Tensor | None, shape: tuple[int, ...]) -> Tensor:
            if found is None:
                return torch.zeros(shape, dtype=operator.dtype, device=operator.device)
            return found.detach().clone()

        held = {"basis": self.basis, "guard": self._guard, "anchor": self._anchor}
        state: dict[str, Any] = {
            "known": {name: value is not None for name, value in held.items()},
            "anchor": saved(self._anchor, (operator.size,)),
        }
        for prefix, pairs in (("", self.basis), ("guard_", self._guard)):
            for name, shape in self._shapes(prefix).items():
                state[f"{prefix}{name}"] = saved(getattr(pairs, name, None), shape)
        return state | self._numbers()

    def loaded(self, state: SavedState) -> Self:
        """Returns a copy that holds what was saved; what cannot be raises ``ArgumentError``.

        A basis whose age is not known, of a run with ``refresh=n``, is dropped where an angle is
        followed: the next update is a solve.
        """
        loaded = self.trial()
        loaded._load(state)  # noqa: SLF001 (of this class)
        return loaded

    def _load(self, state: SavedState) -> None:
        """Takes all that was saved.

        Raises:
            ArgumentError: an entry is none that this class could have saved.
        """
        self.stats = _loaded_stats(state)
        known = state.inside("known", ["basis", "guard", "anchor"])
        has_basis, has_guard, has_anchor = map(known.flag, ("basis", "guard", "anchor"))
        if has_basis < has_guard or has_guard < has_anchor:
            found = {"basis": has_basis, "guard": has_guard, "anchor": has_anchor}
            allowed = "a basis where there is a guard, and a guard where there is an anchor"
            raise ArgumentError("the loaded known", found, allowed)
        self.basis = self._loaded_pairs(state, "") if has_basis else None
        self._guard = self._loaded_pairs(state, "guard_") if has_guard else None
        self._anchor = self._loaded_tensor(state, "anchor", (self.operator.size,))
        if not has_anchor:
            self._anchor = None
            if self.max_angle is not None:
                self.basis = self._guard = None
        self.gapless = state.flag("gapless")
        self._lowest, self._mean = state.number("lowest"), state.number("mean")
        pace = state.inside("pace", [field.name for field in fields(Pace)])
        observed = pace.rows("observed", 3, minimum=0, infinite=True)
        self._pace = Pace(
            start=pace.number("start", minimum=0, infinite=True),
            observed=tuple((inside, outside, ageing) for inside, outside, ageing in observed),
            trust=pace.number("trust", minimum=0.5, infinite=True),
        )
        self._ratios = state.numbers("ratios", minimum=0, maximum=1)
        self._unevenness = state.optional("unevenness", minimum=0)
        estimate, distance = state.numbers("probe_at", 2, minimum=0, infinite=True)
        self._probe_at = min(estimate, self._limit), distance

    @property
    def entries(self) -> set[str]:
        """The names in ``state_dict()``."""
        pairs = {f"{prefix}{name}" for prefix in ("", "guard_") for name in self._shapes(prefix)}
        return {"known", "anchor", *pairs, *self._numbers()}

    def rows(self) -> dict[str, Tensor]:
        """Returns all that is orthonormal, by its name in a state."""
        held = {"vectors": self.basis, "guard_vectors": self._guard}
        return {n: pairs.vectors for n, pairs in held.items() if pairs is not None and pairs.k}

    def _numbers(self) -> dict[str, Any]:
        return {
            "gapless": self.gapless,
            "lowest": self._lowest,
            "mean": self._mean,
            "pace": asdict(self._pace),
            "ratios": list(self._ratios),
            "unevenness": self._unevenness,
            "probe_at": list(self._probe_at),
        }

    def _shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        size = self.operator.size
        k = min(1, size - self.k) if prefix else self.k
        return {"eigenvalues": (k,), "vectors": (k, size), "residuals": (k,)}

    def _loaded_pairs(self, state: SavedState, prefix: str) -> EigenBasis:
        """Returns pairs that were saved.

        Raises:
            ArgumentError: they are none, or not in order.
        """
        pairs = EigenBasis(
            **{
                name: self._loaded_tensor(
                    state, f"{prefix}{name}", shape, minimum=0 if name == "residuals" else None
                )
                for name, shape in self._shapes(prefix).items()
            }
        )
        values = pairs.eigenvalues.tolist()
        if values != sorted(values, reverse=True):
            raise ArgumentError(f"the loaded {prefix}eigenvalues", values, "in descending order")
        return pairs

    def _loaded_tensor(
        self, state: SavedState, name: str, shape: tuple[int, ...], **limits: Any
    ) -> Tensor:
        operator, remedy = self.operator, "The state is of another model or k."
        return state.tensor(name, shape, operator.dtype, operator.device, remedy=remedy, **limits)


def _loaded_stats(state: SavedState) -> SubspaceStats:
    """Returns the counts that were saved.

    Raises:
        ArgumentError: one is none.
    """
    stats = state.inside("stats", [field.name for field in fields(SubspaceStats)])
    counts = ("refreshes", "cold", "probes", "failures", "products", "gradients")
    loaded = SubspaceStats(
        **{name: stats.count(name) for name in counts},
        bound=stats.optional("bound", minimum=0, maximum=1),
        estimate=stats.optional("estimate", minimum=0, maximum=1),
        seconds=stats.number("seconds", minimum=0),
    )
    if loaded.cold > loaded.refreshes:
        allowed = f"at most the refreshes, {loaded.refreshes}"
        raise ArgumentError("the loaded stats.cold", loaded.cold, allowed)
    return loaded
