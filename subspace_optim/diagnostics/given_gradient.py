"""Whether what is measured is the loss that is trained on: its gradient tells."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from subspace_optim._validation import OtherGradientWarning
from subspace_optim.diagnostics.measures import Step, Training
from subspace_optim.linalg.rows import square
from subspace_optim.step_hooks import in_two_calls

_ALIKE = 0.9
"""The cosine from which on two gradients are taken to be of one loss, in another precision."""


class GivenGradient:
    """Compares the gradient that the optimizer was given with that of the loss, for one warning.

    Only the loss of a ``CurrentBatch`` has to have it; and only where a row knows its gradient
    anyway. Dropout draws other masks each time, a closure makes its gradient within the step, and
    SAM's is of another point: nothing is compared there, nor where the step changes the loss by no
    more than rounding does.

    Args:
        training: what is watched.
    """

    def __init__(self, training: Training) -> None:
        operator = training.operator
        members = [each for followed in training.followed for each in followed.members]
        comparable = operator is not None and operator.of_current_batch
        self._watches = comparable and not any(map(in_two_calls, members))
        self._model: Any = getattr(operator, "model", None)
        self._space = training.parameters
        self._given: Tensor | None = None
        self._has: list[bool] = []  # which parameters have one

    def note(self, *, closure: bool) -> None:
        """Keeps the gradient with which a step begins."""
        if not self._watches or closure or (self._model is not None and _draws(self._model)):
            return
        gradients = [p.grad for p in self._space.tensors]
        self._has = [g is not None for g in gradients]
        if any(self._has):
            self._given = self._space.flatten(gradients)

    def compare(self, step: Step) -> None:
        """Warns where it is of another direction than the loss's."""
        slope = step.slope
        if self._given is None or slope is None or not abs(slope) > step.rounding:
            return
        parts = zip(self._space.unflatten(step.gradient), self._has, strict=True)
        own = self._space.flatten([part if has else None for part, has in parts])
        along = torch.dot(own.double(), self._given.double())
        sums = self._space.inner.sums(square(own), square(self._given), along)
        *squares, product = torch.stack(sums).tolist()
        lengths = math.sqrt(squares[0]) * math.sqrt(squares[1])
        if lengths > 0 and product < _ALIKE * lengths:
            self._watches = False
            message = (
                f"The gradient that the optimizer gets has a cosine of {product / lengths:.2f} "
                "with that of the loss that is measured. It is of another loss or of another batch "
                "than the operator has, or it was changed after the backward pass. Give the "
                "operator the loss that is trained on, and set the batch before `optimizer.step()`."
            )
            warnings.warn(message, OtherGradientWarning, stacklevel=2)

    def forget(self) -> None:
        """Drops what is kept."""
        self._given = None


def _draws(model: nn.Module) -> bool:
    """Whether a module draws dropout masks: a layer, or one that keeps a rate of its own."""
    return any(
        (isinstance(m, _DropoutNd) and m.p > 0)
        or any(
            "drop" in name and isinstance(rate, float) and rate > 0
            for name, rate in vars(m).items()
        )
        for m in model.modules()
        if m.training
    )
