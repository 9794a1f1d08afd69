"""``next_eigenvalues(n)``: what lies below the dominant subspace."""

from __future__ import annotations

from dataclasses import dataclass

from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.subspaces import DominantSubspace


def next_eigenvalues(n: int) -> Measure:
    r"""Records the eigenvalues below the k-th, at :math:`\theta_t`.

    ==================== ===========================================
    ``next_eigenvalues`` λ_{k+1} … λ_{k+n}, a list
    ==================== ===========================================

    Beside ``dominant()`` the columns ``eigenvalues``, ``sharpness`` and ``gap`` are then those of
    ``θ_t`` too, and not of the last refresh.

    It costs a solve for k + n pairs over all data at each row, which leaves the subspace's basis as
    it is; the first is a cold one, and the others refine.

    Args:
        n: how many.

    Returns:
        The measure.

    A number that is out of range raises ``ArgumentError`` where it is attached.
    """
    return NextEigenvalues(n)


@dataclass
class NextEigenvalues(Measure):
    """See ``next_eigenvalues``."""

    n: int

    columns = ("next_eigenvalues",)
    refines = ("eigenvalues", "sharpness", "gap")

    def attach(self, training: Training) -> None:
        """Makes the subspace of k + n pairs.

        Raises:
            ArgumentError: there is no k-th, or none below it.
        """
        operator = operator_for("next_eigenvalues", training)
        self._k = training.k
        if not self._k:
            found = "next_eigenvalues() of a source without eigenpairs"
            remedy = "Pass the monitor a DominantSubspace(operator, k=10)."
            raise ArgumentError("measures", found, "that of a source with a k-th", remedy)
        free = training.parameters.size - self._k
        if not free:
            remedy = "Take a smaller k."
            raise ArgumentError("measures", "next_eigenvalues() of all pairs", "of some", remedy)
        n = check_integer("n of next_eigenvalues", self.n, minimum=1, maximum=free)
        options = training.solver_options()
        self._subspace = DominantSubspace(operator, self._k + n, refresh=1, **options)
        self.lists = {"next_eigenvalues": n}

    def before(self, step: Step) -> Row:  # noqa: ARG002 (solved for at the present parameters)
        """Solves for them."""
        every = self._subspace.update().eigenvalues.tolist()
        eigenvalues, following = every[: self._k], every[self._k :]
        return {
            "next_eigenvalues": following,
            "eigenvalues": eigenvalues,
            "sharpness": eigenvalues[0],
            "gap": eigenvalues[-1] - following[0],
        }
