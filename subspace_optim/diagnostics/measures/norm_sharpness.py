"""``norm_sharpness()``: the sharpness in the norm of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.norm_sharpness import dual_norm, unit_ball
from subspace_optim.diagnostics.norm_sharpness import norm_sharpness as sharpness_of
from subspace_optim.diagnostics.unit_balls import Norm


def norm_sharpness(norm: Norm | None = None, *, starts: int = 2, steps: int = 20) -> Measure:
    r"""Records the largest curvature in the unit ball of the optimizer's norm, as far as found.

    ================== =======================================================================
    ``norm_sharpness`` :math:`\max\{d^\top H d : \|d\| \le 1\}` at ``θ_t``: of SGD λ_1, of
                       sign descent over the cube, of Muon over matrices of spectral norm 1
    ``norm_threshold`` 2/η; of steps that are as long as their rate, as those of signs and of Muon,
                       :math:`2 \|g\|_* / \eta` with the dual norm of the gradient; NaN for
                       steps of both kinds, as those of Muon beside SGD
    ================== =======================================================================

    It is ``diagnostics.norm_sharpness``, a lower bound by a search, which the eigenvectors of the
    subspace start too where there is one.

    It costs a gradient and at most ``starts · (steps + 1)`` products, mostly a quarter of that.

    Args:
        norm: a name, or names by patterns of parameters (default: the optimizer's).
        starts: of the search.
        steps: of each search, at most.

    Returns:
        The measure.

    Reference:
        Islamov et al. 2026, arXiv 2603.05002.
    """
    return NormSharpness(norm, starts, steps)


@dataclass
class NormSharpness(Measure):
    """See ``norm_sharpness``."""

    norm: Norm | None
    starts: int
    steps: int

    columns = ("norm_sharpness", "norm_threshold")

    def attach(self, training: Training) -> None:
        """Checks that there is a Hessian, and a norm."""
        operator = operator_for("norm_sharpness", training)
        ball = unit_ball(operator, self._whose(training), self.norm)
        self._norms = set(ball.norms)

    def _whose(self, training: Training) -> list[Optimizer] | None:
        return training.optimizers if self.norm is None else None

    def before(self, step: Step) -> Row:
        """Searches."""
        training, operator = step.training, step.operator
        value = sharpness_of(
            operator,
            self._whose(training),
            norm=self.norm,
            basis=step.basis if training.k else None,
            starts=self.starts,
            steps=self.steps,
            seed=step.number,
        )
        rates = [g.get("lr") for o in training.optimizers for g in o.param_groups]
        lr = max((float(rate) for rate in rates if rate is not None), default=0.0)
        if self._norms == {"euclidean"}:
            length = 1.0
        elif "euclidean" in self._norms:  # some steps are as long as their rate, and some are not
            length = math.nan
        else:
            length = dual_norm(operator, self._whose(training), norm=self.norm)
        threshold = 2 * length / lr if lr else math.inf
        return {"norm_sharpness": value, "norm_threshold": threshold}
