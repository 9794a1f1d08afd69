"""``valley()``: the river under the hill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subspace_optim.diagnostics.measures.base import (
    Measure,
    Row,
    Training,
    operator_for,
    subspace_for,
)
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.valley import Valley, hill_share
from subspace_optim.diagnostics.valley import valley as valley_at


def valley() -> Measure:
    r"""Records the loss after a Newton step inside the dominant subspace: that of the river below.

    ============== ========================================================================
    ``river_loss`` the loss at ``θ_t`` less ``Σ_i (g_i/λ_i) u_i``, over positive eigenvalues
    ``hill_share`` the share of the last decrease of the loss, from the row before to this
                   one, that came from the height above the river
    ============== ========================================================================

    They are ``diagnostics.valley`` and ``hill_share``. Of a ``CurrentBatch`` there is no share: the
    losses of two minibatches differ by more than a step. It costs a gradient and a forward pass.

    Returns:
        The measure.

    Reference:
        Wen et al. 2024, arXiv 2410.05192, for river and hill.
    """
    return ValleyMeasure()


@dataclass
class ValleyMeasure(Measure):
    """See ``valley``."""

    columns = ("river_loss", "hill_share")

    def attach(self, training: Training) -> None:
        """Checks that there is a basis."""
        operator_for("valley", training)
        subspace_for("valley", training)
        training.in_basis = True
        self._before: Valley | None = None

    def before(self, step: Step) -> Row:
        """Looks down."""
        basis = step.basis
        now, before = valley_at(step.operator, basis), self._before
        if not step.operator.of_current_batch:
            self._before = now
        row = {"river_loss": now.river_loss}
        return row if before is None else row | {"hill_share": hill_share(before, now)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the valley of the last row."""
        return {"valley": None if self._before is None else tuple(self._before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it."""
        before = state["valley"]
        self._before = None if before is None else Valley(*before)
