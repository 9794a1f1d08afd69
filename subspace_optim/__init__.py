"""Optimizers and diagnostics in the dominant and the bulk subspace of the loss Hessian."""

from importlib.metadata import version

from subspace_optim import diagnostics
from subspace_optim._validation import (
    ArgumentError,
    AttachedTwiceWarning,
    ConvergenceWarning,
    DataChangedError,
    EngineWarning,
    InconsistentDerivativeError,
    LogWarning,
    NoGapWarning,
    NonFiniteError,
    NotOneFunctionError,
    RanksWarning,
    SecondDerivativeError,
    StaleBasisWarning,
    UnseenStepsWarning,
)
from subspace_optim.curvature import (
    CurvatureOperator,
    FiniteDifferenceHessian,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSpace,
    ResidualOperator,
)
from subspace_optim.diagnostics import Monitor
from subspace_optim.linalg import EigenBasis, LowRankCurvature
from subspace_optim.optim import (
    SAM,
    BulkSAM,
    BulkSGD,
    ClassGradientQuasiNewton,
    DomSAM,
    DomSGD,
    LowRankNewton,
    project_updates,
)
from subspace_optim.subspaces import (
    ClassGradientSubspace,
    DominantSubspace,
    FixedSubspace,
    Subspace,
)

__version__ = version("subspace_optim")

__all__ = [
    "SAM",
    "ArgumentError",
    "AttachedTwiceWarning",
    "BulkSAM",
    "BulkSGD",
    "ClassGradientQuasiNewton",
    "ClassGradientSubspace",
    "ConvergenceWarning",
    "CurvatureOperator",
    "DataChangedError",
    "DomSAM",
    "DomSGD",
    "DominantSubspace",
    "EigenBasis",
    "EngineWarning",
    "FiniteDifferenceHessian",
    "FixedSubspace",
    "GaussNewtonOperator",
    "HessianOperator",
    "InconsistentDerivativeError",
    "LogWarning",
    "LowRankCurvature",
    "LowRankNewton",
    "Monitor",
    "NoGapWarning",
    "NonFiniteError",
    "NotOneFunctionError",
    "ParameterSpace",
    "RanksWarning",
    "ResidualOperator",
    "SecondDerivativeError",
    "StaleBasisWarning",
    "Subspace",
    "UnseenStepsWarning",
    "diagnostics",
    "project_updates",
]
