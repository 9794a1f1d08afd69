"""What operators of a mean loss over data share: passes, parameter states, and kept batches."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.curvature.batches import Batches, Supervised
from subspace_optim.curvature.differentiation import Linearisation, LossAt, Slopes, first_order
from subspace_optim.curvature.isolation import Mode, full_precision, in_mode, seeded
from subspace_optim.curvature.memory import AllocationMeter, free_memory
from subspace_optim.curvature.objective import BatchLoss, Objective, OfBatch, unwrapped
from subspace_optim.curvature.operator import CurvatureOperator, OperatorStats
from subspace_optim.curvature.parameters import ParameterSpace, digest
from subspace_optim.curvature.ranks import Ranks

_LOW_PRECISION = (torch.float16, torch.bfloat16)
Result = TypeVar("Result")
Differentiate = Callable[[LossAt, Sequence[Tensor]], Linearisation]


class MeanLossOperator(CurvatureOperator):
    r"""A curvature matrix of the mean loss over ``data``, summed up from those of its batches.

    .. math::
        A v = \frac{1}{N} \sum_b n_b A_b v, \qquad
        L(\theta) = \frac{1}{N} \sum_b n_b \, \ell(f_\theta(x_b), y_b), \quad N = \sum_b n_b

    Subclasses say what one batch's matrix is (``_linearise``). What they need for its products
    is kept for all batches that fit ``memory_budget``, and made anew for each block of products
    for the others.

    Args:
        model: called as ``model(x)``. ``DistributedDataParallel`` and ``torch.compile`` wrappers
            are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass. Batches are moved to the parameters' device.
        params: the parameters to differentiate by (default: all that require a gradient).
        mode: ``"train"`` or ``"eval"`` (default: the mode that the model is in).
        memory_budget: bytes for what is kept (default: a quarter of the memory that is free).
        seed: of the dropout masks.
        process_group: sums over its ranks, each with its own part of the data (default: none).

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    _fused_kernels: ClassVar[bool] = False  # whether fused attention may stay fused

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
        process_group: Any = None,
    ) -> None:
        self._ranks = Ranks(process_group)
        with self._ranks.all_or_none():
            if not callable(loss_fn) and not isinstance(loss_fn, OfBatch):
                raise ArgumentError("loss_fn", loss_fn, "callable as loss_fn(output, target)")
            if not isinstance(model, nn.Module):
                raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
            if mode not in (None, "train", "eval"):
                raise ArgumentError("mode", mode, "'train', 'eval' or None")
            if memory_budget is not None and not (
                isinstance(memory_budget, int | float) and memory_budget >= 0
            ):
                raise ArgumentError("memory_budget", memory_budget, "a number of bytes, or None")
            self.model = unwrapped(model)
            self.parameters = ParameterSpace(self.model, params)
            batch_loss = loss_fn.function if isinstance(loss_fn, OfBatch) else Supervised(loss_fn)
            self._objective = Objective(self.model, batch_loss)
            self._batches = Batches(data, pairs=not isinstance(loss_fn, OfBatch))
        self.stats = OperatorStats()
        self._mode = mode
        self._memory_budget = memory_budget
        self._seed = seed
        self._point: _Point | None = None
        self._frozen = False

    @classmethod
    def from_loss(cls, model: nn.Module, batch_loss: BatchLoss, data: Any, **options: Any) -> Self:
        """Makes the operator of a model that is not ``f(x) -> output``.

        Args:
            model: any module.
            batch_loss: ``batch_loss(model, batch) -> (mean loss, weight)``; the weight is what
                the mean is over: examples, or the tokens that count.
            data: a re-iterable of batches of any form; a mapping is one batch.
            **options: the keyword arguments of the class.

        Returns:
            The operator.

        Raises:
            ArgumentError: an argument that cannot be used.
        """
        if not callable(batch_loss):
            raise ArgumentError("batch_loss", batch_loss, "callable as batch_loss(model, batch)")
        return cls(model, OfBatch(batch_loss), data, **options)

    @abstractmethod
    def _linearise(self, loss_at: LossAt, leaves: Sequence[Tensor]) -> Linearisation:
        """Returns loss, gradient and product of one batch at the parameters ``leaves``."""

    def matvec(self, v: Tensor) -> Tensor:
        """Returns the product with ``v: (P,)``, a new ``(P,)``."""
        return self.matmat(v[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``.

        Raises:
            ArgumentError: the shape is another.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            shape = tuple(vectors.shape)
            raise ArgumentError("the shape of vectors", shape, f"(j, {self.size}), one a row")
        with self._fixed() as point:
            if point.kept is None:
                self._accumulate(point, self._linearise, keep=True)
            vectors = vectors.to(self.device, self.dtype).contiguous()

            def add_to(products: Tensor) -> None:
                for batch in self._linearisations(point):
                    for v, product in zip(vectors, products, strict=True):
                        slopes = batch.product(self.parameters.unflatten(v))
                        self._add(slopes, batch.weight, product)
                    del batch  # before the graph of the next one is built

            products = self._total(point, vectors.shape, self.dtype, add_to)
            self.stats.products += len(vectors)
            return products.div_(point.weight)

    def gradient(self) -> Tensor:
        """Returns ``∇L(θ)``, ``(P,)``. It is computed once for each parameter state."""
        with self._fixed() as point:
            if point.gradient is None:
                self._accumulate(point, first_order)
            gradient: Tensor = point.gradient
            return gradient.clone()

    def loss(self) -> float:
        """Returns ``L(θ)``, from the gradient's pass where there was one."""
        with self._fixed() as point:
            if point.loss is None:
                self._accumulate(point, None)
            loss: float = point.loss
            return loss

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: they are looked at on entry only."""
        with self._fixed():
            yield

    def release(self) -> None:
        """Frees what is kept. Loss and gradient of these parameters stay known."""
        if self._point is not None:
            self._point.kept = None

    @contextmanager
    def _fixed(self) -> Iterator[_Point]:
        """Enters the present parameter state; inside of another entry, the same one."""
        if self._frozen and self._point is not None:
            yield self._point
            return
        precision = full_precision(self.device, fused=self._fused_kernels)
        with precision, in_mode(self.model, self._mode):
            self._frozen = True
            try:
                yield self._move_to_current()
            finally:
                self._frozen = False

    def _move_to_current(self) -> _Point:
        """Returns what is known of the present parameter state; what was of another is dropped."""
        state = [*self.model.parameters(), *self.model.buffers()]
        key = (
            int(digest(state)),
            self.device,
            tuple(module.training for module in self.model.modules()),
        )
        if self._point is not None and self._point.key != key:
            self._forget()  # first: its graphs are gone before others are built
        self._agree()
        if self._point is None:
            low = any(p.dtype in _LOW_PRECISION for p in self.model.parameters())
            self._point = _Point(key, *self._copies(), upcast=low)
        return self._point

    def _agree(self) -> None:
        """Sees to it that all ranks go on from the same parameters and the same knowledge.

        Raises:
            ArgumentError: the parameters of the ranks differ.
        """
        if self._ranks.group is None:
            return
        theta = int(digest(self.model.parameters()))
        known = 0 if self._point is None else self._point.known()
        same_theta, same_knowledge = self._ranks.agree([theta, known], self.device)
        if not same_theta:
            remedy = "Broadcast them from one rank, as DistributedDataParallel does."
            found, allowed = "ranks whose parameters differ", "ranks of equal parameters"
            raise ArgumentError("process_group", found, allowed, remedy)
        if not same_knowledge:  # else some would compute what the others only look up
            self._forget()

    def _forget(self) -> None:
        self.release()  # what is kept may know the point that it belongs to
        self._point = None

    def _copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of parameters and buffers, low precision as float32: training may go on."""

        def copy(tensor: Tensor) -> Tensor:
            low = tensor.dtype in _LOW_PRECISION
            return tensor.detach().to(torch.float32 if low else tensor.dtype, copy=True)

        parameters = {n: copy(p) for n, p in self._objective.named_parameters()}
        for name in self.parameters.names:
            parameters[f"model.{name}"].requires_grad_()
        return parameters, {n: copy(b) for n, b in self._objective.named_buffers()}

    def _accumulate(
        self, point: _Point, differentiate: Differentiate | None, *, keep: bool = False
    ) -> None:
        """One pass over the data: loss, gradient, and what of it is kept for products.

        Args:
            point: where, and what is found out is added to.
            differentiate: how; ``None`` for the loss alone.
            keep: keeps what products need, as long as it fits the budget.

        Raises:
            ArgumentError: the data have no examples.
            NonFiniteError: the loss or a weight is not finite.
        """
        budget = self._budget() if keep else 0.0
        kept: dict[int, Linearisation] = {}
        used = count = 0
        size = self.size if differentiate else 0
        gradient = torch.zeros(size, dtype=self.dtype, device=self.device)

        def add_to(sums: Tensor) -> None:
            nonlocal used, count
            for index, nbytes, evaluate in self._evaluations(point):
                count += 1
                with AllocationMeter() as meter:
                    batch = evaluate(differentiate)
                sums += torch.stack([_weighted(batch.loss.double(), batch.weight), batch.weight])
                if differentiate:
                    self._add(batch.slopes, batch.weight, gradient)
                    batch.slopes = ()  # it has been added up, and is held no longer
                if keep and used + (held := meter.alive() + nbytes) <= budget:
                    used += held
                    kept[index] = batch
                del batch  # before the graph of the next one is built

        total, weight = self._total(point, (2,), torch.float64, add_to).tolist()
        if weight == 0:
            raise ArgumentError("data", "of no examples", "at least one example of weight above 0")
        loss = total / weight if weight > 0 else math.nan
        if not math.isfinite(loss):
            message = (
                f"The mean loss over the data is {loss} (weight {weight:g}), so it has no "
                "curvature. Lower the learning rate, or look for NaN in parameters and data."
            )
            raise NonFiniteError(message)
        point.loss, point.weight = loss, weight
        if differentiate:
            self.stats.gradients += 1
            point.gradient = self._ranks.sum_(gradient).div_(weight)
        if keep:
            point.kept, point.streamed = kept, count - len(kept)
            self.stats.graphs_kept, self.stats.graphs_streamed = len(kept), point.streamed
            self.stats.graph_bytes = used

    def _total(
        self, point: _Point, shape: Sequence[int], dtype: torch.dtype, add_to: Callable[..., None]
    ) -> Tensor:
        """Returns the sum over the ranks of what ``add_to`` adds to zeros, done at ``point``.

        The whole pass is done there, since checkpointed parts run the model again in a backward
        pass.
        """

        def add(total: Tensor) -> None:
            self._at(point, lambda: add_to(total))

        return self._ranks.total(shape, dtype, self.device, add)

    def _linearisations(self, point: _Point) -> Iterator[Linearisation]:
        """Yields every batch, ready for products: the kept ones, then the others one by one."""
        kept = point.kept or {}
        yield from kept.values()
        if point.streamed:
            for index, _, evaluate in self._evaluations(point):
                if index not in kept:
                    yield evaluate(self._linearise)

    def _evaluations(
        self, point: _Point
    ) -> Iterator[tuple[int, int, Callable[[Differentiate | None], Linearisation]]]:
        """Yields for each batch its index, its bytes, and what evaluates it at ``point``."""
        names = [f"model.{name}" for name in self.parameters.names]
        leaves = [point.parameters[name] for name in names]
        self.stats.passes += 1

        for index, batch, nbytes in self._batches.read(self.device, upcast=point.upcast):
            # Batches that the ranks take in turn have the masks that one process gives them.
            seed = self._seed + index * self._ranks.size + self._ranks.rank

            def loss_at(
                parameters: Sequence[Tensor], batch: Any = batch, seed: int = seed
            ) -> tuple[Tensor, Tensor]:
                state = dict(zip(names, parameters, strict=True))
                with seeded(self.device, seed):
                    return self._at(point, lambda: self._objective.evaluate(batch), state)

            def evaluate(
                differentiate: Differentiate | None, loss_at: LossAt = loss_at
            ) -> Linearisation:
                if differentiate is None:
                    with torch.no_grad():
                        return Linearisation(*loss_at(leaves))
                return differentiate(loss_at, leaves)

            yield index, nbytes, evaluate

    def _at(
        self,
        point: _Point,
        action: Callable[[], Result],
        parameters: dict[str, Tensor] | None = None,
    ) -> Result:
        """Returns ``action()``, done with the model at ``point``, or at these parameters."""
        # Cloned: batch norm and spectral norm write into their buffers.
        state = {name: buffer.clone() for name, buffer in point.buffers.items()}
        state |= point.parameters | (parameters or {})
        result: Result = functional_call(self._objective, state, (action,))
        return result

    def _add(self, slopes: Slopes, weight: Tensor, into: Tensor) -> None:
        """Adds one batch's weighted term to the vector ``into: (P,)``.

        Raises:
            ArgumentError: a gradient is sparse.
        """
        pieces = zip(self.parameters.unflatten(into), slopes, self.parameters.names, strict=True)
        for total, slope, name in pieces:
            if slope is not None:
                if slope.layout != torch.strided:
                    label = f"the gradient of '{name}'"
                    raise ArgumentError(label, slope.layout, "dense", "Use sparse=False.")
                total.add_(_weighted(slope, weight))

    def _budget(self) -> float:
        if self._memory_budget is not None:
            return self._memory_budget
        sharing = 1 if self.device.type == "cuda" else self._ranks.size  # of one machine's memory
        return free_memory(self.device) / (4 * sharing)

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied, and a copy has parameters of its own.
        return self.__dict__ | {"_point": None, "_frozen": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        operator = type(self).__new__(type(self))
        memo[id(self)] = operator
        memo[id(self._batches)] = self._batches  # data are read only: the copies share them
        operator.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return operator


def _weighted(value: Tensor, weight: Tensor) -> Tensor:
    """Returns ``weight · value``; zeros for a batch of weight 0, whose mean is NaN."""
    return torch.where(weight > 0, value * weight, 0.0)


@dataclass
class _Point:
    """A parameter state, and what is known of the loss there."""

    key: object
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    upcast: bool  # parameters of low precision are here as float32, and so are their inputs
    weight: float = 0.0
    loss: Any = None  # a float, a tensor and a dict of batches once a pass has found them
    gradient: Any = None
    kept: Any = None
    streamed: int = 0

    def known(self) -> int:
        """Returns a number that tells which of these have been found, 0 for none."""
        found = (self.loss is not None, self.gradient is not None, self.kept is not None)
        return sum(1 << bit for bit, is_known in enumerate(found) if is_known)
