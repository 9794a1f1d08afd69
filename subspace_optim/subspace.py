"""``DominantSubspace``: the cached eigenbasis that optimizers and monitors share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from subspace_optim._validation import (
    ArgumentError,
    StaleBasisWarning,
    check_integer,
    check_number,
)
from subspace_optim.ageing import AgeingBasis, SubspaceStats
from subspace_optim.curvature.objective import unwrapped
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import check_orthonormal, orthonormalise_

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
    digest of them tells one from the next, whichever way they were written. Train or eval mode and
    buffers are not part of it: give the operator a ``mode`` if they change between steps.

    With ``refresh="auto"`` a basis is kept while the sine of the largest angle between it and the
    true subspace is estimated to be at most ``max_angle``. The estimate is carried forward by how
    far the parameters have moved, and checked by probes of two products. A basis that has aged
    is refined by one step of subspace iteration, k + 1 products, and solved for anew where that
    is not enough; its eigenvalues are those of the last refresh. If ``λ_k`` and ``λ_{k+1}``
    cannot be told apart there is one warning, and each parameter state gets a solve to ``tol``.

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
        asked: how often it was asked for a basis.

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
        remedy = f"The operator has {operator.size} parameters."
        self.k = check_integer("k", k, minimum=1, maximum=operator.size, remedy=remedy)
        auto = isinstance(refresh, str) and refresh == "auto"
        if not auto:
            remedy = "Or 'auto', which keeps a basis for as long as it serves."
            refresh = check_integer("refresh", refresh, minimum=1, remedy=remedy)
        check_number("max_angle", max_angle, exclusive=True)
        if max_angle > 1:
            raise ArgumentError("max_angle", max_angle, "at most 1", "It is the sine of an angle.")
        check_number("tol", tol, exclusive=True)
        self.refresh_every: int | Literal["auto"] = refresh
        self.max_angle = max_angle
        self.operator = operator
        self.tol = tol
        self.seed = check_integer("seed", seed, minimum=0)
        self._held = self._holder(
            operator,
            self.k,
            tol=tol,
            max_angle=max_angle if auto else None,
            seed=self.seed,
        )
        self.asked = 0
        self._clock = 0
        self._refreshed_at = 0
        self._state: int | None = None  # the parameters at the last update
        self._state_clock = 0
        self._attempted: int | None = None  # ... and when the basis was last decided upon
        self._failures = 0

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
        state, held = self._look(), self._held
        if held.basis is None or not held.fits():
            return self._attempt(state, held.solve)
        if state == self._attempted:
            return held.basis
        if self.refresh_every == "auto":
            return held.basis if held.serves() else self._attempt(state, held.renew)
        if self._clock - self._refreshed_at >= self.refresh_every:
            return self._attempt(state, held.solve)
        return held.basis

    def refresh(self) -> EigenBasis:
        """Returns a new basis for the present parameters, whether one is due or not.

        With ``refresh="auto"`` it is the basis that is there, refined, if there is one, a gap
        below it, and that is enough.
        """
        held = self._held
        return self._attempt(self._look(), held.refresh if held.fits() else held.solve)

    def _look(self) -> int:
        """Returns the present parameter state, and counts it if it is new."""
        state = self.parameters.digest()
        self.asked += 1
        if state != self._state:
            self._state = state
            self._clock = max(self._clock, self._state_clock + 1)
            self._state_clock = self._clock
        return state

    def _attempt(self, state: int, work: Callable[[], None]) -> EigenBasis:
        """Does the work at the present parameters, and returns the basis that is then in use.

        Raises:
            RuntimeError: the work failed, and there is no basis, or it is the third in a row.
        """
        stats, before = self.stats, asdict(self.operator.stats)
        start, refreshes = time.perf_counter(), stats.refreshes
        try:
            with self.operator.frozen():
                work()
        except RuntimeError as error:  # non-finite, out of memory, no second derivative
            stats.failures += 1
            self._failures += 1
            if self.basis is None or self._failures >= _FAILURES_IN_A_ROW:
                raise
            message = (
                f"The refresh at step {self._clock} failed ({error}). The basis of step "
                f"{self._refreshed_at} stays in use; failure {self._failures} of at most "
                f"{_FAILURES_IN_A_ROW - 1} in a row."
            )
            warnings.warn(message, StaleBasisWarning, stacklevel=3)
        else:
            self._failures = 0
        finally:
            self.operator.release()
            stats.seconds += time.perf_counter() - start
            stats.products += self.operator.stats.products - before["products"]
            stats.gradients += self.operator.stats.gradients - before["gradients"]
        if stats.refreshes > refreshes:
            self._refreshed_at = self._clock
        self._attempted = state
        assert self.basis is not None  # noqa: S101 (where there is none, the work makes one)
        return self.basis

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis and the counters, for ``torch.save``; a scheduler's twin.

        A run that loads it goes on with the same basis and refreshes at the same steps.
        """
        return self._held.state_dict() | {
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
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            found = f"without {', '.join(sorted(missing))}"
            remedy = (
                "Pass what `subspace.state_dict()` returned, not the optimizer's or the model's."
            )
            raise ArgumentError("the loaded state", found, "that of a subspace", remedy)
        vectors = state_dict["vectors"]
        if vectors is not None:
            shape, own = tuple(vectors.shape), (self.k, self.operator.size)
            if shape != own:
                remedy = "The state is of another model or k."
                raise ArgumentError("the shape of the loaded basis", shape, f"{own}", remedy)
        self._held.load_state_dict(state_dict)
        self._held.stats = SubspaceStats(**state_dict["stats"])
        self._clock = state_dict["clock"]
        self._refreshed_at = state_dict["refreshed_at"]
        self._state = state_dict["state"]
        self._state_clock = state_dict["state_clock"]
        self._attempted = state_dict["attempted"]
        self._failures = state_dict["failures_in_a_row"]


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
