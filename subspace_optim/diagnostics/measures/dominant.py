"""Where the update of a step goes: into the dominant subspace, or into the bulk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.effective_lr import distance
from subspace_optim.diagnostics.measures.gradients import Gradient, Gradients
from subspace_optim.diagnostics.stability import preconditioned_sharpness, thresholds
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.step_hooks import Followed
from subspace_optim.subspaces import DominantSubspace, Subspace, projector_of

COLUMNS = (
    "step",
    "loss",
    "gradient_norm",
    "update_norm",
    "chi_gradient",
    "chi_update",
    "dom_lr",
    "bulk_lr",
    "distance",
    "sharpness",
    "eigenvalues",
    "next_eigenvalues",
    "gap",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "preconditioned_sharpness",
    "angle_estimate",
    "gradients",
    "products",
    "examples",
    "loss_error",
    "gradient_norm_error",
    "chi_gradient_error",
    "dom_lr_error",
    "bulk_lr_error",
)


@dataclass
class Before:
    """What a row needs of ``θ_t``, from before the step."""

    theta: Tensor
    basis: EigenBasis
    gradient: Gradient | None  # without an operator there is none
    row: dict[str, Any]  # what is known already


class Dominant:
    """Measures a step, before and after it, with what the subspace offers.

    Every subspace has ``parameters`` and ``update()``, which tell where the update goes. It may
    have more: an ``operator`` gives the loss, the gradient and the cost; ``k``, the number of its
    eigenpairs, gives the eigenvalues; ``gap`` and ``stats.estimate`` are recorded as they are.

    Args:
        subspace: to measure in.
        optimizers: whose steps these are.
        next_k: further eigenvalues, by a solve of their own.
        preconditioned: whether Adam's sharpness is solved for.
        sample: of how many examples loss and gradient are, as of ``Gradients``.

    Attributes:
        lists: of the columns with lists, how long these are.
        start: the parameters from which distances count.

    Raises:
        ArgumentError: an option is out of range, or needs what subspace or optimizers do not have.
    """

    def __init__(
        self,
        subspace: Subspace,
        optimizers: Sequence[Followed],
        *,
        next_k: int,
        preconditioned: bool,
        sample: int | Literal["auto"] | None,
    ) -> None:
        self.subspace = subspace
        self.operator = operator_of(subspace)
        self._optimizers = [each.optimizer for each in optimizers]
        k = 0 if self.operator is None else getattr(subspace, "k", 0)
        free = subspace.parameters.size - k if k else 0
        remedy = "" if k else "More takes a DominantSubspace."
        next_k = check_integer("next_k", next_k, minimum=0, maximum=free, remedy=remedy)
        if preconditioned and not all(isinstance(o, Adam | AdamW) for o in self._optimizers):
            remedy = "The thresholds of other optimizers are for the sharpness itself."
            raise ArgumentError("preconditioned", True, "False, but for Adam and AdamW", remedy)
        if preconditioned and self.operator is None:
            allowed = "False for a subspace without an operator"
            raise ArgumentError("preconditioned", True, allowed, "Use a DominantSubspace.")
        self._preconditioned = preconditioned
        self._gradients = Gradients(subspace, self.operator, sample)
        self._next: DominantSubspace | None = None
        if next_k and self.operator is not None:
            self._next = DominantSubspace(
                self.operator, k + next_k, refresh=1, **self._solver_options()
            )
        self.lists = {"eigenvalues": k, "next_eigenvalues": next_k}
        space = subspace.parameters
        self.start = space.flatten(space.tensors)
        # A step that goes on after the one inside, as Lookahead's, has another threshold; SAM's
        # is told by its radius.
        self._with_thresholds = [
            each.optimizer
            for each in optimizers
            if len(each.members) == 1 or "rho" in each.optimizer.param_groups[0]
        ]

    @torch.no_grad()
    def before(self) -> Before:
        """Measures what a row needs before the step."""
        subspace, operator = self.subspace, self.operator
        spent = None if operator is None else replace(operator.stats)
        basis = projector_of(subspace)
        row: dict[str, Any] = {}
        gradient, norm = self._gradients.at(basis), math.nan
        if gradient is not None:
            row |= gradient.known()
            norm = gradient.norm
        # Now: a scheduler may change the rate before several optimizers have all stepped.
        row |= thresholds(self._with_thresholds, norm)
        known = {
            "gap": getattr(subspace, "gap", None),
            "angle_estimate": getattr(getattr(subspace, "stats", None), "estimate", None),
        }
        row |= {column: value for column, value in known.items() if value is not None}
        if self.lists["eigenvalues"]:
            row |= self._eigenvalues(basis)
        if self._preconditioned and operator is not None:
            with suppress(ArgumentError):  # before the first step there are no moments
                row["preconditioned_sharpness"] = preconditioned_sharpness(
                    operator, self._optimizers, **self._solver_options()
                )
        if operator is not None and spent is not None:
            row["gradients"] = operator.stats.full_gradients - spent.full_gradients
            row["products"] = operator.stats.full_products - spent.full_products
        space = subspace.parameters
        return Before(space.flatten(space.tensors), basis, gradient, row)

    def _solver_options(self) -> dict[str, Any]:
        """Returns the options of solves beside the subspace: its own, where it has them."""
        names = ("tol", "seed")
        return {n: getattr(self.subspace, n) for n in names if hasattr(self.subspace, n)}

    def _eigenvalues(self, basis: EigenBasis) -> dict[str, Any]:
        k, found = self.lists["eigenvalues"], {}
        eigenvalues = basis.eigenvalues.tolist()
        if self._next is not None:
            every = self._next.update().eigenvalues.tolist()
            eigenvalues, following = every[:k], every[k:]
            found = {"next_eigenvalues": following, "gap": eigenvalues[-1] - following[0]}
        return found | {"eigenvalues": eigenvalues, "sharpness": eigenvalues[0]}

    @torch.no_grad()
    def after(self, before: Before) -> dict[str, Any]:
        """Returns what is known of the row after the step."""
        space, basis, gradient = self.subspace.parameters, before.basis, before.gradient
        update = space.flatten(space.tensors) - before.theta
        measured = {
            "update_norm": distance(update, torch.zeros_like(update)),
            "chi_update": alignment(update, basis),
            "distance": distance(before.theta, self.start),
        }
        if gradient is not None:
            measured |= gradient.of_update(update)
        values = torch.stack([value.double() for value in measured.values()]).tolist()
        return before.row | dict(zip(measured, values, strict=True))


def operator_of(subspace: Subspace) -> CurvatureOperator | None:
    """Returns the operator whose loss and gradient are recorded, if the subspace has one.

    Raises:
        ArgumentError: it is of other parameters.
    """
    operator = getattr(subspace, "operator", None)
    if not isinstance(operator, CurvatureOperator):
        return None
    both = (operator.parameters.tensors, subspace.parameters.tensors)
    ours, theirs = ([id(p) for p in tensors] for tensors in both)
    if ours != theirs:
        remedy = "Build both from one model, with the same params."
        raise ArgumentError("the subspace's operator", "of other parameters", "of its own", remedy)
    return operator
