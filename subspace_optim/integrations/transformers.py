"""``MonitorCallback`` and ``SAMCallback`` of a ``transformers.Trainer``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from subspace_optim._validation import ArgumentError, LogWarning
from subspace_optim.curvature import CurrentBatch
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.curvature.parameters import Params
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, measured
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.integrations._losses import ModelLoss
from subspace_optim.integrations._watch import Source, Watch
from subspace_optim.step_hooks import innermost

STATE = "subspace_optim.pt"
"""The file in a checkpoint's folder."""


class MonitorCallback(TrainerCallback):
    """Attaches a ``Monitor`` to the training of a ``Trainer``: made after it, and that is all.

    .. code-block:: python

        trainer = Trainer(model, arguments, train_dataset=data)
        callback = MonitorCallback(trainer, every=50)
        trainer.train()
        callback.monitor.plot()

    Without further arguments it records ``measures.stability()`` on the minibatches that are
    trained on, by the model's own loss: that of all micro-batches of a step together. Rows go to
    the trainer's loggers, as ``subspace/<column>`` at the trainer's step, and to its
    ``log_history``. Monitor and subspace are saved with the trainer's checkpoints, in
    ``subspace_optim.pt``, and go on from there. With several processes all of them measure
    together. The training is the same to the bit.

    Args:
        trainer: whose callbacks it joins.
        source: a subspace or an operator to measure in, such as the subspace of a ``BulkSGD``; or
            a function of the model that makes it when training begins (default: made of what
            follows).
        loss: ``loss(model, batch) -> (mean, weight)`` (default: the loss that the model returns).
        data: a data set of what the trainer trains on, collated as for an evaluation, or a
            ``DataLoader`` (default: the minibatches as they come).
        params: of the curvature: a pattern, a predicate, or tensors (default: all trained ones).
        k: measures in a ``DominantSubspace`` of so many eigenvectors (default: in none).
        measures, every, log: as of ``Monitor``.

    Attributes:
        monitor: the monitor; ``None`` until training begins.

    Raises:
        ArgumentError: ``trainer`` is none, or computes the loss in a way of its own, and neither
            ``loss`` nor ``source`` tells it; or a source is given, and what it is made of.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        source: Source | None = None,
        *,
        loss: BatchLossFunction | None = None,
        data: Any = None,
        params: Params = None,
        k: int | None = None,
        measures: Measures | None = None,
        every: int | Callable[[int], bool] = 50,
        log: Any = None,
    ) -> None:
        trainer = _checked(trainer, "MonitorCallback(trainer, every=50)")
        if source is None and loss is None:
            _check_own_loss(trainer)
        self._rows: list[Row] = []  # that the trainer's loggers have not got yet
        self._watch = Watch(
            source,
            loss=loss,
            data=data,
            params=params,
            k=k,
            measures=measures,
            every=every,
            log=log,
            track=self._rows.append,
        )
        self._trainer = trainer
        self._own: ModelLoss | None = None
        self._from: Any = None  # what training was asked to go on from
        train = trainer.train

        def remembering(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._from = resume_from_checkpoint
            return train(resume_from_checkpoint, *args, **kwargs)

        trainer.train = remembering  # callbacks are not told
        trainer.add_callback(self)

    @property
    def monitor(self) -> Monitor | None:
        """The monitor; ``None`` until training begins."""
        return self._watch.monitor

    def _loss(self) -> BatchLossFunction:
        """Returns the loss that was given, or makes the model's own."""
        if self._watch.loss is not None:
            return self._watch.loss
        self._own = ModelLoss(counts=self._trainer.model_accepts_loss_kwargs)
        return self._own

    def _data(self) -> Any:
        """Returns the minibatches of training, or batches of the data set that was given."""
        data, trainer = self._watch.data, self._trainer
        if data is None:
            return CurrentBatch.from_forward(trainer.model_wrapped)
        if isinstance(data, torch.utils.data.DataLoader):
            return data
        return trainer.get_eval_dataloader(data)

    # --- events ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attaches the monitor, and takes up its state where a training is resumed."""
        trainer = self._trainer
        if state.global_step:
            self._watch.load_state_dict(_load(self._folders()))
        self._watch.begin(trainer.model, trainer.optimizer, loss=self._loss, data=self._data)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Learns what the losses of this step's micro-batches are divided by."""
        if self._own is not None:
            count, processes = self._trainer.current_gradient_accumulation_steps, args.world_size
            self._own.scale = float(
                count * (processes if args.average_tokens_across_devices else 1)
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hands rows to the trainer's loggers."""
        for row in self._rows:
            should_log = control.should_log
            self._trainer.log(measured(row))
            control.should_log = should_log  # which a log takes as done
        self._rows.clear()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves monitor and subspace with a checkpoint."""
        if self._trainer.args.should_save:
            folder = self._folder(state.global_step)
            if folder.is_dir():
                part = folder / f"{STATE}.part"
                torch.save(self._watch.state_dict(), part)
                Path(part).replace(folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detaches the monitor."""
        self._watch.end()

    # --- checkpoints ----------------------------------------------------------------------------

    def _folder(self, step: int) -> Path:
        return Path(self._trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _folders(self) -> list[Path]:
        """Returns where the state of the checkpoint may be."""
        named = [each for each in (self._from, self._trainer.args.resume_from_checkpoint) if each]
        paths = [Path(each) for each in named if isinstance(each, str | os.PathLike)]
        return [*paths, self._folder(self._trainer.state.global_step)]


class SAMCallback(TrainerCallback):
    """Lets a ``Trainer`` step with ``SAM``, ``DomSAM`` or ``BulkSAM``, also under accumulation.

    .. code-block:: python

        optimizer = BulkSAM(model.parameters(), lr=0.1, rho=0.05, subspace=subspace)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        SAMCallback(trainer)

    Before each step it calls ``first_step()``, and the trainer's ``training_step`` again on all
    micro-batches; gradients are clipped then as before.

    Args:
        trainer: whose callbacks it joins, and whose ``training_step`` it calls.

    Raises:
        ArgumentError: ``trainer`` is none.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        trainer = _checked(trainer, "SAMCallback(trainer)")
        self._trainer = trainer
        self._step = trainer.training_step
        self._taken: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = []
        trainer.training_step = self._training_step
        trainer.add_callback(self)

    def _training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._taken.append((dict(inputs), args, kwargs))
        return self._step(model, inputs, *args, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ascends, and computes the gradients there.

        Raises:
            ArgumentError: the optimizer takes no two steps.
        """
        trainer, taken = self._trainer, self._taken
        self._taken = []
        optimizer = innermost(trainer.optimizer)
        if not hasattr(optimizer, "first_step"):
            found = type(optimizer).__name__
            raise ArgumentError("the trainer's optimizer", found, "SAM, DomSAM or BulkSAM")
        optimizer.first_step(zero_grad=True)
        model = trainer.model_wrapped
        for index, (inputs, rest, named) in enumerate(taken, start=1):
            last = index == len(taken)
            with nullcontext() if last else trainer.accelerator.no_sync(model=model):
                self._step(model, inputs, *rest, **named)
        if args.max_grad_norm:
            trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)


def _checked(trainer: Any, example: str) -> Trainer:
    """Returns the trainer.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(trainer, Trainer):
        remedy = f"After the trainer is made, write {example}: it adds itself to its callbacks."
        found = "left out" if trainer is None else type(trainer).__name__
        raise ArgumentError("trainer", found, "a transformers.Trainer", remedy)
    return trainer


def _check_own_loss(trainer: Trainer) -> None:
    """Checks that what is trained on is the loss that the model returns.

    Raises:
        ArgumentError: it is another.
    """
    ways = {
        "label smoothing": trainer.label_smoother is not None,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "a compute_loss of its own": type(trainer).compute_loss is not Trainer.compute_loss,
    }
    for way, is_so in ways.items():
        if is_so:
            remedy = (
                "Pass loss=, a function of the model and a batch; or, if they are the same, "
                "loss=integrations.transformers.ModelLoss()."
            )
            allowed = "one that trains on the loss of its model"
            raise ArgumentError("trainer", f"one with {way}", allowed, remedy)


def _load(folders: list[Path]) -> dict[str, Any]:
    """Returns the state in the first of the folders that has one; warns where none has."""
    for folder in folders:
        if (folder / STATE).is_file():
            loaded: dict[str, Any] = torch.load(folder / STATE, map_location="cpu")
            return loaded
    message = (
        f"There is no {STATE} in {folders[0]}: it was saved without a MonitorCallback. Training "
        "is resumed, and the monitor begins anew."
    )
    warnings.warn(message, LogWarning, stacklevel=2)
    return {}
