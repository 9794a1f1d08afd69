"""``GaussNewtonOperator``: the curvature of the loss seen through a linearised model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.evaluation import (
    Evaluate,
    Linearisation,
    Point,
    Slopes,
    explained,
    refuse_functions_of_one_pass,
)
from subspace_optim.curvature.isolation import Mode
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.objective import BatchLoss, OfBatch
from subspace_optim.curvature.parameters import Params
from subspace_optim.curvature.proof import Products

_NO_OUTPUT = (
    "batch_loss",
    "a loss of (model, batch)",
    "a loss of the model's output, at which the curvature is split",
    "Use GaussNewtonOperator(model, loss_fn, data), with loss_fn(output, target).",
)


class GaussNewtonOperator(MeanLossOperator):
    r"""The generalised Gauss-Newton matrix of the mean loss over ``data``.

    .. math::
        G v = \frac{1}{N} \sum_b n_b \, J_b^\top H_b J_b v, \qquad
        J_b = \frac{\partial f_\theta(x_b)}{\partial \theta}, \quad
        H_b = \nabla_f^2 \, \ell(f, y_b) \big|_{f = f_\theta(x_b)}, \quad N = \sum_b n_b

    It is the part of the Hessian that the curvature of the loss makes, and leaves out the
    curvature of the model. For losses that are convex in the output, such as cross-entropy and
    squared error, it is positive semidefinite. For cross-entropy it is the Fisher information of
    the model, and where the model is linear in θ, the Hessian.

    Model, data, mode, dropout masks and batch statistics are those of ``HessianOperator``, and so
    are loss and gradient. What a product needs is built once at the same parameters for all
    batches that fit ``memory_budget``, and once for each block of products for the others: ``Jv``
    by a backward pass through the backward pass, ``H(Jv)`` through the loss alone, and ``Jᵀ`` by
    a backward pass of the model.

    Args:
        model: called as ``model(x)``; its output is a tensor, or tensors in tuples, lists and
            dicts. ``DistributedDataParallel`` and ``torch.compile`` wrappers are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples, of nothing but these two.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass. Batches are moved to the parameters' device.
        params: the parameters to differentiate by (default: all that require a gradient).
        mode: ``"train"`` or ``"eval"`` (default: the mode that the model is in).
        memory_budget: bytes for what is kept (default: a quarter of the memory that is free).
        seed: of the dropout masks.
        process_group: sums over its ranks, as in ``HessianOperator`` (default: none).
        verify: whether it proves itself, as ``HessianOperator`` does: that its products are
            symmetric, and the rest.

    Products raise what those of ``HessianOperator`` do, and ``ArgumentError`` for an output that
    holds anything but real tensors, and for a loss that looks at the parameters themselves.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    _products: ClassVar[Products] = "symmetric"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Params = None,
        mode: Mode | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
        process_group: Any = None,
        verify: bool = True,
    ) -> None:
        if isinstance(loss_fn, OfBatch):
            raise ArgumentError(*_NO_OUTPUT)
        self._loss = SplitLoss(loss_fn)
        super().__init__(
            model,
            self._loss if callable(loss_fn) else loss_fn,
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            process_group=process_group,
            verify=verify,
        )
        self._user_loss = loss_fn
        self.stats.engine = "double_backward"

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,  # noqa: ARG003
        batch_loss: BatchLoss,  # noqa: ARG003
        data: Any,  # noqa: ARG003
        **options: Any,  # noqa: ARG003
    ) -> NoReturn:
        """Refuses: a loss of (model, batch) does not show the output that it is a loss of.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(*_NO_OUTPUT)

    def _linearise(self, evaluate: Evaluate, point: Point) -> Linearisation:
        with explained(), self._loss.split() as ends:
            loss, weight = evaluate()
            return gauss_newton(loss, weight, ends, point.leaves)


class SplitLoss:
    """``loss_fn(output, target)``, whose graph can be made to end at the output.

    Args:
        loss_fn: the loss.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        self.loss_fn = loss_fn
        self._ends: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Returns the loss; inside of ``split`` that of detached copies of the output."""
        if self._ends is not None:
            output = self._detached(output, self._ends)
        return self.loss_fn(output, target)

    @contextmanager
    def split(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yields a list that fills with the tensors of the output, each with its copy."""
        self._ends = []
        try:
            yield self._ends
        finally:
            self._ends = None

    @staticmethod
    def _detached(output: Any, ends: list[tuple[Tensor, Tensor]]) -> Any:
        """Returns the output with copies in the place of its tensors.

        Raises:
            ArgumentError: it holds what may hide a tensor.
        """
        leaves, structure = tree_flatten(output)
        for i, leaf in enumerate(leaves):
            known = leaf is None or isinstance(leaf, bool | int | float | str | Tensor)
            if not known or (isinstance(leaf, Tensor) and leaf.is_complex()):
                found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                remedy = "Wrap the model in a module that returns its output so."
                allowed = "real tensors, in tuples, lists and dicts"
                raise ArgumentError("what the model's output holds", found, allowed, remedy)
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[i] = leaf.detach().requires_grad_()
                ends.append((leaf, leaves[i]))
        return tree_unflatten(leaves, structure)


