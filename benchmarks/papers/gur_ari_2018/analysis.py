"""What the raw figures of `gur_ari_2018` say: numbers for claims and tables, and curves.

Those of spectra are in ``edges``, and are named here as well, since data look for them here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.gur_ari_2018.edges import (  # noqa: F401 (data look for them here)
    deeper_than_elsewhere,
    density,
    dip,
    log_normal,
    log_normal_misfit,
    mean_of_kth,
    outliers,
    outliers_beyond_k,
    outliers_of_the_paper,
    scree,
)
from benchmarks.papers.reductions import Curve, column, mean_of, median_of
from benchmarks.papers.reproduction import Raw

Array = NDArray[np.float64]
Matrix = list[list[float]]

_TRAINED: Final = 100  # steps of "some training": there the paper's matrices are preserved
_NOTHING: Final = 1e-6  # an eigenvalue below this, relative to the largest, is zero

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


def before_the_rise(raw: Raw) -> float:
    """Returns the smallest f_top of the bases before some training."""
    pairs = zip(raw["saved"], raw["f_top"], strict=True)
    return float(min(value for step, value in pairs if step < _TRAINED))


def rise(raw: Raw) -> float:
    """Returns by how much f_top is larger after some training than at the start."""
    return trained_median(raw, "f_top") - float(raw["f_top"][0])


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
    """Returns λ_{k−1}/λ_{k+1} over (k + 1)/(k − 1), that of eigenvalues in proportion to 1/i.

    It is the median after some training; without a positive λ_{k+1} there is none.
    """
    k = raw["k"]
    values = since(raw, "eigenvalues").reshape(-1, 2 * k)
    above, below = values[:, k - 2], values[:, k]
    if not (below > 0).all():
        return math.nan
    return float(median_of(above / below) * (k - 1) / (k + 1))


def first_trained(raw: Raw) -> int:
    """Returns the number of the first basis after some training."""
    return next((i for i, step in enumerate(raw["saved"]) if step >= _TRAINED), len(raw["saved"]))


def matrix_of(raw: Raw, subspace: str | int) -> Matrix:
    """Returns the overlaps of all bases: of the top or next k, or the top of so many dimensions."""
    if subspace == "next":
        return cast("Matrix", raw["next"])
    return cast("Matrix", raw["preserved"][str(raw["k"] if subspace == "top" else subspace)])


def kept(raw: Raw, subspace: str) -> float:
    """Returns the overlap of the top or next k after some training with the last ones."""
    matrix, first = matrix_of(raw, subspace), first_trained(raw)
    return matrix[first][-1] if first < len(matrix) else math.nan


def kept_more(raw: Raw) -> float:
    """Returns how much more of the top k is kept than of the next k."""
    return kept(raw, "top") - kept(raw, "next")


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
    """Returns how much less the top 2k are preserved than the top k − 1."""
    means = by_dimension(raw)
    return float(means[raw["k"] - 1] - means[2 * raw["k"]])


def largest_rise(raw: Raw) -> float:
    """Returns the largest rise of preservation with the dimension, from k on."""
    means = [value for d, value in sorted(by_dimension(raw).items()) if d >= raw["k"]]
    return float(np.max(np.diff(means)))


def spread_over_eigenvectors(raw: Raw, *steps: int) -> float:
    """Returns over how many of the top k eigenvectors the gradient is spread, at the least."""
    tops = [np.array(fractions_at(raw, step)[: raw["k"]]) for step in steps]
    counts = [float(top.sum() ** 2 / np.square(top).sum()) for top in tops if len(top)]
    return min(counts, default=math.nan)


def off_the_sum(raw: Raw, step: int, start: int, stop: int) -> float:
    """Returns a sum of c_i² at a step, i from start + 1 to stop, less what the paper prints."""
    found = fractions_at(raw, step)
    return math.fsum(found[start:stop]) - SUMS[step, start, stop] if found else math.nan


def fractions_at(raw: Raw, step: int) -> list[float]:
    """Returns the parts of the gradient along each eigenvector at a step; none without a basis."""
    found = dict(zip(raw["saved"], raw["fractions"], strict=True))
    return list(found.get(step, []))


def smallest_top(raw: Raw) -> float:
    """Returns λ_k over λ_1, at the least."""
    values = np.array(raw["eigenvalues"], dtype=float)
    return float(np.min(values[:, raw["k"] - 1] / values[:, 0]))


def growth(raw: Raw) -> float:
    """Returns λ_1 in the first half of training, its median without the start, over the start's."""
    values = raw["largest"]
    return median_of(values[1 : len(values) // 2 + 1]) / float(values[0])


def decay(raw: Raw) -> float:
    """Returns the mean λ_1 of the last tenth of training over the median of the first half."""
    values = raw["largest"]
    last = values[-max(len(values) // 10, 1) :]
    return mean_of(last) / median_of(values[1 : len(values) // 2 + 1])


def head_over_first(raw: Raw) -> float:
    """Returns the size of the top weights in the first eigenvector over that of the first layer.

    Both are root mean squares; it is the mean over the steps that are kept.
    """
    return mean_of(rms[-2] / rms[0] for rms in raw["anatomy"]["rms"])


def off_four_times(raw: Raw) -> float:
    """Returns it less 4, which the paper prints."""
    return head_over_first(raw) - 4


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
    """Yields a series up to the last basis."""
    shown = [i for i, step in enumerate(raw["at"]) if step <= raw["saved"][-1]]
    yield Curve([raw["at"][i] for i in shown], [raw[name][i] for i in shown])


def off_the_table(raw: Raw) -> float:
    """Returns the mean overlap less the paper's."""
    return float(raw["mean_overlap"] - CASES[raw["case"]]["paper"])


# --- the solvable model ------------------------------------------------------------------------


def off_the_trajectory(raw: Raw) -> float:
    """Returns the largest relative error at the end: of the leads, and of the weights."""
    leads = np.array(raw["lead"][-1], dtype=float) / np.array(raw["flow"][-1], dtype=float)
    return float(np.max([*np.abs(leads - 1), raw["trajectory"][-1]]))


def inverse_time(raw: Raw) -> float:
    """Returns by how much the two eigenvalues differ from 1/(ηt) at the end, relatively."""
    return float(max(abs(value * raw["time"][-1] - 1) for value in raw["eigenvalues"][-1][:2]))


def log_time(raw: Raw) -> Array:
    """Returns log ηt."""
    return cast("Array", np.log(np.array(raw["time"], dtype=float)))


def component(raw: Raw, name: str, number: int) -> Array:
    """Returns one of the numbers of each row of a column."""
    return cast("Array", np.array(raw[name], dtype=float)[:, number])


def times_time(raw: Raw, name: str, number: int) -> Array:
    """Returns one of the numbers of each row of a column, times ηt."""
    return cast("Array", component(raw, name, number) * np.array(raw["time"], dtype=float))


def _gap(case: Raw) -> Array:
    values, k = np.array(case["eigenvalues"], dtype=float), case["k"]
    return cast("Array", values[:, k - 1] / np.maximum(values[:, k], _NOTHING * values[:, 0]))


_MIXTURES: Final[dict[str, tuple[Callable[[Raw], bool], Callable[[Raw], Any]]]] = {
    "plain": (lambda case: not case["noise"] and not case["bias"] and case["k"] > 2, _gap),
    "noisy": (lambda case: case["noise"] and not case["bias"], lambda case: case["f_top"]),
    "biased": (lambda case: case["bias"], lambda case: component(case, "fractions", -1)),
}
"""Kinds of mixtures, and what is looked at: λ_k/λ_{k+1} without noise and biases, for more than
two classes; f_top with noise and without biases; c_k² with biases."""


def least_of_mixtures(raw: Raw, kind: str) -> float:
    """Returns what is looked at in mixtures of that kind, at the end, at the least."""
    of_kind, of = _MIXTURES[kind]
    return float(min(of(case)[-1] for case in filter(of_kind, raw["cases"])))


def mixtures(raw: Raw, kind: str) -> Iterator[Curve]:
    """Yields it by step for each of the mixtures of that kind; dashed with noise."""
    of_kind, of = _MIXTURES[kind]
    for case in filter(of_kind, raw["cases"]):
        k, noise = case["k"], case["noise"]
        label = f"k = {k}" + (f", σ = {noise:g}" if noise and case["bias"] else "")
        look = {"color": {2: "dominant", 5: "bulk", 10: "third"}.get(k, "ink")}
        if noise and case["bias"]:
            look["ls"] = "--"
        yield Curve([max(step, 0.5) for step in case["step"]], of(case), label, look=look)


def descents(raw: Raw) -> float:
    """Returns the share of steps of Newton's method that lowered the loss."""
    return float(np.mean(np.diff(raw["loss"]["newton"]) < 0))


def climbs(raw: Raw) -> float:
    """Returns the number of steps of Newton's method that raised the loss.

    It is one more, where the last loss is not below the first: to stand still is not to descend.
    """
    losses = raw["loss"]["newton"]
    return float(np.sum(np.diff(losses) > 0) + (losses[-1] >= losses[0]))


def rank_missed(raw: Raw) -> float:
    """Returns the largest difference of a rank from k(k − 1)."""
    return float(max(abs(rank - k * (k - 1)) for k, rank in raw["ranks"]))
