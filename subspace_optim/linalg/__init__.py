"""Numerics on callables and tensors: they know no model, no loss and no optimizer."""

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import EigenSolution, top_eigenpairs
from subspace_optim.linalg.low_rank import LowRankCurvature

__all__ = ["EigenBasis", "EigenSolution", "LowRankCurvature", "top_eigenpairs"]
