"""The gradient graph of a problem by itself: what ways there are to take products from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.speed.problems import Problem, twice_differentiable
from benchmarks.speed.recipe import flat


class GradientGraph:
    """Products with the Hessian of a problem's loss, as backward passes through one kept graph.

    Args:
        problem: at its present parameters.
        model: in the place of the problem's own, such as a copy of another precision.
    """

    def __init__(self, problem: Problem, model: nn.Module | None = None) -> None:
        model = problem.model if model is None else model
        self.parameters = list(model.parameters())
        x = problem.x.to(self.dtype) if problem.x.is_floating_point() else problem.x
        with twice_differentiable():
            loss = problem.loss(model(x), problem.y)
            self.slopes = torch.autograd.grad(loss, self.parameters, create_graph=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.parameters[0].dtype

    def product(self, v: Tensor) -> Tensor:
        """Returns ``H v``, ``(P,)``."""
        return flat(self._backward(self._pieces(v)))

    def matmat(self, rows: Tensor) -> Tensor:
        """Returns the products with rows ``(j, P)``, one after the other, in the rows' dtype."""
        return torch.stack([self.product(row.to(self.dtype)).to(rows.dtype) for row in rows])

    def batched(self, rows: Tensor) -> Tensor:
        """Returns the products with rows ``(j, P)`` by one backward pass for all of them."""
        found = self._backward(self._pieces(rows), is_grads_batched=True)
        return torch.cat([g.reshape(len(rows), -1) for g in found], dim=1)

    def _pieces(self, v: Tensor) -> list[Tensor]:
        """One tensor a parameter, each with the leading dimensions of ``v``."""
        pieces = v.split([p.numel() for p in self.parameters], dim=-1)
        return [
            piece.reshape(*v.shape[:-1], *p.shape)
            for piece, p in zip(pieces, self.parameters, strict=True)
        ]

    def _backward(
        self, cotangents: Sequence[Tensor], *, is_grads_batched: bool = False
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.slopes,
            self.parameters,
            cotangents,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=is_grads_batched,
        )
