"""``HessianOperator``: products with the Hessian of the mean loss, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from subspace_optim._validation import (
    ArgumentError,
    EngineWarning,
    InconsistentDerivativeError,
)
from subspace_optim.curvature.evaluation import (
    ENGINES,
    Evaluate,
    Linearisation,
    Point,
    double_backward,
)
from subspace_optim.curvature.isolation import Mode
from subspace_optim.curvature.mean_loss import MeanLossOperator
from subspace_optim.curvature.objective import OfBatch
from subspace_optim.curvature.parameters import Params
from subspace_optim.curvature.proof import Report

Engine = Literal["auto", "func", "double_backward"]


class HessianOperator(MeanLossOperator):
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
    ``loss.backward()``, that products are its derivative and symmetric, and that two batches
    together are the mean of both. ``check()`` does so at any time, with a report.

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
        engine: ``"func"``, the ``vjp`` of ``torch.func.grad``, at leaves that stand in the places
            of the parameters for the time of an evaluation; ``"double_backward"``, two passes of
            ``torch.autograd`` at the parameters themselves, for losses that reach them past the
            modules (lists, closures, caches) and for what ``torch.func`` cannot transform
            (checkpointed parts, functions without ``setup_context``, gradients inside of the
            loss); or ``"auto"``, the first of these that proves right. ``stats.engine`` tells
            which it is. Both give the same products at the same cost.
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
        loss_fn: Callable[[Any, Any], Tensor] | OfBatch,
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
        if engine not in ("auto", *ENGINES):
            raise ArgumentError("engine", engine, "'auto', 'func' or 'double_backward'")
        super().__init__(
            model,
            loss_fn,
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            process_group=process_group,
            verify=verify,
        )
        self._asked_for_func = engine == "func"
        # What nobody proves differentiates by the parameters themselves: that cannot miss one.
        preferred = "func" if verify else "double_backward"
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

    def _linearise(self, evaluate: Evaluate, point: Point) -> Linearisation:
        if self.stats.engine == "func":
            return ENGINES["func"](evaluate, point)
        return double_backward(evaluate, point)

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
