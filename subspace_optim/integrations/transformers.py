"""``MonitorCallback`` and ``SAMCallback`` of a ``transformers.Trainer``."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from subspace_optim._validation import ArgumentError, LogWarning
from subspace_optim.curvature import CurrentBatch
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLossFunction
from subspace_optim.diagnostics import Monitor
from subspace_optim.diagnostics.logs import Row, measured
from subspace_optim.diagnostics.rows import Measures
from subspace_optim.integrations._trainer_loss import Taken, TrainerLoss
from subspace_optim.integrations._watch import Source, Watch
from subspace_optim.step_hooks import innermost

STATE = "subspace_optim{}.pt"
"""The file in a checkpoint's folder; further callbacks of a trainer have a number in it."""
_PRINTERS = (PrinterCallback, ProgressCallback)


class MonitorCallback(TrainerCallback):
    """Attaches a ``Monitor`` to the training of a ``Trainer``: made after it, and that is all.

    .. code-block:: python

        trainer = Trainer(model, arguments, train_dataset=data)
        callback = MonitorCallback(trainer, every=50)
        trainer.train()
        callback.monitor.plot()

    Without further arguments it records ``measures.stability()`` on the minibatches that are
    trained on, by the loss that the trainer computes, also with label smoothing or a
    ``compute_loss_func``: that of all micro-batches of a step together. Rows go to the trainer's
    loggers, but not to its output, as ``subspace/<column>`` at the trainer's step, and to its
    ``log_history``. Monitor and subspace are saved with the trainer's checkpoints, in
    ``subspace_optim.pt``, and go on from there. With several processes all of them measure
    together. The training is the same to the bit.

    Args:
        trainer: whose callbacks it joins.
        source: a subspace or an operator to measure in, such as the subspace of a ``BulkSGD``; or
            a function of the model that makes it when training begins (default: made of what
            follows).
        loss: ``loss(model, batch) -> (mean, weight)`` of a collated batch (default: the loss that
            the trainer computes). ``"model"`` is the loss that the model returns, for a trainer
            whose own ``compute_loss`` comes to the same.
        data: a data set of what the trainer trains on, collated as for an evaluation, or a
            ``DataLoader`` (default: the minibatches as they come).
        params: of the curvature: a pattern, a predicate, or tensors (default: all trained ones).
        k: measures in a ``DominantSubspace`` of so many eigenvectors (default: in none).
        measures, every, log, append: as of ``Monitor``.

    Attributes:
        monitor: the monitor; ``None`` until training begins.

    Raises:
        ArgumentError: ``trainer`` is none, or its class computes the loss in a way of its own, and
            neither ``loss`` nor ``source`` tells it; a source is given, and what it is made of;
            or an argument cannot be. When training begins: it is another trainer's, or the model
            is sharded.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        source: Source | None = None,
        *,
        loss: BatchLossFunction | Literal["model"] | None = None,
        data: Any = None,
        params: Params = None,
        k: int | None = None,
        measures: Measures | None = None,
        every: int | Callable[[int], bool] = 50,
        log: Any = None,
        append: bool = False,
    ) -> None:
        trainer = _checked(trainer, "MonitorCallback(trainer, every=50)")
        if source is None and loss is None:
            _check_own_loss(trainer)
        self._rows: list[Row] = []  # that the trainer's loggers have not got yet
        self._watch = Watch(
            source,
            loss=TrainerLoss(trainer) if isinstance(loss, str) and loss == "model" else loss,
            data=data,
            params=params,
            k=k,
            measures=measures,
            every=every,
            log=log,
            append=append,
            track=self._rows.append,
        )
        self._trainer = trainer
        self._from: Any = None  # what training was asked to go on from
        self._taken = self._wanted = 0  # micro-batches of the present step, and how many there are
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, MonitorCallback)]
        self._file = STATE.format(f"-{len(others)}" if others else "")
        train, compute_loss = trainer.train, trainer.compute_loss

        def remembering(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._from = resume_from_checkpoint
            return train(resume_from_checkpoint, *args, **kwargs)

        @wraps(compute_loss)
        def taking(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._take(inputs, kwargs.get("num_items_in_batch"))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.train = remembering  # callbacks are told neither ...
        trainer.compute_loss = taking  # ... of this
        trainer.add_callback(self)

    @property
    def monitor(self) -> Monitor | None:
        """The monitor; ``None`` until training begins."""
        return self._watch.monitor

    def _loss(self) -> BatchLossFunction:
        """Returns the loss that was given, or that of the trainer."""
        return self._watch.loss or TrainerLoss(self._trainer)

    def _data(self) -> Any:
        """Returns the minibatches of training, or batches of the data set that was given."""
        data, trainer = self._watch.data, self._trainer
        if data is None:
            return CurrentBatch()
        if isinstance(data, torch.utils.data.DataLoader):
            return data
        return trainer.get_eval_dataloader(data)

    # --- events ---------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Attaches the monitor, and takes up its state where a training is resumed.

        Raises:
            ArgumentError: it is another trainer's, or the model is sharded.
        """
        trainer = self._trainer
        if state is not trainer.state:
            remedy = "Make another one: MonitorCallback(trainer)."
            raise ArgumentError("the callback", "of another trainer", "this trainer's", remedy)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ArgumentError("the model", "sharded by FSDP or DeepSpeed", "whole on each rank")
        self._rows.clear()  # of a training that broke off: its monitor and files have them
        if state.global_step:
            self._watch.load_state_dict(_load(self._folders(), self._file))
        self._watch.begin(trainer.model, trainer.optimizer, loss=self._loss, data=self._data)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the micro-batches of a step; a second pass of SAM's brings no others."""
        self._taken, self._wanted = 0, self._trainer.current_gradient_accumulation_steps

    def _take(self, inputs: Any, count: Any) -> None:
        """Takes a micro-batch whose loss is computed for a backward pass."""
        if self._taken == self._wanted or not torch.is_grad_enabled():
            return
        batch = (
            dict(inputs) if isinstance(inputs, Mapping) else inputs
        )  # labels are taken out of it
        own = isinstance(self._loss(), TrainerLoss)
        taken = Taken(batch, count, self._wanted) if own else batch
        self._watch.add(taken, first=self._taken == 0)
        self._taken += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hands rows to the trainer's loggers."""
        for row in self._rows:
            _log(self._trainer, measured(row))
        self._rows.clear()
        self._watch.look(self._trainer.optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves monitor and subspace with a checkpoint."""
        if self._trainer.args.should_save:
            folder = self._folder(state.global_step)
            if folder.is_dir():
                part = folder / f"{self._file}.part"
                torch.save(self._watch.state_dict(), part)
                Path(part).replace(folder / self._file)

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
    micro-batches; gradients are clipped then as before. Under ``fp16=True`` both passes carry the
    scaler's scale; where one overflows the parameters stay as they were, and the scaler learns of
    the second. An error between the two passes leaves the parameters as they were, too.

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

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forgets what a step that was interrupted has left."""
        self._taken = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ascends, and computes the gradients there.

        Raises:
            ArgumentError: the optimizer takes no two steps.
        """
        trainer, taken = self._trainer, self._taken
        self._taken = []
        optimizer = innermost(trainer.optimizer)
        if not hasattr(optimizer, "put_back"):
            found = type(optimizer).__name__
            raise ArgumentError("the trainer's optimizer", found, "SAM, DomSAM or BulkSAM")
        try:
            optimizer.first_step(zero_grad=True)
            self._second_pass(taken)
        except BaseException:
            optimizer.put_back()
            raise

    def _second_pass(
        self, taken: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        """Computes the gradients of the micro-batches of the step where the parameters are now."""
        trainer = self._trainer
        model, accelerator, clip = (
            trainer.model_wrapped,
            trainer.accelerator,
            trainer.args.max_grad_norm,
        )
        if accelerator.scaler is not None:  # the same scale, for gradients that it has not unscaled
            accelerator.scaler.update(accelerator.scaler.get_scale())
        for index, (inputs, rest, named) in enumerate(taken, start=1):
            last = index == len(taken)
            with nullcontext() if last else accelerator.no_sync(model=model):
                self._step(model, inputs, *rest, **named)
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the parameters back where a scaler has skipped the step."""
        innermost(self._trainer.optimizer).put_back()


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
    """Checks that what is trained on is the loss that ``Trainer`` computes.

    Raises:
        ArgumentError: it is another.
    """
    own = inspect.unwrap(trainer.compute_loss)  # ours are around it
    if getattr(own, "__func__", None) is not Trainer.compute_loss:
        remedy = (
            "Pass loss=, a function of the model and a collated batch that returns the mean and "
            "what it is a mean over; or, if it comes to the loss of the model, loss='model'."
        )
        allowed = "one with that of Trainer"
        raise ArgumentError("trainer", "one with a compute_loss of its own", allowed, remedy)


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """Hands values to the trainer's loggers and its history, past the callbacks that print."""
    state, control, handler = trainer.state, trainer.control, trainer.callback_handler
    logs = values if state.epoch is None else values | {"epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    callbacks, should_log = handler.callbacks, control.should_log
    handler.callbacks = [c for c in callbacks if not isinstance(c, _PRINTERS)]
    try:
        handler.on_log(trainer.args, state, control, logs)
    finally:
        handler.callbacks = callbacks
        control.should_log = should_log  # which a log takes as done


def _load(folders: list[Path], file: str) -> dict[str, Any]:
    """Returns the state in the first of the folders that has one; warns where none has."""
    for folder in folders:
        if (folder / file).is_file():
            loaded: dict[str, Any] = torch.load(folder / file, map_location="cpu")
            return loaded
    message = (
        f"There is no {file} in {folders[0]}: it was saved without a MonitorCallback. Training "
        "is resumed, and the monitor begins anew."
    )
    warnings.warn(message, LogWarning, stacklevel=2)
    return {}
