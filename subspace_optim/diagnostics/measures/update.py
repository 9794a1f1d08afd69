"""``update()``: how far the parameters go."""

from __future__ import annotations

from dataclasses import dataclass

from subspace_optim.diagnostics.effective_lr import distance
from subspace_optim.diagnostics.measures.base import Measure, Row
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.linalg.rows import norm


def update() -> Measure:
    r"""Records how far the step goes, and how far training has come.

    =============== ==============================================================
    ``update_norm`` ``‖θ_{t+1} − θ_t‖``
    ``distance``    ``‖θ_t − θ_0‖``, from the parameters at the attachment
    =============== ==============================================================

    It costs no pass over the data.

    Returns:
        The measure.
    """
    return Update()


@dataclass
class Update(Measure):
    """See ``update``."""

    columns = ("update_norm", "distance")

    def after(self, step: Step) -> Row:
        """Returns both."""
        inner = step.training.parameters.inner
        return {
            "update_norm": norm(step.update, inner),
            "distance": distance(step.theta, step.training.start, inner=inner),
        }
