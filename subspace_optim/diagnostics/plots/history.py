"""Pictures of the histories that monitors keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics.plots.style import (
    LINES,
    SMALL,
    Array,
    Theme,
    ThemeName,
    key,
    label_powers,
    number,
    paint,
    panels_of,
    points,
    say,
    stroke,
    theme_of,
)

History = Mapping[str, Sequence[Any]]

_DIVERGED: Final = 1e100
"""What is larger is left out, as infinities are; what is smaller than its inverse is 0."""
_REACH: Final = 8
"""The limits of the rates lie this many median deviations from the median."""

# --- one history -------------------------------------------------------------------------------


def dashboard(
    history: History, *, axes: Sequence[Axes] | None = None, theme: ThemeName = "light"
) -> Figure:
    """Draws a training run: six panels over the steps.

    Loss; sharpness, with the thresholds of stability that apply; the eigenvalues, with the gap
    below the k-th; χ_k of gradient and update; the effective learning rates; the distance from
    the start and the size of the updates. Loss, sharpness, eigenvalues and norms have logarithmic
    scales where they are positive and span a decade. What was estimated from a sample has a band
    of two standard errors to either side.

    The limits of the effective rates come from their medians, and from the median distance to
    these: one small gradient makes a rate of any size, which would flatten all the others. Rates
    beyond the limits are triangles at the edge, and the label counts them.

    Args:
        history: of a ``Monitor``. What it has not recorded is not drawn.
        axes: six panels (default: a figure of 2 by 3).
        theme: the colours.

    Returns:
        The figure.
    """
    look, table = theme_of(theme), _Table(history)
    panels = panels_of(axes, look, (10.5, 6.0), 2, 3)
    _curves(panels[0], look, table, [_of(table, "loss", "loss", look.ink)], "training loss")
    sharpness = _Curve(table["sharpness"], r"$\lambda_{1}$", look.dominant, width=1.8)
    lines = [sharpness, *_thresholds(look, table), *_preconditioned(look, table)]
    _curves(panels[1], look, table, lines, r"sharpness $\lambda_1$")
    _eigenvalues(panels[2], look, table)
    chi = [
        _of(table, "chi_gradient", "gradient", look.dominant),
        _Curve(table["chi_update"], "update", look.bulk, "dashed"),
    ]
    _curves(panels[3], look, table, chi, r"alignment $\chi_k$", limits=(-0.02, 1.02))
    _rates(panels[4], look, table)
    norms = [
        _Curve(table["distance"], r"distance from $\theta_0$", look.ink),
        _Curve(table["update_norm"], "update", look.third, "dashed"),
    ]
    # The distance starts at 0, for which a logarithmic scale has no place.
    _curves(panels[5], look, table, norms, "norm", skip_zeros=True)
    for i, panel in enumerate(panels):
        key(panel, look, columns=3 if i == 2 else 2)
    return panels[0].figure.figure


def eigenvalue_history(
    history: History, *, axes: Axes | None = None, theme: ThemeName = "light"
) -> Figure:
    """Draws the eigenvalues over the steps: the top k, the next ones, and the thresholds.

    The band between them is the gap ``λ_k − λ_{k+1}``, in which λ_{k+1} is the recorded one or,
    without ``next_k``, that of the last refresh. The scale is logarithmic where all of it is
    positive and spans a decade.

    Args:
        history: of a ``Monitor``. What it has not recorded is not drawn.
        axes: a panel (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Reference:
        `song_2024`, Figure 2.
    """
    look, table = theme_of(theme), _Table(history)
    (panel,) = panels_of(axes, look, (7.0, 4.0))
    _eigenvalues(panel, look, table, _thresholds(look, table))
    key(panel, look, columns=4)
    return panel.figure.figure


@dataclass(frozen=True)
class _Curve:
    """Values over the steps, ``(n,)`` or a line for each column ``(n, m)``, and their style."""

    values: Array
    label: str
    color: str
    line: str = "solid"
    width: float = 1.4
    errors: Array | None = None  # standard errors of values (n,)


def _of(table: _Table, column: str, label: str, color: str, line: str = "solid") -> _Curve:
    """A column with its standard errors."""
    return _Curve(table[column], label, color, line, errors=table[f"{column}_error"])


class _Table:
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

    def __getitem__(self, column: str) -> Array:
        """Returns a column of numbers, ``(n,)``."""
        return _finite(self._history.get(column, [None] * len(self.steps)))

    def lists(self, column: str) -> Array:
        """Returns a column of lists, ``(n, length of the longest)``."""
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


def _curves(
    axes: Axes,
    look: Theme,
    table: _Table,
    curves: Sequence[_Curve],
    ylabel: str,
    *,
    limits: tuple[float, float] | None = None,
    skip_zeros: bool = False,
) -> None:
    """Draws curves over the steps into a panel, and says so where there is nothing to draw."""
    paint(axes, look, "step", ylabel)
    values = np.concatenate([curve.values.ravel() for curve in curves])
    values = values[np.isfinite(values)]
    if not len(values):
        say(axes, look, "nothing recorded")
        return
    powers = limits is None and _spans_a_decade(values[values != 0] if skip_zeros else values)
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


def _band(axes: Axes, steps: Array, curve: _Curve, *, positive: bool) -> None:
    """Draws two standard errors to either side; on a logarithmic scale a decade at most."""
    if curve.errors is None or not (curve.errors > 0).any():
        return
    low, high = curve.values - 2 * curve.errors, curve.values + 2 * curve.errors
    low = np.maximum(low, curve.values / 10) if positive else low
    style: dict[str, Any] = {"color": curve.color, "alpha": 0.2, "linewidth": 0, "zorder": 0.6}
    axes.fill_between(steps, low, high, **style)


def _spans_a_decade(values: Array) -> bool:
    return len(values) > 0 and bool(values.min() > 0 and values.max() >= 10 * values.min())


def _line(axes: Axes, steps: Array, values: Array, curve: _Curve, label: str) -> None:
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


def _thresholds(look: Theme, table: _Table) -> list[_Curve]:
    """The sharpness above which the optimizer is unstable; all NaN where that does not apply."""
    return [
        _Curve(table["threshold"], "stability threshold", look.ink, "dotted"),
        _Curve(table["sam_edge"], "SAM-edge", look.third, "dash-dotted"),
    ]


def _preconditioned(look: Theme, table: _Table) -> list[_Curve]:
    """Adam's sharpness and its threshold, which says nothing about the sharpness itself."""
    sharpness = table["preconditioned_sharpness"]
    if not np.isfinite(sharpness).any():
        return []
    return [
        _Curve(sharpness, r"preconditioned $\lambda_1$", look.fourth, "dashed", 1.8),
        _Curve(table["adam_threshold"], "Adam's threshold", look.ink, "dash-dot-dotted"),
    ]


def _eigenvalues(axes: Axes, look: Theme, table: _Table, thresholds: Sequence[_Curve] = ()) -> None:
    """Draws the top k and the next eigenvalues, and the gap between them."""
    top, following = table.lists("eigenvalues"), table.lists("next_eigenvalues")
    k, more = top.shape[1], following.shape[1]
    curves = [
        _Curve(top, _range_of_eigenvalues(1, k), look.dominant, width=1.2),
        _Curve(following, _range_of_eigenvalues(k + 1, k + more), look.bulk, "dashed", 1.0),
    ]
    _curves(axes, look, table, [*curves, *thresholds], r"eigenvalues $\lambda_i$")
    if not k:
        return
    # fmin and fmax pass over NaN, and give NaN only where there is nothing else.
    last = np.fmin.reduce(top, axis=1)
    below = np.fmax.reduce(following, axis=1, initial=np.nan)
    below = np.where(np.isfinite(below), below, last - table["gap"])
    if axes.get_yscale() == "log":
        below[below <= 0] = axes.get_ylim()[0]
    if np.isfinite(below).any():
        style: dict[str, Any] = {"color": look.grid, "linewidth": 0, "zorder": 0.5}
        axes.fill_between(table.steps, below, last, label="gap", **style)


def _range_of_eigenvalues(first: int, last: int) -> str:
    names = dict.fromkeys((rf"$\lambda_{{{first}}}$", rf"$\lambda_{{{last}}}$"))
    return " to ".join(names)


def _rates(axes: Axes, look: Theme, table: _Table) -> None:
    """Draws the effective learning rates within limits that no spike moves."""
    curves = [
        _of(table, "dom_lr", "Dom-LR", look.dominant),
        _of(table, "bulk_lr", "Bulk-LR", look.bulk, "dashed"),
    ]
    low, high = _limits([curve.values for curve in curves])
    _curves(axes, look, table, curves, "effective learning rate", limits=(low, high))
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


def _limits(columns: Sequence[Array]) -> tuple[float, float]:
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


# --- several histories -------------------------------------------------------------------------


def effective_rates(
    histories: Mapping[str, History],
    *,
    axes: Sequence[Axes] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws Dom-LR and Bulk-LR of several optimizers side by side, on one scale.

    A row for each optimizer: the mean over the recorded steps, in figures too, and a bar over the
    middle 80 % of them. The mean can lie outside of the bar, where a few steps make it. The scale
    is logarithmic where all of it is positive, and linear around 0 where it is not.

    Args:
        histories: of a ``Monitor``, by the name of the optimizer.
        axes: two panels (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Reference:
        `song_2024`, Definition 4 and Tables 2 and 3.
    """
    look = theme_of(theme)
    tables = [_Table(history) for history in histories.values()]
    panels = panels_of(axes, look, (9.0, 1.3 + 0.32 * max(len(tables), 2)), 1, 2)
    rates = [[_spread(table[column]) for table in tables] for column in ("dom_lr", "bulk_lr")]
    values = np.array(rates).ravel()
    values = values[np.isfinite(values)]
    names, colors = ("Dom-LR", "Bulk-LR"), (look.dominant, look.bulk)
    for panel, rows, name, color, marker in zip(panels, rates, names, colors, "os", strict=True):
        paint(panel, look, f"{name}: mean, and 10 to 90 % of the steps", "")
        if not len(values):
            say(panel, look, "nothing recorded")
            continue
        _scale_of_rates(panel, values)
        panel.grid(visible=False, axis="y")
        for row, (mean, low, high) in enumerate(rows):
            stroke(panel, [low, high], [row, row], color, 2)
            points(panel, [mean], [row], color, marker, 6)
            panel.annotate(
                "none" if np.isnan(mean) else number(float(f"{mean:.3g}")),
                (1.02, row),
                xycoords=("axes fraction", "data"),
                annotation_clip=False,
                color=look.ink,
                fontsize=SMALL,
                va="center",
            )
        panel.set_yticks(range(len(rows)), list(histories))
        panel.set_ylim(len(rows) - 0.5, -0.5)
    if axes is None:
        panels[1].tick_params(labelleft=False)  # the rows of the panel beside it
    return panels[0].figure.figure


def _spread(values: Array) -> tuple[float, float, float]:
    """Mean, 10th and 90th percentile of the finite values; NaN without any."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan, np.nan
    low, high = np.quantile(finite, (0.1, 0.9))
    return float(finite.mean()), float(low), float(high)


def _scale_of_rates(axes: Axes, values: Array) -> None:
    """Sets scale, limits and labels of the rates' axis."""
    low, high = float(values.min()), float(values.max())
    if low > 0:
        # At least a decade, so that there are labels.
        widen = max(1.3, np.sqrt(10 * low / high))
        axes.set_xscale("log")
        axes.set_xlim(low / widen, high * widen)
        label_powers(axes.xaxis, low / widen, high * widen)
        return
    sizes = np.abs(values[values != 0])
    # Two decades at most on either side of the linear part: their labels have room.
    smallest = max(sizes.min(), sizes.max() / 100) if len(sizes) else 1.0
    linear = float(10 ** np.floor(np.log10(smallest)))
    axes.set_xscale("symlog", linthresh=linear)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.xaxis.set_major_formatter(FuncFormatter(number))
    axes.set_xlim(min(1.5 * low, -linear / 2), max(1.5 * high, linear / 2))
