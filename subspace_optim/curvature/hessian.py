"""``HessianOperator``: products with the Hessian of the mean loss, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import grad

from subspace_optim._validation import (
    ArgumentError,
    EngineWarning,
    InconsistentDerivativeError,
)
from subspace_optim.curvature.contexts import Mode
from subspace_optim.curvature.early_scatter import scattered_early
from subspace_optim.curvature.evaluation import Derivatives, PerParameter, Point, backward
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLoss, BatchLossFunction, Supervised
from subspace_optim.curvature.report import Report
from subspace_optim.curvature.second_derivatives import explained, refuse_functions_of_one_pass

Engine = Literal["auto", "func", "double_backward"]


def func(batch_loss: BatchLoss, point: Point) -> Derivatives:
    """Differentiates the loss as a function of the parameters, by ``torch.func.grad``.

    Preferred because leaves stand in the places of the parameters: hooks, flags and gradients of
    the user's own have no part in it, and a gradient that the loss takes itself is one level of
    the transform among others.
    """

    def loss_at(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with point.holding(leaves), point.surroundings.buffers_of_this_level():
            loss, weight = batch_loss()
        return loss, (loss, weight)

    with explained():
        gradient, (loss, weight) = grad(loss_at, has_aux=True)(tuple(point.leaves))
        refuse_functions_of_one_pass(loss)
    return _derivatives(loss, weight, gradient, point.leaves)


def double_backward(batch_loss: BatchLoss, point: Point) -> Derivatives:
    """Differentiates the loss by a backward pass at the parameters that keeps its graph.

    Needed because, like ``loss.backward()``, it finds parameters wherever the loss reaches them,
    past the modules too, and runs what ``torch.func`` cannot transform.
    """
    with explained():
        loss, weight = batch_loss()
        refuse_functions_of_one_pass(loss)
        gradient = backward(loss, point.leaves, create_graph=True)
    found = _derivatives(loss, weight, gradient, point.leaves)
    if point.layout is not None and not point.keep_gathered:
        found.product = scattered_early(loss, gradient, point.leaves, found.product)
    return found


def _derivatives(
    loss: Tensor, weight: Tensor, gradient: PerParameter, leaves: Sequence[Tensor]
) -> Derivatives:
    values = [None if g is None else g.detach() for g in gradient]
    product = hessian_vector_product(gradient, leaves)
    return Derivatives(loss.detach(), weight, values, product)


def hessian_vector_product(
    gradient: PerParameter, leaves: Sequence[Tensor]
) -> Callable[[list[Tensor]], PerParameter]:
    """Returns ``v -> H v``, a backward pass through the graph of ``gradient``.

    It gives the vector-Jacobian product ``vᵀ ∂∇L/∂θ``, which is ``H v`` because H is symmetric.
    The map holds the ends of the graph, and not the gradient: a graph that is kept has no tensor
    of P numbers of its own.

    Args:
        gradient: functions of ``leaves``, each with a graph if it varies with them.
        leaves: the parameters.
    """
    varying = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
    parts = [g for g in gradient if g is not None and g.requires_grad]
    ends, dtypes = [get_gradient_edge(g) for g in parts], [g.dtype for g in parts]

    def product(v: list[Tensor]) -> PerParameter:
        if not ends:
            return (None,) * len(leaves)
        cotangents = [v[i].to(dtype) for i, dtype in zip(varying, dtypes, strict=True)]
        with explained():
            return torch.autograd.grad(
                ends, leaves, cotangents, retain_graph=True, allow_unused=True
            )

    return product


class MeanLossHessian(MeanLossOperator):
    """A Hessian of the mean loss, also of models that are not called as ``model(x)``.

    Whoever subclasses it adds its own arguments to ``_set_up``, which both constructors call.
    """

    def _set_up(
        self, model: nn.Module, batch_loss: BatchLossFunction, data: Any, **options: Any
    ) -> None:
        """Sets the operator up; ``options`` are the keyword arguments of the class."""
        super().__init__(model, batch_loss, data, **options)

    @classmethod
    def from_loss(
        cls, model: nn.Module, batch_loss: BatchLossFunction, data: Any, **options: Any
    ) -> Self:
        """Makes the operator of a model that is not ``f(x) -> output``.

        Args:
            model: any module.
            batch_loss: ``batch_loss(model, batch) -> (mean loss, weight)``; the weight is what
                the mean is over: examples, or the tokens that count.
            data: a re-iterable of batches of any form, or a ``CurrentBatch``; a mapping is one
                batch.
            **options: the keyword arguments of the class.

        Returns:
            The operator.

        An argument that cannot be used raises an ``ArgumentError``.
        """
        operator = cls.__new__(cls)
        operator._set_up(model, batch_loss, data, **options)  # noqa: SLF001 (its own)
        return operator


class HessianOperator(MeanLossHessian):
    r"""The Hessian of the mean loss over ``data``, at the model's current parameters.

    .. math::
        H v = \nabla_\theta \langle \nabla_\theta L(\theta), v \rangle, \qquad
        L(\theta) = \frac{1}{N} \sum_b n_b \, \ell(f_\theta(x_b), y_b), \quad N = \sum_b n_b

    It differentiates the function that training minimises: the user's own model in its current
    mode, with all that draws at random seeded, batch statistics of each batch of ``data``, and no
    autocast, neither around the model nor inside of it. What an evaluation changes is put back:
    buffers, generators, and the attributes, lists and closures that model and loss can reach.
    bf16 and fp16 parameters are differentiated through float32 copies.

    At its first use, and again where the structure of the model has changed, it proves itself on
    a few examples: that the loss is one function, that the gradient is the one of
    ``loss.backward()``, that products are its derivative and symmetric, and that two batches,
    the first and the last, are together the mean of both. ``check()`` does so at any time, with a
    report.

    The graph of each batch's gradient is kept and reused for every product at the same
    parameters, as long as all of them fit ``memory_budget``; the batches beyond it stream, their
    graphs built once for each block of products. A batch is never divided, since batch norm would
    make another function of its parts: the graph of the largest one has to fit in memory.

    With ``process_group`` each rank passes its own part of the data, and loss, gradient and
    products are those of all parts together, bit by bit the same on every rank. All ranks call
    the same methods in the same order; a block of products is one all-reduce, and so is each look
    at the parameters, which have to be equal. An error of one rank is raised on all. Buffers are
    those of each rank.

    A model that is sharded, by ``fully_shard`` or tensor parallel, needs no argument: each rank
    passes its own part of the data, and vectors hold the coordinates that lie on it. Parameters
    are gathered while their module runs, by operations that differentiate twice; its second
    derivatives are by double backward. All ranks call the same, and batch b is that of all ranks.

    Args:
        model: called as ``model(x)``. ``DistributedDataParallel`` and ``torch.compile`` wrappers
            are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass, or a ``CurrentBatch``. Batches are moved to the parameters' device. A pair of
            pairs is read as two batches; one batch of such parts is a list of one:
            ``[((a, b), (c, d))]``.
        params: the parameters to differentiate by: tensors, a pattern of names such as
            ``"blocks.*.attn.*"``, several, or a predicate of (name, tensor) (default: all that
            require a gradient).
        mode: ``"train"`` or ``"eval"`` (default: the mode that the model is in).
        memory_budget: bytes for kept graphs (default: a quarter of the memory that is free).
        seed: of the dropout masks.
        engine: ``"func"``, a backward pass through the gradient of ``torch.func.grad``, at leaves
            that stand in the places of the parameters for the time of an evaluation;
            ``"double_backward"``, two passes of ``torch.autograd`` at the parameters themselves,
            for losses that reach them past the modules (lists, closures, caches) and for what
            ``torch.func`` cannot transform (checkpointed parts, functions without
            ``setup_context``, gradients inside of the loss); or ``"auto"``, the first of these that
            proves right. ``stats.engine`` tells which it is. Both give the same products at the
            same cost.
        process_group: sums over its ranks, each with its own part of the data (default: none).
        verify: whether it proves itself.

    Products and gradients raise ``ArgumentError`` for a loss that is no scalar and for batches
    that are no pairs, ``NonFiniteError`` for a loss that is not finite, ``DataChangedError`` for
    a pass whose data differ from the first, ``NotOneFunctionError`` and
    ``InconsistentDerivativeError`` for a proof that fails, and products ``SecondDerivativeError``
    for a part of the model that has none: ``FiniteDifferenceHessian`` is for those.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

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
        engine: Engine = "auto",
        process_group: Any = None,
        verify: bool = True,
    ) -> None:
        self._set_up(
            model,
            Supervised(loss_fn),
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            engine=engine,
            process_group=process_group,
            verify=verify,
        )

    def _set_up(
        self,
        model: nn.Module,
        batch_loss: BatchLossFunction,
        data: Any,
        *,
        engine: Engine = "auto",
        **options: Any,
    ) -> None:
        if engine not in ("auto", "func", "double_backward"):
            raise ArgumentError("engine", engine, "'auto', 'func' or 'double_backward'")
        super()._set_up(model, batch_loss, data, **options)
        self._asked_for_func = engine == "func"
        # Without a proof, by the parameters themselves: that cannot miss one.
        # And so is a sharded model: torch.func cannot transform what gathers its parameters.
        transforms = options.get("verify", True) and self.parameters.layout is None
        preferred = "func" if transforms else "double_backward"
        self.stats.engine = preferred if engine == "auto" else engine

    def check(self) -> Report:
        """Proves the operator at the present parameters, and tells what came out.

        Returns:
            What was compared and how far it was off, with a verdict, for the engine at present;
            for double backward where ``torch.func`` cannot transform the model. Nothing is raised
            for a proof that fails.
        """
        engine = self.stats.engine
        try:
            return super().check()
        except Exception:
            if engine != "func":
                raise
            self.stats.engine = "double_backward"
            return super().check()
        finally:
            self.stats.engine = engine

    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        differentiate = func if self.stats.engine == "func" else double_backward
        return differentiate(batch_loss, point)

    def _prove(self, point: Point, *, products: bool) -> Point:
        """Proves products by ``torch.func``, or else those by double backward."""
        if self.stats.engine != "func":
            return super()._prove(point, products=products)
        try:
            return super()._prove(point, products=products)
        except Exception as caught:  # noqa: BLE001 (one of the model's own the other engine raises too)
            error = caught
            self.stats.engine = "double_backward"
            try:
                proved = self._point_of(point.surroundings, point.key)
                super()._prove(proved, products=products)
            except BaseException:
                self.stats.engine = "func"
                raise
        if self._asked_for_func or isinstance(error, InconsistentDerivativeError):
            message = (
                f"Products by torch.func cannot be had of this model ({type(error).__name__}: "
                f"{error}). The engine 'double_backward' takes their place: it has been proved, "
                "and costs the same."
            )
            warnings.warn(message, EngineWarning, stacklevel=2)
        return proved
