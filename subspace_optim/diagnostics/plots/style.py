"""The house style of the pictures: two themes, no global state, and text that stays text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from subspace_optim._validation import ArgumentError

ThemeName = Literal["light", "dark"]
Array = NDArray[np.float64]

LABEL: Final = 9
SMALL: Final = 8
LINES: Final[dict[str, tuple[Any, str]]] = {
    "solid": ("-", "o"),
    "dashed": ((0, (5, 2)), "s"),
    "dotted": ((0, (1, 1.4)), "^"),
    "dash-dotted": ((0, (6, 1.5, 1, 1.5)), "D"),
    "dash-dot-dotted": ((0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
    "long-dashed": ((0, (9, 1.8)), "P"),
    "short-dashed": ((0, (2.6, 1.3)), "X"),
    "dash-dash-dotted": ((0, (5, 1.3, 5, 1.3, 1, 1.3)), "<"),
    "long-short": ((0, (9, 1.5, 2.5, 1.5)), ">"),
    "dash-three-dotted": ((0, (6, 1.3, 1, 1.3, 1, 1.3, 1, 1.3)), "p"),
    "loosely dotted": ((0, (1, 2.6)), "*"),
    "double-dotted": ((0, (1, 1.2, 1, 3.4)), "h"),
    "triple-dotted": ((0, (1, 1.2, 1, 1.2, 1, 3.4)), "8"),
    "wide-dashed": ((0, (3, 3.4)), "d"),
}
"""Dashes, and the marker of a single point: lines of a panel are told apart without any colour."""


@dataclass(frozen=True)
class Theme:
    """The colours of a theme; those of the lines are of Okabe and Ito's palette.

    Attributes:
        background: of figure and panels.
        ink: text, and lines that belong to neither part.
        faint: ticks and their labels.
        grid: grid lines and filled bands, which only support.
        dominant: what belongs to the dominant subspace.
        bulk: what belongs to the bulk.
        third: a further line.
        fourth: a further line.
    """

    background: str
    ink: str
    faint: str
    grid: str
    dominant: str
    bulk: str = "#D55E00"
    third: str = "#009E73"
    fourth: str = "#CC79A7"


THEMES: Final[dict[str, Theme]] = {
    "light": Theme(
        background="#ffffff",
        ink="#1f2328",
        faint="#59636e",
        grid="#dde2e7",
        dominant="#0072B2",
    ),
    "dark": Theme(
        background="#0d1117",
        ink="#e6edf3",
        faint="#9da7b1",
        grid="#2a3038",
        dominant="#56B4E9",
    ),
}
DOMINANT, BULK = THEMES["light"].dominant, THEMES["light"].bulk
"""Blue and vermillion, which colour-blind readers tell apart."""


def theme_of(name: str) -> Theme:
    """Returns the theme of that name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in THEMES:
        raise ArgumentError("theme", name, " or ".join(map(repr, THEMES)))
    return THEMES[name]


class Picture(Figure):
    """A figure that is saved as it looks, with text as text in svg and pdf files.

    A notebook shows it without pyplot and ``%matplotlib``, in its own colours.
    """

    def __init__(self, theme: Theme, width: float, height: float) -> None:
        super().__init__(
            figsize=(width, height),
            dpi=120,
            layout="constrained",
            facecolor=theme.background,
            edgecolor=theme.background,
        )

    def _repr_png_(self) -> tuple[bytes, dict[str, float]]:
        """Shows it in a notebook: IPython knows of pyplot's figures alone, and this is none.

        Returns:
            The picture with twice its dots, for sharp screens, and the size to show it in.
        """
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=2 * self.dpi)
        width, height = self.get_size_inches() * self.dpi
        return file.getvalue(), {"width": round(width), "height": round(height)}

    def savefig(self, fname: Any, *, transparent: bool | None = None, **options: Any) -> None:
        """Saves it as ``Figure.savefig`` does, with the same arguments.

        Its own background is kept, and the identifiers in an svg file are the same every time.
        """
        # The layout is made for the labels of the drawing before, so that one comes first.
        self.draw_without_rendering()
        text: dict[Any, Any] = {
            "svg.fonttype": "none",
            "pdf.fonttype": 42,
            "svg.hashsalt": "subspace_optim",
        }
        with rc_context(text):
            super().savefig(
                fname, transparent=transparent, **({"facecolor": "auto", "dpi": "figure"} | options)
            )


