"""``DominantSubspace``: the cached eigenbasis that optimizers and monitors share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from subspace_optim._validation import (
    ArgumentError,
    StaleBasisWarning,
    check_integer,
    check_number,
)
from subspace_optim.ageing import AgeingBasis, SubspaceStats
from subspace_optim.curvature.checkpoints import VERSION, SavedState, checksum
from subspace_optim.curvature.objective import unwrapped
from subspace_optim.curvature.operator import CurvatureOperator, State
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import check_orthonormal, orthonormalise_
from subspace_optim.step_count import StepCount

__all__ = [
    "DominantSubspace",
    "EigenBasis",
    "FixedSubspace",
    "LowRankCurvature",
    "Subspace",
    "SubspaceStats",
    "basis_of",
    "check_subspace",
    "projector_of",
]

_FAILURES_IN_A_ROW = 3
_ROOM = 4
"""What a saved basis may be off by, in units of what a basis that is given may be."""


@runtime_checkable
class Subspace(Protocol):
    """What an optimizer needs: coordinates, and a basis that fits the present parameters.

    One of one's own has these two members. ``update()`` is called once a step, under
    ``torch.no_grad()``, before anything moves; a basis to project onto has orthonormal rows.
    """

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""

    def update(self) -> EigenBasis | LowRankCurvature:
        """Returns the basis to use at the present parameters."""


def check_subspace(subspace: Any, *, projects: bool) -> None:
    """Checks the argument of an optimizer.

    Args:
        subspace: the argument.
        projects: whether its basis will be projected onto.

    Raises:
        ArgumentError: it is no subspace, or none to project onto.
    """
    if isinstance(subspace, type) or not isinstance(subspace, Subspace):
        allowed = "a subspace, such as DominantSubspace(hessian, k=10)"
        raise ArgumentError("subspace", type(subspace).__name__, allowed)
    if projects and getattr(subspace, "orthogonal", True) is False:
        raise ArgumentError(*_no_projector(type(subspace).__name__))


def basis_of(subspace: Subspace) -> EigenBasis | LowRankCurvature:
    """Returns the basis at the present parameters.

    Raises:
        ArgumentError: it is not in the coordinates of the parameters.
    """
    basis, space = subspace.update(), subspace.parameters
    found = (basis.size, basis.dtype, basis.device)
    own = (space.size, space.dtype, space.device)
    if found != own:
        allowed = f"{own}, as the parameters have it"
        raise ArgumentError("size, dtype and device of the subspace's basis", found, allowed)
    return basis


def projector_of(subspace: Subspace) -> EigenBasis:
    """Returns the basis at the present parameters, of a subspace to project onto.

    Raises:
        ArgumentError: its vectors are not orthogonal, so that it is no projector.
    """
    basis = basis_of(subspace)
    if not isinstance(basis, EigenBasis):
        raise ArgumentError(*_no_projector(type(basis).__name__))
    return basis


def _no_projector(kind: str) -> tuple[str, str, str, str]:
    found, allowed = f"a {kind} with vectors that are not orthogonal", "one to project onto"
    return "subspace", found, allowed, "Use ClassGradientSubspace(..., orthogonal=True)."


class DominantSubspace:
    r"""The span of the top k eigenvectors of an operator, kept as long as it may be.

    .. math:: \mathcal{S}_k(\theta) = \mathrm{span}\{u_1(\theta), \dots, u_k(\theta)\}, \qquad
              \lambda_1 \ge \dots \ge \lambda_P \text{ (largest algebraic)}

    (`song_2024`, Definition 1.) Whoever asks first at a parameter state pays for the refresh,
    if one is due; others get the same basis. A parameter state is what the parameters hold: a
    digest of them tells one from the next, whichever way they were written. What else the loss
    depends on and the operator can see is part of it: other parameters and buffers of the model, of
    the loss and of what they reach, modes, and data that were written in place.

    With ``refresh="auto"`` a basis is kept while the sine of the largest angle between it and the
    true subspace is estimated to be at most ``max_angle``. The estimate is carried forward by how
    far the parameters have moved, and checked by probes of two products. A basis that has aged
    is refined by one step of subspace iteration, k + 1 products, and solved for anew where that
    is not enough; its eigenvalues are those of the last refresh. Where other tensors have changed,
    no displacement tells of it, and the basis is probed; where a mode has, it is solved for. If
    ``λ_k`` and ``λ_{k+1}`` cannot be told apart there is one warning, and each parameter state gets
    a solve to ``tol``.

    Args:
        operator: what curvature means: ``HessianOperator``, or any ``CurvatureOperator``.
        k: dimension of the subspace; for classification usually the number of classes.
        refresh: ``"auto"``, or the training steps that a basis serves for. 1, the papers'
            protocol, is a new basis at every step.
        max_angle: the sine up to which ``"auto"`` keeps a basis.
        tol: relative residual of the eigenpairs of a solve: ``‖Hu − λu‖ ≤ tol · max|λ_i|`` over the
            k pairs, down to the floor of the dtype.
        seed: of the random vectors of solves and probes. With ``refresh=n`` the basis is a
            function of parameters and seed.

    Attributes:
        operator: as given.
        k: as given.
        stats: what the basis has cost, and how good it is.
        steps: the training steps that are known of; who follows an optimizer tells it of more.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range.
    """

    _holder = AgeingBasis

    def __init__(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        refresh: int | Literal["auto"] = "auto",
        max_angle: float = 0.05,
        tol: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if not isinstance(operator, CurvatureOperator):
            kind = type(operator).__name__
            raise ArgumentError("operator", kind, "a CurvatureOperator such as HessianOperator")
        self._ranks = operator.ranks
        with self._ranks.all_or_none():
            remedy = f"The operator has {operator.size} parameters."
            self.k = check_integer("k", k, minimum=1, maximum=operator.size, remedy=remedy)
            auto = isinstance(refresh, str) and refresh == "auto"
            if not auto:
                remedy = "Or 'auto', which keeps a basis for as long as it serves."
                refresh = check_integer("refresh", refresh, minimum=1, remedy=remedy)
            check_number("max_angle", max_angle, exclusive=True)
            if max_angle > 1:
                remedy = "It is the sine of an angle."
                raise ArgumentError("max_angle", max_angle, "at most 1", remedy)
            check_number("tol", tol, exclusive=True)
            self.seed = check_integer("seed", seed, minimum=0)
        self.refresh_every: int | Literal["auto"] = refresh
        self.max_angle = float(max_angle)
        self.operator = operator
        self.tol = float(tol)
        self._ranks.check_alike("Pass the same on each.", **self._options())
        self._held = self._holder(
            operator,
            self.k,
            tol=self.tol,
            max_angle=self.max_angle if auto else None,
            seed=self.seed,
        )
        self.steps = StepCount(operator)
        self._refreshed_at = 0
        self._attempted: int | None = None  # ... and when the basis was last decided upon
        self._failures = 0
        self._around = 0, 0  # what was elsewhere, and the modes, at the last attempt
        self._settled: _Seen | None = None  # at the last decision

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""
        return self.operator.parameters

    @property
    def basis(self) -> EigenBasis | None:
        """The basis of the last refresh; ``None`` before the first."""
        return self._held.basis

    @property
    def gap(self) -> float | None:
        """``λ_k − λ_{k+1}`` as the last refresh knows it: ``λ_{k+1}`` is approached from below.

        ``None`` before the first refresh, and for k = P.
        """
        return self._held.gap

    @property
    def stats(self) -> SubspaceStats:
        """What the basis has cost so far, and how good it is."""
        return self._held.stats

    @property
    def clock(self) -> int:
        """The number of the training step that is known of; the first is 1."""
        return self.steps.now

    def update(self) -> EigenBasis:
        """Returns the basis for the present parameters, refreshed first if that is due.

        The first refresh that fails raises its error. A later one warns with
        ``StaleBasisWarning`` and leaves the last basis in use; the third in a row raises.
        """
        return self._provide(forced=False)

    def refresh(self) -> EigenBasis:
        """Returns a new basis for the present parameters, whether one is due or not.

        With ``refresh="auto"`` it is the basis that is there, refined, if there is one, a gap
        below it, and that is enough.
        """
        return self._provide(forced=True)

    def _provide(self, *, forced: bool) -> EigenBasis:
        held, seen = self._held, _NOTHING_SEEN
        estimate: float | None = None

        def is_due() -> bool | None:
            nonlocal seen, estimate
            seen = state, clock = self._look()
            if forced or not held.fits():
                return True
            if seen == self._settled:
                return None  # what all ranks have decided together is known to each of them
            if hash(state) == self._attempted:
                return False
            if self.refresh_every == "auto":
                estimate, serves = held.carried_forward()
                return not (serves and (state.elsewhere, state.modes) == self._around)
            return clock - self._refreshed_at >= self.refresh_every or not self._is_finite()

        due = self._ranks.any(is_due)
        state = hash(seen.state)
        self.steps.look(state)
        if estimate is not None:
            self.stats.estimate = estimate
        if due:
            self._attempt(seen.state, self._work(seen.state, forced=forced))
        if not due or state == self._attempted:
            self._settled = seen
        assert self.basis is not None  # noqa: S101 (where there is none, an attempt makes one)
        return self.basis

    def _look(self) -> _Seen:
        """Returns the present parameter state, and the clock there."""
        state = self.operator.state()
        return _Seen(state, self.steps.number(hash(state)))

    def _work(self, state: State, *, forced: bool) -> Callable[[AgeingBasis], None]:
        """Returns what is to be done at this state; that it is the same on all ranks is checked."""
        if not self._held.fits():
            return _solve
        if self.refresh_every != "auto":
            return _refresh if forced else _solve
        # A mode that has changed makes another matrix, of which the basis that is there tells
        # nothing; of other tensors a probe tells by how much they have changed it.
        if state.modes != self._around[1]:
            return _solve
        if forced:
            return _refresh
        return _reconsider if state.elsewhere != self._around[0] else _renew

    def _is_finite(self) -> bool:
        """Whether all parameters are: those that are not stay the same, step after step."""
        with torch.no_grad():
            largest = nn.utils.get_total_norm(self.parameters.tensors, torch.inf)
        return bool(torch.isfinite(largest))

    def _attempt(self, state: State, work: Callable[[AgeingBasis], None]) -> None:
        """Does the work at the present parameters: all of it is taken over, or nothing.

        What has failed is raised if there is no basis, or it is the third failure in a row.
        """
        operator, stats, trial = self.operator, self.stats, self._held.trial()
        start, before = time.perf_counter(), asdict(operator.stats)
        failure: RuntimeError | MemoryError | None = None
        try:
            with self._ranks.all_or_none():
                self._check_ranks(trial, work)
                with operator.frozen():
                    work(trial)
        except (RuntimeError, MemoryError) as error:  # non-finite, out of memory, no derivative
            failure = error
        else:
            if trial.stats.refreshes > stats.refreshes:
                self._refreshed_at = self.clock
            self._take(trial)
            self._failures, self._attempted = 0, hash(state)
            self._around = state.elsewhere, state.modes
        finally:
            operator.release()
            stats.seconds += time.perf_counter() - start
            stats.products += operator.stats.products - before["products"]
            stats.gradients += operator.stats.gradients - before["gradients"]
        if failure is None:
            self._held.warn_of_no_gap()
            return
        stats.failures += 1
        self._failures += 1
        if self.basis is None or self._failures >= _FAILURES_IN_A_ROW:
            raise failure
        if self._is_finite():  # once a state; where training has diverged, at each update
            self._attempted = hash(state)
        message = (
            f"The refresh at step {self.clock} failed ({failure}). The basis of step "
            f"{self._refreshed_at} stays in use; failure {self._failures} of at most "
            f"{_FAILURES_IN_A_ROW - 1} in a row."
        )
        warnings.warn(message, StaleBasisWarning, stacklevel=4)

    def _take(self, trial: AgeingBasis) -> None:
        """Puts the trial in the place of what was held, in one assignment; ``stats`` live on."""
        stats, self._held = self.stats, trial
        vars(stats).update(vars(trial.stats))
        trial.stats = stats

    def _options(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "refresh": self.refresh_every,
            "max_angle": self.max_angle,
            "tol": self.tol,
            "seed": self.seed,
        }

    def _check_ranks(self, held: AgeingBasis, work: Callable[[AgeingBasis], None]) -> None:
        """Sees to it that all ranks do the same work."""
        if self._ranks.group is not None:
            remedy = "Construct and ask the subspaces alike, and load one state on all ranks."
            own = {"what is due": work.__name__, "the basis": held.fingerprint()}
            own |= {"the number of failures": self._failures}
            self._ranks.check_alike(remedy, **self._options(), **own)

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis and the counters, for ``torch.save``; a scheduler's twin.

        A run that loads it goes on with the same basis and refreshes at the same steps. The
        tensors are copies, and of the same shapes whether there is a basis or not, so that
        ``torch.distributed.checkpoint`` can read into the state of a subspace that has none.
        """
        entries = self._held.state_dict() | self._counters() | {"stats": asdict(self.stats)}
        return {"version": VERSION} | entries | {"checksum": _checksum(entries)}

    def _counters(self) -> dict[str, int | None]:
        return self.steps.state_dict() | {
            "refreshed_at": self._refreshed_at,
            "attempted": self._attempted,
            "elsewhere": self._around[0],
            "modes": self._around[1],
            "failures_in_a_row": self._failures,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the basis and the counters of ``state_dict``, on the operator's device.

        All of them, or none: a state of another model, k or version, an entry that is missing or
        cannot be, and one that was changed raise an ``ArgumentError`` that names it.

        Args:
            state_dict: what ``state_dict()`` returned. Model, optimizer and subspace may be
                loaded in any order.
        """
        names = {"version", "stats", "checksum", *self._held.entries, *self._counters()}
        remedy = "Pass what `subspace.state_dict()` returned, not the optimizer's or the model's."
        state = SavedState(state_dict, names, remedy)
        held = self._held.loaded(state)
        for name, rows in held.rows().items():
            saved = state_dict[name].dtype
            accuracy = max(torch.finfo(dtype).eps for dtype in (saved, rows.dtype))
            check_orthonormal(f"the loaded {name}", rows, _ROOM * accuracy)
            if rows.dtype != saved:
                orthonormalise_(rows)
        clock = state.count("clock")
        remedy = f"The loaded clock is {clock}."
        refreshed_at = state.count("refreshed_at", maximum=clock, remedy=remedy)
        state_clock = state.count("state_clock", maximum=clock, remedy=remedy)
        failures = state.count("failures_in_a_row", maximum=held.stats.failures)
        seen, attempted = state.digest("state"), state.digest("attempted")
        elsewhere, modes = state.digest("elsewhere"), state.digest("modes")
        state.check_sum(_checksum({name: state_dict[name] for name in names}))

        self._take(held)
        self.steps.load(clock, seen, state_clock)
        self._refreshed_at, self._failures, self._attempted = refreshed_at, failures, attempted
        self._around = elsewhere or 0, modes or 0
        self._settled = None


class _Seen(NamedTuple):
    """What a look at the operator has found."""

    state: State
    clock: int


_NOTHING_SEEN = _Seen(State(0), 0)


def _solve(held: AgeingBasis) -> None:
    held.solve()


def _renew(held: AgeingBasis) -> None:
    held.renew()


def _reconsider(held: AgeingBasis) -> None:
    held.reconsider()


def _refresh(held: AgeingBasis) -> None:
    held.refresh()


def _checksum(state: Mapping[str, Any]) -> int:
    """Of all that decides; what the basis has cost does not, and differs between ranks."""
    certificate = {name: state["stats"][name] for name in ("bound", "estimate")}
    others = {"version", "stats", "checksum"}
    return checksum({n: value for n, value in state.items() if n not in others} | certificate)


class FixedSubspace:
    """The span of given vectors, whatever the parameters are: a basis that never changes.

    For a basis of one's own: that of another network, of the start of training, of random
    directions. Vectors that are orthonormal up to rounding are made so to a few units in the last
    place, and pairs are put in descending order of their eigenvalues; the user's tensors are
    left as they are.

    Args:
        model: owns the parameters. ``DistributedDataParallel`` and ``torch.compile`` wrappers are
            taken off.
        vectors: ``(k, P)``, orthonormal rows, in the coordinates of ``params``.
        eigenvalues: ``(k,)``, the curvatures along them (default: ones). Projections do not look
            at them; optimizers that divide by the curvature, as Newton's method does, need them.
        params: the parameters (default: all that require a gradient).

    Attributes:
        parameters: the coordinates of the basis.
        basis: the basis; its residuals are 0.

    Raises:
        ArgumentError: an argument is of the wrong shape, not finite or not orthonormal.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Tensor,
        eigenvalues: Tensor | None = None,
        *,
        params: Iterable[Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
        space = ParameterSpace(unwrapped(model), params)
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ArgumentError("vectors", kind, "a tensor of real numbers")
        shape = tuple(vectors.shape)
        if vectors.dim() != 2 or shape[1] != space.size or not 1 <= shape[0] <= space.size:
            allowed = f"(k, {space.size}), one vector a row, k from 1 to {space.size}"
            raise ArgumentError("the shape of vectors", shape, allowed)
        if eigenvalues is None:
            eigenvalues = torch.ones(len(vectors))
        if not isinstance(eigenvalues, Tensor) or eigenvalues.is_complex():
            raise ArgumentError(
                "eigenvalues", type(eigenvalues).__name__, "a tensor of real numbers"
            )
        eigenvalues = eigenvalues.detach().to(space.device, space.dtype)
        if tuple(eigenvalues.shape) != shape[:1]:
            found, allowed = tuple(eigenvalues.shape), f"{shape[:1]}, one value a vector"
            raise ArgumentError("the shape of eigenvalues", found, allowed)
        eigenvalues, order = eigenvalues.sort(descending=True, stable=True)
        rows = vectors.detach().to(space.device, space.dtype)[order]  # a copy
        for name, tensor in (("vectors", rows), ("eigenvalues", eigenvalues)):
            if not bool(tensor.isfinite().all()):
                raise ArgumentError(name, "not finite", "finite", "Look for NaN in them.")
        check_orthonormal("vectors", rows, max(torch.finfo(t.dtype).eps for t in (vectors, rows)))
        orthonormalise_(rows)
        self.parameters = space
        self.basis = EigenBasis(eigenvalues, rows, torch.zeros_like(eigenvalues))

    def update(self) -> EigenBasis:
        """Returns the basis, always the same."""
        return self.basis
