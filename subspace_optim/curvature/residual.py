"""``ResidualOperator``: the part of the Hessian that the curvature of the model makes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.gauss_newton import GaussNewtonOperator
from subspace_optim.curvature.operator import (
    COSTS,
    CurvatureOperator,
    GroupMeans,
    OperatorStats,
    State,
)
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.curvature.samples import PIECES


class ResidualOperator(CurvatureOperator):
    r"""The Hessian less its Gauss-Newton matrix.

    .. math::
        R = H - G, \qquad
        R v = \frac{1}{N} \sum_b n_b \sum_c \frac{\partial \ell}{\partial f_c} \,
        \nabla_\theta^2 f_c(x_b) \, v

    The Gauss-Newton matrix is what the curvature of the loss makes of a model that is taken to be
    linear, the residual what the curvature of the model adds. It vanishes where the model is
    linear in θ, or fits its data exactly. Elsewhere its eigenvalues may have any sign: all
    negative curvature of a loss that is convex in the output is in it.

    It is a difference: its products have the rounding errors of those of H and G, which are no
    smaller where R is. Loss and gradient are the Hessian's. Each product is one with H and one
    with G, and ``stats`` counts what the two spend on it, and nothing that they spend otherwise.

    Args:
        hessian: H, of any kind.
        gauss_newton: G, of the same loss, data and parameters. That the loss is the same is looked
            at with the first product.

    Products raise what those of H and G do, and ``ArgumentError`` where their losses differ.

    Raises:
        ArgumentError: an argument is no such operator, or they are of different parameters.

    Reference:
        `sagun_2017`, section 2: the two terms of its decomposition.
    """

    def __init__(self, hessian: CurvatureOperator, gauss_newton: GaussNewtonOperator) -> None:
        if not isinstance(hessian, CurvatureOperator):
            remedy = "Use HessianOperator(model, loss_fn, data)."
            raise ArgumentError("hessian", type(hessian).__name__, "a CurvatureOperator", remedy)
        if not isinstance(gauss_newton, GaussNewtonOperator):
            remedy = "The order is ResidualOperator(hessian, gauss_newton)."
            found = type(gauss_newton).__name__
            raise ArgumentError("gauss_newton", found, "a GaussNewtonOperator", remedy)
        ours, theirs = hessian.parameters, gauss_newton.parameters
        if list(map(id, ours.tensors)) != list(map(id, theirs.tensors)):
            allowed = f"the Hessian's parameters, in its order: {ours.names}"
            if ours.names == theirs.names:
                allowed = "those of the model that the Hessian is of, and not of a copy"
            remedy = "Give both operators the same model and `params`."
            raise ArgumentError("parameters of gauss_newton", theirs.names, allowed, remedy)
        self.hessian, self.gauss_newton = hessian, gauss_newton
        self.parameters = ours
        self.stats = OperatorStats()
        self._compared = False

    def _facts(self) -> dict[str, str]:
        return super()._facts() | {
            "hessian": repr(self.hessian),
            "gauss_newton": repr(self.gauss_newton),
        }

    @property
    def accuracy(self) -> float:
        """Relative error of the products of H and G: of theirs, not of the difference."""
        return max(self.hessian.accuracy, self.gauss_newton.accuracy)

    @property
    def is_hessian(self) -> bool:
        """No: it is a part of it."""
        return False

    @property
    def of_current_batch(self) -> bool:
        """Whether the data of the Hessian are a ``CurrentBatch``."""
        return self.hessian.of_current_batch

    @property
    def ranks(self) -> Ranks:
        """Those of the Hessian."""
        return self.hessian.ranks

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``."""
        with self._counted():
            products = self.hessian.matmat(vectors)
            products = products.sub_(self.gauss_newton.matmat(vectors))
            if not self._compared:
                self._compare_losses()
        return products

    @property
    def examples(self) -> tuple[int, int] | None:
        """Those of the Hessian."""
        return self.hessian.examples

    def sample(self, examples: int, *, seed: int, pieces: int = PIECES) -> ResidualOperator | None:
        """Returns the difference of the two on a sample of their data, if there is one."""
        hessian = self.hessian.sample(examples, seed=seed, pieces=pieces)
        gauss_newton = self.gauss_newton.sample(examples, seed=seed, pieces=pieces)
        if hessian is None or gauss_newton is None:
            return None
        view = copy.copy(self)
        view.hessian, view.gauss_newton = hessian, gauss_newton
        return view

    def group_means(self, groups: int, *, seed: int) -> GroupMeans | None:
        """Returns loss and gradient of groups of a sample's batches: those of the Hessian."""
        with self._counted():
            return self.hessian.group_means(groups, seed=seed)

    def batch_matmat(self, vectors: Tensor, see: Callable[[Tensor], object]) -> Tensor:
        """Returns the products as ``matmat`` does, and shows what each batch adds to them."""
        parts: list[Tensor] = []
        with self._counted():
            products = self.hessian.batch_matmat(vectors, lambda part: parts.append(part.clone()))
            others = iter(parts)
            return products.sub_(
                self.gauss_newton.batch_matmat(vectors, lambda part: see(next(others).sub_(part)))
            )

    def gradient(self) -> Tensor:
        """Returns the gradient of the mean loss over all of the data, ``(P,)``."""
        with self._counted():
            return self.hessian.gradient()

    def loss(self) -> float:
        """Returns the mean loss over all of the data."""
        with self._counted():
            return self.hessian.loss()

    def state(self) -> State:
        """Returns numbers that differ where anything does that either of the two depends on."""
        both = self.hessian.state(), self.gauss_newton.state()
        return State(*(hash(numbers) for numbers in zip(*both, strict=True)))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: both look at them on entry only."""
        with self.hessian.frozen(), self.gauss_newton.frozen():
            yield

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[None]:
        """Loss, gradient and products inside are those at other parameters, ``theta: (P,)``."""
        with self.hessian.at(theta), self.gauss_newton.at(theta):
            yield

    def release(self) -> None:
        """Frees what both keep for further products at the present parameters."""
        self.hessian.release()
        self.gauss_newton.release()

    def step_begins(self) -> None:
        """Is told that a training step begins, and tells both."""
        self.hessian.step_begins()
        self.gauss_newton.step_begins()

    def step_ended(self, *, taken: bool = True) -> None:
        """Is told that it has ended, and tells both."""
        self.hessian.step_ended(taken=taken)
        self.gauss_newton.step_ended(taken=taken)

    def _compare_losses(self) -> None:
        """Checks that both are of one loss, which the pass of a product has found already.

        Raises:
            ArgumentError: they are not.
        """
        loss, other = self.hessian.loss(), self.gauss_newton.loss()
        epsilon = torch.finfo(self.dtype).eps
        if not math.isclose(loss, other, rel_tol=math.sqrt(epsilon), abs_tol=100 * epsilon):
            remedy = "Give both operators the same loss, data, mode and seed."
            allowed = f"the Hessian's, {loss:.6g}"
            raise ArgumentError("the loss of gauss_newton", other, allowed, remedy)
        self._compared = True

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Adds what both spend inside to ``stats``, and takes over how they work at present."""
        stats, both = self.stats, (self.hessian.stats, self.gauss_newton.stats)
        before = [copy.copy(of) for of in both]
        try:
            yield
        finally:
            for of, was in zip(both, before, strict=True):
                for name in (*COSTS, "full_forwards", "passes"):
                    spent = getattr(of, name) - getattr(was, name)
                    setattr(stats, name, getattr(stats, name) + spent)
            stats.examples, stats.weight = both[0].examples, both[0].weight
            stats.graphs_kept = sum(of.graphs_kept for of in both)
            stats.graphs_streamed = sum(of.graphs_streamed for of in both)
            stats.graph_bytes = sum(of.graph_bytes for of in both)
            stats.engine = " - ".join(of.engine for of in both)
