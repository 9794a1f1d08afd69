"""``Watch``: what the callbacks of all trainers do alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import CurrentBatch, CurvatureOperator, HessianOperator
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.curvature.parameters import Params
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, targets_of
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.subspaces import DominantSubspace, Subspace

Source = Subspace | CurvatureOperator | Callable[[nn.Module], Subspace | CurvatureOperator]
"""Where a monitor measures, or what makes that of the model when training begins."""


class Watch:
    """Makes a monitor when training begins, and keeps its state beside a trainer's checkpoints.

    Args:
        source: where to measure (default: a ``HessianOperator``, made of what follows).
        loss, data, params: of the operator.
        k: of a ``DominantSubspace`` of it; ``None`` for the operator itself.
        measures, every, log: as of ``Monitor``.
        track: takes each row as it comes, for the trainer's own loggers.

    Attributes:
        monitor: the latest; ``None`` until training has begun.
        loss: as given.
        data: as given.

    Raises:
        ArgumentError: a source is given, and what another would be made of; or it is none.
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
        self.monitor: Monitor | None = None
        self.loss, self.data = loss, data
        self._source, self._params, self._k = source, params, k
        self._measures, self._every = measures, every
        self._logs = [track, *targets_of(log)]
        self._batch: CurrentBatch | None = None
        self._loaded: dict[str, Any] | None = None  # waits for a monitor

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
            append=self._loaded is not None,
        )
        self.monitor = monitor
        if self._loaded is not None:
            if self._loaded["subspace"] is not None:
                source.load_state_dict(self._loaded["subspace"])
            monitor.load_state_dict(self._loaded["monitor"])
            self._loaded = None
        return monitor

    def add(self, batch: Any) -> None:
        """Adds a micro-batch, where the minibatches of training are measured."""
        if self._batch is not None:
            self._batch.add(batch)

    def end(self) -> None:
        """Detaches the monitor, which keeps its history."""
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
        """Takes states for the monitor that begins next, in the place of the one that there is."""
        self.monitor, self._loaded = None, state or None


def _all_ranks() -> Any:
    """Returns the process group of all ranks; ``None`` where there is but one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
