"""The picture of stability: sharpnesses against the thresholds that they are held against."""

from __future__ import annotations

from typing import Final, NamedTuple

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
    finite_values,
    spans_a_decade,
)
from subspace_optim.diagnostics.plots.style import (
    Array,
    Theme,
    ThemeName,
    key,
    panels_of,
    points,
    theme_of,
)


class _Kind(NamedTuple):
    """A sharpness or a threshold: its column, and how it is drawn."""

    column: str
    label: str
    color: str  # an attribute of the theme
    line: str
    width: float = 1.4


_ALONE: Final = r"sharpness $\lambda_1$"
_KINDS: Final = (
    _Kind("sharpness", r"$\lambda_{1}$", "dominant", "solid", 1.8),
    _Kind("critical_sharpness", r"critical $\lambda_c$", "bulk", "long-dashed", 1.6),
    _Kind("update_sharpness", "along the update", "third", "short-dashed"),
    _Kind("gradient_sharpness", "along the gradient", "dominant", "dash-dash-dotted"),
    _Kind("batch_sharpness", "batch sharpness", "fourth", "long-short", 1.6),
    _Kind("norm_sharpness", "in the optimizer's norm", "fourth", "dash-three-dotted", 1.6),
)
_THRESHOLDS: Final = (
    _Kind("threshold", "stability threshold", "ink", "dotted"),
    _Kind("sam_edge", "SAM-edge", "third", "dash-dotted"),
    _Kind("critical_threshold", r"$2/\eta$", "ink", "loosely dotted", 1.8),
    _Kind("small_batch_threshold", r"$2(1-\mu)/\eta$", "ink", "double-dotted"),
    _Kind("large_batch_threshold", r"$2(1+\mu)/\eta$", "ink", "triple-dotted"),
    _Kind("norm_threshold", "threshold in the norm", "ink", "wide-dashed"),
)
_BLOCKS: Final = ("solid", "dashed", "long-dashed", "dash-dotted", "short-dashed")
"""The lines of the sharpest blocks; of so many the names can be told."""

THRESHOLDS: Final = tuple(kind.column for kind in _THRESHOLDS)
SHARPNESSES: Final = (*(kind.column for kind in _KINDS), "preconditioned_sharpness")
CHANGES: Final = ("actual_change", "predicted_change")


def stability(
    history: History,
    *,
    axes: Axes | list[Axes] | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws whether a training is at its edge of stability: a panel for each question.

    All sharpnesses that were recorded, with the thresholds that they are held against, on a
    logarithmic scale where they span a decade: what is not positive are triangles at its lower
    edge. Adam's threshold is for the preconditioned sharpness, and is drawn beside that alone;
    thresholds that are the same throughout are one line. Then, where they were recorded, the
    sharpness of the blocks, of which the sharpest are named; and the change of the loss beside that
    of the quadratic, within limits that no spike moves. What was estimated from minibatches has a
    band of two standard errors to either side.

    Args:
        history: of a ``Monitor``. What it has not recorded is not drawn.
        axes: as many panels as there are, one at least (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Reference:
        Cohen et al. 2021; Andreyev & Beneventano 2024; Kalra et al. 2026.
    """
    look, table = theme_of(theme), Table(history)
    drawings = [draw_sharpness]
    drawings += [draw_blocks] if blocks_of(table) else []
    drawings += [draw_change] if table.has(*CHANGES) else []
    panels = panels_of(axes, look, (7.0, 0.8 + 2.7 * len(drawings)), len(drawings))
    for panel, drawing in zip(panels, drawings, strict=True):
        drawing(panel, look, table)
        key(panel, look, columns=4)
    return panels[0].figure.figure


def draw_sharpness(axes: Axes, look: Theme, table: Table) -> None:
    """Draws the sharpnesses that were recorded, and their thresholds."""
    kinds = [kind for kind in _KINDS if table.has(kind.column)]
    curves = [
        curve_of(table, kind.column, kind.label, getattr(look, kind.color), kind.line, kind.width)
        for kind in kinds
    ]
    drawn = [*curves, *thresholds_of(look, table), *_preconditioned(look, table)]
    only = {kind.column for kind in kinds} <= {"sharpness"}
    values = finite_values(drawn)
    powers = spans_a_decade(values[values > 0])
    draw_curves(axes, look, table, drawn, _ALONE if only else "sharpness", powers=powers)
    if powers:
        _mark_below_zero(axes, table, drawn)


def draw_blocks(axes: Axes, look: Theme, table: Table) -> None:
    """Draws the sharpness of blocks; the names are those of the sharpest."""
    blocks = {name: table[column] for name, column in blocks_of(table).items()}
    sharpest = sorted(blocks, key=lambda name: -_typical(blocks[name]))[: len(_BLOCKS)]
    others = [values for name, values in blocks.items() if name not in sharpest]
    colors = (look.dominant, look.bulk, look.third, look.fourth, look.ink)
    curves = [
        Curve(blocks[name], name, color, line)
        for name, color, line in zip(sharpest, colors, _BLOCKS, strict=False)
    ]
    if others:
        label = f"{len(others)} more"
        curves.append(Curve(np.stack(others, axis=1), label, look.ink, "dotted", 0.8))
    draw_curves(axes, look, table, curves, r"$\lambda_1$ of blocks")


def draw_change(axes: Axes, look: Theme, table: Table) -> None:
    """Draws what a step does to the loss, and what the quadratic predicts."""
    curves = [
        Curve(table["actual_change"], "actual", look.ink),
        Curve(table["predicted_change"], "predicted by the quadratic", look.bulk, "dashed"),
    ]
    draw_steady(axes, look, table, curves, "change of the loss")


def thresholds_of(look: Theme, table: Table) -> list[Curve]:
    """What a sharpness is held against; of those that are the same throughout, the first."""
    curves: list[Curve] = []
    for kind in _THRESHOLDS:
        values = table[kind.column]
        if not any(np.allclose(values, c.values, 1e-9, 0, equal_nan=True) for c in curves):
            color = getattr(look, kind.color)
            curves.append(Curve(values, kind.label, color, kind.line, kind.width))
    return curves


def blocks_of(table: Table) -> dict[str, str]:
    """Returns the columns ``sharpness[<block>]``, by the block."""
    return {
        column.removeprefix("sharpness[").removesuffix("]"): column
        for column in table
        if column.startswith("sharpness[") and column.endswith("]")
    }


def _preconditioned(look: Theme, table: Table) -> list[Curve]:
    """Adam's sharpness and its threshold, which says nothing about the sharpness itself."""
    if not table.tells("preconditioned_sharpness"):
        return []
    sharpness = table["preconditioned_sharpness"]
    return [
        Curve(sharpness, r"preconditioned $\lambda_1$", look.fourth, "dashed", 1.8),
        Curve(table["adam_threshold"], "Adam's threshold", look.ink, "dash-dot-dotted"),
    ]


def _mark_below_zero(axes: Axes, table: Table, curves: list[Curve]) -> None:
    """Marks what a logarithmic scale has no place for by triangles at its lower edge."""
    (low, high), count = axes.get_ylim(), 0
    for curve in curves:
        below = curve.values <= 0
        if below.any():
            steps = table.steps[below]
            points(axes, steps, np.full(len(steps), low), curve.color, "v", 5, clip_on=False)
            count += len(steps)
    if count:
        axes.set_ylim(low, high)
        axes.set_ylabel(f"{axes.get_ylabel()}\n({count} not above 0: triangles)")


def _typical(values: Array) -> float:
    """The median of what is finite; less than anything where nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else -np.inf
