"""``HessianOperator``: products with the Hessian of the mean loss, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from subspace_optim._validation import ArgumentError, EngineWarning
from subspace_optim.curvature.differentiation import (
    ENGINES,
    Linearisation,
    LossAt,
    double_backward,
)
from subspace_optim.curvature.isolation import Mode
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.objective import OfBatch

Engine = Literal["double_backward", "func"]


class HessianOperator(MeanLossOperator):
    r"""The Hessian of the mean loss over ``data``, at the model's current parameters.

    .. math::
        H v = \nabla_\theta \langle \nabla_\theta L(\theta), v \rangle, \qquad
        L(\theta) = \frac{1}{N} \sum_b n_b \, \ell(f_\theta(x_b), y_b), \quad N = \sum_b n_b

    It differentiates the function that training minimises: the model in its current mode, with
    dropout masks fixed by ``seed``, batch statistics of each batch of ``data``, and no autocast.
    bf16 and fp16 parameters are differentiated through float32 copies.

    The graph of each batch's gradient is kept and reused for every product at the same
    parameters, as long as all of them fit ``memory_budget``; the batches beyond it stream, their
    graphs built once for each block of products. A batch is never divided, since batch norm would
    make another function of its parts: the graph of the largest one has to fit in memory.

    With ``process_group`` each rank passes its own part of the data, and loss, gradient and
    products are those of all parts together, bit by bit the same on every rank. All ranks call
    the same methods in the same order; a block of products is one all-reduce, and so is each look
    at the parameters, which have to be equal. An error of one rank is raised on all. Buffers are
    those of each rank.

    Args:
        model: called as ``model(x)``. ``DistributedDataParallel`` and ``torch.compile`` wrappers
            are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass. Batches are moved to the parameters' device.
        params: the parameters to differentiate by (default: all that require a gradient).
        mode: ``"train"`` or ``"eval"`` (default: the mode that the model is in).
        memory_budget: bytes for kept graphs (default: a quarter of the memory that is free).
        seed: of the dropout masks.
        engine: ``"double_backward"``, two passes of ``torch.autograd``, or ``"func"``, where
            ``torch.func.grad`` transforms the loss and its gradient is differentiated. Both give
            the same products at the same cost. ``"func"`` builds graphs more slowly (a tenth to
            a half of a gradient on usual networks, several gradients on tiny ones), and for
            models that it cannot transform, such as those with checkpointed parts or functions
            without ``setup_context``, the other engine is used, with an ``EngineWarning``.
        process_group: sums over its ranks, each with its own part of the data (default: none).

    Products and gradients raise ``ArgumentError`` for a loss that is no scalar and for batches
    that are no pairs, ``NonFiniteError`` for a loss that is not finite, ``DataChangedError`` for
    a pass whose data differ from the first, and products ``SecondDerivativeError`` for a part of
    the model that has none: ``FiniteDifferenceHessian`` is for those.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | OfBatch,
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        mode: Mode | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
        engine: Engine = "double_backward",
        process_group: Any = None,
    ) -> None:
        if engine not in ENGINES:
            raise ArgumentError("engine", engine, "'double_backward' or 'func'")
        super().__init__(
            model,
            loss_fn,
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            process_group=process_group,
        )
        self.stats.engine = engine

    def _linearise(self, loss_at: LossAt, leaves: Sequence[Tensor]) -> Linearisation:
        if self.stats.engine == "double_backward":
            return double_backward(loss_at, leaves)
        try:
            return ENGINES[self.stats.engine](loss_at, leaves)
        except Exception as error:  # noqa: BLE001 (the model's own errors the other engine raises too)
            linearisation = double_backward(loss_at, leaves)
            message = (
                f"torch.func cannot transform this model ({type(error).__name__}: {error}). The "
                "engine 'double_backward' takes its place: products are the same and cost the "
                "same. What is lost is only what 'func' was chosen for, a second way to the "
                "same numbers."
            )
            warnings.warn(message, EngineWarning, stacklevel=2)
            self.stats.engine = "double_backward"
            return linearisation
