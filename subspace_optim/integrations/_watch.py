"""``Watch``: what the callbacks of all trainers do alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import CurvatureOperator
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.subspaces import DominantSubspace, Subspace

Source = Subspace | CurvatureOperator | Callable[[nn.Module], Subspace | CurvatureOperator]
"""Where a monitor measures, or what makes that of the model when training begins."""


class Watch:
    """Makes a monitor when training begins, and keeps its state beside a trainer's checkpoints.

    A state may be loaded before there is a monitor: it waits for it.

    Args:
        source: where to measure (default: the curvature that ``operator`` makes).
        k: of a ``DominantSubspace`` of that; ``None`` for the operator itself.
        own: names and values of the other arguments of which the curvature is made.
        measures, every, log: as of ``Monitor``.

    Attributes:
        monitor: the latest; ``None`` until training has begun.

    Raises:
        ArgumentError: a source is given, and what another would be made of; or it is none.
    """

    def __init__(
        self,
        source: Source | None,
        k: int | None,
        own: dict[str, Any],
        *,
        measures: Measures | None,
        every: int | Callable[[int], bool],
        log: Any,
    ) -> None:
        if source is not None:
            if not (isinstance(source, CurvatureOperator | Subspace) or callable(source)):
                allowed = "a subspace, an operator, or a function of the model that makes it"
                remedy = "Measures are named: measures=..."
                raise ArgumentError("source", type(source).__name__, allowed, remedy)
            for name, value in {"k": k, **own}.items():
                if value is not None:
                    remedy = "It is that of the source: give it there."
                    raise ArgumentError(name, "given beside a source", "left out", remedy)
        self.monitor: Monitor | None = None
        self._source, self._k = source, k
        self._measures, self._every, self._log = measures, every, log
        self._loaded: dict[str, Any] | None = None  # waits for a monitor
        self._seen = 0  # rows that were handed out

    def begin(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        operator: Callable[[], CurvatureOperator],
    ) -> Monitor:
        """Attaches a monitor.

        Args:
            model: without its wrappers.
            optimizers: that train it, wrapped or not.
            operator: makes the curvature, where no source was given.
        """
        self.end()
        source: Any = self._source
        if source is None:
            made = operator()
            source = made if self._k is None else DominantSubspace(made, k=self._k)
        elif not isinstance(source, CurvatureOperator | Subspace):
            source = source(model)
        monitor = Monitor(
            optimizers,
            source,
            measures=self._measures,
            every=copy.copy(self._every),  # a schedule belongs to one monitor
            log=self._log,
            append=self._loaded is not None,
        )
        self.monitor, self._seen = monitor, 0
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
        return monitor

    def end(self) -> None:
        """Detaches the monitor, which keeps its history."""
        if self.monitor is not None:
            self.monitor.detach()

    def new_rows(self) -> list[Row]:
        """Returns the rows that have come since the last call."""
        rows: list[Row] = [] if self.monitor is None else [*self.monitor.rows()[self._seen :]]
        self._seen += len(rows)
        return rows

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
        """Takes states, now or when there is a monitor."""
        if self.monitor is None:
            self._loaded = state or None
            return
        subspace: Any = self.monitor.source
        if state["subspace"] is not None:
            subspace.load_state_dict(state["subspace"])
        self.monitor.load_state_dict(state["monitor"])
        self._seen, self._loaded = len(self.monitor.history["step"]), None


def ranks() -> Any:
    """Returns the process group of all ranks; ``None`` where there is but one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
