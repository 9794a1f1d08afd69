"""``TrainerLoss``: the loss that a ``transformers.Trainer`` computes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Trainer

from subspace_optim.integrations._losses import loss_of, size_of

IGNORED = -100
"""The label of what does not count."""


class Taken(NamedTuple):
    """A micro-batch as it was trained on.

    Attributes:
        inputs: what the loss was computed of.
        count: what the trainer divides sums by: the labels that count in all micro-batches of the
            step; ``None`` where each of them is a mean.
        steps: the micro-batches of the step.
    """

    inputs: dict[str, Any]
    count: Any
    steps: int


class TrainerLoss:
    """``batch_loss(model, batch)`` of the loss that ``Trainer.compute_loss`` computes.

    A batch is a micro-batch that was ``Taken`` in training, whose loss counts as it did there. Or
    it is a collated one, of a data set: its mean counts by its labels where the trainer counts
    them, and else by its examples.

    Args:
        trainer: whose it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Returns the loss and its weight."""
        if isinstance(batch, Taken):
            loss = self._computed(model, batch.inputs, batch.count)
            return loss * (batch.steps if self._is_a_part(batch.count) else 1), 1
        count = self._count(batch)
        loss = self._computed(model, batch, count)
        if count is None:
            return loss, size_of(batch)
        return loss / self._factor, count

    def _computed(self, model: nn.Module, inputs: Any, count: Any) -> Tensor:
        if isinstance(count, Tensor) and count.dim():
            count = count.sum()  # of several devices with a part of the batch each
        trainer = self._trainer
        found = Trainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=count)
        return loss_of(found)

    @property
    def _counts(self) -> bool:
        """Whether the trainer divides by the labels of a step."""
        trainer = self._trainer
        return trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None

    def _is_a_part(self, count: Any) -> bool:
        """Whether the losses of micro-batches add up to that of their step; as the trainer asks."""
        said: bool | None = getattr(self._trainer, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        by_function = self._trainer.compute_loss_func is not None
        return by_function or (self._trainer.model_accepts_loss_kwargs and count is not None)

    def _count(self, batch: Any) -> Tensor | None:
        """Returns how many labels of a batch count, as the trainer counts them."""
        if not self._counts or "labels" not in batch:
            return None
        labels: Tensor = batch["labels"]
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif getattr(self._trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        return labels.ne(IGNORED).sum()

    @property
    def _factor(self) -> int:
        """What the trainer multiplies a loss by, where processes share the count of labels."""
        trainer, args = self._trainer, self._trainer.args
        if not args.average_tokens_across_devices:
            return 1
        alike = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
        return int(args.n_gpu if args.n_gpu > 1 else trainer.accelerator.num_processes // alike)
