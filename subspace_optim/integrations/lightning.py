"""``MonitorCallback`` of a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import CurrentBatch
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, measured
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.integrations._losses import loss_of, size_of
from subspace_optim.integrations._watch import Source, Watch


class MonitorCallback(Callback):
    """Attaches a ``Monitor`` to the training of a Lightning ``Trainer``.

    .. code-block:: python

        callback = MonitorCallback(every=50)
        trainer = Trainer(callbacks=[callback])
        trainer.fit(module, loader)
        callback.monitor.plot()

    Without further arguments it records ``measures.stability()`` on the minibatches that are
    trained on, by the loss that ``training_step`` returns, with its ``self.log`` silenced: that
    of all micro-batches of a step together. Rows go to the trainer's loggers, as
    ``subspace/<column>`` at the step of its other metrics. Monitor and subspace are saved with
    the trainer's checkpoints, and go on from there. With several processes all of them measure
    together. The training is the same to the bit.

    Args:
        source: a subspace or an operator to measure in, such as the subspace of a ``BulkSGD``; or
            a function of the module that makes it when training begins (default: made of what
            follows).
        loss: ``loss(module, batch) -> (mean, weight)`` (default: that of ``training_step``).
        data: a loader of the batches to measure on (default: the minibatches as they come).
        params: of the curvature: a pattern, a predicate, or tensors (default: all trained ones).
        k: measures in a ``DominantSubspace`` of so many eigenvectors (default: in none).
        measures, every, log, append: as of ``Monitor``.

    Attributes:
        monitor: the monitor; ``None`` until training begins.

    Raises:
        ArgumentError: a source is given, and what it is made of; or an argument cannot be. When
            training begins: the module steps its optimizers itself, and neither ``loss`` nor
            ``source`` is given.
    """

    def __init__(
        self,
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
    ) -> None:
        self._rows: list[Row] = []  # that the trainer's loggers have not got yet
        self._latest: Any = None  # the batch at hand, until a backward pass shows that it is used
        self._used: list[Any] = []  # the batches of the present step, ...
        self._held: list[Any] = []  # ... what the watch takes for these, ...
        self._at = -1  # ... and the number of the step
        self._stage = "fit"
        self._watch = Watch(
            source,
            loss=loss,
            data=data,
            params=params,
            k=k,
            measures=measures,
            every=every,
            log=log,
            append=append,
            track=self._rows.append,
        )

    @property
    def monitor(self) -> Monitor | None:
        """The monitor; ``None`` until training begins."""
        return self._watch.monitor

    def _loss(self, module: LightningModule) -> BatchLossFunction:
        """Returns the loss that was given, or that of the module's ``training_step``.

        Raises:
            ArgumentError: that is no function of parameters and batch.
        """
        if self._watch.loss is not None:
            return self._watch.loss
        if not module.automatic_optimization:
            found = "a module that steps its optimizers itself"
            remedy = "Pass loss=, a function of the module and a batch."
            raise ArgumentError("training_step", found, "one that returns a loss", remedy)
        return StepLoss()

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint: several callbacks may measure different things."""
        key: str = self._generate_state_key(**self._watch.key)
        return key

    # --- events ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns what a checkpoint is loaded for, if one is."""
        self._stage = stage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the monitor to the optimizers that step."""
        data = self._watch.data
        self._drop()
        self._watch.begin(
            pl_module,
            _one_or_all(trainer.optimizers),
            loss=lambda: self._loss(pl_module),
            data=lambda: CurrentBatch() if data is None else data,
        )

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes the batch: its step may begin before its loss is computed, within a closure."""
        given = Given(batch, batch_idx) if self._watch.loss is None else batch
        if not pl_module.automatic_optimization:
            self._watch.add(given)
            return
        if trainer.global_step != self._at:
            self._used, self._at = [], trainer.global_step
        goes_on = list(map(id, self._held)) == list(map(id, self._used))
        self._held, self._latest = [*self._used, given], given
        for index, each in enumerate([given] if goes_on else self._held):
            self._watch.add(each, first=index == 0 and not goes_on)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Learns that the step begins with the batch at hand, whatever was there before."""
        if self._latest is not None:
            self._used = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Learns that the batch at hand is used: others are skipped, and belong to no step."""
        if self._latest is not None:
            self._used.append(self._latest)
            self._latest = None

    def _drop(self) -> None:
        self._latest, self._used, self._held, self._at = None, [], [], -1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hands rows to the trainer's loggers, at the step of its other metrics."""
        self._hand_over(trainer)
        self._watch.look(_one_or_all(trainer.optimizers))

    def _hand_over(self, trainer: Trainer) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001 (as its own callbacks)
        for row in self._rows:
            for logger in trainer.loggers:
                logger.log_metrics(measured(row), step=step)
        self._rows.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches the monitor."""
        self._drop()
        self._watch.end()

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        exception: BaseException,
    ) -> None:
        """Detaches the monitor, and hands over what it has recorded."""
        self._watch.end()
        self._hand_over(trainer)

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of monitor and subspace."""
        return self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them for a training that goes on; a test of a checkpoint leaves the monitor."""
        if self._stage == "fit":
            self._watch.load_state_dict(state_dict)


class Given(NamedTuple):
    """A batch as ``training_step`` was given it."""

    batch: Any
    batch_idx: int


class StepLoss:
    """``batch_loss(module, batch)`` of the loss that ``training_step`` returns.

    A batch is one that was ``Given`` in training; the micro-batches of a step count alike. Or it
    is one of a data set, which counts by its examples, as the first of an epoch.
    """

    def __call__(self, module: Any, batch: Any) -> tuple[Tensor, Any]:
        """Returns the loss and its weight."""
        given = batch if isinstance(batch, Given) else Given(batch, 0)
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with _silent(module):
            output = module.training_step(*(given if takes_index else given[:1]))
        return loss_of(output), 1 if given is batch else size_of(batch)


@contextmanager
def _silent(module: Any) -> Iterator[None]:
    """Lets ``self.log`` do nothing: what is evaluated again has been logged."""
    names = ("log", "log_dict")
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    try:
        for name in names:
            vars(module)[name] = _nothing
        yield
    finally:
        for name in names:
            vars(module).pop(name)
        vars(module).update(own)


def _one_or_all(optimizers: list[Optimizer]) -> Optimizer | list[Optimizer]:
    return optimizers[0] if len(optimizers) == 1 else optimizers


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
