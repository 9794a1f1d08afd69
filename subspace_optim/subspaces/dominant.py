"""``DominantSubspace``: the cached eigenbasis that optimizers and monitors share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch

from subspace_optim._display import Shown, number, numbers
from subspace_optim._progress import LOGGER, ProgressOption, check_progress, shown
from subspace_optim._validation import (
    ArgumentError,
    StaleBasisWarning,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import COSTS, CurvatureOperator, State
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.step_hooks import StepCount
from subspace_optim.subspaces.checkpoints import VERSION, SavedState, checksum
from subspace_optim.subspaces.eigenpairs import check_basis_dtype, names_in_state
from subspace_optim.subspaces.on_sample import OnSample
from subspace_optim.subspaces.refresh import ByAngle, EveryNSteps
from subspace_optim.subspaces.rule import RefreshRule, Situation, SubspaceStats

_FAILURES_IN_A_ROW = 3
_SHORT = 2
"""Steps: a basis that serves for no more of them is short-lived, ..."""
_SHORT_IN_A_ROW = 10
"""... and so many of these in a row are worth a line in the log."""


class DominantSubspace(Shown):
    r"""The span of the top k eigenvectors of an operator, kept as long as it may be.

    .. math:: \mathcal{S}_k(\theta) = \mathrm{span}\{u_1(\theta), \dots, u_k(\theta)\}, \qquad
              \lambda_1 \ge \dots \ge \lambda_P \text{ (largest algebraic)}

    (`song_2024`, Definition 1.) Whoever asks first at a parameter state pays for the refresh, if
    one is due; others get the same basis. A parameter state is told from the next by a digest of
    what the parameters hold, whichever way they were written. It includes whatever else the loss
    depends on and the operator can see: other parameters and buffers of the model, of the loss and
    of what they reach, modes, and data that were written in place.

    With ``refresh="auto"`` a basis is kept while the sine of the largest angle between it and the
    true subspace is estimated to be at most ``max_angle``. The estimate follows the drift of the
    parameters, and is checked by probes of two products. A stale basis is refined by one step of
    subspace iteration, k + 1 products, and solved for anew where that is not enough; its
    eigenvalues are those of the last refresh. Now and then it is made sure that no other direction
    has come to the top. Where the parameters jump to and fro, as at an edge of stability, a second
    basis is held: twice the memory. If ``λ_k`` and ``λ_{k+1}`` cannot be told apart there
    is one warning, and each parameter state gets a solve to ``tol``. The rules are in
    ``subspaces/refresh.py``; one of your own is a ``RefreshRule``.

    Args:
        operator: what curvature means: ``HessianOperator``, or any ``CurvatureOperator``.
        k: dimension of the subspace; for classification usually the number of classes.
        refresh: ``"auto"``, which is ``ByAngle(max_angle)``; the training steps that a basis
            serves for, ``EveryNSteps(n)``, of which 1 is the papers' protocol, a new basis at every
            step; or a ``RefreshRule`` of your own.
        max_angle: the sine up to which ``"auto"`` keeps a basis.
        tol: relative residual of the eigenpairs of a solve: ``‖Hu − λu‖ ≤ tol · max|λ_i|`` over the
            k pairs, down to the floor of the dtype.
        sample: of how many examples the basis is: ``None``, of all; n, of so many; ``"auto"``, of
            as many as keep it within ``max_angle`` of that of all data (``OnSample``). The estimate
            is of the angle to the subspace of all data in any case.
        basis_dtype: what the vectors are held in between refreshes: ``None``, the dtype that they
            are computed in; ``torch.bfloat16``, for half of the memory (a quarter, of float64). It
            turns the basis by a sine of 0.002, which is measured, and part of bound and estimate.
        seed: of the random vectors of solves and probes, and of samples. With ``refresh=n`` the
            basis is a function of parameters and seed.
        progress: shows how far a refresh is: True for a bar (by tqdm, or as lines), or a function
            that is called with each ``ProgressReport``. With False the log of ``subspace_optim``
            has a line after 10 seconds, and every 20.

    Attributes:
        operator: as given.
        k: as given.
        tol: as given.
        basis_dtype: as given.
        seed: as given.
        progress: as given.
        rule: what decides when the basis is renewed, and holds it.
        steps: the training steps that are known of; who follows an optimizer tells it of more.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        refresh: int | Literal["auto"] | RefreshRule = "auto",
        max_angle: float = 0.05,
        tol: float = 1e-3,
        sample: int | Literal["auto"] | None = None,
        basis_dtype: torch.dtype | None = None,
        seed: int = 0,
        progress: ProgressOption = False,
    ) -> None:
        if not isinstance(operator, CurvatureOperator):
            kind = type(operator).__name__
            raise ArgumentError("operator", kind, "a CurvatureOperator such as HessianOperator")
        self._ranks = operator.ranks
        with self._ranks.all_or_none():
            remedy = f"The operator has {operator.size} parameters."
            self.k = check_integer("k", k, minimum=1, maximum=operator.size, remedy=remedy)
            rule = _rule(refresh, max_angle, sample)
            check_number("tol", tol, exclusive=True)
            self.seed = check_integer("seed", seed, minimum=0)
            self.tol = float(tol)
            self.basis_dtype = check_basis_dtype(basis_dtype)
            self.progress = check_progress(progress)
        self.operator = operator
        self.rule = rule
        self._ranks.check_alike("Pass the same on each.", **self._options())
        rule.attach(operator, self.k, tol=self.tol, seed=self.seed, basis_dtype=self.basis_dtype)
        self.steps = StepCount(operator)
        self._refreshed_at = 0
        self._short_in_a_row, self._told = 0, False  # short-lived bases, and whether of them
        self._attempted: int | None = None  # the state at which a refresh was last tried
        self._failures = 0
        self._then = State(0)  # at the last refresh or probe
        self._settled: _Seen | None = None  # at the last decision

    def _facts(self) -> dict[str, str]:
        stats, basis = self.stats, self.basis
        facts = {"k": str(self.k)}
        if basis is None:
            facts["eigenvalues"] = "none yet, update() finds them"
        else:
            age = max(0, self.steps.now - self._refreshed_at)
            facts["eigenvalues"] = numbers(basis.eigenvalues)
            facts["age"] = f"{age} {'step' if age == 1 else 'steps'}"
        limit = getattr(self.rule, "max_angle", None)
        if stats.estimate is not None:
            within = "" if limit is None else f" of at most {limit:g}"
            facts["estimated angle"] = f"{stats.estimate:.2g}{within}"
        facts |= {name: str(option) for name, option in self.rule.options().items()}
        if stats.examples is not None:
            facts["examples"] = number(stats.examples)
        facts["cost"] = (
            f"{stats.refreshes} refreshes by {stats.products:,} products and "
            f"{stats.gradients:,} gradients in {stats.seconds:.3g} s"
        )
        if self.basis_dtype is not None:
            facts["basis_dtype"] = str(self.basis_dtype)
        return facts | {"operator": repr(self.operator)}

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""
        return self.operator.parameters

    @property
    def basis(self) -> EigenBasis | None:
        """The basis of the last refresh; ``None`` before the first."""
        return self.rule.basis

    @property
    def gap(self) -> float | None:
        """``λ_k − λ_{k+1}`` as the last refresh knows it: ``λ_{k+1}`` is approached from below.

        ``None`` before the first refresh, and for k = P.
        """
        return None if self.rule.pairs is None else self.rule.pairs.gap

    @property
    def stats(self) -> SubspaceStats:
        """What the basis has cost so far, and how good it is."""
        return self.rule.stats

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
        rule, seen = self.rule, _NOTHING_SEEN

        def is_due() -> bool | None:
            nonlocal seen
            with self.parameters.looked_up_once():
                seen = state, _ = self._look()
                if forced or not rule.fits():
                    return True
                if seen == self._settled:
                    return None  # what all ranks have decided together is known to each of them
                if self._name(state) == self._attempted:
                    return False
                return rule.is_due(self._situation(seen))

        before = rule.trial()
        try:
            due = self._ranks.any(is_due)
        except BaseException:  # perhaps another rank's: that one has decided nothing
            self._take(before)
            raise
        if rule.basis is not before.basis:  # another one of those that are held
            self._attempted = None
        state = self._name(seen.state)
        self.steps.look(hash(seen.state))
        if due:
            plan = rule.plan(self._situation(seen), forced=forced) if rule.fits() else "solve"
            self._attempt(seen.state, plan)
        if not due or state == self._attempted:
            self._settled = seen
        assert self.basis is not None  # noqa: S101 (where there is none, an attempt makes one)
        return self.basis

    def _look(self) -> _Seen:
        """Returns the present parameter state, and the clock there."""
        state = self.operator.state()
        return _Seen(state, self.steps.number(hash(state)))

    def _name(self, state: State) -> int | None:
        return self.steps.name(hash(state))

    def _situation(self, seen: _Seen) -> Situation:
        return Situation(seen.state, self._then, seen.clock - self._refreshed_at)

    def _attempt(self, state: State, plan: str) -> None:
        """Renews the basis at the present parameters: all of it is taken over, or nothing.

        What has failed is raised if there is no basis, or it is the third failure in a row.
        """
        operator, stats, trial = self.operator, self.stats, self.rule.trial()
        start, before = time.perf_counter(), asdict(operator.stats)
        failure: RuntimeError | MemoryError | None = None
        try:
            with self._ranks.all_or_none():
                self._check_ranks(trial, plan)
                with shown(self.progress, self._ranks.rank), operator.frozen():
                    trial.carry_out(plan)
        except (RuntimeError, MemoryError) as error:  # non-finite, out of memory, no derivative
            failure = error
        else:
            if trial.basis is not self.basis:
                short = self.basis is not None and self.clock - self._refreshed_at <= _SHORT
                self._short_in_a_row = self._short_in_a_row + 1 if short else 0
                self._refreshed_at = self.clock
            self._take(trial)
            self._failures, self._attempted, self._then = 0, self._name(state), state
        finally:
            operator.release()
            stats.seconds += time.perf_counter() - start
            for name in COSTS:
                spent = getattr(operator.stats, name) - before[name]
                setattr(stats, name, getattr(stats, name) + spent)
        if failure is None:
            self.rule.warn()
            self._tell_of_short_lives()
            return
        stats.failures += 1
        self._failures += 1
        if self.basis is None or self._failures >= _FAILURES_IN_A_ROW:
            raise failure
        # Once at a state; where training has diverged, at each update.
        if self.parameters.is_finite():
            self._attempted = self._name(state)
        message = (
            f"The refresh at step {self.clock} failed ({failure}). The basis of step "
            f"{self._refreshed_at} stays in use; failure {self._failures} of at most "
            f"{_FAILURES_IN_A_ROW - 1} in a row."
        )
        warnings.warn(message, StaleBasisWarning, stacklevel=4)

    def _tell_of_short_lives(self) -> None:
        """Tells the log, once, why nearly each step pays for a refresh, and what would help."""
        limit = getattr(self.rule, "max_angle", None)
        if limit is None or self._told or self._short_in_a_row < _SHORT_IN_A_ROW:
            return
        self._told = True
        if self._ranks.rank == 0:
            LOGGER.info(
                "%d bases in a row have served for no more than %d steps: the dominant subspace "
                "turns by more than max_angle=%g (the sine of an angle) within these. So far %d "
                "refreshes took %d products and %.1f s. In the first steps of a training that is "
                "common; a larger max_angle, sample='auto', a k above a gap, or refresh=n costs "
                "less.",
                self._short_in_a_row,
                _SHORT,
                limit,
                self.stats.refreshes,
                self.stats.products,
                self.stats.seconds,
            )

    def _take(self, trial: RefreshRule) -> None:
        """Takes over all that a trial has found; ``rule`` and ``stats`` stay the same objects."""
        stats, found = self.stats, vars(trial)
        vars(self.rule).update(found | {"stats": stats})
        vars(stats).update(vars(found["stats"]))

    def _options(self) -> dict[str, Any]:
        own = {"tol": self.tol, "basis_dtype": str(self.basis_dtype), "seed": self.seed}
        return {"k": self.k, **self.rule.options(), **own}

    def _check_ranks(self, rule: RefreshRule, plan: str) -> None:
        """Sees to it that all ranks do the same work."""
        if self._ranks.group is not None:
            remedy = "Construct and ask the subspaces alike, and load one state on all ranks."
            own = {"what is due": plan, "the basis": rule.fingerprint()}
            own |= {"the number of failures": self._failures}
            self._ranks.check_alike(remedy, **self._options(), **own)

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis and the counters, for ``torch.save``; a scheduler's twin.

        A run that loads it goes on with the same basis and refreshes at the same steps. The
        tensors are copies, and of the same shapes whether there is a basis or not, so that
        ``torch.distributed.checkpoint`` can read into the state of a subspace that has none. Of a
        sharded model all ranks call it.
        """
        entries = self.rule.state_dict() | self._counters() | {"stats": asdict(self.stats)}
        return {"version": VERSION} | entries | {"checksum": _checksum(entries)}

    def _counters(self) -> dict[str, Any]:
        return self.steps.state_dict() | {
            "refreshed_at": self._refreshed_at,
            "attempted": self._attempted,
            "then": list(self._then),
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
        with self.parameters.ranks.all_or_none():  # that hold parts of one state
            take = self._loaded(state_dict)
        take()

    def _loaded(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """Looks at all of a state, and returns what takes it over, which cannot fail."""
        pairs = names_in_state(self.operator, self.k)
        sharded = self.parameters.layout is not None
        counters = {*_COUNTERS, "whole"} if sharded else {*_COUNTERS}
        names = {"version", "stats", "checksum", "rule", *pairs, *counters}
        remedy = "Pass what `subspace.state_dict()` returned, not the optimizer's or the model's."
        state = SavedState(state_dict, names, remedy)
        rule = self.rule.loaded(state)
        clock = state.count("clock")
        remedy = f"The loaded clock is {clock}."
        refreshed_at = state.count("refreshed_at", maximum=clock, remedy=remedy)
        state_clock = state.count("state_clock", maximum=clock, remedy=remedy)
        failures = state.count("failures_in_a_row", maximum=rule.stats.failures)
        seen, attempted = state.digest("state"), state.digest("attempted")
        whole = state.digest("whole") if sharded else None
        then = State(*state.digests("then", 3))
        state.check_sum(_checksum({name: state_dict[name] for name in names}))

        def take() -> None:
            self._take(rule)
            self.steps.load(clock, seen, state_clock, whole)
            self._refreshed_at, self._failures, self._attempted = refreshed_at, failures, attempted
            self._then = then
            self._settled = None

        return take


class _Seen(NamedTuple):
    """What a look at the operator has found."""

    state: State
    clock: int


_NOTHING_SEEN = _Seen(State(0), 0)


def _rule(refresh: Any, max_angle: float, sample: Any) -> RefreshRule:
    """Returns the rule that the arguments stand for.

    Raises:
        ArgumentError: they do not go together.
    """
    by_angle = ByAngle(max_angle)  # an angle that cannot be is told of, used or not
    if sample is not None:
        if refresh != "auto":
            remedy = "A basis that is renewed by another rule is of all data."
            raise ArgumentError("sample", sample, "None, unless refresh is 'auto'", remedy)
        return OnSample(max_angle, sample)
    if isinstance(refresh, RefreshRule):
        return refresh
    return by_angle if isinstance(refresh, str) and refresh == "auto" else EveryNSteps(refresh)


_COUNTERS = (
    "clock",
    "state",
    "state_clock",
    "refreshed_at",
    "attempted",
    "then",
    "failures_in_a_row",
)
_CERTIFICATE = ("bound", "estimate", "sampling_error", "examples")


def _checksum(state: Mapping[str, Any]) -> int:
    """Of all that decides; what the basis has cost does not, and differs between ranks."""
    certificate = {name: state["stats"][name] for name in _CERTIFICATE}
    others = {"version", "stats", "checksum"}
    return checksum({n: value for n, value in state.items() if n not in others} | certificate)
