"""What subspaces and optimizers must do, written out: plain float64, dense matrices, one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from subspace_optim.curvature import CurvatureOperator, OperatorStats, ParameterSpace
from subspace_optim.linalg import EigenBasis
from tests.dense import symmetric

OPTIONS = {
    "lr": 0.05,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}


@dataclass
class Landscape:
    """A loss and its derivatives as functions of one flat float64 vector."""

    loss: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


class Quartic(nn.Module):
    """Parameters with the loss ½ θᵀAθ + bᵀθ + ¼ Σ c_i θ_i⁴, whose derivatives are formulas.

    The gradient is Aθ + b + cθ³ and the Hessian A + 3 diag(cθ²): nothing here asks autograd. A has
    both signs in its spectrum, and the Hessian changes with every step.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]] = ((3, 2), (2,), ()),
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        size = sum(math.prod(shape) for shape in shapes)
        random = torch.Generator().manual_seed(seed)
        self.A = symmetric(torch.linspace(-1, 3, size), seed)
        self.b, c, start = torch.randn(3, size, generator=random, dtype=torch.float64)
        self.c = c.abs()
        pieces = start.split([math.prod(shape) for shape in shapes])
        self.weights = nn.ParameterList(
            nn.Parameter(piece.reshape(shape).to(dtype))
            for piece, shape in zip(pieces, shapes, strict=True)
        )

    def forward(self) -> Tensor:
        return self.loss(torch.cat([p.flatten() for p in self.weights]))

    def loss(self, theta: Tensor) -> Tensor:
        A, b, c = (t.to(theta.dtype) for t in (self.A, self.b, self.c))
        return theta @ A @ theta / 2 + b @ theta + (c * theta**4).sum() / 4

    def gradient(self, theta: Tensor) -> Tensor:
        return self.A @ theta + self.b + self.c * theta**3

    def hessian(self, theta: Tensor) -> Tensor:
        return self.A + 3 * torch.diag(self.c * theta**2)


class DenseOperator(CurvatureOperator):
    """The closed forms of a `Quartic` as a `CurvatureOperator`; products can be made to fail."""

    def __init__(self, model: Quartic) -> None:
        self.parameters = ParameterSpace(model)
        self.stats = OperatorStats()
        self.failure: Exception | float | None = None  # what the next products raise, or return

    def _theta(self) -> Tensor:
        return flat(self.parameters.tensors)

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        self.stats.products += len(vectors)
        self.stats.full_products += len(vectors)
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return torch.full_like(vectors, self.failure)
        return vectors @ self.parameters.model.hessian(self._theta()).to(vectors.dtype)

    def gradient(self) -> Tensor:
        self.stats.gradients += 1
        self.stats.full_gradients += 1
        return self.parameters.model.gradient(self._theta()).to(self.dtype)

    def loss(self) -> float:
        return float(self.parameters.model.loss(self._theta()))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector of all elements, in the order of the tensors."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def outputs(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    """What the model makes of ``x`` with the parameters ``theta``, in their usual order."""
    named = dict(model.named_parameters())
    pieces = theta.split([p.numel() for p in named.values()])
    state = {n: piece.view(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
    return functional_call(model, state, (x,))


def landscape(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Landscape:
    """The mean loss of a model in float64, whatever the dtype of the model. It has no buffers."""
    x, y = x.double(), y.double() if y.is_floating_point() else y

    def loss(theta: Tensor) -> Tensor:
        return loss_fn(outputs(model, theta, x), y)

    return Landscape(loss, grad(loss), hessian(loss))


def relative_gap(matrix: Tensor, k: int) -> float:
    """How far λ_k is from λ_{k+1}, relative to max|λ|: what a projector's accuracy divides by."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    if k == len(values):
        return 1.0
    return float((values[k - 1] - values[k]) / values.abs().max())


def projector(matrix: Tensor, k: int) -> Tensor:
    """P_k as a dense matrix; the subspace must be well defined."""
    if relative_gap(matrix, k) < 1e-4:
        raise ValueError("The case has no gap below λ_k: choose another seed.")
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, -k:]
    return vectors @ vectors.T


class GivenSubspace:
    """A user's own subspace: one basis object for ever."""

    def __init__(self, parameters: ParameterSpace, basis: Any) -> None:
        self.parameters, self.basis = parameters, basis

    def update(self) -> Any:
        return self.basis


class ExactSubspace:
    """The top eigenvectors of a dense Hessian, by `eigh`: an optimizer is tested without a solver.

    Args:
        parameters: the coordinates.
        hessian: of the flat float64 parameters.
        k: how many.

    Attributes:
        refreshes: how many parameter states it was asked at, one after the other.
        basis: at the last of them.
    """

    def __init__(
        self, parameters: ParameterSpace, hessian: Callable[[Tensor], Tensor], k: int
    ) -> None:
        self.parameters, self.hessian, self.k = parameters, hessian, k
        self.refreshes = 0
        self.basis: EigenBasis | None = None
        self._theta: Tensor | None = None

    def update(self) -> EigenBasis:
        theta = flat(self.parameters.tensors)
        if self.basis is None or not torch.equal(theta, self._theta):
            values, vectors = torch.linalg.eigh(self.hessian(theta))
            top, rows = values[-self.k :].flip(0), vectors[:, -self.k :].T.flip(0)
            top, rows = (t.to(self.parameters.dtype).contiguous() for t in (top, rows))
            self.basis, self._theta = EigenBasis(top, rows, torch.zeros_like(top)), theta
            self.refreshes += 1
        return self.basis


def exact(model: Quartic, k: int) -> ExactSubspace:
    return ExactSubspace(ParameterSpace(model), model.hessian, k)


def dense_eigenbasis(size: int, k: int, seed: int, dtype: torch.dtype) -> EigenBasis:
    """The top k eigenpairs of a dense symmetric matrix."""
    values, vectors = torch.linalg.eigh(symmetric(torch.linspace(-1, 3, size), seed))
    top, rows = values.flip(0)[:k], vectors.T.flip(0)[:k]
    return EigenBasis(top.to(dtype), rows.to(dtype).contiguous(), torch.zeros(k, dtype=dtype))


def descend(
    problem: Landscape | Quartic,
    theta: Tensor,
    groups: Sequence[tuple[Tensor, dict[str, Any]]],
    *,
    part: str,
    k: int,
    steps: int,
) -> list[Tensor]:
    """θ_0, θ_1, … of SGD of which one part of the update is taken; each group has its indices."""
    buffers: list[Tensor | None] = [None] * len(groups)
    path = [theta]
    for _ in range(steps):
        gradient, update = problem.gradient(theta), torch.zeros_like(theta)
        for i, (where, o) in enumerate(groups):
            d = (-gradient if o["maximize"] else gradient)[where] + o["weight_decay"] * theta[where]
            if o["momentum"]:
                old = buffers[i]
                new = d if old is None else o["momentum"] * old + (1 - o["dampening"]) * d
                buffers[i] = new
                d = d + o["momentum"] * new if o["nesterov"] else new
            update[where] = -o["lr"] * d
        dominant = projector(problem.hessian(theta), k) @ update
        theta = theta + {"dominant": dominant, "bulk": update - dominant, "all": update}[part]
        path.append(theta)
    return path


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """The distance of two vectors or matrices is at most `relative` times the expected norm."""
    distance = torch.linalg.norm(actual.double() - expected.double())
    allowed = relative * torch.linalg.norm(expected.double())
    if not distance <= allowed:
        raise AssertionError(f"distance {distance:.3e} is above {allowed:.3e}")
