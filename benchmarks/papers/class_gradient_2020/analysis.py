"""What the raw figures of trainings by SGD and the quasi-Newton method say."""

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
_ABOVE_CHANCE: Final = 1.5
"""Times as accurate as chance: what ends below this has not been trained."""

ACCURACIES: Final = {"0.1": (88, 92), "0.05": (87, 92), "0.01": (82, 90)}
"""Table 1 of the paper, in percent: SGD and quasi-Newton."""
LOSSES: Final = {"0.1": (0.3574, 0.3304), "0.05": (0.3985, 0.3346), "0.01": (0.5362, 0.3411)}
"""Table 2 of the paper."""

Curve = dict[str, Any]
Pairs = dict[str, tuple[Curve, Curve]]
"""Curves of SGD and of the quasi-Newton method, by rate or batch size."""


def losses(curve: Curve) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the validation losses; infinite where they are no numbers."""
    values = np.array(curve["loss"], dtype=float)
    return np.where(np.isfinite(values), values, math.inf)


def aligned(sgd: Curve, newton: Curve) -> tuple[Any, Any]:
    """Returns the losses of both after the start; infinite from where a training has ended."""
    rows = max(len(sgd["loss"]), len(newton["loss"]))
    first, second = (
        np.pad(losses(each), (0, rows - len(each["loss"])), constant_values=math.inf)[1:]
        for each in (sgd, newton)
    )
    return first, second


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


def trained(curve: Curve) -> bool:
    """Returns whether a training did not diverge, and ended above chance."""
    return bool(final_accuracy(curve) >= _ABOVE_CHANCE / curve["classes"])


def curves_of(raw: Raw, method: str) -> dict[str, Curve]:
    """Returns the curves of a method by rate or batch size, each with what its run has else."""
    rest = {name: value for name, value in raw.items() if name != "curves"}
    return {key: rest | curve for key, curve in raw["curves"][method].items()}


def pairs(raw: Raw, method: str = "") -> Pairs:
    """Returns the curves of SGD and of a reading of the method: of the only one, if not told."""
    method = method or next(name for name in raw["curves"] if name != "sgd")
    sgd, newton = curves_of(raw, "sgd"), curves_of(raw, method)
    return {key: (sgd[key], newton[key]) for key in sgd}


def both_train(raw: Raw) -> bool:
    """Returns whether both methods end above chance, each time.

    What diverges at once is behind, slower and overtaken, but in an empty sense.
    """
    return all(trained(curve) for pair in pairs(raw).values() for curve in pair)


# --- tables 1 and 2, and section 3 ---------------------------------------------------------------


def accuracy_gains(raw: Raw) -> list[float]:
    """Returns how much more accurate the quasi-Newton method is at the end, for each rate."""
    return [final_accuracy(newton) - final_accuracy(sgd) for sgd, newton in pairs(raw).values()]


def least_accuracy_gain(raw: Raw) -> float:
    """Returns how much more accurate quasi-Newton is at the end than SGD, at the least."""
    return min(accuracy_gains(raw))


def least_loss_gain(raw: Raw) -> float:
    """Returns how much lower quasi-Newton's loss is, at the least; NaN if neither has one."""
    return float(np.min([final_loss(a) - final_loss(b) for a, b in pairs(raw).values()]))


def mean_accuracy_gain(raw: Raw) -> float:
    """Returns the mean gain in accuracy."""
    return mean_of(accuracy_gains(raw))


def mean_accuracy_difference(raw: Raw) -> float:
    """Returns the mean difference in accuracy."""
    return mean_of(map(abs, accuracy_gains(raw)))


def off_table_1(raw: Raw) -> float:
    """Returns the mean difference of SGD's accuracies to those printed."""
    found = curves_of(raw, "sgd")
    return mean_of(final_accuracy(found[rate]) - ACCURACIES[rate][0] / 100 for rate in found)


def off_table_2(raw: Raw) -> float:
    """Returns the mean difference of SGD's losses to those printed."""
    found = curves_of(raw, "sgd")
    return mean_of(final_loss(found[rate]) - LOSSES[rate][0] for rate in found)


def share_behind(raw: Raw) -> float:
    """Returns the share of the rows after the start with quasi-Newton's loss above SGD's."""
    return mean_of(
        bool(behind)
        for pair in pairs(raw).values()
        for sgd, newton in [aligned(*pair)]
        for behind in newton > sgd
    )