def panels_of(
    axes: Axes | Sequence[Axes] | None,
    theme: Theme,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    count: int | None = None,
) -> list[Axes]:
    """Returns the panels that were given, or those of a new figure of ``size`` in inches.

    Args:
        axes: what was given.
        theme: of a new figure.
        size: of a new figure.
        rows: of its panels.
        columns: of its panels.
        count: how many panels there are (default: all that fit); the last row may have fewer.

    Returns:
        The panels, row by row.

    Raises:
        ArgumentError: they are no panels, or not so many.
    """
    wanted = rows * columns if count is None else count
    if axes is None:
        all_panels = list(np.ravel(Picture(theme, *size).subplots(rows, columns, squeeze=False)))
        for panel in all_panels[wanted:]:
            panel.remove()
        return all_panels[:wanted]
    panels = [axes] if isinstance(axes, Axes) else list(np.ravel(np.array(axes, dtype=object)))
    if len(panels) != wanted or not all(isinstance(panel, Axes) for panel in panels):
        allowed = f"{wanted} of matplotlib's Axes" if wanted > 1 else "one of matplotlib's Axes"
        raise ArgumentError("axes", axes, allowed)
    return panels


def paint(axes: Axes, theme: Theme, xlabel: str, ylabel: str) -> None:
    """Gives one panel its labels and the style of the house, whatever the user's settings are."""
    axes.set_facecolor(theme.background)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.faint, linewidth=0.8)
    sides: dict[str, Any] = {"left": True, "bottom": True, "top": False, "right": False}
    axes.tick_params(
        which="both",
        direction="out",
        color=theme.faint,
        labelcolor=theme.faint,
        labelsize=SMALL,
        width=0.8,
        length=3,
        pad=3,
        **sides,
        **{f"label{side}": shown for side, shown in sides.items()},
    )
    axes.tick_params(which="minor", width=0.6, length=1.5)
    axes.minorticks_off()  # a logarithmic scale sets its own
    axes.set_axisbelow(True)
    axes.grid(visible=False, which="minor")
    axes.grid(visible=True, which="major", color=theme.grid, linewidth=0.6, linestyle="-", alpha=1)
    axes.set_xlabel(xlabel, color=theme.ink, fontsize=LABEL)
    axes.set_ylabel(ylabel, color=theme.ink, fontsize=LABEL)
    axes.title.set_color(theme.ink)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(color=theme.faint, fontsize=SMALL)


def stroke(
    axes: Axes, x: Any, y: Any, color: str, width: float, *, dashes: Any = "-", label: str = "_"
) -> None:
    """Draws a line without points, whatever the user's settings are."""
    axes.plot(x, y, linestyle=dashes, marker="", color=color, linewidth=width, label=label)


def points(axes: Axes, x: Any, y: Any, color: str, marker: str, size: float, **style: Any) -> None:
    """Draws points without a line, whatever the user's settings are."""
    style = {"label": "_"} | style
    axes.plot(x, y, linestyle="", marker=marker, color=color, markersize=size, **style)


def key(axes: Axes, theme: Theme, columns: int = 2) -> None:
    """Puts the key above the panel, where it hides nothing; a single line needs none."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        borderpad=0.2,
        borderaxespad=0.2,
        labelspacing=0.3,
        columnspacing=1.2,
        handlelength=2.4,
        handletextpad=0.6,
    )


def say(axes: Axes, theme: Theme, text: str) -> None:
    """Writes what is missing into a panel that has nothing to show, and takes its scales off."""
    if axes.has_data():
        return
    axes.tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(visible=False)
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        color=theme.ink,
        fontsize=LABEL,
        ha="center",
        va="center",
    )


def number(value: float, _position: int | None = None) -> str:
    """Returns a short text: 0.001 to 1000 as they are, others by their power of ten."""
    factor, exponent = f"{value:.1e}".split("e")
    if value == 0 or -3 <= int(exponent) < 4:
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    factor = {"1.0": "", "-1.0": "-"}.get(factor, rf"{float(factor):g}{{\times}}")
    return rf"${factor}10^{{{int(exponent)}}}$"


def label_powers(axis: Axis, low: float, high: float) -> None:
    """Labels a logarithmic axis from ``low`` to ``high``, so that there are at least two labels."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(number))
    axis.set_minor_formatter(NullFormatter())


def colour_bar(axes: Axes, theme: Theme, image: ScalarMappable, label: str) -> None:
    """Puts a colour bar beside a panel, as a part of it: no other panel has to make room."""
    bar = axes.inset_axes((1.03, 0.0, 0.045, 1.0))
    axes.figure.figure.colorbar(image, cax=bar)
    paint(bar, theme, "", label)
    bar.grid(visible=False)
    bar.tick_params(left=False, labelleft=False, right=True, labelright=True)
    bar.tick_params(bottom=False, labelbottom=False)
    bar.yaxis.set_label_position("right")
    for spine in bar.spines.values():
        spine.set_visible(False)
