"""``dominant()``: where the update of a step goes, into the dominant subspace or into the bulk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, subspace_for
from subspace_optim.diagnostics.measures.loss_and_gradient import LossAndGradient
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.measures.thresholds import Thresholds
from subspace_optim.diagnostics.measures.update import Update


def dominant(sample: int | Literal["auto"] | None = "auto") -> list[Measure]:
    r"""Records what the papers ask of a step, in the dominant subspace and in the bulk.

    Beside the columns of ``loss_and_gradient()``, ``update()`` and ``thresholds()``:

    ====================== =====================================================================
    ``chi_gradient``       χ_k of the gradient: the fraction in the dominant subspace
    ``chi_update``         χ_k of the update
    ``dom_lr``             effective learning rate in the dominant subspace (`song_2024`, Def. 4)
    ``bulk_lr``            the same in the bulk
    ``sharpness``          λ_1 of the last refresh
    ``eigenvalues``        λ_1 … λ_k of the last refresh, a list
    ``gap``                λ_k − λ_{k+1} of the last refresh, which has λ_{k+1} from below
    ``angle_estimate``     of the sine of the largest angle between the basis and the true
                           subspace, with ``refresh="auto"``
    ``chi_gradient_error`` standard error of ``chi_gradient``; 0 where it is of all data
    ``dom_lr_error``       the same of ``dom_lr``
    ``bulk_lr_error``      the same of ``bulk_lr``
    ====================== =====================================================================

    Any subspace with an orthonormal basis can be measured in. What is made of the update alone is
    there for each. The other columns need more of the subspace than ``parameters`` and
    ``update()``, and without it they are NaN: an attribute ``operator`` for loss, gradient and
    effective rates, with ``k`` beside it for the eigenvalues, ``gap``, and ``stats.estimate``. A
    ``FixedSubspace`` is given one by ``subspace.operator = hessian``.

    It costs a refresh of the basis, where that is due, and a gradient.

    On a sample, squares are estimated without the noise that they hold (``diagnostics.sampled``):
    norm, χ_k and rates of a small gradient are not those of the noise. Where a square comes out as
    zero or less, what is made of it is NaN: the sample is too small to tell. The sample is of whole
    batches, 8 at least, or of rows where the data are one batch; it is drawn once, apart from that
    of the basis, and kept, with 16 gradients from the beginning of a recorded step to its end. A
    batch that cannot be divided, as where batch norm couples its examples, is measured whole. The
    eigenvalues are the basis's.

    Args:
        sample: of how many examples loss and gradient are: ``"auto"``, of as many as the basis is
            of, which are all without ``DominantSubspace(..., sample=...)``; n, of so many;
            ``None``, of all.

    Returns:
        The measures.
    """
    return [LossAndGradient(sample), Update(), Dominant(sample), Thresholds()]


@dataclass
class Dominant(Measure):
    """See ``dominant``: its own columns."""

    sample: int | Literal["auto"] | None

    columns = (
        "chi_gradient",
        "chi_update",
        "dom_lr",
        "bulk_lr",
        "sharpness",
        "eigenvalues",
        "gap",
        "angle_estimate",
        "chi_gradient_error",
        "dom_lr_error",
        "bulk_lr_error",
    )

    def attach(self, training: Training) -> None:
        """Looks what the subspace offers."""
        subspace_for("dominant", training)
        training.gradients(self.sample)
        training.in_basis = True
        self.lists = {"eigenvalues": training.k}

    def before(self, step: Step) -> Row:
        """Returns what the basis tells, and takes what the rates will need."""
        subspace, basis = step.training.subspace, step.basis
        step.sampled(self.sample)
        known = {
            "gap": getattr(subspace, "gap", None),
            "angle_estimate": getattr(getattr(subspace, "stats", None), "estimate", None),
        }
        row = {column: value for column, value in known.items() if value is not None}
        if self.lists["eigenvalues"]:
            eigenvalues = basis.eigenvalues.tolist()
            row |= {"eigenvalues": eigenvalues, "sharpness": eigenvalues[0]}
        return row

    def after(self, step: Step) -> Row:
        """Returns where the update goes."""
        gradient = step.sampled(self.sample)
        rates = {} if gradient is None else gradient.of_update(step.update)
        return {"chi_update": alignment(step.update, step.basis), **rates}
