"""Loss and gradient of a row: of all data, or of a sample and with standard errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.curvature.operator import CurvatureOperator, GroupMeans
from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.effective_lr import bulk_lr, dom_lr
from subspace_optim.diagnostics.sampled import Groups, Sampled, SampledGradient
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import norm
from subspace_optim.subspaces import Subspace

if TYPE_CHECKING:
    from subspace_optim.diagnostics.measures.step import Step

GROUPS = 16
"""That a sample is dealt to: a standard error of 15 degrees of freedom, for so many gradients."""
_FEWEST = 8
"""Batches of a sample, where the data have so many: of fewer the scatter is hardly known."""
_SEED = 0x5EED
"""Added to the subspace's: a basis is not to be measured on the examples that it was fitted to."""


class Gradient(Protocol):
    """What a row tells of the loss and its gradient at ``θ_t``."""

    norm: float

    def known(self) -> dict[str, Any]:
        """Returns the columns that are known before the step."""

    def of_update(self, update: Tensor) -> dict[str, Tensor]:
        """Returns those that take the update, as scalar tensors."""


class OfAllData:
    """Loss and gradient of all data: nothing is estimated, and the errors are 0.

    Args:
        step: at whose beginning they are taken.
    """

    def __init__(self, step: Step) -> None:
        self._step, gradient = step, step.gradient
        self._loss = step.loss
        self._examples = step.operator.stats.examples or math.nan
        self.norm = float(norm(gradient, step.operator.inner))

    def known(self) -> dict[str, Any]:
        """Returns loss, norm and the number of examples."""
        values = {"loss": self._loss, "gradient_norm": self.norm, "examples": self._examples}
        return values | {"loss_error": 0.0, "gradient_norm_error": 0.0}

    def of_update(self, update: Tensor) -> dict[str, Tensor]:
        """Returns χ_k and the effective rates."""
        gradient, basis = self._step.gradient, self._step.basis
        found = {
            "chi_gradient": alignment(gradient, basis),
            "dom_lr": dom_lr(update, gradient, basis),
            "bulk_lr": bulk_lr(update, gradient, basis),
        }
        zero = torch.zeros((), device=update.device)
        # Where there is no rate there is no error of it.
        errors = {
            f"{name}_error": zero.where(~value.isnan(), value) for name, value in found.items()
        }
        return found | errors


class OfSample:
    """Loss and gradient of a sample.

    Args:
        means: of its groups; the gradients are overwritten.
        examples: of the sample, and of all data.
        basis: the subspace.
    """

    def __init__(self, means: GroupMeans, examples: tuple[int, int], basis: EigenBasis) -> None:
        self._examples, total = examples
        share = self._examples / total
        groups = Groups(means.weights, share)
        self._loss = groups.estimate(groups.means(means.losses))
        self._gradient = SampledGradient(means.gradients, means.weights, share, basis)
        self._norm = self._gradient.norm()
        self.norm = float(self._norm.value)

    def known(self) -> dict[str, Any]:
        """Returns loss and norm, their errors, and the number of examples."""
        found = _columns({"loss": self._loss, "gradient_norm": self._norm})
        return {name: float(value) for name, value in found.items()} | {"examples": self._examples}

    def of_update(self, update: Tensor) -> dict[str, Tensor]:
        """Returns χ_k and the effective rates, and their errors."""
        gradient = self._gradient
        return _columns(
            {
                "chi_gradient": gradient.alignment(),
                "dom_lr": gradient.dom_lr(update),
                "bulk_lr": gradient.bulk_lr(update),
            }
        )


def _columns(found: dict[str, Sampled]) -> dict[str, Tensor]:
    values = {name: each.value for name, each in found.items()}
    return values | {f"{name}_error": each.error for name, each in found.items()}


class Gradients:
    """Measures loss and gradient on as many examples as are asked for.

    A sample is drawn at the first row, which reads all data, and kept; again where its size or the
    modes of the model have changed. Between the two halves of a row there are ``GROUPS``
    gradients in memory.

    Args:
        subspace: in which the gradient is seen; ``None`` where it is not.
        operator: of the loss; ``None`` where there is none.
        sample: the number of examples; ``"auto"``, as many as the basis is of; ``None``, all.

    Raises:
        ArgumentError: ``sample`` is out of range, or a number without an operator.
    """

    def __init__(
        self,
        subspace: Subspace | None,
        operator: CurvatureOperator | None,
        sample: int | Literal["auto"] | None,
    ) -> None:
        if sample is not None and sample != "auto":
            remedy = "Or 'auto', for as many as the basis is of; None for all."
            sample = check_integer("sample", sample, minimum=2, remedy=remedy)
            if operator is None or subspace is None:
                allowed = "'auto' or None, but for a subspace with an operator"
                raise ArgumentError("sample", sample, allowed, "Use a DominantSubspace.")
        self._subspace, self._operator, self._sample = subspace, operator, sample
        self._drawn_for: tuple[int, int] | None = None
        self._view: CurvatureOperator | None = None  # None: all data

    def at(self, step: Step) -> Gradient | None:
        """Returns loss and gradient at the beginning of a step; ``None`` without an operator."""
        operator, examples = self._operator, self._examples()
        if operator is None:
            return None
        if examples is None:
            return OfAllData(step)
        wanted = examples, operator.state().modes
        if operator.ranks.any(lambda: wanted != self._drawn_for):  # all of them draw, or none
            self._view = operator.sample(examples, seed=self._seed(), pieces=GROUPS)
            self._drawn_for = wanted
        return self._of_sample(operator, step) or OfAllData(step)

    def _of_sample(self, operator: CurvatureOperator, step: Step) -> OfSample | None:
        """Returns them of the sample, enlarged if its groups are too few; ``None``: of all data."""
        while self._view is not None and (examples := self._view.examples) is not None:
            drawn, total = examples
            if drawn == total:
                break
            means = self._view.group_means(GROUPS, seed=self._seed())
            if means is not None and len(means.weights) >= _FEWEST:
                return OfSample(means, examples, step.basis)
            more = total if means is None else math.ceil(drawn * _FEWEST / len(means.weights))
            if more >= total:
                break
            self._view = operator.sample(more, seed=self._seed(), pieces=GROUPS)
        self._view = None
        return None

    def _examples(self) -> int | None:
        if self._sample != "auto":
            return self._sample
        stats = getattr(self._subspace, "stats", None)
        examples: int | None = getattr(stats, "examples", None)
        return examples

    def _seed(self) -> int:
        seed: int = getattr(self._subspace, "seed", 0)
        return seed + _SEED
