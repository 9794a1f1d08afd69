"""``DominantSubspace``: the cached eigenbasis that optimizers and monitors share."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from subspace_optim._validation import (
    ArgumentError,
    StaleBasisWarning,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import top_eigenpairs

__all__ = ["DominantSubspace", "EigenBasis", "Subspace", "SubspaceStats"]

_FAILURES_IN_A_ROW = 3


@runtime_checkable
class Subspace(Protocol):
    """What an optimizer needs: coordinates, and a basis that fits the present parameters."""

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""

    def update(self) -> EigenBasis:
        """Returns the basis to use at the present parameters."""


@dataclass
class SubspaceStats:
    """What the basis has cost so far.

    Attributes:
        refreshes: eigensolves that gave a new basis.
        failures: eigensolves that failed, and left the last basis in use.
        products: curvature products of all eigensolves.
        gradients: gradients over the data that the kept graphs of all eigensolves began with.
        seconds: wall time of all eigensolves.
    """

    refreshes: int = 0
    failures: int = 0
    products: int = 0
    gradients: int = 0
    seconds: float = 0.0


class DominantSubspace:
    r"""The span of the top k eigenvectors of an operator, kept as long as it may be.

    .. math:: \mathcal{S}_k(\theta) = \mathrm{span}\{u_1(\theta), \dots, u_k(\theta)\}, \qquad
              \lambda_1 \ge \dots \ge \lambda_P \text{ (largest algebraic)}

    (`song_2024`, Definition 1.) Whoever asks first at a parameter state pays for the refresh,
    if one is due; others get the same basis. A parameter state is what the parameters hold: a
    digest of them tells one from the next, whichever way they were written.

    Args:
        operator: what curvature means: ``HessianOperator``, or any ``CurvatureOperator``.
        k: dimension of the subspace; for classification usually the number of classes.
        refresh: training steps that a basis serves for. 1, the papers' protocol, is a new basis
            at every step.
        tol: relative residual of the eigenpairs, ``‖Hu − λu‖ ≤ tol · max|λ|``.
        seed: of the eigensolver's random vectors. The basis is a function of parameters and seed.

    Attributes:
        operator: as given.
        k: as given.
        stats: what the basis has cost.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        refresh: int = 1,
        tol: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if not isinstance(operator, CurvatureOperator):
            kind = type(operator).__name__
            raise ArgumentError("operator", kind, "a CurvatureOperator such as HessianOperator")
        remedy = f"The operator has {operator.size} parameters."
        self.k = check_integer("k", k, minimum=1, maximum=operator.size, remedy=remedy)
        self.refresh_every = check_integer("refresh", refresh, minimum=1)
        check_number("tol", tol, exclusive=True)
        self.operator = operator
        self.tol = tol
        self.seed = check_integer("seed", seed, minimum=0)
        self.stats = SubspaceStats()
        self._basis: EigenBasis | None = None
        self._clock = 0
        self._refreshed_at = 0
        self._state: int | None = None  # the parameters at the last update
        self._state_clock = 0
        self._attempted: int | None = None  # ... and at the last refresh that raised no error
        self._failures = 0

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""
        return self.operator.parameters

    @property
    def basis(self) -> EigenBasis | None:
        """The basis of the last refresh; ``None`` before the first."""
        return self._basis

    @property
    def clock(self) -> int:
        """Training steps that are known of: parameter states that were seen, or were told of."""
        return self._clock

    def advance(self, clock: int) -> None:
        """Tells of training steps at which nobody asks: ``clock`` is at least this.

        A monitor that records every tenth step tells of the others, so that ``refresh=n`` counts
        them. Steps that others ask at are not counted twice.
        """
        self._clock = max(self._clock, clock)

    def update(self) -> EigenBasis:
        """Returns the basis for the present parameters, refreshed first if that is due.

        The first refresh that fails raises its error. A later one warns with
        ``StaleBasisWarning`` and leaves the last basis in use; the third in a row raises.
        """
        state = self._look()
        age = self._clock - self._refreshed_at
        if self._basis is None or (age >= self.refresh_every and state != self._attempted):
            return self._refresh(state)
        return self._basis

    def refresh(self) -> EigenBasis:
        """Returns a new basis for the present parameters, whether one is due or not."""
        return self._refresh(self._look())

    def _look(self) -> int:
        """Returns the present parameter state, and counts it if it is new."""
        state = self.parameters.digest()
        if state != self._state:
            self._state = state
            self._clock = max(self._clock, self._state_clock + 1)
            self._state_clock = self._clock
        return state

    def _refresh(self, state: int) -> EigenBasis:
        before = asdict(self.operator.stats)
        start = time.perf_counter()
        try:
            basis = self._solve()
        except RuntimeError as error:  # non-finite, out of memory, no second derivative
            self.stats.failures += 1
            self._failures += 1
            if self._basis is None or self._failures >= _FAILURES_IN_A_ROW:
                raise
            message = (
                f"The refresh at step {self._clock} failed ({error}). The basis of step "
                f"{self._refreshed_at} stays in use; failure {self._failures} of at most "
                f"{_FAILURES_IN_A_ROW - 1} in a row."
            )
            warnings.warn(message, StaleBasisWarning, stacklevel=3)
            self._attempted = state
            return self._basis
        finally:
            self.operator.release()
            self.stats.seconds += time.perf_counter() - start
            self.stats.products += self.operator.stats.products - before["products"]
            self.stats.gradients += self.operator.stats.gradients - before["gradients"]
        self.stats.refreshes += 1
        self._failures = 0
        self._refreshed_at = self._clock
        self._attempted = state
        self._basis = basis
        return basis

    def _solve(self) -> EigenBasis:
        """Returns the top k eigenpairs at the present parameters, by a cold solve."""
        operator = self.operator
        with operator.frozen():
            solution = top_eigenpairs(
                operator.matmat,
                operator.size,
                self.k,
                tol=self.tol,
                seed=self.seed,
                dtype=operator.dtype,
                device=operator.device,
            )
        return solution.basis

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis and the counters, for ``torch.save``; a scheduler's twin.

        A run that loads it goes on with the same basis and refreshes at the same steps.
        """
        basis = self._basis
        return {
            "eigenvalues": None if basis is None else basis.eigenvalues,
            "vectors": None if basis is None else basis.vectors,
            "residuals": None if basis is None else basis.residuals,
            "clock": self._clock,
            "refreshed_at": self._refreshed_at,
            "state": self._state,
            "state_clock": self._state_clock,
            "attempted": self._attempted,
            "failures_in_a_row": self._failures,
            "stats": asdict(self.stats),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the basis and the counters of ``state_dict``, on the operator's device.

        Args:
            state_dict: what ``state_dict()`` returned. Model, optimizer and subspace may be
                loaded in any order.

        Raises:
            ArgumentError: its basis has another dimension, or belongs to another model.
        """
        vectors = state_dict["vectors"]
        basis = None
        if vectors is not None:
            shape, own = tuple(vectors.shape), (self.k, self.operator.size)
            if shape != own:
                remedy = "The state is of another model or k."
                raise ArgumentError("the shape of the loaded basis", shape, f"{own}", remedy)
            device, dtype = self.operator.device, self.operator.dtype
            basis = EigenBasis(
                *(
                    state_dict[name].detach().to(device, dtype, copy=True)
                    for name in ("eigenvalues", "vectors", "residuals")
                )
            )
        self._basis = basis
        self._clock = state_dict["clock"]
        self._refreshed_at = state_dict["refreshed_at"]
        self._state = state_dict["state"]
        self._state_clock = state_dict["state_clock"]
        self._attempted = state_dict["attempted"]
        self._failures = state_dict["failures_in_a_row"]
        self.stats = SubspaceStats(**state_dict["stats"])
