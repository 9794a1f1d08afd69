"""Optimizers and diagnostics in the dominant and the bulk subspace of the loss Hessian."""

from importlib.metadata import version

from subspace_optim import diagnostics
from subspace_optim._progress import ProgressReport
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
    OtherGradientWarning,
    RanksWarning,
    SecondDerivativeError,
    StaleBasisWarning,
    UnseenStepsWarning,
)
from subspace_optim.curvature import (
    CurrentBatch,
    CurvatureOperator,
    FiniteDifferenceHessian,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSpace,
    ResidualOperator,
)
from subspace_optim.diagnostics import Monitor, measures
from subspace_optim.diagnostics.schedules import every_share
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
    ByAngle,
    ClassGradientSubspace,
    DominantSubspace,
    EveryNSteps,
    FixedSubspace,
    RefreshRule,
    Subspace,
)

__version__ = version("subspace_optim")

__all__ = [
    "SAM",
    "ArgumentError",
    "AttachedTwiceWarning",
    "BulkSAM",
    "BulkSGD",
    "ByAngle",
    "ClassGradientQuasiNewton",
    "ClassGradientSubspace",
    "ConvergenceWarning",
    "CurrentBatch",
    "CurvatureOperator",
    "DataChangedError",
    "DomSAM",
    "DomSGD",
    "DominantSubspace",
    "EigenBasis",
    "EngineWarning",
    "EveryNSteps",
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
    "OtherGradientWarning",
    "ParameterSpace",
    "ProgressReport",
    "RanksWarning",
    "RefreshRule",
    "ResidualOperator",
    "SecondDerivativeError",
    "StaleBasisWarning",
    "Subspace",
    "UnseenStepsWarning",
    "diagnostics",
    "every_share",
    "measures",
    "project_updates",
]
