"""What raw figures of `gur_ari_2018` say of its solvable model, and of its Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.reductions import Curve
from benchmarks.papers.reproduction import Raw

Array = NDArray[np.float64]

_NOTHING: Final = 1e-6  # an eigenvalue below this, relative to the largest, is zero
_RISE: Final = 1e-5  # of the loss: less than that is rounding


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


def _evenness(case: Raw) -> Array:
    """λ_{k−1}/λ_k over λ_1/λ_{k−1}: above 1, where the last is further away than they are apart."""
    values, k = np.array(case["eigenvalues"], dtype=float), case["k"]
    last = np.where(values[:, k - 1] > 0, values[:, k - 1], np.nan)
    return cast("Array", np.square(values[:, k - 2]) / (last * values[:, 0]))


def _plain(case: Raw) -> bool:
    return not case["noise"] and not case["bias"] and case["k"] > 2


def _noisy(case: Raw) -> bool:
    return bool(case["noise"]) and not case["bias"]


def _biased(case: Raw) -> bool:
    return bool(case["bias"])


_MIXTURES: Final[dict[str, tuple[Callable[[Raw], bool], Callable[[Raw], Any]]]] = {
    "plain": (_plain, _gap),
    "noisy": (_noisy, lambda case: case["f_top"]),
    "bulk": (_noisy, _gap),
    "biased": (_biased, lambda case: component(case, "fractions", -1)),
    "one smaller": (_biased, _evenness),
}
"""Kinds of mixtures, and what is looked at: λ_k/λ_{k+1} without noise and biases, for more than
two classes; f_top, and λ_k/λ_{k+1}, with noise and without biases; with biases c_k², and by how
much λ_k is away from the others."""


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
    """Returns the number of steps of Newton's method that raised the loss by more than rounding.

    It is one more, where the last loss is not below the first: to stand still is not to descend.
    """
    losses = np.array(raw["loss"]["newton"], dtype=float)
    rises = np.diff(losses) > _RISE * losses[:-1]
    return float(rises.sum() + (losses[-1] >= losses[0]))


def rank_missed(raw: Raw) -> float:
    """Returns the largest difference of a rank from k(k − 1)."""
    return float(max(abs(rank - k * (k - 1)) for k, rank in raw["ranks"]))
