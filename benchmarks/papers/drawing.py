"""How the pictures of a reproduction look, whatever the paper.

A picture is a grid of panels: ``grid`` makes them, ``in_turn`` and ``line`` draw the seeds, and
``finished`` gives all panels the look of the house once their labels are set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.papers.reproduction import Raw
from subspace_optim.diagnostics.plots.style import (
    LABEL,
    THEMES,
    key,
    label_powers,
    paint,
    panels_of,
    say,
)

LOOK: Final = THEMES["light"]
_STRONG: Final = {"lw": 1.5, "alpha": 1.0}
_THIN: Final = {"lw": 0.6, "alpha": 0.5}


def grid(
    titles: Sequence[str], columns: int | None = None, *, width: float = 3.4, height: float = 2.8
) -> list[Axes]:
    """Returns panels with titles, row by row; places that are left over stay empty.

    Args:
        titles: one a panel.
        columns: panels in a row; ``None``: all of them.
        width: of a panel, in inches.
        height: of a panel.
    """
    columns = columns or len(titles)
    rows = -(-len(titles) // columns)
    panels = panels_of(None, LOOK, (width * columns, height * rows), rows, columns)
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    return panels[: len(titles)]


def in_turn(of_seeds: Mapping[int, Raw]) -> Iterator[tuple[Raw, bool]]:
    """Yields the figures of each seed, and whether it is the first, which comes last, on top."""
    for seed in sorted(of_seeds, reverse=True):
        yield of_seeds[seed], seed == min(of_seeds)


def first_of(of_seeds: Mapping[int, Raw]) -> Raw | None:
    """Returns the figures of the first seed; ``None`` without any."""
    return of_seeds[min(of_seeds)] if of_seeds else None


def line(axes: Axes, x: Any, y: Any, first: bool, label: str = "", **look: Any) -> Line2D:
    """Draws the line of one seed: the first is strong and in the key, the others are thin.

    Args:
        axes: the panel.
        x: along the panel.
        y: as many.
        first: as ``in_turn`` tells.
        label: its name in the key.
        look: more of ``Axes.plot``.
    """
    style = _STRONG | {"label": label} if first else _THIN
    return axes.plot(x, y, **style | look)[0]


def mark(axes: Axes, x: float, **look: Any) -> None:
    """Draws a line from the bottom to the top, dashed if nothing else is told."""
    usual: dict[str, Any] = {"color": LOOK.faint, "lw": 0.8, "ls": "--"}
    axes.axvline(x, **usual | look)


def shade(place: float) -> Any:
    """Returns the colour of one of several that have an order; ``place`` is from 0 to 1."""
    return colormaps["viridis"](0.9 * place)


def finished(panels: Sequence[Axes], columns: int = 3) -> Figure:
    """Returns the figure of panels that are drawn, now in the look of the house.

    Titles are above the keys, and a panel that is empty says so.

    Args:
        panels: with titles, labels and scales.
        columns: of the key above each panel; 0: there is none.
    """
    for axes in panels:
        if columns:
            key(axes, LOOK, columns)
    keys = [legend.get_texts() for axes in panels if (legend := axes.get_legend())]
    rows = max((-(-len(texts) // columns) for texts in keys), default=0)
    for axes in panels:
        axes.set_title(axes.get_title(), fontsize=LABEL, pad=6 + 13 * rows)
        paint(axes, LOOK, axes.get_xlabel(), axes.get_ylabel())
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                label_powers(axis, *axis.get_view_interval())
        say(axes, LOOK, "not measured")
    return panels[0].figure.figure
