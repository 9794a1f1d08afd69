"""``HessianOperator``: products with the Hessian of the mean loss, by ``torch.func``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.curvature.batches import Batches, Supervised
from subspace_optim.curvature.isolation import Mode, full_precision, in_mode, seeded
from subspace_optim.curvature.operator import CurvatureOperator, OperatorStats
from subspace_optim.curvature.parameters import ParameterSpace, digest

BatchLoss = Callable[[Any, Any], tuple[Tensor, Any]]
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_ASSUMED_MEMORY = 1 << 32


class HessianOperator(CurvatureOperator):
    r"""The Hessian of the mean loss over ``data``, at the model's current parameters.

    .. math::
        H v = \nabla_\theta \langle \nabla_\theta L(\theta), v \rangle, \qquad
        L(\theta) = \frac{1}{N} \sum_b n_b \, \ell(f_\theta(x_b), y_b), \quad N = \sum_b n_b

    It differentiates the function that training minimises: the model in its current mode, with
    dropout masks fixed by ``seed``, batch statistics of each batch of ``data``, and no autocast.
    bf16 and fp16 parameters are differentiated through float32 copies.

    The graph of each batch's gradient is kept and reused for every product at the same
    parameters, as long as all of them fit ``memory_budget``; the batches beyond it stream, their
    graphs built once for each block of products.

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

    Products and gradients raise ``ArgumentError`` for a loss that is no scalar and for batches
    that are no pairs, ``NonFiniteError`` for a loss that is not finite, and ``DataChangedError``
    for a pass whose data differ from the first.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | _BatchLoss,
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        mode: Mode | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
    ) -> None:
        if not callable(loss_fn) and not isinstance(loss_fn, _BatchLoss):
            raise ArgumentError("loss_fn", loss_fn, "callable as loss_fn(output, target)")
        if not isinstance(model, nn.Module):
            raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
        if mode not in (None, "train", "eval"):
            raise ArgumentError("mode", mode, "'train', 'eval' or None")
        if memory_budget is not None and not (
            isinstance(memory_budget, int | float) and memory_budget >= 0
        ):
            raise ArgumentError("memory_budget", memory_budget, "a number of bytes, or None")
        self.model = _unwrapped(model)
        self.parameters = ParameterSpace(self.model, params)
        self.stats = OperatorStats()
        batch_loss = loss_fn.function if isinstance(loss_fn, _BatchLoss) else Supervised(loss_fn)
        self._objective = _Objective(self.model, batch_loss)
        self._batches = Batches(data, pairs=not isinstance(loss_fn, _BatchLoss))
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
            **options: ``params``, ``mode``, ``memory_budget`` and ``seed``, as above.

        Returns:
            The operator.

        Raises:
            ArgumentError: an argument that cannot be used.
        """
        if not callable(batch_loss):
            raise ArgumentError("batch_loss", batch_loss, "callable as batch_loss(model, batch)")
        return cls(model, _BatchLoss(batch_loss), data, **options)

    def matvec(self, v: Tensor) -> Tensor:
        """Returns ``H v`` for ``v: (P,)``, a new ``(P,)``."""
        return self.matmat(v[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns ``H v_i`` for the rows ``v_i`` of ``vectors: (j, P)``, a new ``(j, P)``.

        Raises:
            ArgumentError: the shape is another.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            shape = tuple(vectors.shape)
            raise ArgumentError("the shape of vectors", shape, f"(j, {self.size}), one a row")
        with self._fixed() as point:
            if point.graphs is None:
                self._accumulate(point, linearise=True)
            vectors = vectors.to(self.device, self.dtype).contiguous()
            products = torch.zeros_like(vectors)
            for graph in self._graphs(point):
                for v, product in zip(vectors, products, strict=True):
                    graph.add_product(
                        self.parameters.unflatten(v), self.parameters.unflatten(product)
                    )
            self.stats.products += len(vectors)
            return products.div_(point.weight)

    def gradient(self) -> Tensor:
        """Returns ``∇L(θ)``, ``(P,)``. It is computed once for each parameter state."""
        with self._fixed() as point:
            if point.gradient is None:
                self._accumulate(point, linearise=False)
            gradient: Tensor = point.gradient
            return gradient.clone()

    def loss(self) -> float:
        """Returns ``L(θ)``, from the gradient's pass where there was one."""
        with self._fixed() as point:
            if point.loss is None:
                with torch.no_grad():
                    self._accumulate(point, linearise=False, differentiate=False)
            loss: float = point.loss
            return loss

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: they are looked at on entry only."""
        with self._fixed():
            yield

    @contextmanager
    def _fixed(self) -> Iterator[_Point]:
        """Enters the present parameter state; inside of another entry, the same one."""
        if self._frozen and self._point is not None:
            yield self._point
            return
        with full_precision(self.device), in_mode(self.model, self._mode):
            self._frozen = True
            try:
                yield self._move_to_current()
            finally:
                self._frozen = False

    def release(self) -> None:
        """Frees the kept graphs. Loss and gradient of these parameters stay known."""
        if self._point is not None:
            self._point.graphs = None

    def _move_to_current(self) -> _Point:
        """Returns what is known of the present parameter state; what was of another is dropped."""
        state = [*self.model.parameters(), *self.model.buffers()]
        key = (
            int(digest(state)),
            self.device,
            tuple(module.training for module in self.model.modules()),
        )
        if self._point is None or self._point.key != key:
            self._point = None  # first: its graphs are gone before others are built
            self._point = _Point(key, *self._copies())
        return self._point

    def _copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of parameters and buffers, low precision as float32: training may go on."""

        def copy(tensor: Tensor) -> Tensor:
            low = tensor.dtype in _LOW_PRECISION
            return tensor.detach().to(torch.float32 if low else tensor.dtype, copy=True)

        parameters = {n: copy(p) for n, p in self._objective.named_parameters()}
        return parameters, {n: copy(b) for n, b in self._objective.named_buffers()}

    def _accumulate(self, point: _Point, *, linearise: bool, differentiate: bool = True) -> None:
        """One pass over the data: loss, gradient, and the graphs that fit the budget.

        Raises:
            NonFiniteError: the loss or a weight is not finite.
        """
        budget = self._budget() if linearise else 0.0
        kept: dict[int, _Graph] = {}
        used = count = 0
        weights: list[Tensor] = []
        losses: list[Tensor] = []
        gradient = torch.zeros(self.size if differentiate else 0, dtype=self.dtype).to(self.device)
        for index, evaluate in self._evaluations(point):
            count += 1
            with _AllocationMeter() as meter:
                graph = evaluate(linearise, differentiate)
            weights.append(graph.weight)
            losses.append(_weighted(graph.loss.double(), graph.weight))
            if differentiate:
                graph.move_gradient(self.parameters.unflatten(gradient))
            if linearise and used + (held := meter.alive()) <= budget:
                used += held
                kept[index] = graph
        weight = float(torch.stack(weights).sum())
        loss = float(torch.stack(losses).sum()) / weight if weight > 0 else math.nan
        if not math.isfinite(loss):
            message = (
                f"The mean loss over the data is {loss} (weight {weight:g}), so it has no "
                "curvature. Lower the learning rate, or look for NaN in parameters and data."
            )
            raise NonFiniteError(message)
        point.loss, point.weight = loss, weight
        if differentiate:
            self.stats.gradients += 1
            point.gradient = gradient.div_(weight)
        if linearise:
            point.graphs, point.streamed = kept, count - len(kept)
            self.stats.graphs_kept, self.stats.graphs_streamed = len(kept), point.streamed
            self.stats.graph_bytes = used

    def _graphs(self, point: _Point) -> Iterator[_Graph]:
        """Yields the graph of every batch: the kept ones, then the others, built one by one."""
        kept = point.graphs or {}
        yield from kept.values()
        if point.streamed:
            for index, evaluate in self._evaluations(point):
                if index not in kept:
                    yield evaluate(True, True)

    def _evaluations(self, point: _Point) -> Iterator[tuple[int, Callable[[bool, bool], _Graph]]]:
        """Yields for each batch of one pass a function that evaluates it at ``point``."""
        low_precision = any(p.dtype in _LOW_PRECISION for p in self.model.parameters())
        names = [f"model.{name}" for name in self.parameters.names]
        primals = tuple(point.parameters[name] for name in names)
        dtypes = tuple(p.dtype for p in primals)
        self.stats.passes += 1

        for index, batch in self._batches.read(self.device, upcast=low_precision):

            def loss(parameters: tuple[Tensor, ...], batch: Any = batch) -> Any:
                state = point.parameters | dict(zip(names, parameters, strict=True))
                # Cloned inside: batch norm and spectral norm write into their buffers.
                state |= {name: buffer.clone() for name, buffer in point.buffers.items()}
                value, weight = functional_call(self._objective, state, (batch,))
                return value, (value.detach(), weight.detach())

            def evaluate(
                linearise: bool, differentiate: bool, loss: Any = loss, index: int = index
            ) -> _Graph:
                with seeded(self.device, self._seed + index):
                    if not differentiate:
                        _, (value, weight) = loss(primals)
                        return _Graph(value, weight)
                    gradient = grad(loss, has_aux=True)
                    if not linearise:
                        slopes, (value, weight) = gradient(primals)
                        return _Graph(value, weight, slopes)
                    # H is symmetric: the transposed product of the gradient is the product.
                    outcome: Any = vjp(gradient, primals, has_aux=True)
                    slopes, product, (value, weight) = outcome
                    return _Graph(value, weight, slopes, product, dtypes)

            yield index, evaluate

    def _budget(self) -> float:
        if self._memory_budget is not None:
            return self._memory_budget
        return _free_memory(self.device) / 4

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied, and a copy has parameters of its own.
        return self.__dict__ | {"_point": None, "_frozen": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        operator = type(self).__new__(type(self))
        memo[id(self)] = operator
        memo[id(self._batches)] = self._batches  # data are read only: the copies share them
        operator.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return operator


@dataclass
class _BatchLoss:
    """Marks a function of (model, batch), where else a loss of (output, target) stands."""

    function: BatchLoss


class _Objective(nn.Module):
    """Loss and weight of a batch as a module, for ``functional_call`` to put parameters into."""

    def __init__(self, model: nn.Module, batch_loss: BatchLoss) -> None:
        super().__init__()
        self.model = model
        self.batch_loss = batch_loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the mean loss and its weight, both scalars.

        Raises:
            ArgumentError: the loss is not a real scalar, or there is no weight with it.
        """
        result = self.batch_loss(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(
                "what batch_loss returns", type(result).__name__, "(mean loss, weight)"
            )
        loss, weight = result
        if not isinstance(loss, Tensor):
            raise ArgumentError("the loss", type(loss).__name__, "a scalar tensor")
        if loss.dim() != 0:
            remedy = "Take the mean over examples, e.g. with reduction='mean'."
            raise ArgumentError("the shape of the loss", tuple(loss.shape), "()", remedy)
        if not loss.is_floating_point():
            raise ArgumentError("the dtype of the loss", loss.dtype, "real floating point")
        return loss, torch.as_tensor(weight, dtype=torch.float64, device=loss.device)


def _weighted(value: Tensor, weight: Tensor) -> Tensor:
    """Returns ``weight · value``; zeros for a batch of weight 0, whose mean is NaN."""
    return torch.where(weight > 0, value * weight, 0.0)


@dataclass
class _Graph:
    """One batch at fixed parameters: its loss and weight, its gradient, its Hessian's product."""

    loss: Tensor
    weight: Tensor
    slopes: tuple[Tensor, ...] = ()
    product: Any = None
    dtypes: tuple[torch.dtype, ...] = ()

    def move_gradient(self, into: list[Tensor]) -> None:
        """Adds the batch's weighted gradient, and holds it no longer."""
        for total, slope in zip(into, self.slopes, strict=True):
            total.add_(_weighted(slope, self.weight))
        self.slopes = ()

    def add_product(self, v: list[Tensor], into: list[Tensor]) -> None:
        """Adds the batch's weighted product with ``v``."""
        with torch.no_grad():  # some versions of torch return rows that carry a graph
            (rows,) = self.product(tuple(map(Tensor.to, v, self.dtypes)))
            for total, row in zip(into, rows, strict=True):
                total.add_(_weighted(row, self.weight))


@dataclass
class _Point:
    """A parameter state, and what is known of the loss there."""

    key: object
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    weight: float = 0.0
    loss: Any = None  # a float, a tensor and a dict of graphs once a pass has found them
    gradient: Any = None
    graphs: Any = None
    streamed: int = 0


class _AllocationMeter(TorchDispatchMode):
    """Counts the bytes that were allocated inside and are still held, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers that add nothing to the function.

    Those of ``torch.compile`` would take the second derivative away.
    """
    for attribute in ("module", "_orig_mod"):
        wrapper = nn.parallel.DistributedDataParallel if attribute == "module" else nn.Module
        inner = getattr(model, attribute, None)
        if isinstance(model, wrapper) and isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model


def _free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; an assumed 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_ASSUMED_MEMORY]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = [1024 * int(lines["MemAvailable"].split()[0])]
    with suppress(OSError, ValueError):  # a container's limit, where there is one
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(free))
