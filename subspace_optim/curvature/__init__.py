"""A model's loss as a linear operator: it knows no eigensolver, subspace or optimizer."""

from subspace_optim.curvature.current_batch import CurrentBatch
from subspace_optim.curvature.finite_difference import FiniteDifferenceHessian
from subspace_optim.curvature.gauss_newton import GaussNewtonOperator
from subspace_optim.curvature.hessian import HessianOperator
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.operator import CurvatureOperator, OperatorStats
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.residual import ResidualOperator

__all__ = [
    "CurrentBatch",
    "CurvatureOperator",
    "FiniteDifferenceHessian",
    "GaussNewtonOperator",
    "HessianOperator",
    "MeanLossOperator",
    "OperatorStats",
    "ParameterSpace",
    "ResidualOperator",
]
