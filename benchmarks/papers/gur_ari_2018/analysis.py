"""What the raw figures of `gur_ari_2018` say: numbers for claims and tables, and curves.

Those of spectra are in ``edges``, those of the solvable model in ``toys``; they are named here as
well, since data look for them here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.gur_ari_2018.edges import (  # noqa: F401 (data look for them here)
    deeper_than_elsewhere,
    density,
    dip,
    fitted_on_average,
    gap_at_k,
    log_normal,
    log_normal_misfit,
    mean_of_kth,
    outliers,
    outliers_beyond_k,
    outliers_of_the_paper,
    scree,
)
from benchmarks.papers.gur_ari_2018.toys import (  # noqa: F401
    climbs,
    component,
    descents,
    inverse_time,
    least_of_mixtures,
    log_time,
    mixtures,
    off_the_trajectory,
    rank_missed,
    times_time,
)
from benchmarks.papers.reductions import Curve, column, mean_of, median_of
from benchmarks.papers.reproduction import Raw

Array = NDArray[np.float64]
Matrix = list[list[float]]

_TRAINED: Final = 100  # steps of "some training": there the paper's matrices are preserved
_MUCH_LATER: Final = 400  # the step up to which all networks are followed
_BETWEEN: Final = 200
_RANDOM: Final = 4.36  # over how many of ten axes a random direction is spread, on average
_FEWEST: Final = 6  # λ_1 along a training, so that its last tenth is behind its first half
_LEAST: Final = 0.1  # a mean overlap below this is too small to divide by

SUMS: Final = {(0, 0, 20): 0.20, (50, 0, 20): 0.94, (50, 0, 10): 0.93, (50, 10, 20): 0.01}
"""What the paper prints beside Figure 11: sums of c_i², by step and the i that they are over."""


# --- the top subspace along training -----------------------------------------------------------


def since(raw: Raw, name: str, step: int = _TRAINED) -> Array:
    """Returns what the bases from a step on say."""
    pairs = zip(raw["saved"], column(raw, name), strict=True)
    return np.array([value for at, value in pairs if at >= step], dtype=float)


def trained_median(raw: Raw, name: str) -> float:
    """Returns the median of a column after some training."""
    return median_of(since(raw, name))


def f_top_trained(raw: Raw) -> float:
    """Returns the median f_top along the way after some training."""
    pairs = zip(raw["f_at"], raw["f"], strict=True)
    return median_of(value for step, value in pairs if step >= _TRAINED)


def more_on_the_first(raw: Raw) -> float:
    """Returns how much larger the median f_top is on the first data than on the second."""
    first, second = raw["f"]
    return median_of(first) - median_of(second)


def before_the_rise(raw: Raw) -> float:
    """Returns the smallest f_top along the way before some training."""
    pairs = zip(raw["f_at"], raw["f"], strict=True)
    return float(min((value for step, value in pairs if step < _TRAINED), default=math.nan))


def at_the_start(raw: Raw) -> float:
    """Returns f_top at step 0."""
    return float(dict(zip(raw["f_at"], raw["f"], strict=True)).get(0, math.nan))


def rise(raw: Raw) -> float:
    """Returns by how much f_top is larger after some training than at the start."""
    return f_top_trained(raw) - at_the_start(raw)


def loss_is_halved(raw: Raw) -> bool:
    """Returns whether training has brought the loss to half of what it was."""
    return bool(raw["loss"][-1] <= raw["loss"][0] / 2)


def half_are_fitted(raw: Raw) -> bool:
    """Returns whether half of the examples are fitted after some training."""
    accuracies = since(raw, "accuracy_there")
    return len(accuracies) > 0 and bool(accuracies[0] >= 0.5)


def labels_are_fitted(raw: Raw) -> bool:
    """Returns whether nine tenths of the examples are fitted at the end."""
    return bool(raw["accuracy"] >= 0.9)


def nothing_is_fitted(raw: Raw) -> bool:
    """Returns whether the loss of ten classes is that of guessing, but for 3 %, to the end."""
    return bool(min(raw["loss"]) >= 0.97 * math.log(10))


def all_are_fitted(raw: Raw) -> bool:
    """Returns whether all but a hundredth of the examples are fitted at the end."""
    return bool(raw["accuracy"][-1] >= 0.99)


def tested_over_trained(raw: Raw) -> float:
    """Returns the mean overlap on test data over that on the training data."""
    of_training = raw["mean_overlap"]
    return float(raw["mean_overlap_test"] / of_training) if of_training >= _LEAST else math.nan


def random_ratio(raw: Raw) -> float:
    """Returns the overlap of random vectors in the top subspace, over that of the gradient."""
    return median_of(since(raw, "random_in_top") / since(raw, "overlap_there"))


def estimated_overlap(raw: Raw, subspace: str = "top") -> float:
    """Returns the overlap of random vectors in the top or next k subspace by eq. 4."""
    k = raw["k"]
    values = since(raw, "eigenvalues").reshape(-1, 2 * k)
    values = values[:, :k] if subspace == "top" else values[:, k:]
    squares = np.square(values).sum(axis=1)
    return median_of(values.sum(axis=1) / np.sqrt(k * squares))


def off_the_estimate(raw: Raw) -> float:
    """Returns the overlap of random vectors in the top subspace less √(3/4), the paper's."""
    return trained_median(raw, "random_in_top") - math.sqrt(3 / 4)


