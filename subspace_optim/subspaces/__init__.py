"""Which subspace, and when its basis is renewed."""

from subspace_optim.subspaces.base import (
    Subspace,
    basis_of,
    check_subspace,
    operator_of,
    projector_of,
)
from subspace_optim.subspaces.class_gradients import ClassGradientSubspace
from subspace_optim.subspaces.dominant import DominantSubspace
from subspace_optim.subspaces.fixed import FixedSubspace
from subspace_optim.subspaces.refresh import ByAngle, EveryNSteps
from subspace_optim.subspaces.rule import RefreshRule, Situation, SubspaceStats

__all__ = [
    "ByAngle",
    "ClassGradientSubspace",
    "DominantSubspace",
    "EveryNSteps",
    "FixedSubspace",
    "RefreshRule",
    "Situation",
    "Subspace",
    "SubspaceStats",
    "basis_of",
    "check_subspace",
    "operator_of",
    "projector_of",
]