def gauss_newton(
    loss: Tensor, weight: Tensor, ends: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]
) -> Linearisation:
    """Returns loss, gradient, and the products ``v -> Jᵀ H J v`` of one batch.

    Args:
        loss: the mean loss, a function of the copies in ``ends``.
        weight: what it is a mean over.
        ends: the tensors of the model's output, functions of ``leaves``, each with its copy.
        leaves: the parameters.

    Raises:
        ArgumentError: the loss is a function of the parameters too.
    """
    nothing: Slopes = (None,) * len(leaves)
    known = Linearisation(loss.detach(), weight, nothing, lambda v: nothing)  # noqa: ARG005
    if not loss.requires_grad:
        return known
    for tensor in (loss, *(output for output, _ in ends)):
        refuse_functions_of_one_pass(tensor)
    inputs = [*(copy for _, copy in ends), *leaves]
    slopes = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    if any(slope is not None for slope in slopes[len(ends) :]):
        allowed = "a function of (output, target) alone"
        remedy = "Leave a penalty on the parameters out: its curvature is not of this form."
        raise ArgumentError("loss_fn", "a function of the parameters", allowed, remedy)
    used = [
        (output, copy, slope)
        for (output, copy), slope in zip(ends, slopes, strict=False)
        if output.requires_grad and slope is not None
    ]
    if not used:
        return known
    # At the loss's own slopes Jᵀu is the gradient; as a function of u its derivative is Jv.
    cotangents = [slope.detach().requires_grad_() for *_, slope in used]
    outputs = [output for output, *_ in used]
    pulled = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True)
    known.slopes = [None if p is None else p.detach() for p in pulled]

    # The map holds the ends of the graphs, not the P numbers of a gradient.
    moved = [(i, p.dtype) for i, p in enumerate(pulled) if p is not None and p.requires_grad]
    pulled_ends = [get_gradient_edge(pulled[i]) for i, _ in moved]
    output_ends = [get_gradient_edge(output) for output in outputs]
    copies = [copy for _, copy, _ in used]
    which = [j for j, (*_, slope) in enumerate(used) if slope.requires_grad]
    slope_ends = [get_gradient_edge(slope) for *_, slope in used if slope.requires_grad]
    if not which:
        return known

    def product(v: list[Tensor]) -> Slopes:
        keep: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        directions = [v[i].to(dtype) for i, dtype in moved]
        with explained():
            tangents = torch.autograd.grad(pulled_ends, cotangents, directions, **keep)
            curved = [tangents[j] for j in which]
            bent = torch.autograd.grad(slope_ends, copies, curved, **keep)
            return torch.autograd.grad(
                output_ends, leaves, bent, retain_graph=True, allow_unused=True
            )

    known.product = product
    return known