def top_less_next(raw: Raw) -> float:
    """Returns how much more random vectors of the top k overlap than those of the next k."""
    return estimated_overlap(raw) - estimated_overlap(raw, "next")


def gap_around_k(raw: Raw) -> float:
    """Returns by how much more steeply eigenvalues fall from k − 1 to k + 1 than around there.

    It is the exponent of the power law that these two are of, less that of the one which is fitted
    to eigenvalues 2 to 2k: 0 for any power law. It is the median after some training; without
    eigenvalues that are all positive there is none.
    """
    k = raw["k"]
    values = since(raw, "eigenvalues").reshape(-1, 2 * k)
    if not (values > 0).all():
        return math.nan
    logs = np.log(values)
    places = np.log(np.arange(2, 2 * k + 1))
    fall = (logs[:, k - 2] - logs[:, k]) / math.log((k + 1) / (k - 1))
    return median_of(fall + np.polyfit(places, logs[:, 1:].T, 1)[0])


def first_trained(raw: Raw) -> int:
    """Returns the number of the first basis after some training."""
    return next((i for i, step in enumerate(raw["saved"]) if step >= _TRAINED), len(raw["saved"]))


def matrix_of(raw: Raw, subspace: str | int) -> Matrix:
    """Returns the overlaps of all bases: of the top or next k, or the top of so many dimensions."""
    if subspace == "next":
        return cast("Matrix", raw["next"])
    return cast("Matrix", raw["preserved"][str(raw["k"] if subspace == "top" else subspace)])


def kept(raw: Raw, subspace: str | int, start: int = _TRAINED, stop: int = _MUCH_LATER) -> float:
    """Returns the overlap of a subspace at one step with that at another; NaN without either."""
    matrix, at = matrix_of(raw, subspace), raw["saved"]
    if start not in at or stop not in at:
        return math.nan
    return float(matrix[at.index(start)][at.index(stop)])


def kept_more(raw: Raw, than: str | int) -> float:
    """Returns how much more of the top k is kept than of another subspace."""
    return kept(raw, "top") - kept(raw, than)


def settles(raw: Raw) -> float:
    """Returns how much more of the top k is kept from step 200 to 400 than from 100 to 200."""
    early = kept(raw, "top", _TRAINED, _BETWEEN)
    return kept(raw, "top", _BETWEEN, _MUCH_LATER) - early


def starts(raw: Raw) -> list[int]:
    """Returns the numbers of a few bases: the first after some training, and not the last."""
    last = len(raw["saved"]) - 2
    evenly = {round(i) for i in np.linspace(0, max(last, 0), 6)}
    return sorted(i for i in evenly | {first_trained(raw)} if i <= last)


def overlaps_from_starts(raw: Raw, subspace: str | int) -> Iterator[Curve]:
    """Yields the overlap with later subspaces by distance, from each of a few starts."""
    saved, matrix = raw["saved"], matrix_of(raw, subspace)
    for i in starts(raw):
        after = [step - saved[i] for step in saved[i:]]
        yield Curve(after, matrix[i][i:], f"$t_1 = {saved[i]}$", _place(raw, i))


def overlaps_by_dimension(raw: Raw) -> Iterator[Curve]:
    """Yields the mean overlap with later subspaces by dimension, from each of a few starts."""
    for i in starts(raw):
        means = by_dimension(raw, i)
        label = f"$t_1 = {raw['saved'][i]}$"
        yield Curve(list(means), list(means.values()), label, _place(raw, i))


def _place(raw: Raw, start: int) -> float:
    return start / max(len(raw["saved"]) - 2, 1)


def by_dimension(raw: Raw, start: int | None = None) -> dict[int, float]:
    """Returns the mean overlap with later subspaces, by dimension (Figure 3).

    Args:
        raw: of a run that is followed.
        start: the basis to start from, by its number (default: all after some training).
    """
    first = first_trained(raw)
    chosen = range(first, len(raw["saved"]) - 1) if start is None else (start,)
    return {
        int(d): mean_of(v for i in chosen for v in matrix[i][i + 1 :])
        for d, matrix in raw["preserved"].items()
    }


def lost_beyond(raw: Raw) -> float:
    """Returns how much less subspaces of 1.5 k dimensions and more are preserved than those of k.

    The latter are those of k − 1, k and k + 1.
    """
    means, k = by_dimension(raw), raw["k"]
    near = mean_of(value for d, value in means.items() if abs(d - k) <= 1)
    return near - mean_of(value for d, value in means.items() if d >= 1.5 * k)


