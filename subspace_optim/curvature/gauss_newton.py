"""``GaussNewtonOperator``: the curvature of the loss seen through a linearized model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.contexts import Mode
from subspace_optim.curvature.evaluation import Derivatives, PerParameter, Point
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLoss, Supervised
from subspace_optim.curvature.report import Products
from subspace_optim.curvature.second_derivatives import explained, refuse_functions_of_one_pass


def cut(output: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Cuts the graph at the output of the model.

    Returns:
        The output with detached copies in the place of its tensors, and the tensors, each with
        its copy.

    Raises:
        ArgumentError: the output holds what may hide a tensor.
    """
    cuts = []
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
            cuts.append((leaf, leaves[i]))
    return tree_unflatten(leaves, structure), cuts


def gauss_newton(
    loss: Tensor, weight: Tensor, cuts: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]
) -> Derivatives:
    """Returns loss, gradient, and the products ``v -> Jᵀ H J v`` of one batch.

    Args:
        loss: the mean loss, a function of the copies in ``cuts``.
        weight: what it is a mean over.
        cuts: the tensors of the model's output, functions of ``leaves``, each with its copy.
        leaves: the parameters.

    Raises:
        ArgumentError: the loss is a function of the parameters too.
    """
    zeros: PerParameter = (None,) * len(leaves)
    known = Derivatives(loss.detach(), weight, zeros, lambda v: zeros)  # noqa: ARG005
    if not loss.requires_grad:
        return known
    for tensor in (loss, *(output for output, _ in cuts)):
        refuse_functions_of_one_pass(tensor)
    inputs = [*(copy for _, copy in cuts), *leaves]
    by_inputs = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in by_inputs[len(cuts) :]):
        allowed = "a function of (output, target) alone"
        remedy = "Leave a penalty on the parameters out: its curvature is not of this form."
        raise ArgumentError("loss_fn", "a function of the parameters", allowed, remedy)
    used = [
        (output, copy, gradient)
        for (output, copy), gradient in zip(cuts, by_inputs, strict=False)
        if output.requires_grad and gradient is not None
    ]
    if not used:
        return known
    # The vjp u -> Jᵀu. At u = ∂ℓ/∂f it is the gradient; it is linear, and its derivative along v,
    # transposed, is the tangent Jv.
    cotangents = [gradient.detach().requires_grad_() for *_, gradient in used]
    outputs = [output for output, *_ in used]
    vjp = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True)
    known.gradient = [None if g is None else g.detach() for g in vjp]

    # The map holds on to the ends of the graphs, and not to the P numbers of a gradient.
    varying = [(i, g.dtype) for i, g in enumerate(vjp) if g is not None and g.requires_grad]
    vjp_ends = [get_gradient_edge(vjp[i]) for i, _ in varying]
    output_ends = [get_gradient_edge(output) for output in outputs]
    copies = [copy for _, copy, _ in used]
    curved = [j for j, (*_, gradient) in enumerate(used) if gradient.requires_grad]
    loss_ends = [get_gradient_edge(gradient) for *_, gradient in used if gradient.requires_grad]
    if not curved:  # the loss is linear in the output
        return known

    def product(v: list[Tensor]) -> PerParameter:
        keep: Any = {"retain_graph": True, "allow_unused": True}
        zeros: Any = {"materialize_grads": True}
        along = [v[i].to(dtype) for i, dtype in varying]
        with explained():
            # Jv, H Jv and Jᵀ H Jv: a backward pass each.
            tangents = torch.autograd.grad(vjp_ends, cotangents, along, **keep, **zeros)
            tangents = tuple(tangents[j] for j in curved)
            products = torch.autograd.grad(loss_ends, copies, tangents, **keep, **zeros)
            return torch.autograd.grad(output_ends, leaves, products, **keep)

    known.product = product
    return known


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
    a backward pass of the model. There is no ``from_loss``: a loss of (model, batch) does not show
    the output at which the two are split.

    Args:
        model: called as ``model(x)``; its output is a tensor, or tensors in tuples, lists and
            dicts. ``DistributedDataParallel`` and ``torch.compile`` wrappers are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples, of nothing but these two.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass. Batches are moved to the parameters' device. A pair of pairs is read as two
            batches; one batch of such parts is a list of one: ``[((a, b), (c, d))]``.
        params: the parameters to differentiate by: tensors, a pattern of names such as
            ``"blocks.*.attn.*"``, several, or a predicate of (name, tensor) (default: all that
            require a gradient).
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

    @property
    def is_hessian(self) -> bool:
        """No: it lacks the curvature of the model."""
        return False

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
        super().__init__(
            model,
            Supervised(loss_fn),
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            process_group=process_group,
            verify=verify,
        )
        self.stats.engine = "double_backward"

    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        loss_fn: Any = batch_loss.function  # a Supervised, as this class makes it
        x, y, count = loss_fn.split(batch_loss.batch)
        with explained():
            output, cuts = cut(batch_loss.model(x))
            loss, weight = batch_loss.scalars(loss_fn.of_output(output, y, count))
            return gauss_newton(loss, weight, cuts, point.leaves)
