"""``attach``: a ``Monitor`` of a loop with ``accelerate.Accelerator``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import CurrentBatch
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, measured
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.integrations._losses import ModelLoss
from subspace_optim.integrations._watch import Source, Watch


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    source: Source | None = None,
    *,
    loss: BatchLossFunction | None = None,
    data: Any = None,
    params: Params = None,
    k: int | None = None,
    measures: Measures | None = None,
    every: int | Callable[[int], bool] = 50,
    log: Any = None,
    append: bool = False,
) -> Monitor:
    """Attaches a ``Monitor`` to what ``accelerator.prepare`` has returned.

    .. code-block:: python

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        monitor = attach(accelerator, model, optimizer, every=50)

    Without further arguments it records ``measures.stability()`` on the minibatches that are
    trained on, by the model's own loss: that of all micro-batches of a step together. Rows go to
    the accelerator's trackers, as ``subspace/<column>`` at the number of the optimizer's step.
    Monitor and subspace are saved and loaded by ``accelerator.save_state`` and ``load_state``.
    With several processes all of them measure together. The training is the same to the bit.

    Args:
        accelerator: that has prepared model and optimizer.
        model: as prepared.
        optimizer: as prepared.
        source: a subspace or an operator to measure in, such as the subspace of a ``BulkSGD``; or
            a function of the model that makes it (default: made of what follows).
        loss: ``loss(model, batch) -> (mean, weight)`` (default: the loss that the model returns).
        data: the batches to measure on (default: the minibatches as they come).
        params: of the curvature: a pattern, a predicate, or tensors (default: all trained ones).
        k: measures in a ``DominantSubspace`` of so many eigenvectors (default: in none).
        measures: as of ``Monitor``.
        every: as of ``Monitor``.
        log: as of ``Monitor``, beside the trackers.
        append: as of ``Monitor``.

    Returns:
        The monitor.

    Raises:
        ArgumentError: ``accelerator`` is none; or a source is given, and what it is made of.
    """
    if not isinstance(accelerator, Accelerator):
        found = type(accelerator).__name__
        raise ArgumentError("accelerator", found, "an accelerate.Accelerator")
    inner = accelerator.unwrap_model(model)

    def track(row: Row) -> None:
        if accelerator.trackers:
            accelerator.log(measured(row), step=row["step"])

    watch = Watch(
        source,
        loss=loss,
        data=data,
        params=params,
        k=k,
        measures=measures,
        every=every,
        log=log,
        append=append,
        track=track,
    )
    monitor = watch.begin(
        inner,
        optimizer,
        loss=lambda: ModelLoss() if loss is None else loss,
        data=lambda: CurrentBatch.from_forward(model) if data is None else data,
    )
    states = [each for each in (monitor, monitor.source) if hasattr(each, "state_dict")]
    accelerator.register_for_checkpointing(*states)
    return monitor
