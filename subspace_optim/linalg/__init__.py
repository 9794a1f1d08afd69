"""Numerics on callables and tensors: they know no model, no loss and no optimizer."""

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import EigenSolution, top_eigenpairs

__all__ = ["EigenBasis", "EigenSolution", "top_eigenpairs"]
