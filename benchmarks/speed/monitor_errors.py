"""Are the standard errors of a monitor on a sample the true ones? Samples, drawn and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

import torch

import subspace_optim as so
from benchmarks.progress import counted
from benchmarks.speed.problems import Problem
from subspace_optim.diagnostics.measures.gradients import GROUPS
from subspace_optim.diagnostics.sampled import Groups, SampledGradient

STATES: Final = (0, 50, 500)
"""Steps of SGD, beside the late ones."""
SHARES: Final = (0.1, 0.5)
"""Of all data that a sample is."""
BAR: Final = 0.9
"""The share of draws whose two standard errors are to cover the truth."""
COLUMNS: Final = ("loss", "gradient_norm", "chi_gradient", "dom_lr", "bulk_lr")


def coverage(problem: Problem, k: int, late: int, draws: int) -> dict[str, Any]:
    """Draws samples along a training, at the same parameters, basis and update.

    Args:
        problem: what to train.
        k: dimension of the subspace.
        late: steps of SGD at the last state.
        draws: samples of each state and share.

    Returns:
        ``rows``: for each state, share and column the true number, the mean of what was told and
        of its errors, the standard deviation of the draws, the share that was told at all, and the
        share of these within two standard errors of the truth. ``met``: whether all of χ and the
        rates are above ``BAR``.
    """
    rows = []
    for state in sorted({*(s for s in STATES if s < late), late}):
        problem.move_to(state)
        hessian = problem.hessian()
        basis = so.DominantSubspace(hessian, k, sample="auto").update()
        gradient, loss = hessian.gradient(), hessian.loss()
        theta = problem.theta()
        problem.step(torch.optim.SGD(problem.model.parameters(), lr=problem.lr), state)
        update = problem.theta() - theta
        problem.set_theta(theta)
        truth = {
            "loss": loss,
            "gradient_norm": float(gradient.norm()),
            "chi_gradient": float(so.diagnostics.alignment(gradient, basis)),
            "dom_lr": float(so.diagnostics.dom_lr(update, gradient, basis)),
            "bulk_lr": float(so.diagnostics.bulk_lr(update, gradient, basis)),
        }
        for share in SHARES:
            name = f"step {state}, {share:.0%} of the data"
            told: dict[str, list[tuple[float, float]]] = {column: [] for column in COLUMNS}
            for seed in counted(name, range(draws), unit="draw"):
                found = _told(hessian, share, seed, basis, update)
                for column, pair in found.items():
                    told[column].append(pair)
            rows += [
                {"state": state, "share": share, "column": column}
                | summary(truth[column], told[column])
                for column in COLUMNS
            ]
    judged = [row for row in rows if row["column"] in COLUMNS[2:] and row["told"] > 0]
    return {"draws": draws, "rows": rows, "met": all(row["covered"] >= BAR for row in judged)}


def _told(
    hessian: so.HessianOperator, share: float, seed: int, basis: so.EigenBasis, update: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """Returns numbers and errors of one draw, as a row of a monitor has them.

    Raises:
        ValueError: the data cannot be divided.
    """
    count = hessian.stats.examples
    view = hessian.sample(round(share * count), seed=seed, pieces=GROUPS)
    if view is None or view.examples is None:
        raise ValueError("the data are one batch whose loss is no mean over examples")
    means, drawn = view.group_means(GROUPS, seed=seed), view.examples[0] / view.examples[1]
    groups = Groups(means.weights, drawn)
    gradient = SampledGradient(means.gradients, means.weights, drawn, basis)
    found = {
        "loss": groups.estimate(groups.means(means.losses)),
        "gradient_norm": gradient.norm(),
        "chi_gradient": gradient.alignment(),
        "dom_lr": gradient.dom_lr(update),
        "bulk_lr": gradient.bulk_lr(update),
    }
    return {column: (float(each.value), float(each.error)) for column, each in found.items()}


def summary(truth: float, told: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Returns what draws say of a number.

    Args:
        truth: the number.
        told: of each draw the number and its standard error; NaN where it was too small to tell.
    """
    seen = [(value, error) for value, error in told if value == value]  # noqa: PLR0124 (NaN)
    values, errors = [value for value, _ in seen], [error for _, error in seen]
    return {
        "truth": truth,
        "told": len(seen) / len(told),
        "mean": statistics.fmean(values) if seen else None,
        "deviation": statistics.pstdev(values) if seen else None,
        "error": statistics.median(errors) if seen else None,
        "covered": statistics.fmean(abs(v - truth) <= 2 * e for v, e in seen) if seen else None,
    }
