"""What the raw figures of trainings by SGD and the quasi-Newton method say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Final

import numpy as np

from benchmarks.papers.reductions import mean_of, second_half, value
from benchmarks.papers.reproduction import Raw

_LAST: Final = 3
"""Rows that the end of a curve is the mean of."""
_LOST_FROM: Final = 10.0
"""A training that ends above this multiple of its loss at the start has diverged."""
_TREND: Final = 0.9
"""A method is ahead from a row on if it is in so many of the rows that follow."""
_ABOVE_CHANCE: Final = 1.5
"""Times as accurate as chance: what ends below this has not been trained."""
_START: Final = 4
"""The start of a training is the first of so many parts."""

ACCURACIES: Final = {"0.1": (88, 92), "0.05": (87, 92), "0.01": (82, 90)}
"""Table 1 of the paper, in percent: SGD and quasi-Newton."""
LOSSES: Final = {"0.1": (0.3574, 0.3304), "0.05": (0.3985, 0.3346), "0.01": (0.5362, 0.3411)}
"""Table 2 of the paper."""
_LIMIT: Final = 0.1
"""The rate of section 3 above which both diverge."""

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
    sgd, newton = curves_of(raw, "sgd"), curves_of(raw, method or _only(raw))
    return {key: (sgd[key], newton[key]) for key in sgd}


def lasting(raw: Raw, method: str = "") -> Pairs:
    """Returns the pairs of which neither diverged.

    What explodes is behind, slower and overtaken: that is not what the sentences are about.
    """
    return {key: pair for key, pair in pairs(raw, method).items() if not any(map(diverged, pair))}


def both_train(raw: Raw) -> bool:
    """Returns whether both methods end above chance, each time."""
    return all(trained(curve) for pair in pairs(raw).values() for curve in pair)


# --- tables 1 and 2, and section 3 ---------------------------------------------------------------


def _gains(found: Pairs) -> list[float]:
    return [final_accuracy(newton) - final_accuracy(sgd) for sgd, newton in found.values()]


def least_accuracy_gain(raw: Raw) -> float:
    """Returns how much more accurate quasi-Newton is at the end than SGD, at the least."""
    return min(_gains(pairs(raw)))


def least_loss_gain(raw: Raw) -> float:
    """Returns how much lower quasi-Newton's loss is, at the least; NaN if neither has one."""
    return float(np.min([final_loss(a) - final_loss(b) for a, b in pairs(raw).values()]))


def mean_accuracy_gain(raw: Raw) -> float:
    """Returns the mean gain in accuracy where neither diverges; NaN for no such rate."""
    return mean_of(_gains(lasting(raw)))


def excess_difference(raw: Raw) -> float:
    """Returns by how much the methods differ in accuracy more than SGD does at two rates.

    Both are means, where neither diverges; NaN for fewer than two such rates.
    """
    found = lasting(raw)
    ends = [final_accuracy(sgd) for sgd, _ in found.values()]
    own = mean_of(abs(a - b) for a, b in combinations(ends, 2))
    return mean_of(map(abs, _gains(found))) - own


def off_table_1(raw: Raw, column: int = 0) -> float:
    """Returns the mean difference of accuracies to those of a column: SGD's, or the method's.

    Of the rates at which it does not diverge; NaN for none.
    """
    found = _not_diverged(raw, column).items()
    return mean_of(final_accuracy(curve) - ACCURACIES[rate][column] / 100 for rate, curve in found)


def off_table_2(raw: Raw, column: int = 0) -> float:
    """Returns the mean difference of losses to those of a column, likewise."""
    found = _not_diverged(raw, column).items()
    return mean_of(final_loss(curve) - LOSSES[rate][column] for rate, curve in found)


def _not_diverged(raw: Raw, column: int) -> dict[str, Curve]:
    found = curves_of(raw, _only(raw) if column else "sgd")
    return {rate: curve for rate, curve in found.items() if not diverged(curve)}


def share_behind(raw: Raw) -> float:
    """Returns the share of the rows after the start with quasi-Newton's loss above SGD's.

    Over the rates at which neither diverges; NaN for none.
    """
    return mean_of(
        bool(behind)
        for pair in lasting(raw).values()
        for sgd, newton in [aligned(*pair)]
        for behind in newton > sgd
    )


