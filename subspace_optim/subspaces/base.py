"""``Subspace``: what an optimizer and a diagnostic need of any subspace."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature


@runtime_checkable
class Subspace(Protocol):
    """What an optimizer needs: coordinates, and a basis that fits the present parameters.

    A subspace of your own is an object with these two members. ``update()`` is called once a step,
    under ``torch.no_grad()``, before anything moves; a basis to project onto has orthonormal rows.
    """

    @property
    def parameters(self) -> ParameterSpace:
        """The coordinates of the basis."""

    def update(self) -> EigenBasis | LowRankCurvature:
        """Returns the basis to use at the present parameters."""


def check_subspace(subspace: Any, *, projects: bool, name: str = "subspace") -> None:
    """Checks the argument of an optimizer.

    Args:
        subspace: the argument.
        projects: whether its basis will be projected onto.
        name: of the argument.

    Raises:
        ArgumentError: it is no subspace, or none to project onto.
    """
    if isinstance(subspace, type) or not isinstance(subspace, Subspace):
        allowed = "a subspace, such as DominantSubspace(hessian, k=10)"
        raise ArgumentError(name, type(subspace).__name__, allowed)
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


def operator_of(subspace: Subspace) -> CurvatureOperator | None:
    """Returns the operator whose loss and gradient are recorded, if the subspace has one.

    Raises:
        ArgumentError: it is of other parameters.
    """
    operator = getattr(subspace, "operator", None)
    if not isinstance(operator, CurvatureOperator):
        return None
    both = (operator.parameters.tensors, subspace.parameters.tensors)
    ours, theirs = ([id(p) for p in tensors] for tensors in both)
    if ours != theirs:
        remedy = "Build both from one model, with the same params."
        raise ArgumentError("the subspace's operator", "of other parameters", "of its own", remedy)
    return operator
