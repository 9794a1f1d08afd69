"""``Step``: one step of a training as measures see it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.critical_sharpness import loss_at, rounding_of
from subspace_optim.diagnostics.measures.base import Training, subspace_for
from subspace_optim.diagnostics.measures.gradients import Gradient
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import norm
from subspace_optim.subspaces import projector_of


class Step:
    r"""One step, from :math:`\theta_t` to :math:`\theta_{t+1}`: each part is computed when asked.

    Loss, gradient and Hessian are those of the operator at :math:`\theta_t`, also when the step has
    been taken. They take turns of their own at the model: ask for all that needs derivatives
    within one ``at_start()``, so that their graph is built once.

    Args:
        training: what is watched.
        number: t, counted from the attachment.

    Attributes:
        training: as given.
        number: as given.
        theta: ``θ_t``, ``(P,)``.
        losses: ``L(θ_t + c u)``, by c, as far as ``loss_along`` has found them.
        lr: the rate with which the step begins; NaN where parameters that move have several.
    """

    def __init__(self, training: Training, number: int) -> None:
        self.training, self.number = training, number
        space = training.parameters
        self.theta = space.flatten(space.tensors)
        rates = {
            float(group["lr"]) for group in training.moving_groups() if group.get("lr") is not None
        }
        self.lr = rates.pop() if len(rates) == 1 else math.nan
        self._update: Tensor | None = None
        self._inside = False
        self._sampled: dict[object, Gradient | None] = {}
        self.losses: dict[float, float] = {}

    @property
    def operator(self) -> CurvatureOperator:
        """The operator of the loss.

        Raises:
            RuntimeError: there is none.
        """
        if self.training.operator is None:
            raise RuntimeError("The subspace of this monitor has no operator.")
        return self.training.operator

    @cached_property
    def basis(self) -> EigenBasis:
        """The subspace at ``θ_t``; it has to be asked for in ``before`` first.

        Raises:
            RuntimeError: the step has been taken, and nobody has.
        """
        if self._update is not None:
            raise RuntimeError("A measure that needs step.basis has to ask for it in before().")
        return projector_of(subspace_for("basis", self.training))

    @property
    def update(self) -> Tensor:
        """``θ_{t+1} − θ_t``, ``(P,)``.

        Raises:
            RuntimeError: the step has not been taken yet.
        """
        if self._update is None:
            raise RuntimeError("The update is not known before the step: ask for it in after().")
        return self._update

    @property
    def moved(self) -> bool:
        """Whether the step has changed the parameters."""
        changed = self.update.any().double()
        return bool(self.training.parameters.inner.sum(changed))

    @contextmanager
    def at_start(self) -> Iterator[CurvatureOperator]:
        """Yields the operator, which measures at ``θ_t`` inside.

        The model holds ``θ_t`` there too, in other memory, until the block ends.
        """
        if self._update is None or self._inside:
            yield self.operator
            return
        with self.operator.at(self.theta):
            self._inside = True
            try:
                yield self.operator
            finally:
                self._inside = False

    @cached_property
    def gradient(self) -> Tensor:
        """``∇L(θ_t)`` over all data, ``(P,)``."""
        with self.at_start() as operator:
            return operator.gradient()

    @property
    def gradient_norm(self) -> float:
        """``‖∇L(θ_t)‖``, from a sample where a measure has taken one."""
        known = [each for each in self._sampled.values() if each is not None]
        return known[0].norm if known else float(norm(self.gradient, self.operator.inner))

    @property
    def slope(self) -> float | None:
        """``⟨∇L(θ_t), θ_{t+1} − θ_t⟩``, if the gradient is known."""
        if "gradient" not in vars(self):
            return None
        along = torch.dot(self.gradient.double(), self.update.double())
        return float(self.training.parameters.inner.sum(along))

    @cached_property
    def loss(self) -> float:
        """``L(θ_t)`` over all data."""
        with self.at_start() as operator:
            return operator.loss()

    def loss_along(self, multiple: float) -> float:
        """Returns ``L(θ_t + c (θ_{t+1} − θ_t))``: a forward pass; infinite where it overflows.

        Args:
            multiple: c; 1 is where the step went.
        """
        if multiple not in self.losses:
            self.losses[multiple] = self.loss_at(self.update, multiple)
        return self.losses[multiple]

    def loss_at(self, direction: Tensor, multiple: float) -> float:
        """Returns ``L(θ_t + c d)``: a forward pass; infinite where it overflows.

        Args:
            direction: d, ``(P,)``.
            multiple: c.
        """
        theta = self.theta.add(direction, alpha=multiple)
        with self.at_start() as operator:
            return loss_at(operator, theta)

    @property
    def rounding(self) -> float:
        """Rounding of a loss near ``θ_t``, absolute."""
        return rounding_of(self.loss, self.theta.dtype)

    def sampled(self, sample: int | Literal["auto"] | None) -> Gradient | None:
        """Returns loss and gradient of so many examples; ``None`` without an operator.

        Args:
            sample: as of ``measures.dominant``.
        """
        if self.training.in_basis and self._update is None:
            _ = self.basis
        if sample not in self._sampled:
            self._sampled[sample] = self.training.gradients(sample).at(self)
        return self._sampled[sample]

    def seen_by(self, operator: CurvatureOperator) -> Step:
        """Returns the same step, with the loss of another operator of the same parameters."""
        other = copy.copy(self)
        for name in ("gradient", "loss"):
            vars(other).pop(name, None)
        other.training = replace(self.training, operator=operator)
        other._sampled, other.losses, other._inside = {}, {}, False  # noqa: SLF001 (its own)
        return other

    def end(self) -> None:
        """Tells that the step has been taken."""
        space = self.training.parameters
        self._update = space.flatten(space.tensors).sub_(self.theta)