def volatility(curve: Curve) -> float:
    """Returns the mean change of log loss from row to row in the second half of a training."""
    values = losses(curve)
    return float(np.abs(np.diff(np.log(values[len(values) // 2 :]))).mean())


def volatility_ratio(raw: Raw) -> float:
    """Returns the geometric mean of quasi-Newton's volatility over SGD's.

    Over the rates at which neither diverges: what is lost has no second half. NaN for none.
    """
    ratios = [
        volatility(newton) / volatility(sgd)
        for sgd, newton in pairs(raw).values()
        if not diverged(sgd) and not diverged(newton)
    ]
    return float(np.exp(mean_of(np.log(ratios))))


def survivors(raw: Raw) -> float:
    """Returns the share of the quasi-Newton method's trainings that end above chance."""
    return mean_of(trained(newton) for _, newton in pairs(raw).values())


# --- figure 2 ------------------------------------------------------------------------------------


def lead(sgd: Curve, newton: Curve) -> float:
    """Returns SGD's loss over quasi-Newton's, geometric mean of the first third of the rows."""
    first, second = (each[: max(1, len(each) // 3)] for each in aligned(sgd, newton))
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(first / second).mean()))


def early_lead(raw: Raw) -> float:
    """Returns the best early lead of all batch sizes."""
    return max(lead(*pair) for pair in pairs(raw).values())


def late_share(sgd: Curve, newton: Curve) -> float:
    """Returns the share of the rows of the second half with SGD ahead."""
    first, second = aligned(sgd, newton)
    return float((first < second)[len(first) // 2 :].mean())


def least_late_lead(raw: Raw) -> float:
    """Returns the smallest such share of all batch sizes."""
    return min(late_share(*pair) for pair in pairs(raw).values())


def crossover(sgd: Curve, newton: Curve) -> float:
    """Returns the step from which SGD is ahead, but for a tenth of the rows; infinite: from none.

    A row in which neither has been trained yet is no lead.
    """
    first, second = aligned(sgd, newton)
    ahead = first < second
    for row, step in enumerate(sgd["step"][1:]):
        if ahead[row] and ahead[row:].mean() >= _TREND:
            return float(step)
    return math.inf


def first_crossover(raw: Raw) -> float:
    """Returns the crossover with the smallest batch, in epochs."""
    size = min(pairs(raw), key=int)
    return crossover(*pairs(raw)[size]) * int(size) / int(raw["examples"])


# --- the readings --------------------------------------------------------------------------------


def readings(raw: Raw) -> dict[str, Pairs]:
    """Returns the pairs of each reading of the method."""
    return {method: pairs(raw, method) for method in raw["curves"] if method != "sgd"}


def stable_readings(raw: Raw) -> float:
    """Returns how many readings of the method end above chance, each time."""
    return float(
        sum(all(trained(newton) for _, newton in each.values()) for each in _own(raw).values())
    )


def best_reading(raw: Raw) -> float:
    """Returns how much more accurate than SGD the best of the readings is at the end."""
    return max(
        mean_of(final_accuracy(newton) - final_accuracy(sgd) for sgd, newton in each.values())
        for each in _own(raw).values()
    )


def _own(raw: Raw) -> dict[str, Pairs]:
    """The readings of what the paper has: its vectors are not orthogonal."""
    return {name: each for name, each in readings(raw).items() if "orthogonal" not in name}


# --- the rate that each stands -------------------------------------------------------------------


def limit(raw: Raw, method: str) -> float:
    """Returns the largest rate of the ladder at which a method ends above chance.

    Half of the smallest one where there is none.
    """
    found = curves_of(raw, method)
    stood = [float(rate) for rate, curve in found.items() if trained(curve)]
    return max(stood, default=min(map(float, found)) / 2)


def limits(raw: Raw) -> tuple[float, float]:
    """Returns that of SGD, and that of the only reading of the quasi-Newton method."""
    return limit(raw, "sgd"), limit(raw, next(name for name in raw["curves"] if name != "sgd"))


def larger_limit(raw: Raw) -> float:
    """Returns the larger of both limits."""
    return max(limits(raw))


def smaller_limit(raw: Raw) -> float:
    """Returns the smaller of both limits."""
    return min(limits(raw))


def limit_ratio(raw: Raw) -> float:
    """Returns quasi-Newton's limit over SGD's."""
    sgd, newton = limits(raw)
    return newton / sgd


# --- class gradients beside eigenvectors ---------------------------------------------------------


def late_rank(raw: Raw, tolerance: int = 0) -> float:
    """Returns the median rank in the second half of training, by one of the tolerances."""
    return float(np.median(second_half(raw["ranks"][tolerance])))


def off_figure_4(raw: Raw) -> float:
    """Returns the assigned cosine of the average of eq. 16, less the one printed."""
    return float(raw["average"]["assigned"]) - 0.36


def random_cosine(raw: Raw) -> float:
    """Returns the expected |cosine| of two random directions in as many dimensions: √(2/πP)."""
    return math.sqrt(2 / (math.pi * raw["size"]))


def cutoff(raw: Raw) -> float:
    """Returns the mean of the top C eigenvalues over that of the next C."""
    top, following = np.array(raw["eigenvalues"][: 2 * raw["classes"]]).reshape(2, -1)
    return float(top.mean() / following.mean())


def cut(raw: Raw) -> float:
    """Returns how far the spectrum falls after the C-th eigenvalue, beside its falls around there.

    It is ``log(λ_C / λ_{C+1})`` over the mean of the same at half of C places before and behind.
    """
    falls = -np.diff(np.log(raw["eigenvalues"]))
    at, reach = raw["classes"] - 1, raw["classes"] // 2
    around = np.concatenate([falls[at - reach : at], falls[at + 1 : at + 1 + reach]])
    return float(falls[at] / around.mean())


def missed_by(raw: Raw, method: str) -> float:
    """Returns how far from C a count of the eigenvalues that stand out is."""
    return float(abs(raw["outliers"][method] - raw["classes"]))


def mean_cosine_between(raw: Raw) -> float:
    """Returns the mean |cosine| between the class gradients of two classes."""
    cosines = np.abs(np.array(raw["of_all"]["between"], dtype=float))
    return float(cosines[~np.eye(len(cosines), dtype=bool)].mean())


def curvature_ratios(raw: Raw) -> list[float]:
    """Returns the median of v_kᵀHv_k / λ_k over the classes, at each step that has it."""
    return [float(np.median(ratios)) for ratios in raw["ratios"].values()]


def largest_curvature_ratio(raw: Raw) -> float:
    """Returns the largest of them."""
    return max(curvature_ratios(raw))


def first_curvature_ratio(raw: Raw) -> float:
    """Returns that before the first step, over C."""
    return curvature_ratios(raw)[0] / float(raw["classes"])


def late_curvature_ratio(raw: Raw) -> float:
    """Returns their mean in the second half of training, over the first."""
    found = curvature_ratios(raw)
    return mean_of(second_half(found)) / found[0]
