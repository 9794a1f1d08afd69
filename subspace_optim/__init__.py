"""Optimizers and diagnostics in the dominant and the bulk subspace of the loss Hessian."""

from importlib.metadata import version

from subspace_optim import diagnostics
from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    DataChangedError,
    EngineWarning,
    NonFiniteError,
    SecondDerivativeError,
    StaleBasisWarning,
)
from subspace_optim.curvature import FiniteDifferenceHessian, HessianOperator
from subspace_optim.diagnostics import Monitor
from subspace_optim.linalg import EigenBasis
from subspace_optim.optim import BulkSGD, DomSGD
from subspace_optim.subspace import DominantSubspace

__version__ = version("subspace_optim")

__all__ = [
    "ArgumentError",
    "BulkSGD",
    "ConvergenceWarning",
    "DataChangedError",
    "DomSGD",
    "DominantSubspace",
    "EigenBasis",
    "EngineWarning",
    "FiniteDifferenceHessian",
    "HessianOperator",
    "Monitor",
    "NonFiniteError",
    "SecondDerivativeError",
    "StaleBasisWarning",
    "diagnostics",
]
