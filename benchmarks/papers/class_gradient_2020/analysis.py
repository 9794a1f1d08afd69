"""What the raw figures of `class_gradient_2020` say: numbers for claims, pictures and tables."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from benchmarks.papers.reductions import mean_of, second_half
from benchmarks.papers.reproduction import Raw

_LAST: Final = 3
"""Rows that the end of a curve is the mean of."""
_LOST_FROM: Final = 10.0
"""A training that ends above this multiple of its loss at the start has diverged."""
_TREND: Final = 0.9
"""A method is ahead from a row on if it is in so many of the rows that follow."""

Curve = dict[str, Any]
Pairs = dict[str, tuple[Curve, Curve]]
"""Curves of SGD and of the quasi-Newton method, by rate or batch size."""


def losses(curve: Curve) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the validation losses; infinite where they are no numbers."""
    values = np.array(curve["loss"], dtype=float)
    return np.where(np.isfinite(values), values, math.inf)


def diverged(curve: Curve) -> bool:
    """Returns whether a training is lost: it ended, or its loss is far above the start at the end.

    The highest of the last rows counts: what has diverged may come down again for one.
    """
    found = losses(curve)
    return bool(curve["diverged"] or found[-_LAST:].max() > _LOST_FROM * found[0])


def final_loss(curve: Curve) -> float:
    """Returns the loss at the end; infinite where training diverged."""
    return math.inf if diverged(curve) else float(losses(curve)[-_LAST:].mean())


def final_accuracy(curve: Curve) -> float:
    """Returns the accuracy at the end; chance where training diverged."""
    if diverged(curve):
        return float(1 / curve["classes"])
    return float(np.mean(curve["accuracy"][-_LAST:]))


def curves_of(raw: Raw, method: str) -> dict[str, Curve]:
    """Returns the curves of a method by rate or batch size, each with what its run has else."""
    rest = {name: value for name, value in raw.items() if name != "curves"}
    return {key: rest | curve for key, curve in raw["curves"][method].items()}


def pairs(raw: Raw) -> Pairs:
    """Returns the curves of SGD and of quasi-Newton as printed, by rate or batch size."""
    sgd, newton = curves_of(raw, "sgd"), curves_of(raw, "printed")
    return {key: (sgd[key], newton[key]) for key in sgd}


def survivors(raw: Raw) -> Pairs:
    """Returns the pairs of which both trainings survive.

    One that diverges is behind, slower, more volatile and overtaken, and tells of none of these.
    """
    return {
        key: (sgd, newton)
        for key, (sgd, newton) in pairs(raw).items()
        if not diverged(sgd) and not diverged(newton)
    }


def _accuracy_gains(among: Pairs) -> list[float]:
    """How much more accurate the quasi-Newton method is at the end than SGD."""
    return [final_accuracy(newton) - final_accuracy(sgd) for sgd, newton in among.values()]


def least_accuracy_gain(raw: Raw) -> float:
    """Returns how much more accurate quasi-Newton is at the end than SGD, at the least."""
    return min(_accuracy_gains(pairs(raw)))


def least_loss_gain(raw: Raw) -> float:
    """Returns how much lower quasi-Newton's loss is, at the least; NaN if neither has one."""
    return float(np.min([final_loss(a) - final_loss(b) for a, b in pairs(raw).values()]))


def mean_accuracy_gain(raw: Raw) -> float:
    """Returns the mean gain in accuracy where both survive."""
    return mean_of(_accuracy_gains(survivors(raw)))


def mean_accuracy_difference(raw: Raw) -> float:
    """Returns the mean difference in accuracy where both survive."""
    return mean_of(map(abs, _accuracy_gains(survivors(raw))))


def share_behind(raw: Raw) -> float:
    """Returns the share of the epochs after the start with quasi-Newton's loss above SGD's."""
    return mean_of(
        bool(above)
        for sgd, newton in survivors(raw).values()
        for above in losses(newton)[1:] > losses(sgd)[1:]
    )


def volatility(curve: Curve) -> float:
    """Returns the mean change of log loss from epoch to epoch in the second half of a training."""
    values = losses(curve)
    late = values[len(values) // 2 :]
    if not np.isfinite(late).all():
        return math.inf
    return float(np.abs(np.diff(np.log(late))).mean())


def volatility_ratio(raw: Raw) -> float:
    """Returns the geometric mean over the rates of quasi-Newton's volatility over SGD's."""
    found = survivors(raw).values()
    ratios = [volatility(newton) / volatility(sgd) for sgd, newton in found]
    return float(np.exp(mean_of(np.log(ratios))))


def best_accuracy(raw: Raw) -> float:
    """Returns the best accuracy at the end of SGD and quasi-Newton, at the lowest rate."""
    found = pairs(raw)
    lowest = found[min(found, key=float)]
    return max(map(final_accuracy, lowest))


def early_lead(raw: Raw) -> float:
    """Returns SGD's loss over quasi-Newton's, at best, in the first tenth of the steps."""
    leads = []
    for sgd, newton in survivors(raw).values():
        early = slice(1, max(2, len(sgd["loss"]) // 10))
        leads.append(float(np.max(losses(sgd)[early] / losses(newton)[early])))
    return max(leads, default=math.nan)


def least_late_lead(raw: Raw) -> float:
    """Returns the share of the rows of the second half with SGD ahead, at the least."""
    shares = []
    for sgd, newton in survivors(raw).values():
        ahead = losses(sgd) < losses(newton)
        shares.append(float(ahead[len(ahead) // 2 :].mean()))
    return min(shares, default=math.nan)


def crossover(sgd: Curve, newton: Curve) -> float:
    """Returns the step from which SGD is ahead, but for a tenth of the rows; infinite: from none.

    A row in which neither has been trained yet is no lead.
    """
    ahead = losses(sgd) < losses(newton)
    for row, step in enumerate(sgd["step"]):
        if row and ahead[row] and ahead[row:].mean() >= _TREND:
            return float(step)
    return math.inf


def first_crossover(raw: Raw) -> float:
    """Returns the crossover with the smallest batch, in epochs; NaN if a training diverged."""
    size = min(pairs(raw), key=int)
    if size not in survivors(raw):
        return math.nan
    return crossover(*pairs(raw)[size]) * int(size) / int(raw["examples"])


# --- class gradients beside eigenvectors ---------------------------------------------------------


def survived(raw: Raw) -> bool:
    """Returns whether the training of a run of class gradients did not diverge."""
    return not raw["diverged"]


def late_rank(raw: Raw, tolerance: int = 0) -> float:
    """Returns the median rank in the second half of training, by one of the tolerances."""
    return float(np.median(second_half(raw["ranks"][tolerance])))


def random_cosine(raw: Raw) -> float:
    """Returns the expected |cosine| of two random directions in as many dimensions: √(2/πP)."""
    return math.sqrt(2 / (math.pi * raw["size"]))


def cutoff(raw: Raw) -> float:
    """Returns the mean of the top C eigenvalues over that of the next C."""
    top, following = np.array(raw["eigenvalues"][: 2 * raw["classes"]]).reshape(2, -1)
    return float(top.mean() / following.mean())


def mean_cosine_between(raw: Raw) -> float:
    """Returns the mean |cosine| between the class gradients of two classes."""
    cosines = np.abs(np.array(raw["of_all"]["between"], dtype=float))
    return float(cosines[~np.eye(len(cosines), dtype=bool)].mean())


def curvature_ratio(raw: Raw) -> float:
    """Returns the median of v_kᵀHv_k / λ_k over classes and steps."""
    return float(np.median([ratio for ratios in raw["ratios"].values() for ratio in ratios]))
