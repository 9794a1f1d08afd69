"""The one renderer: a picture is panels, and a panel its lines, as ``exhibits.toml`` tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.papers.drawing import LOOK, finished, first_of, grid, in_turn, line, mark, shade
from benchmarks.papers.reductions import Curve, column
from benchmarks.papers.reproduction import Raw, RawOfSeeds

Values = Callable[[Raw], Any]
"""A column, or what a function of ``analysis`` makes of the raw figures of a seed."""


@dataclass(frozen=True)
class Line:
    """Lines of each seed; one of ``y``, ``curves``, ``at`` and ``level`` is told.

    Attributes:
        y: along the line.
        x: as many; ``None``: numbers from ``start`` on.
        start: see there.
        curves: several lines together, with labels and looks of their own.
        at: where a dashed line goes from the bottom to the top.
        level: where a line goes from side to side.
        seeds: of all, or of the first alone.
        label: in the key; ``{path}`` is a column.
        look: more of ``Axes.plot``; ``color`` is a name of the house's theme.
    """

    y: Values | None = None
    x: Values | None = None
    start: Values = lambda _: 1
    curves: Values | None = None
    at: Values | None = None
    level: Values | None = None
    seeds: Literal["all", "first"] = "all"
    label: str = ""
    look: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, axes: Axes, raw: Raw, first: bool) -> None:
        """Draws it for a seed."""
        if self.seeds == "first" and not first:
            return
        look, label = _coloured(self.look), filled(self.label, raw)
        if self.at is not None:
            mark(axes, self.at(raw), **look | ({"label": label} if label else {}))
        if self.level is not None:
            axes.axhline(self.level(raw), label=label, **look)
        for curve in self._of(raw):
            more = {} if curve.shade is None else {"color": shade(curve.shade)}
            look_of = look | more | _coloured(curve.look)
            line(axes, curve.x, curve.y, first, curve.label or label, **look_of)
            label = ""  # one of several is in the key

    def _of(self, raw: Raw) -> Sequence[Curve]:
        if self.curves is not None:
            return tuple(self.curves(raw))
        if self.y is None:
            return ()
        y = self.y(raw)
        return (Curve(self.start(raw) + np.arange(len(y)) if self.x is None else self.x(raw), y),)


def _coloured(look: Mapping[str, Any]) -> dict[str, Any]:
    """The look with its colour, which is a name of the house's theme."""
    return dict(look) | ({"color": getattr(LOOK, look["color"])} if "color" in look else {})


@dataclass(frozen=True)
class Panel:
    """A panel for each of its runs.

    Attributes:
        runs: one after the other; of the exhibit, where none is told.
        title: ``{path}`` is a column of the first seed, and ``{run}`` the title of the run.
        lines: drawn in this order, seed by seed, the first seed last.
        paint: what no lines can be: it gets the panel and the seeds of the run.
        finished: whether it is when it is painted, with a look of its own.
        counts: along the panel are whole numbers.
        symlog: the extent of the linear part, where the scale along the panel is of that kind.
        look: more of ``Axes.set``.
    """

    runs: tuple[str, ...]
    title: str = "{run}"
    lines: tuple[Line, ...] = ()
    paint: Callable[[Axes, Mapping[int, Raw]], None] | None = None
    finished: bool = False
    counts: bool = False
    symlog: float | None = None
    look: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, axes: Axes, of_seeds: Mapping[int, Raw]) -> None:
        """Draws what there is of a run."""
        for raw, first in in_turn(of_seeds):
            for each in self.lines:
                each.draw(axes, raw, first)
        if self.paint is not None:
            self.paint(axes, of_seeds)
        if self.symlog is not None:
            axes.set_xscale("symlog", linthresh=self.symlog)
        axes.set(**self.look)
        if self.counts:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


@dataclass(frozen=True)
class Picture:
    """Panels in a grid.

    Attributes:
        panels: see there.
        titles: of the runs.
        order: all runs of a panel, and then the next panel; or all panels of a run first.
        columns: in the grid; ``None``: all panels are in one row.
        width: of a panel, in inches.
        height: of a panel.
        key: columns of the key above each panel.
    """

    panels: tuple[Panel, ...]
    titles: Mapping[str, str]
    order: Literal["panels", "runs"] = "panels"
    columns: int | None = None
    width: float = 3.4
    height: float = 2.8
    key: int = 3

    def __call__(self, raws: RawOfSeeds) -> Figure:
        """Returns the picture of what there is."""
        placed = [(panel, run) for panel in self.panels for run in panel.runs]
        if self.order == "runs":
            placed.sort(key=lambda each: each[0].runs.index(each[1]))
        titles = [
            filled(panel.title, first_of(raws[run]) or {}, run=self.titles[run])
            for panel, run in placed
        ]
        grid_of = grid(titles, self.columns, width=self.width, height=self.height)
        for axes, (panel, run) in zip(grid_of, placed, strict=True):
            panel.draw(axes, raws[run])
        drawn = zip(grid_of, placed, strict=True)
        # A panel that is finished has the look of the house, but for one that is empty.
        left = [axes for axes, (panel, _) in drawn if not panel.finished or not axes.has_data()]
        return finished(left, self.key)


class _Template(Formatter):
    """``{path:format}`` is a column; one that there is not is a dash."""

    def get_field(self, field_name: str, _: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return column(kwargs, field_name), field_name
        except (IndexError, KeyError):
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return "–" if value is None else str(super().format_field(value, format_spec))


def filled(text: str, raw: Raw, **more: str) -> str:
    """Returns a text with columns in the places of ``{path:format}``."""
    return _Template().vformat(text, (), raw | more)