def slope_from_k(raw: Raw) -> float:
    """Returns the slope of preservation against the dimension, from k on."""
    means = {d: value for d, value in by_dimension(raw).items() if d >= raw["k"]}
    return float(np.polyfit(list(means), list(means.values()), 1)[0])


def gained_below_k(raw: Raw) -> float:
    """Returns how much more the top k − 1 are preserved than the top 2."""
    means = by_dimension(raw)
    return means[raw["k"] - 1] - means[2]


def spread(fractions: list[float]) -> float:
    """Returns over how many of the eigenvectors the gradient is spread; NaN of none."""
    top = np.array(fractions)
    return float(top.sum() ** 2 / np.square(top).sum()) if len(top) else math.nan


def spread_over_eigenvectors(raw: Raw, *steps: int) -> float:
    """Returns over how many of the top k the gradient is spread, on average of these steps."""
    return mean_of(spread(fractions_at(raw, step)[: raw["k"]]) for step in steps)


def spread_over_random(raw: Raw) -> float:
    """Returns over how many of ten the gradient is spread, over the same for random directions.

    It is the geometric mean after some training.
    """
    spreads = [spread(list(each[: raw["k"]])) for each in since(raw, "fractions")]
    return math.exp(mean_of(map(math.log, spreads))) / _RANDOM


def off_the_sum(raw: Raw, step: int, start: int, stop: int) -> float:
    """Returns a sum of c_i² at a step, i from start + 1 to stop, less what the paper prints."""
    found = fractions_at(raw, step)
    return math.fsum(found[start:stop]) - SUMS[step, start, stop] if found else math.nan


def fractions_at(raw: Raw, step: int) -> list[float]:
    """Returns the parts of the gradient along each eigenvector at a step; none without a basis."""
    found = dict(zip(raw["saved"], raw["fractions"], strict=True))
    return list(found.get(step, []))


def smallest_top(raw: Raw) -> float:
    """Returns λ_k over the largest |λ| that was found, at the least; NaN unless λ_1 is positive."""
    values = np.array(raw["eigenvalues"], dtype=float)
    if not (values[:, 0] > 0).all():
        return math.nan
    return float(np.min(values[:, raw["k"] - 1] / np.abs(values).max(axis=1)))


def growth(raw: Raw) -> float:
    """Returns λ_1 in the first half of training, its median without the start, over the start's."""
    values = raw["largest"]
    return median_of(values[1 : len(values) // 2 + 1]) / float(values[0])


def decay(raw: Raw) -> float:
    """Returns the mean λ_1 of the last tenth of training over the median of the first half.

    Where the last tenth is not wholly behind the first half there is none.
    """
    values = raw["largest"]
    if len(values) < _FEWEST:
        return math.nan
    last = values[-max(len(values) // 10, 1) :]
    return mean_of(last) / median_of(values[1 : len(values) // 2 + 1])


def head_over_first(raw: Raw, size: str) -> float:
    """Returns the size of the top weights in the first eigenvector over that of the first layer.

    It is the geometric mean over the steps that are kept.

    Args:
        raw: of a run that keeps them.
        size: ``largest`` component, or ``rms``, the root mean square.
    """
    sizes = raw["anatomy"]["rms"] if size == "rms" else largest_components(raw["anatomy"])
    return math.exp(mean_of(math.log(each[-2] / each[0]) for each in sizes))


def largest_components(anatomy: Raw) -> Matrix:
    """Returns the largest |component| of the first eigenvector in each part, by its steps."""
    return [
        [max(map(abs, (*lows, *highs))) for lows, highs in zip(low, high, strict=True)]
        for low, high in zip(anatomy["low"], anatomy["high"], strict=True)
    ]


def head_share(raw: Raw) -> float:
    """Returns the share of the last layer in the first eigenvector, at the most."""
    return float(np.max(np.array(raw["anatomy"]["share"])[:, -2:].sum(axis=1)))


def head(raw: Raw, number: int, part: str) -> Iterator[Curve]:
    """Yields the first eigenvector's weights or biases in the last layer, at one of its steps."""
    values = np.array(list(raw["anatomy"]["head"].values())[number], dtype=float)
    weights = len(values) - raw["anatomy"]["sizes"][-1]
    shown = slice(0, weights) if part == "weights" else slice(weights, len(values))
    yield Curve(np.arange(len(values))[shown], values[shown])


def early(raw: Raw, name: str) -> Iterator[Curve]:
    """Yields a series up to the last step at which f_top was measured."""
    shown = [i for i, step in enumerate(raw["at"]) if step <= raw["f_at"][-1]]
    yield Curve([raw["at"][i] for i in shown], [raw[name][i] for i in shown])


def off_the_table(raw: Raw) -> float:
    """Returns the mean overlap less the paper's."""
    return float(raw["mean_overlap"] - CASES[raw["case"]]["paper"])
