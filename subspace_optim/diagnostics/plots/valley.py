"""The picture of the valley: the river under the hill, and which of them the loss came down."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspace_optim.diagnostics.plots.curves import (
    Curve,
    History,
    Table,
    curve_of,
    draw_curves,
    draw_steady,
)
from subspace_optim.diagnostics.plots.style import Theme, ThemeName, key, panels_of, theme_of


def valley(
    history: History, *, axes: list[Axes] | None = None, theme: ThemeName = "light"
) -> Figure:
    """Draws the loss above the river, and the share of its decrease that was the hill's.

    The river is the loss after a Newton step inside the dominant subspace; the band between it and
    the loss is the height on the hill. Below, the share of each decrease that came from the hill:
    1 is all of it, 0 is progress along the river alone. A share is of any size where the loss has
    hardly moved, so that it is shown within limits that no spike moves, with triangles beyond.

    Args:
        history: of a ``Monitor`` with ``measures.valley()`` and the loss, as of
            ``measures.dominant()``. What it has not recorded is not drawn.
        axes: two panels (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Reference:
        Wen et al. 2024: the river valley.
    """
    look, table = theme_of(theme), Table(history)
    panels = panels_of(axes, look, (7.0, 5.2), 2)
    draw_loss(panels[0], look, table)
    draw_hill_share(panels[1], look, table)
    for panel in panels:
        key(panel, look, columns=3)
    return panels[0].figure.figure


def draw_loss(axes: Axes, look: Theme, table: Table) -> None:
    """Draws the loss, and the river below it."""
    curves = [curve_of(table, "loss", "loss", look.ink)]
    if table.tells("river_loss"):
        curves.append(Curve(table["river_loss"], "river", look.bulk, "dashed"))
    draw_curves(axes, look, table, curves, "training loss")
    loss, river = table["loss"], table["river_loss"]
    if np.isfinite(loss - river).any():
        hill: dict[str, Any] = {"color": look.dominant, "alpha": 0.2, "linewidth": 0, "zorder": 0.5}
        axes.fill_between(table.steps, river, loss, label="hill", **hill)


def draw_hill_share(axes: Axes, look: Theme, table: Table) -> None:
    """Draws the share of each decrease that came from the hill."""
    curves = [Curve(table["hill_share"], "hill", look.dominant)]
    draw_steady(axes, look, table, curves, "share of the hill", within=(0.0, 1.0))
