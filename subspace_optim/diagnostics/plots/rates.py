"""The picture of the effective learning rates of several optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

from subspace_optim.diagnostics.plots.curves import History, Table, curve_of, draw_steady
from subspace_optim.diagnostics.plots.style import (
    SMALL,
    Array,
    Theme,
    ThemeName,
    label_powers,
    number,
    paint,
    panels_of,
    points,
    say,
    stroke,
    theme_of,
)


def draw_rates(axes: Axes, look: Theme, table: Table) -> None:
    """Draws the effective learning rates of one history, within limits that no spike moves."""
    curves = [
        curve_of(table, "dom_lr", "Dom-LR", look.dominant),
        curve_of(table, "bulk_lr", "Bulk-LR", look.bulk, "dashed"),
    ]
    draw_steady(axes, look, table, curves, "effective learning rate")


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
    tables = [Table(history) for history in histories.values()]
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
