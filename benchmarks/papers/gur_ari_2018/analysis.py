"""What the raw figures of `gur_ari_2018` say: numbers for claims and tables, and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.reductions import Curve, mean_of, median_of
from benchmarks.papers.reproduction import Raw
from subspace_optim.diagnostics import count_outliers

Array = NDArray[np.float64]
Matrix = list[list[float]]

_TRAINED: Final = 100  # steps of "some training": there the paper's matrices are preserved
_EARLY: Final = 50  # steps after which the paper finds the gradient in the top subspace
_BANDWIDTH: Final = 0.05  # of the density of eigenvalues, in decades
_NOTHING: Final = 1e-6  # an eigenvalue below this, relative to the largest, is zero
_FITTED: Final = 0.9  # training accuracy from which a network has fitted its labels


# --- the top subspace along training -----------------------------------------------------------


def since(raw: Raw, name: str, step: int = _TRAINED) -> Array:
    """Returns what the bases from a step on say."""
    pairs = zip(raw["saved"], raw[name], strict=True)
    return np.array([value for at, value in pairs if at >= step], dtype=float)


def trained_median(raw: Raw, name: str) -> float:
    """Returns the median of a column after some training."""
    return median_of(since(raw, name))


def random_ratio(raw: Raw) -> float:
    """Returns the overlap of random vectors in the top subspace, over that of the gradient."""
    return median_of(since(raw, "random_in_top") / since(raw, "overlap_there"))


def estimated_overlap(raw: Raw) -> float:
    """Returns the overlap of random vectors in the top subspace by eq. 4."""
    values = since(raw, "eigenvalues").reshape(-1, 2 * raw["k"])[:, : raw["k"]]
    squares = np.square(values).sum(axis=1)
    return median_of(values.sum(axis=1) / np.sqrt(raw["k"] * squares))


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
    """Returns the largest rise of preservation with the dimension, from k − 1 on."""
    means = [value for d, value in sorted(by_dimension(raw).items()) if d >= raw["k"] - 1]
    return float(np.max(np.diff(means)))


def spread_over_eigenvectors(raw: Raw) -> float:
    """Returns over how many of the top k eigenvectors the gradient is spread, at the least."""
    tops = [fractions[: raw["k"]] for fractions in since(raw, "fractions", _EARLY)]
    counts = [float(top.sum() ** 2 / np.square(top).sum()) for top in tops]
    return min(counts, default=math.nan)


def fractions_at(raw: Raw, step: int) -> list[float]:
    """Returns the parts of the gradient along each eigenvector at a step; none without a basis."""
    found = dict(zip(raw["saved"], raw["fractions"], strict=True))
    return list(found.get(step, []))


def smallest_top(raw: Raw) -> float:
    """Returns λ_k over λ_1, at the least."""
    values = np.array(raw["eigenvalues"], dtype=float)
    return float(np.min(values[:, raw["k"] - 1] / values[:, 0]))


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
    """Returns the distance of the mean overlap from the paper's."""
    return float(abs(raw["mean_overlap"] - CASES[raw["case"]]["paper"]))


# --- spectra -----------------------------------------------------------------------------------


def scree(raw: Raw) -> Array:
    """Returns the top 3k eigenvalues that are positive."""
    values = np.array(raw["eigenvalues"][: 3 * raw["k"]], dtype=float)
    return cast("Array", np.where(values > 0, values, np.nan))


def outliers(raw: Raw) -> int:
    """Returns how many eigenvalues stand out, by the largest ratio in the top 3k."""
    values = torch.tensor(raw["eigenvalues"][: 3 * raw["k"]], dtype=torch.float64)
    return count_outliers(values, "ratio", floor=1e-2).count


def outliers_of_the_paper(raw: Raw) -> str:
    """Returns how many stand out in its Figure 4, which has no five digits."""
    return "–" if raw["labels"] == "five" else str(raw["k"])


def outliers_beyond_k(raw: Raw) -> float:
    """Returns how many more there are than classes."""
    return float(outliers(raw) - raw["k"])


def fitted(raw: Raw) -> bool:
    """Returns whether the labels were fitted."""
    return bool(raw["accuracy"] >= _FITTED)


def decades(raw: Raw) -> Array:
    """Returns log10 λ, a row for each realisation."""
    return cast("Array", np.log10(np.array(raw["eigenvalues"], dtype=float)))


def log_density(raw: Raw, grid: Array) -> Array:
    """Returns the density of log10 λ at a grid, all realisations together."""
    values = np.array(raw["eigenvalues"], dtype=float)
    points = np.log10(values[values > 0])
    return cast("Array", norm.pdf(grid[:, None], points, _BANDWIDTH).mean(axis=1))


def density(raw: Raw) -> Iterator[Curve]:
    """Yields the density of log10 λ."""
    x = _around(raw)
    yield Curve(x, log_density(raw, x))


def log_normal(raw: Raw) -> Iterator[Curve]:
    """Yields the density of a Gaussian with mean and deviation of the top k."""
    values, x = decades(raw), _around(raw)
    top = values[:, : raw["k"]]
    yield Curve(x, norm.pdf(x, top.mean(), top.std()) * raw["k"] / values.shape[1])


def mean_of_kth(raw: Raw) -> float:
    """Returns the mean of log10 λ_k."""
    return float(decades(raw)[:, raw["k"] - 1].mean())


def _around(raw: Raw) -> Array:
    values = decades(raw)
    return np.linspace(values.min() - 0.1, values.max() + 0.1, 400)


def dip(raw: Raw) -> float:
    """Returns the smallest density around the mean λ_k over the lower of the peaks beside it.

    Around it: between the mean log λ of the 1.2 k-th and of the 0.8 k-th.
    """
    values, k = decades(raw), raw["k"]
    means = values.mean(axis=0)
    grid = np.linspace(values.min(), values.max(), 1000)
    found = log_density(raw, grid)
    inside = (grid >= means[round(1.2 * k) - 1]) & (grid <= means[round(0.8 * k) - 1])
    if not inside.any():
        return math.nan
    lowest = int(np.argmin(np.where(inside, found, np.inf)))
    return float(found[lowest] / min(found[:lowest].max(), found[lowest:].max()))


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
    """Returns the number of steps of Newton's method that raised the loss."""
    return float(np.sum(np.diff(raw["loss"]["newton"]) > 0))


def rank_missed(raw: Raw) -> float:
    """Returns the largest difference of a rank from k(k − 1)."""
    return float(max(abs(rank - k * (k - 1)) for k, rank in raw["ranks"]))
