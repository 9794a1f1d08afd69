"""``gradient_noise(k)``: where the gradients of minibatches scatter."""

from __future__ import annotations

from dataclasses import dataclass

from subspace_optim._validation import check_integer
from subspace_optim.diagnostics.batch_sharpness import check_minibatches
from subspace_optim.diagnostics.gradient_noise import gradient_noise as noise_of
from subspace_optim.diagnostics.measures.base import (
    Measure,
    Row,
    Training,
    operator_for,
    subspace_for,
)
from subspace_optim.diagnostics.measures.step import Step


def gradient_noise(
    k: int | None = None, *, batch_size: int | None = None, max_batches: int = 32
) -> Measure:
    r"""Records the variance of minibatch gradients along the top eigenvectors.

    ====================== ===================================================================
    ``noise``              ``u_iᵀ C u_i`` for each of the first k eigenvectors, with the covariance
                           C of the gradients of batches; a list (``noise_1`` … in files)
    ``covariance_overlap`` of the top k eigenvectors of C with those of the Hessian, from 0 to 1
    ====================== ===================================================================

    They are ``diagnostics.gradient_noise``; each row draws anew. It costs a gradient of each batch.

    Args:
        k: how many eigenvectors of the basis (default: all).
        batch_size: of the training (default: the batches of the operator's data).
        max_batches: in a row.

    Returns:
        The measure.

    An argument that is out of range, and data that have no such batches, raise ``ArgumentError``
    where it is attached; a ``CurrentBatch``, whose data are not there yet, in the row.

    Reference:
        Jastrzębski et al. 2020, *The break-even point on optimization trajectories of deep neural
        networks*.
    """
    return GradientNoiseMeasure(k, batch_size, max_batches)


@dataclass
class GradientNoiseMeasure(Measure):
    """See ``gradient_noise``."""

    k: int | None
    batch_size: int | None
    max_batches: int

    columns = ("noise", "covariance_overlap")

    def attach(self, training: Training) -> None:
        """Checks the number of eigenvectors and of batches."""
        operator = operator_for("gradient_noise", training)
        subspace_for("gradient_noise", training)
        k = training.k if self.k is None else self.k
        check_integer("k of gradient_noise", k, minimum=1, maximum=training.k)
        check_integer("max_batches", self.max_batches, minimum=2)
        check_minibatches(operator, self.batch_size)
        self._k, self.lists = k, {"noise": k}

    def before(self, step: Step) -> Row:
        """Takes gradients of batches."""
        found = noise_of(
            step.operator,
            step.basis.first(self._k),
            batch_size=self.batch_size,
            max_batches=self.max_batches,
            seed=step.number,
        )
        return {"noise": found.noise, "covariance_overlap": found.covariance_overlap}
