"""Reductions of raw figures to numbers: what the papers share, for claims, tables and pictures.

Data files name them with the columns that they are of: ``["value", "gradient_printed.-1"]``. A
column is a path: ``phases.SGD.chi_gradient``, ``GD.-1`` for an element of a list, and
``rows.distance`` for that of each row; or two of them, number by number: ``a / b``, ``a * b``,
``a - b``. What is one paper's own is in its ``analysis``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.papers.reproduction import Raw


class Curve(NamedTuple):
    """A line of a picture.

    Attributes:
        x: along the panel.
        y: as many.
        label: in the key.
        shade: its place among lines that have an order, from 0 to 1.
        look: more of ``Axes.plot``.
    """

    x: Any
    y: Any
    label: str = ""
    shade: float | None = None
    look: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def column(raw: Any, path: str) -> Any:
    """Returns what is at the end of a path through dicts and lists, or of two."""
    for sign, combine in ((" / ", np.divide), (" * ", np.multiply), (" - ", np.subtract)):
        if sign in path:
            with np.errstate(divide="raise", invalid="raise"):
                return combine(*(column(raw, each) for each in path.split(sign)))
    found = raw
    for number, part in enumerate(parts := path.split(".")):
        if isinstance(found, list) and not part.removeprefix("-").isdecimal():
            return [column(each, ".".join(parts[number:])) for each in found]
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def mean_of(values: Iterable[float]) -> float:
    """Returns the mean; NaN of no values."""
    found = list(values)
    return statistics.fmean(found) if found else math.nan


def median_of(values: Iterable[float]) -> float:
    """Returns the median; NaN of no values."""
    found = list(values)
    return float(np.median(found)) if found else math.nan


def second_half(values: Sequence[float]) -> Sequence[float]:
    """Returns the second half, the middle included."""
    return values[len(values) // 2 :]


def value(raw: Raw, path: str) -> float:
    """Returns the number that a column is."""
    return float(column(raw, path))


def mean(raw: Raw, path: str) -> float:
    """Returns the mean of a column; NaN of none."""
    return mean_of(column(raw, path))


def late_mean(raw: Raw, path: str) -> float:
    """Returns the mean of the second half of a column; NaN of none."""
    return mean_of(second_half(column(raw, path)))


def largest(raw: Raw, path: str) -> float:
    """Returns the largest number of a column."""
    return float(max(column(raw, path)))


def smallest(raw: Raw, *paths: str) -> float:
    """Returns the smallest number of columns, or of numbers."""
    return float(min(np.min(column(raw, path)) for path in paths))


def largest_size(raw: Raw, path: str) -> float:
    """Returns the largest absolute value of a column."""
    return float(max(map(abs, column(raw, path))))


def just_after(raw: Raw, path: str) -> float:
    """Returns where a line between the eigenvalue of that number and the next is."""
    return value(raw, path) + 0.5
