"""The float64 reference that every answer is checked against.

It shares nothing with what is measured but the model: products are double backward passes through
one float64 graph, eigenpairs are SciPy's.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.speed.problems import Problem, twice_differentiable
from benchmarks.speed.recipe import flat


@dataclass(frozen=True)
class Check:
    """How far an answer is from the reference.

    Attributes:
        residual: ``max_i ‖H v_i − λ_i v_i‖ / λ_1``.
        sine: of the largest principal angle to the reference's subspace.
        eigenvalues: largest error of an eigenvalue, relative to ``λ_1``.
    """

    residual: float
    sine: float
    eigenvalues: float


class Residuals:
    """The Hessian of a problem at its present parameters, in float64.

    Args:
        problem: its parameters may change afterwards.
    """

    def __init__(self, problem: Problem) -> None:
        problem.model.zero_grad()
        model = copy.deepcopy(problem.model).double()
        x = problem.x.double() if problem.x.is_floating_point() else problem.x
        self._parameters = list(model.parameters())
        with twice_differentiable():
            loss = problem.loss(model(x), problem.y)
            self._slopes = torch.autograd.grad(loss, self._parameters, create_graph=True)
        self._device = x.device

    def product(self, v: Tensor) -> Tensor:
        """Returns ``H v``, ``(P,)``."""
        pieces = v.split([p.numel() for p in self._parameters])
        views = [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]
        rows = torch.autograd.grad(
            self._slopes, self._parameters, views, retain_graph=True, materialize_grads=True
        )
        return flat(rows)

    def _residual(self, eigenvalues: Tensor, vectors: Tensor, scale: Tensor) -> float:
        norms = [
            torch.linalg.vector_norm(self.product(v) - value * v)
            for value, v in zip(eigenvalues, vectors, strict=True)
        ]
        return float(torch.stack(norms).max() / scale)

    def check(self, eigenvalues: Tensor, vectors: Tensor) -> Check:
        """Returns the residual of an answer, beside the largest of its own eigenvalues.

        What needs the true pairs is NaN.
        """
        vectors = vectors.to(self._device, torch.float64)
        vectors = torch.nn.functional.normalize(vectors)
        eigenvalues = eigenvalues.to(vectors)
        scale = eigenvalues.abs().max()
        return Check(self._residual(eigenvalues, vectors, scale), math.nan, math.nan)


class Reference(Residuals):
    """The same, with its top k eigenpairs.

    Args:
        problem: its parameters may change afterwards.
        k: how many pairs.

    Attributes:
        eigenvalues: ``(k,)``, descending.
        vectors: ``(k, P)``, orthonormal rows.
        residual: relative, of these pairs themselves.
    """

    def __init__(self, problem: Problem, k: int) -> None:
        super().__init__(problem)
        size = problem.size

        def product(v: NDArray[np.float64]) -> NDArray[np.float64]:
            return self.product(torch.from_numpy(v.ravel()).to(self._device)).cpu().numpy()

        # One sweep of this length is past the tolerance where the spectrum has a gap to speak of.
        values, vectors = eigsh(
            LinearOperator((size, size), matvec=product, dtype=np.float64),
            k,
            which="LA",
            ncv=min(size, 2 * k + 6),
            tol=1e-5,
            v0=np.random.default_rng(0).standard_normal(size),
        )
        self.eigenvalues = torch.from_numpy(values[::-1].copy()).to(self._device)
        self.vectors = torch.from_numpy(vectors.T[::-1].copy()).to(self._device)
        self.residual = self._residual(self.eigenvalues, self.vectors, self.eigenvalues[0].abs())

    def sine(self, vectors: Tensor) -> float:
        """Returns the sine of the largest principal angle between their span and the true one."""
        rows = torch.linalg.qr(vectors.to(self.vectors).T).Q.T
        outside = rows - (rows @ self.vectors.T) @ self.vectors
        return float(torch.linalg.matrix_norm(outside, 2))

    def check(self, eigenvalues: Tensor, vectors: Tensor) -> Check:
        """Returns how good an answer is; vectors are rows, taken at length 1."""
        vectors = torch.nn.functional.normalize(vectors.to(self.vectors))
        eigenvalues = eigenvalues.to(self.eigenvalues)
        error = (eigenvalues.sort(descending=True).values - self.eigenvalues).abs().max()
        return Check(
            self._residual(eigenvalues, vectors, self.eigenvalues[0].abs()),
            self.sine(vectors),
            float(error / self.eigenvalues[0].abs()),
        )
