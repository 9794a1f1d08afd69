"""The dashboard: all that a monitor has recorded, a panel for each question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspace_optim.diagnostics.plots.curves import (
    Curve,
    History,
    Table,
    curve_of,
    draw_curves,
    finite_values,
    spans_a_decade,
)
from subspace_optim.diagnostics.plots.eigenvalues import draw_eigenvalues
from subspace_optim.diagnostics.plots.rates import draw_rates
from subspace_optim.diagnostics.plots.sharpness import (
    CHANGES,
    SHARPNESSES,
    THRESHOLDS,
    blocks_of,
    draw_blocks,
    draw_change,
    draw_sharpness,
)
from subspace_optim.diagnostics.plots.style import Theme, ThemeName, key, panels_of, theme_of
from subspace_optim.diagnostics.plots.valley import draw_hill_share, draw_loss

Drawing = Callable[[Axes, Theme, Table], None]

_ACROSS: Final = 3
"""Panels of a row."""


def dashboard(
    history: History, *, axes: Sequence[Axes] | Axes | None = None, theme: ThemeName = "light"
) -> Figure:
    """Draws a training run: a panel over the steps for each part of what was recorded.

    For ``measures.dominant()`` these are six: loss; sharpness, with the thresholds of stability
    that apply; the eigenvalues, with the gap below the k-th; χ_k of gradient and update; the
    effective learning rates; the distance from the start and the size of the updates. Other
    sharpnesses are in the panel of the sharpness, as ``stability`` draws them, and the river of
    ``measures.valley()`` in that of the loss. The change of the loss, the sharpness of blocks and
    the share of the hill have panels of their own, and so has each further column, those of your
    own measures too; columns ``name_1``, ``name_2`` … share one.

    What is positive and spans a decade has a logarithmic scale, except for rates, shares and
    changes. What was estimated from a sample has a band of two standard errors to either side.

    The limits of rates, shares and changes come from their medians, and from the median distance to
    these: one small gradient makes a rate of any size, which would flatten all the others. What is
    beyond the limits are triangles at the edge, and the label counts them.

    Args:
        history: of a ``Monitor``. What it has not recorded is not drawn.
        axes: as many panels as there are (default: a figure with three in a row).
        theme: the colours.

    Returns:
        The figure.
    """
    look, table = theme_of(theme), Table(history)
    drawings = _drawings(table)
    count = len(drawings)
    rows, columns = -(-count // _ACROSS), min(count, _ACROSS)
    size = (3.5 * _ACROSS if count > 2 else 4.6 * columns, 3.0 * rows)
    panels = panels_of(axes, look, size, rows, columns, count=count)
    for panel, drawing in zip(panels, drawings, strict=True):
        drawing(panel, look, table)
        key(panel, look, columns=3 if drawing is draw_eigenvalues else 2)
    return panels[0].figure.figure


def _drawings(table: Table) -> list[Drawing]:
    """What there is to be drawn: one panel at least."""
    parts: list[tuple[Drawing, Sequence[str]]] = [
        (draw_loss, ["loss", "river_loss"]),
        (draw_sharpness, SHARPNESSES),
        (draw_eigenvalues, ["eigenvalues", "next_eigenvalues"]),
        (_draw_alignment, ["chi_gradient", "chi_update"]),
        (draw_rates, ["dom_lr", "bulk_lr"]),
        (_draw_norms, ["distance", "update_norm"]),
        (draw_change, CHANGES),
        (draw_blocks, list(blocks_of(table).values())),
        (draw_hill_share, ["hill_share"]),
    ]
    drawings = [drawing for drawing, columns in parts if table.has(*columns)]
    drawn = {column for _, columns in parts for column in columns} | _BESIDE
    for stem, columns in _stems(table, drawn).items():
        drawings.append(partial(_draw_others, stem, columns))
    return drawings or [draw_loss]


_BESIDE: Final = {
    "step",
    "gradients",
    "products",
    "forwards",
    "examples",
    "gradient_norm",
    "angle_estimate",
    "gap",
    "critical_multiple",
    "adam_threshold",
    *THRESHOLDS,
}
"""Columns without a panel: what a row took, and what others are drawn with."""


def _stems(table: Table, drawn: set[str]) -> dict[str, list[str]]:
    """Returns the further columns, by what their names have before a number."""
    stems: dict[str, list[str]] = {}
    for column in table:
        of_another = column.endswith("_error") and table.has(column.removesuffix("_error"))
        if column not in drawn and not of_another:
            stems.setdefault(re.sub(r"_\d+$", "", column), []).append(column)
    return stems


def _draw_alignment(axes: Axes, look: Theme, table: Table) -> None:
    chi = [
        curve_of(table, "chi_gradient", "gradient", look.dominant),
        Curve(table["chi_update"], "update", look.bulk, "dashed"),
    ]
    draw_curves(axes, look, table, chi, r"alignment $\chi_k$", limits=(-0.02, 1.02))


def _draw_norms(axes: Axes, look: Theme, table: Table) -> None:
    norms = [
        Curve(table["distance"], r"distance from $\theta_0$", look.ink),
        Curve(table["update_norm"], "update", look.third, "dashed"),
    ]
    # The distance starts at 0, for which a logarithmic scale has no place.
    values = finite_values(norms)
    draw_curves(axes, look, table, norms, "norm", powers=spans_a_decade(values[values != 0]))


def _draw_others(stem: str, columns: Sequence[str], axes: Axes, look: Theme, table: Table) -> None:
    """Draws columns that the picture knows nothing of, under their name."""
    values = np.concatenate([table.lists(column) for column in columns], axis=1)
    drawn = Curve(values, stem, look.ink, width=1.2)
    if values.shape[1] == 1:
        drawn = curve_of(table, columns[0], stem, look.ink)
    draw_curves(axes, look, table, [drawn], stem.replace("_", " "))
