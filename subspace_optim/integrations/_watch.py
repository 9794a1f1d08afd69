"""``Watch``: what the callbacks of all trainers do alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError, UnseenStepsWarning, check_integer
from subspace_optim.curvature import CurrentBatch, CurvatureOperator, HessianOperator
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, check_targets, targets_of
from subspace_optim.diagnostics.rows import Measures, flat_measures
from subspace_optim.diagnostics.schedules import checked_schedule
from subspace_optim.step_hooks import innermost
from subspace_optim.subspaces import DominantSubspace, Subspace

Source = Subspace | CurvatureOperator | Callable[[nn.Module], Subspace | CurvatureOperator]
"""Where a monitor measures, or what makes that of the model when training begins."""


class Watch:
    """Makes a monitor when training begins, and keeps its state beside a trainer's checkpoints.

    Args:
        source: where to measure (default: a ``HessianOperator``, made of what follows).
        loss, data, params: of the operator.
        k: of a ``DominantSubspace`` of it; ``None`` for the operator itself.
        measures, every, log, append: as of ``Monitor``. Files that it has begun itself, and those
            of a run that is taken up again, are added to in any case.
        track: takes each row as it comes, for the trainer's own loggers.

    Attributes:
        monitor: the latest; ``None`` until training has begun.
        loss: as given.
        data: as given.

    Raises:
        ArgumentError: a source is given, and what another would be made of; or an argument is of
            the wrong type, or cannot be.
    """

    def __init__(
        self,
        source: Source | None,
        *,
        loss: BatchLossFunction | None,
        data: Any,
        params: Params,
        k: int | None,
        measures: Measures | None,
        every: int | Callable[[int], bool],
        log: Any,
        append: bool,
        track: Callable[[Row], object],
    ) -> None:
        if source is not None:
            if not (isinstance(source, CurvatureOperator | Subspace) or callable(source)):
                allowed = "a subspace, an operator, or a function of the model that makes it"
                remedy = "Measures are named: measures=..."
                raise ArgumentError("source", type(source).__name__, allowed, remedy)
            own = {"k": k, "loss": loss, "data": data, "params": params}
            for name, value in own.items():
                if value is not None:
                    remedy = "It is that of the source: give it there."
                    raise ArgumentError(name, "given beside a source", "left out", remedy)
        # What can be checked now is not left to the beginning of a training, an hour later.
        if loss is not None and not callable(loss):
            allowed = "a function of the model and a batch that returns the mean and its weight"
            raise ArgumentError("loss", loss, allowed)
        if k is not None:
            check_integer("k", k, minimum=1)
        if measures is not None:
            measures = flat_measures(measures)
        targets = targets_of(log)
        check_targets(targets)
        self.monitor: Monitor | None = None
        self.loss, self.data = loss, data
        self._source, self._params, self._k = source, _kept(params), k
        self._measures, self._every = measures, checked_schedule(every)
        self._logs, self._append = [track, *targets], append
        self._batch: CurrentBatch | None = None
        self._watched: list[int] = []  # the optimizers
        self._loaded: dict[str, Any] | None = None  # waits for a monitor

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from another one beside it, in short and in every process alike."""
        measures = [type(each).__name__ for each in self._measures or []]
        params = self._params if isinstance(self._params, str) else self._params is not None
        given = {"source": self._source is not None, "data": self.data is not None}
        return given | {"k": self._k, "params": params, "measures": measures}

    def begin(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        loss: Callable[[], BatchLossFunction],
        data: Callable[[], Any],
    ) -> Monitor:
        """Attaches a monitor.

        Args:
            model: without its wrappers.
            optimizers: that train it, wrapped or not.
            loss: makes the loss of the operator, where there is no source.
            data: makes its data; a ``CurrentBatch`` is removed at the end.
        """
        self.end()
        source: Any = self._source
        if source is None:
            batch_loss, batches = loss(), data()
            self._batch = batches if isinstance(batches, CurrentBatch) else None
            options = {"params": self._params, "process_group": _all_ranks()}
            source = HessianOperator.from_loss(model, batch_loss, batches, **options)
            if self._k is not None:
                source = DominantSubspace(source, k=self._k)
        elif not isinstance(source, CurvatureOperator | Subspace):
            source = source(model)
        monitor = Monitor(
            optimizers,
            source,
            measures=self._measures,
            every=copy.copy(self._every),  # a schedule belongs to one monitor
            log=self._logs,
            append=self._append or self._loaded is not None,
        )
        self.monitor, self._append = monitor, True
        self._watched = _identities(optimizers)
        if self._loaded is not None:
            if self._loaded["subspace"] is not None:
                source.load_state_dict(self._loaded["subspace"])
            monitor.load_state_dict(self._loaded["monitor"])
            self._loaded = None
        return monitor

    def add(self, batch: Any, *, first: bool = False) -> None:
        """Adds a micro-batch, where the minibatches of training are measured.

        Args:
            batch: in whichever form the loss takes it.
            first: of its step, where the trainer says so.
        """
        if self._batch is not None:
            take = self._batch.set if first else self._batch.add
            take(batch)

    def look(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """Warns, once, where the trainer steps other optimizers than at its beginning."""
        if self._watched and _identities(optimizers) != self._watched:
            self._watched = []
            message = (
                "The trainer has exchanged its optimizer since training began. The monitor is at "
                "the one that was there then, and there are no rows of the steps of the other."
            )
            warnings.warn(message, UnseenStepsWarning, stacklevel=2)

    def end(self) -> None:
        """Detaches the monitor, which keeps its history."""
        self._watched = []
        if self.monitor is not None:
            self.monitor.detach()
        if self._batch is not None:
            self._batch.remove()
            self._batch = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of monitor and subspace; what was loaded, as long as it waits."""
        if self.monitor is None:
            return self._loaded or {}
        subspace: Any = self.monitor.source
        has_state = hasattr(subspace, "state_dict")
        return {
            "monitor": self.monitor.state_dict(),
            "subspace": subspace.state_dict() if has_state else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes states for the monitor that begins next."""
        self._loaded = state or None


def _identities(optimizers: Optimizer | Sequence[Optimizer]) -> list[int]:
    """Returns which optimizers step, without their wrappers."""
    several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    return [id(innermost(each)) for each in several]


def _kept(params: Params) -> Params:
    """Returns the parameters that are meant, also of what can be iterated over but once.

    Raises:
        ArgumentError: they are of another type.
    """
    if params is None or isinstance(params, str | Tensor):
        return params
    allowed = "a pattern of names, a predicate of (name, tensor), or tensors"
    if isinstance(params, nn.Module):
        remedy = "Pass what its `parameters()` returns."
        raise ArgumentError("params", type(params).__name__, allowed, remedy)
    if callable(params):
        return params
    if not isinstance(params, Iterable):
        raise ArgumentError("params", params, allowed)
    kept = list(params)
    for index, each in enumerate(kept):
        if not isinstance(each, str | Tensor):
            remedy = "Leave `params` out for all that require a gradient."
            raise ArgumentError(f"params[{index}]", each, "a tensor or a pattern", remedy)
    return kept


def _all_ranks() -> Any:
    """Returns the process group of all ranks; ``None`` where there is but one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
