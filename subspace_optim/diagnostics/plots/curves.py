"""Columns of a history as curves over the steps: what its pictures are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics.plots.style import (
    LINES,
    Array,
    Theme,
    label_powers,
    paint,
    points,
    say,
    stroke,
)

History = Mapping[str, Sequence[Any]]

_DIVERGED: Final = 1e100
"""What is larger is left out, as infinities are; what is smaller than its inverse is 0."""
_REACH: Final = 8
"""Steady limits lie this many median deviations from the median."""


class Table:
    """A history as arrays, NaN where nothing finite was recorded."""

    def __init__(self, history: History) -> None:
        if not isinstance(history, Mapping):
            remedy = "Pass `monitor.history`."
            raise ArgumentError("history", type(history).__name__, "a mapping of columns", remedy)
        steps = history.get("step", ())
        for column, values in history.items():
            if len(values) != len(steps):
                raise ArgumentError(
                    f"the length of history[{column!r}]",
                    len(values),
                    f"{len(steps)}, the length of history['step']",
                )
        self._history = history
        self.steps = _finite(steps)

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the columns."""
        return iter(self._history)

    def __getitem__(self, column: str) -> Array:
        """Returns a column of numbers, ``(n,)``."""
        return _finite(self._history.get(column, [None] * len(self.steps)))

    def has(self, *columns: str) -> bool:
        """Returns whether there is one of these columns, whatever it holds."""
        return any(column in self._history for column in columns)

    def tells(self, column: str) -> bool:
        """Returns whether a column of numbers holds a finite one."""
        return bool(np.isfinite(self[column]).any())

    def lists(self, column: str) -> Array:
        """Returns a column of lists, ``(n, length of the longest)``; numbers are lists of one."""
        rows = self._history.get(column, [()] * len(self.steps))
        rows = [np.atleast_1d(_finite(row)) for row in rows]
        table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
        for filled, row in zip(table, rows, strict=True):
            filled[: len(row)] = row
        return table


def _finite(values: Any) -> Array:
    """Returns the values as a fresh array; ``None``, infinities and what has diverged are NaN."""
    array = np.array(values, dtype=np.float64)
    array[~(np.abs(array) < _DIVERGED)] = np.nan
    array[np.abs(array) < 1 / _DIVERGED] = 0.0
    return array


@dataclass(frozen=True)
class Curve:
    """Values over the steps, ``(n,)`` or a line for each column ``(n, m)``, and their style."""

    values: Array
    label: str
    color: str
    line: str = "solid"
    width: float = 1.4
    errors: Array | None = None  # standard errors of values (n,)


def curve_of(
    table: Table, column: str, label: str, color: str, line: str = "solid", width: float = 1.4
) -> Curve:
    """A column with its standard errors."""
    return Curve(table[column], label, color, line, width, table[f"{column}_error"])


def draw_curves(
    axes: Axes,
    look: Theme,
    table: Table,
    curves: Sequence[Curve],
    ylabel: str,
    *,
    limits: tuple[float, float] | None = None,
    powers: bool | None = None,
) -> None:
    """Draws curves over the steps into a panel, and says so where there is nothing to draw.

    Args:
        axes: the panel.
        look: the theme.
        table: whose steps they are over.
        curves: what is drawn.
        ylabel: of the panel.
        limits: of its scale, which is then linear.
        powers: whether the scale is logarithmic (default: where all is positive and spans a
            decade); what is not positive is then left out.
    """
    paint(axes, look, "step", ylabel)
    values = finite_values(curves)
    if not len(values):
        say(axes, look, "nothing recorded")
        return
    if powers is None:
        powers = limits is None and spans_a_decade(values)
    if powers:
        axes.set_yscale("log")
    for curve in curves:
        _band(axes, table.steps, curve, positive=powers)
        for i, column in enumerate(curve.values.reshape(len(table.steps), -1).T):
            shown = np.where(column > 0, column, np.nan) if powers else column
            _line(axes, table.steps, shown, curve, curve.label if i == 0 else "_")
    if limits is not None:
        axes.set_ylim(*limits)
    elif powers:
        label_powers(axes.yaxis, *axes.get_ylim())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def finite_values(curves: Sequence[Curve]) -> Array:
    """Returns all finite values of the curves."""
    values: Array = np.concatenate([np.empty(0), *(curve.values.ravel() for curve in curves)])
    finite: Array = values[np.isfinite(values)]
    return finite


def spans_a_decade(values: Array) -> bool:
    """Returns whether all values are positive, and the largest ten times the smallest."""
    return len(values) > 0 and bool(values.min() > 0 and values.max() >= 10 * values.min())


def _band(axes: Axes, steps: Array, curve: Curve, *, positive: bool) -> None:
    """Draws two standard errors to either side; on a logarithmic scale a decade at most."""
    if curve.errors is None or not (curve.errors > 0).any():
        return
    low, high = curve.values - 2 * curve.errors, curve.values + 2 * curve.errors
    low = np.maximum(low, curve.values / 10) if positive else low
    style: dict[str, Any] = {"color": curve.color, "alpha": 0.2, "linewidth": 0, "zorder": 0.6}
    axes.fill_between(steps, low, high, **style)


def _line(axes: Axes, steps: Array, values: Array, curve: Curve, label: str) -> None:
    """Draws a line, and a point wherever a value has no neighbour to be joined to."""
    shown = np.isfinite(values)
    if not shown.any():
        return
    dashes, marker = LINES[curve.line]
    stroke(axes, steps, values, curve.color, curve.width, dashes=dashes, label=label)
    around = np.pad(shown, 1)
    alone = shown & ~around[:-2] & ~around[2:]
    if alone.any():
        points(axes, steps[alone], values[alone], curve.color, marker, 4)


# --- limits that no spike moves ------------------------------------------------------------------


def steady_limits(columns: Sequence[Array]) -> tuple[float, float]:
    """Returns limits with 0, and with what lies near the median of each column."""
    low = high = 0.0
    for column in columns:
        values = column[np.isfinite(column)]
        if len(values):
            middle = np.median(values)
            reach = max(_REACH * np.median(np.abs(values - middle)), abs(middle) / 2)
            low = min(low, max(values.min(), middle - reach))
            high = max(high, min(values.max(), middle + reach))
    margin = 0.06 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def draw_steady(
    axes: Axes,
    look: Theme,
    table: Table,
    curves: Sequence[Curve],
    ylabel: str,
    *,
    within: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Draws curves within steady limits; what is beyond are triangles at the edge, and counted.

    Args:
        axes: the panel.
        look: the theme.
        table: whose steps they are over.
        curves: what is drawn.
        ylabel: of the panel.
        within: is shown in any case.
    """
    values = [curve.values for curve in curves]
    low, high = steady_limits([*values, np.array(within)])
    draw_curves(axes, look, table, curves, ylabel, limits=(low, high))
    mark_beyond(axes, table, curves, low, high)


def mark_beyond(axes: Axes, table: Table, curves: Sequence[Curve], low: float, high: float) -> None:
    """Marks what is beyond the limits by triangles at the edge; the label counts them."""
    beyond = 0
    for curve in curves:
        for outside, edge, marker in (
            (curve.values > high, high, "^"),
            (curve.values < low, low, "v"),
        ):
            if outside.any():
                steps = table.steps[outside]
                at_edge = np.full(len(steps), edge)
                points(axes, steps, at_edge, curve.color, marker, 5, clip_on=False)
                beyond += len(steps)
    if beyond:
        axes.set_ylabel(f"{axes.get_ylabel()}\n({beyond} beyond the limits: triangles)")
