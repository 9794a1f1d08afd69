"""The picture of the eigenvalues over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspace_optim.diagnostics.plots.curves import Curve, History, Table, draw_curves
from subspace_optim.diagnostics.plots.sharpness import thresholds_of
from subspace_optim.diagnostics.plots.style import Theme, ThemeName, key, panels_of, theme_of


def eigenvalue_history(
    history: History, *, axes: Axes | None = None, theme: ThemeName = "light"
) -> Figure:
    """Draws the eigenvalues over the steps: the top k, the next ones, and the thresholds.

    The band between them is the gap ``λ_k − λ_{k+1}``, in which λ_{k+1} is the recorded one or,
    without ``next_eigenvalues``, that of the last refresh. The scale is logarithmic where all of
    it is positive and spans a decade.

    Args:
        history: of a ``Monitor``. What it has not recorded is not drawn.
        axes: a panel (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Reference:
        `song_2024`, Figure 2.
    """
    look, table = theme_of(theme), Table(history)
    (panel,) = panels_of(axes, look, (7.0, 4.0))
    draw_eigenvalues(panel, look, table, thresholds_of(look, table))
    key(panel, look, columns=4)
    return panel.figure.figure


def draw_eigenvalues(
    axes: Axes, look: Theme, table: Table, thresholds: Sequence[Curve] = ()
) -> None:
    """Draws the top k and the next eigenvalues, and the gap between them."""
    top, following = table.lists("eigenvalues"), table.lists("next_eigenvalues")
    k, more = top.shape[1], following.shape[1]
    curves = [
        Curve(top, _range_of_eigenvalues(1, k), look.dominant, width=1.2),
        Curve(following, _range_of_eigenvalues(k + 1, k + more), look.bulk, "dashed", 1.0),
    ]
    draw_curves(axes, look, table, [*curves, *thresholds], r"eigenvalues $\lambda_i$")
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
