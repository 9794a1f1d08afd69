"""What spectra of `gur_ari_2018` say: outliers, and the density at the right edge."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import expon, kstest, norm, uniform

from benchmarks.papers.reductions import Curve
from benchmarks.papers.reproduction import Raw
from subspace_optim.diagnostics import count_outliers

Array = NDArray[np.float64]

_BANDWIDTH: Final = 0.05  # of the density of eigenvalues, in decades
_SHOWN: Final = 30  # eigenvalues among which outliers are looked for, whatever k is
_ELSEWHERE: Final = (0.5, 1.5, 2.0, 2.5)  # times k, where a dip is looked for as a control


def scree(raw: Raw) -> Array:
    """Returns the top 30 eigenvalues that are positive."""
    values = np.array(raw["eigenvalues"][:_SHOWN], dtype=float)
    return cast("Array", np.where(values > 0, values, np.nan))


def outliers(raw: Raw) -> int:
    """Returns how many eigenvalues stand out, by the elbow of the top 30."""
    values = torch.tensor(raw["eigenvalues"][:_SHOWN], dtype=torch.float64)
    return count_outliers(values, "elbow").count


def gap_at_k(raw: Raw) -> float:
    """Returns the largest gap at k, or at k − 1, less the largest one elsewhere but after λ_1.

    A gap at j is the exponent of the power law that λ_j and λ_{j+1} are of: 1 for all of 1/i. Those
    of the top 30 are looked at, which all have to be positive.
    """
    values, k = np.array(raw["eigenvalues"][:_SHOWN], dtype=float), raw["k"]
    if not (values > 0).all():
        return math.nan
    places = np.arange(1, len(values) + 1)
    gaps = np.diff(np.log(values)) / np.diff(-np.log(places))
    of_classes = np.isin(places[:-1], (k - 1, k))
    elsewhere = ~of_classes & (places[:-1] > 1)
    return float(gaps[of_classes].max() - gaps[elsewhere].max())


def outliers_of_the_paper(raw: Raw) -> str:
    """Returns how many stand out in its Figure 4, which has no five digits."""
    return "–" if raw["labels"] == "five" else str(raw["k"])


def outliers_beyond_k(raw: Raw) -> float:
    """Returns how many more there are than classes."""
    return float(outliers(raw) - raw["k"])


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


def log_normal_misfit(raw: Raw) -> float:
    """Returns how far log λ of the top k are from a Gaussian, over what they are from others.

    It is the largest distance of the distribution functions, all realisations together, over the
    smaller one of two more: a uniform distribution, and an exponential one, which is that of
    eigenvalues in proportion to 1/i with i anywhere between 1 and k. All three have the mean and
    the deviation that were found.
    """
    if not positive(raw):
        return math.nan
    values = decades(raw)[:, : raw["k"]].ravel()
    middle, deviation = values.mean(), values.std()
    reach = math.sqrt(3) * deviation
    others = (uniform(middle - reach, 2 * reach), expon(middle - deviation, deviation))
    gaussian = kstest(values, norm(middle, deviation).cdf).statistic
    return float(gaussian / min(kstest(values, other.cdf).statistic for other in others))


def positive(raw: Raw) -> bool:
    """Returns whether all eigenvalues have logarithms."""
    return bool((np.array(raw["eigenvalues"], dtype=float) > 0).all())


def fitted_on_average(raw: Raw) -> bool:
    """Returns whether nine tenths of the examples are fitted, on average over realisations."""
    return bool(np.mean(raw["accuracies"]) >= 0.9)


def deeper_than_elsewhere(raw: Raw) -> float:
    """Returns the dip at the k-th less the deepest one elsewhere: at k/2, 3k/2, 2k and 5k/2."""
    k = raw["k"]
    return dip(raw) - min(dip(raw, round(times * k)) for times in _ELSEWHERE)


def dip(raw: Raw, number: int | None = None) -> float:
    """Returns the smallest density around an eigenvalue over the lower of the peaks beside it.

    Around it: between the mean log λ of the 1.2 n-th and of the 0.8 n-th.

    Args:
        raw: of a run with realisations.
        number: n, of the eigenvalue (default: k).
    """
    if not positive(raw):
        return math.nan
    values, n = decades(raw), number or raw["k"]
    means = values.mean(axis=0)
    grid = np.linspace(values.min(), values.max(), 1000)
    found = log_density(raw, grid)
    inside = (grid >= means[round(1.2 * n) - 1]) & (grid <= means[round(0.8 * n) - 1])
    if not inside.any():
        return math.nan
    lowest = int(np.argmin(np.where(inside, found, np.inf)))
    return float(found[lowest] / min(found[: lowest + 1].max(), found[lowest:].max()))
