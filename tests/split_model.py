"""A model whose parameters are split over ranks (``tests.split``), and its loss in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.operator import CurvatureOperator, Minibatches, OperatorStats
from subspace_optim.curvature.parameters import ParameterSpace
from tests.dense import symmetric
from tests.split import Either

P, FIRST = 40, 15
"""Coordinates, and how many of them are of the first of two parameters."""


class SplitModel(nn.Module):
    """``L(θ) = ½ θᵀAθ + ¼ Σ c_i θ_i⁴ − bᵀθ``, of which a rank holds its elements of two parameters.

    Args:
        inner: the rank's.
        seed: of A, b and θ.
        dtype: of the parameters.
    """

    def __init__(self, inner: Either, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = inner
        spectrum = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.linspace(-0.5, 1.0, P - 3)])
        generator = torch.Generator().manual_seed(seed)
        self.A = symmetric(spectrum.double(), seed)
        theta, b, c = torch.randn(3, P, generator=generator, dtype=torch.float64)
        self.b, self.c = b, 0.2 * c.square()
        number = torch.arange(P)[inner.columns]
        own = inner.mine(theta).to(dtype)
        self.first = nn.Parameter(own[number < FIRST].clone())
        self.second = nn.Parameter(own[number >= FIRST].clone())

    def theta(self) -> Tensor:
        """All of it, on all ranks."""
        own = torch.cat([self.first.detach(), self.second.detach()])
        return self.inner.whole(own).double()

    def loss(self, theta: Tensor) -> float:
        return float(theta @ self.A @ theta / 2 + self.c @ theta**4 / 4 - self.b @ theta)

    def gradient(self, theta: Tensor) -> Tensor:
        return self.A @ theta + self.c * theta**3 - self.b

    def hessian(self, theta: Tensor) -> Tensor:
        return self.A + torch.diag(3 * self.c * theta**2)

    def backward(self) -> float:
        """Sets the gradients, and returns the loss."""
        theta = self.theta()
        own = self.inner.mine(self.gradient(theta)).split([len(self.first), len(self.second)])
        for p, gradient in zip((self.first, self.second), own, strict=True):
            p.grad = gradient.to(p.dtype)
        return self.loss(theta)


class SplitSpace(ParameterSpace):
    """The coordinates that lie on a rank."""

    def __init__(self, model: SplitModel, inner: Either) -> None:
        super().__init__(model)
        self.size, self.inner = P, inner
        self._own: Either = inner

    def is_finite(self) -> bool:
        return bool(self._own.whole(self.flatten(self.tensors)).isfinite().all())

    def digest(self) -> int:
        return int(digest([self._own.whole(self.flatten(self.tensors))]))


class SplitOperator(CurvatureOperator):
    """The Hessian of the loss."""

    def __init__(self, model: SplitModel, inner: Either) -> None:
        self.model, self._own = model, inner
        self.parameters: Any = SplitSpace(model, inner)
        self.stats = OperatorStats()
        self.tilt = 0.0  # of the matrix of a batch
        self.current = False

    @property
    def of_current_batch(self) -> bool:
        return self.current

    def matmat(self, vectors: Tensor) -> Tensor:
        self.stats.products += len(vectors)
        theta = self.model.theta()
        whole = self._own.whole(vectors).double()
        return self._own.mine(whole @ self._hessian(theta)).to(vectors)

    def _hessian(self, theta: Tensor) -> Tensor:
        return self.model.hessian(theta) + self.tilt * torch.eye(P).double()

    def gradient(self) -> Tensor:
        self.stats.gradients += 1
        theta = self.model.theta()
        return self._own.mine(self.model.gradient(theta) + self.tilt * theta).to(self.dtype)

    def loss(self) -> float:
        theta = self.model.theta()
        return self.model.loss(theta) + self.tilt * float(theta @ theta) / 2

    def minibatches(self, batch_size: int | None = None, *, seed: int = 0) -> Minibatches | None:
        """Five, of which each has a term of its own."""
        del batch_size, seed
        return Minibatches(5, map(self._batch, range(5)))

    def _batch(self, number: int) -> SplitOperator:
        other = SplitOperator(self.model, self._own)
        other.tilt = (number - 2) / 4
        return other

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[None]:
        with self.parameters.holding(theta):
            yield