def volatility(curve: Curve) -> float:
    """Returns the deviation of the changes of log loss in the second half of a training.

    It is taken around their mean: a steady fall is no volatility. NaN for fewer than two changes.
    """
    values = losses(curve)
    changes = np.diff(np.log(values[len(values) // 2 :]))
    return float(changes.std(ddof=1)) if len(changes) > 1 else math.nan


def volatility_ratio(raw: Raw) -> float:
    """Returns the geometric mean of quasi-Newton's volatility over SGD's.

    Over the rates at which neither diverges, and SGD's is not 0; NaN for none.
    """
    both = [(volatility(sgd), volatility(newton)) for sgd, newton in lasting(raw).values()]
    return _geometric_mean([newton / sgd for sgd, newton in both if sgd > 0])


def _geometric_mean(ratios: Sequence[float]) -> float:
    with np.errstate(divide="ignore"):
        return float(np.exp(mean_of(np.log(ratios))))


def survivors(raw: Raw) -> float:
    """Returns the share of the quasi-Newton method's trainings that end above chance."""
    return mean_of(trained(newton) for _, newton in pairs(raw).values())


# --- figure 2 ------------------------------------------------------------------------------------


def lead(sgd: Curve, newton: Curve) -> float:
    """Returns SGD's loss over quasi-Newton's, geometric mean of the first rows.

    Infinite or 0 where one of them has ended there; NaN where both have.
    """
    rows = max(1, max(len(sgd["loss"]), len(newton["loss"])) // _START)
    first, second = (each[:rows] for each in aligned(sgd, newton))
    if not len(first) or not np.isfinite(np.minimum(first, second)).all():
        return math.nan
    return _geometric_mean(first / second)


def full_batch_lead(raw: Raw) -> float:
    """Returns the early lead with the largest of the batches."""
    found = pairs(raw)
    return lead(*found[max(found, key=int)])


def late_share(sgd: Curve, newton: Curve) -> float:
    """Returns the share of the rows of the second half with SGD ahead."""
    first, second = aligned(sgd, newton)
    return float((first < second)[len(first) // 2 :].mean())


def least_late_lead(raw: Raw) -> float:
    """Returns the smallest such share of those batch sizes at which neither diverges, or NaN."""
    return min((late_share(*pair) for pair in lasting(raw).values()), default=math.nan)


def crossover(sgd: Curve, newton: Curve) -> float:
    """Returns the step from which SGD is ahead, but for a tenth of the rows; infinite: from none.

    NaN where quasi-Newton was never ahead before, so that there is nothing to cross. A row in which
    both have the same loss is no lead.
    """
    first, second = aligned(sgd, newton)
    ahead, led = first < second, first > second
    for row, step in enumerate(sgd["step"][1:]):
        if ahead[row] and ahead[row:].mean() >= _TREND:
            return float(step) if led[:row].any() else math.nan
    return math.inf if led.any() else math.nan


def first_crossover(raw: Raw) -> float:
    """Returns the crossover with the smallest batch, in epochs; NaN if either diverges there."""
    size = min(pairs(raw), key=int)
    if size not in (found := lasting(raw)):
        return math.nan
    return crossover(*found[size]) * int(size) / int(raw["examples"])


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
    """Returns how much more accurate than SGD the best of those readings is that train.

    NaN if none does.
    """
    found = [
        each for each in _own(raw).values() if all(trained(newton) for _, newton in each.values())
    ]
    return max((mean_of(_gains(each)) for each in found), default=math.nan)


def _own(raw: Raw) -> dict[str, Pairs]:
    """The readings of what the paper has: its vectors are not orthogonal."""
    return {name: each for name, each in readings(raw).items() if "orthogonal" not in name}


# --- the largest rates ---------------------------------------------------------------------------


def limit(raw: Raw, method: str) -> float:
    """Returns the largest rate of the ladder at which a method does not diverge.

    NaN if it trains at no rate: then there is none from which on it diverges.
    """
    found = curves_of(raw, method)
    if not any(map(trained, found.values())):
        return math.nan
    return max(float(rate) for rate, curve in found.items() if not diverged(curve))


def sgds_limit(raw: Raw) -> float:
    """Returns that of SGD, over the one printed."""
    return limit(raw, "sgd") / _LIMIT


def sgds_largest_trained(raw: Raw) -> float:
    """Returns the largest rate at which SGD ends above chance, over the limit printed.

    Half of the smallest of the ladder where there is none.
    """
    return _largest_trained({rate: (curve,) for rate, curve in curves_of(raw, "sgd").items()})


def newtons_limit(raw: Raw) -> float:
    """Returns that of the only reading of the quasi-Newton method, over the one printed."""
    return limit(raw, _only(raw)) / _LIMIT


def limit_ratio(raw: Raw) -> float:
    """Returns quasi-Newton's limit over SGD's."""
    return newtons_limit(raw) / sgds_limit(raw)


def largest_trained(raw: Raw) -> float:
    """Returns the largest rate at which both methods end above chance, over the limit printed.

    Half of the smallest of the ladder where there is none.
    """
    return _largest_trained(pairs(raw))


def _largest_trained(found: Mapping[str, Sequence[Curve]]) -> float:
    """The largest rate at which all of its curves end above chance, over the limit printed."""
    ended = [float(rate) for rate, curves in found.items() if all(map(trained, curves))]
    return max(ended, default=min(map(float, found)) / 2) / _LIMIT


def _only(raw: Raw) -> str:
    return next(str(name) for name in raw["curves"] if name != "sgd")


# --- class gradients beside eigenvectors ---------------------------------------------------------


def learned(raw: Raw) -> bool:
    """Returns whether the network of the class gradients is more accurate than chance."""
    return bool(raw["accuracy"] >= _ABOVE_CHANCE / raw["classes"])


def late_rank(raw: Raw, tolerance: int = 0) -> float:
    """Returns the median rank in the second half of training, by one of the tolerances."""
    return float(np.median(second_half(raw["ranks"][tolerance])))


def off_figure_4(raw: Raw, path: str) -> float:
    """Returns an assigned cosine, less the one printed."""
    return value(raw, path) - 0.36


def random_cosine(raw: Raw) -> float:
    """Returns the expected |cosine| of two random directions in as many dimensions: √(2/πP)."""
    return math.sqrt(2 / (math.pi * raw["size"]))


def kept_over_chance(raw: Raw) -> float:
    """Returns the overlap with the next minibatch, late in training, over random subspaces'."""
    return mean_of(second_half(raw["kept"])) * float(raw["size"] / raw["classes"])


def cutoff(raw: Raw) -> float:
    """Returns the mean of the top C eigenvalues over that of the next C; NaN if that is not > 0."""
    top, following = np.array(raw["eigenvalues"][: 2 * raw["classes"]]).reshape(2, -1).mean(axis=1)
    return float(top / following) if following > 0 else math.nan


def cut(raw: Raw) -> float:
    """Returns how far the spectrum falls at C, beside its falls before and behind.

    Falls are logarithms of the ratio of the means of two neighbouring blocks of C/2 eigenvalues;
    of the four blocks around C the middle ones are across it. NaN where one is not above 0, or
    where there is no fall to compare with.
    """
    half = raw["classes"] // 2
    first = raw["classes"] - 2 * half
    blocks = np.array(raw["eigenvalues"][first : first + 4 * half]).reshape(4, half).mean(axis=1)
    if not (blocks > 0).all():
        return math.nan
    before, across, behind = -np.diff(np.log(blocks))
    around = (before + behind) / 2
    return float(across / around) if around > 0 else math.nan


def guessed(raw: Raw, method: str) -> float:
    """Returns 1 if a count of the eigenvalues that stand out is C, else 0; NaN of no count."""
    count = raw["outliers"][method]
    return math.nan if math.isnan(count) else float(count == raw["classes"])


def longest(raw: Raw) -> float:
    """Returns the largest eigenvalue of the cosines between class gradients: 1 if orthogonal."""
    cosines = np.array(raw["of_all"]["between"], dtype=float)
    if not np.isfinite(cosines).all():
        return math.nan
    return float(np.linalg.eigvalsh(cosines)[-1])


VEHICLES: Final = (0, 1, 8, 9)
"""Of the classes of CIFAR-10: airplane, automobile, ship and truck. The others are animals."""


def within_kinds(raw: Raw) -> float:
    """Returns the mean cosine of two classes of one kind less that of two of different kinds."""
    cosines = np.array(raw["of_all"]["between"], dtype=float)
    vehicle = np.isin(np.arange(len(cosines)), VEHICLES)
    same = vehicle[:, None] == vehicle
    others = ~np.eye(len(cosines), dtype=bool)
    return float(cosines[same & others].mean() - cosines[~same].mean())


def curvature_ratios(raw: Raw) -> list[float]:
    """Returns the median of v_kᵀHv_k / λ_k over the classes, at each step that has it."""
    return [float(np.median(ratios)) for ratios in raw["ratios"].values()]


def late_curvature_ratio(raw: Raw) -> float:
    """Returns their mean in the second half of training."""
    return mean_of(second_half(curvature_ratios(raw)))


def first_curvature_ratio(raw: Raw) -> float:
    """Returns that before the first step, over C."""
    return curvature_ratios(raw)[0] / float(raw["classes"])


def fall_of_curvature_ratio(raw: Raw) -> float:
    """Returns their mean in the second half of training, over the first."""
    return late_curvature_ratio(raw) / curvature_ratios(raw)[0]
