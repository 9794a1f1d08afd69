"""Pictures of matrices and of spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics.plots.style import (
    SMALL,
    Array,
    Theme,
    ThemeName,
    colour_bar,
    key,
    label_powers,
    paint,
    panels_of,
    points,
    say,
    stroke,
    theme_of,
)
from subspace_optim.linalg.spectral_density import SpectralDensity

_MAP: Final = "viridis"
"""Its lightness alone says the order, for colour-blind readers and grey print."""
_READABLE: Final = 12
"""Matrices of up to so many rows and columns have room for numbers."""


def overlap_heatmap(
    matrix: ArrayLike | Tensor,
    steps: Sequence[float] | None = None,
    *,
    axes: Axes | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws the overlaps of saved bases with each other, on a scale from 0 to 1.

    Args:
        matrix: ``(n, n)``, such as ``overlap_matrix(bases)``.
        steps: ``(n,)``, where the bases were saved (default: their numbers). The cells are of one
            size, also where the steps are not.
        axes: a panel (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Raises:
        ArgumentError: the matrix is not square, or there is not a step for each row.

    Reference:
        `gur_ari_2018`, eq. 5 and Figure 2.
    """
    look, overlaps = theme_of(theme), _matrix("matrix", matrix)
    n = len(overlaps)
    if overlaps.shape != (n, n):
        raise ArgumentError("the shape of matrix", overlaps.shape, "(n, n), a row for each basis")
    labels = list(range(n)) if steps is None else list(steps)
    if len(labels) != n:
        raise ArgumentError("the length of steps", len(labels), f"{n}, one for each row of matrix")
    (panel,) = panels_of(axes, look, (5.2, 4.3))
    paint(panel, look, "saved at step", "saved at step")
    _heat(panel, look, overlaps, "subspace overlap", "lower")
    ticks = _few(n, 6)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(ticks, [f"{labels[i]:.6g}" for i in ticks])
    return panel.figure.figure


def cosine_matrix(
    cosines: ArrayLike | Tensor,
    assignment: Sequence[int] | Tensor | None = None,
    *,
    axes: Axes | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws the cosines of class gradients and eigenvectors, and which of them go together.

    They are drawn without their signs, which mean nothing for eigenvectors, on a scale from 0 to
    1. The pairs of the assignment are framed, with their value; where there are more than 12
    classes or eigenvectors, they have a dot.

    Args:
        cosines: ``(C, k)``, a class a row.
        assignment: ``(C,)``, the eigenvector of each class, counted from 0, or -1 for none: that
            of ``class_gradient_cosines``.
        axes: a panel (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.

    Raises:
        ArgumentError: the cosines are no matrix, or the assignment does not fit them.

    Reference:
        `class_gradient_2020`, Figure 4b.
    """
    look, values = theme_of(theme), np.abs(_matrix("cosines", cosines))
    classes, k = values.shape
    columns = [-1] * classes if assignment is None else [int(column) for column in assignment]
    if len(columns) != classes or not all(-1 <= column < k for column in columns):
        allowed = f"{classes} numbers from -1 to {k - 1}, one for each class"
        raise ArgumentError("assignment", columns, allowed)
    (panel,) = panels_of(axes, look, (5.2, 4.3))
    paint(panel, look, "eigenvector", "class")
    _heat(panel, look, values, "|cosine|", "upper")
    panel.xaxis.set_ticks(_few(k, _READABLE), [str(i + 1) for i in _few(k, _READABLE)])
    panel.yaxis.set_ticks(_few(classes, _READABLE))
    pairs = [(row, column) for row, column in enumerate(columns) if column >= 0]
    for row, column in pairs:
        if max(classes, k) <= _READABLE:
            _frame(panel, row, column, values[row, column])
        else:
            edge = {"markeredgecolor": "black", "markeredgewidth": 0.8}
            points(panel, column, row, "white", "o", 3.5, **edge)
    if pairs:
        mean = np.mean([values[pair] for pair in pairs])
        text = f"marked: the optimal assignment, mean {mean:.2f}"
        panel.text(0.0, 1.02, text, transform=panel.transAxes, color=look.ink, fontsize=SMALL)
    return panel.figure.figure


def density(
    spectrum: SpectralDensity,
    eigenvalues: ArrayLike | Tensor | None = None,
    *,
    width: float | None = None,
    axes: Axes | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """Draws a spectral density on a logarithmic scale, with its standard error and the outliers.

    The scale begins a little below the smallest density at a node: further down there is nothing
    but the tails of the kernel.

    Args:
        spectrum: of ``spectral_density``.
        eigenvalues: the outliers, which are marked and counted.
        width: of the kernel (default: that of the spectrum).
        axes: a panel (default: a figure of its own).
        theme: the colours.

    Returns:
        The figure.
    """
    look = theme_of(theme)
    outliers = _vector(() if eigenvalues is None else eigenvalues)
    outliers = outliers[np.isfinite(outliers)]
    nodes = _vector(spectrum.nodes)
    ends = np.concatenate([nodes, outliers])
    margin = 0.04 * np.ptp(ends) or 1.0
    grid = np.linspace(ends.min() - margin, ends.max() + margin, 2000)
    grid = np.union1d(grid, nodes)  # no peak is missed
    mean, error = (_vector(part) for part in spectrum.density(torch.from_numpy(grid), width))
    at_nodes = mean[np.isin(grid, nodes)]
    floor = max(at_nodes.min() / 3, 1e-8 * at_nodes.max())
    (panel,) = panels_of(axes, look, (7.0, 4.0))
    paint(panel, look, r"eigenvalue $\lambda$", "spectral density")
    panel.set_yscale("log")
    label = f"mean of {len(spectrum.nodes)} probes"
    stroke(panel, grid, np.fmax(mean, floor / 10), look.ink, 1.2, label=label)
    panel.fill_between(
        grid,
        np.fmax(mean - error, floor / 10),
        np.fmax(mean + error, floor / 10),
        color=look.faint,
        alpha=0.4,
        linewidth=0,
        label="± standard error",
    )
    if len(outliers):
        label = f"{len(outliers)} outlier{'s' * (len(outliers) > 1)}"
        heights, transform = np.full(len(outliers), 0.03), panel.get_xaxis_transform()
        points(panel, outliers, heights, look.dominant, "^", 6, transform=transform, label=label)
    panel.set_ylim(floor, 3 * mean.max())
    label_powers(panel.yaxis, floor, 3 * mean.max())
    key(panel, look, columns=3)
    return panel.figure.figure


def _heat(
    axes: Axes, look: Theme, values: Array, label: str, origin: Literal["lower", "upper"]
) -> None:
    """Draws numbers from 0 to 1 as cells, with a colour bar."""
    axes.grid(visible=False)
    if not values.size:
        say(axes, look, "nothing recorded")
        return
    colours = colormaps[_MAP].with_extremes(bad=look.grid)
    rows, columns = values.shape
    image = axes.imshow(
        values,
        colours,
        vmin=0,
        vmax=1,
        origin=origin,
        interpolation="nearest",
        aspect="equal" if rows == columns else "auto",
    )
    colour_bar(axes, look, image, label)


def _few(count: int, most: int) -> list[int]:
    """Returns at most so many of the indices below ``count``, evenly spaced, from 0 on."""
    return list(range(0, count, max(1, -(-count // most))))


def _frame(axes: Axes, row: int, column: int, value: float) -> None:
    """Frames a cell, in white on black, which no colour hides, and writes its value into it."""
    for colour, width in (("black", 3.0), ("white", 1.4)):
        corner = (column - 0.43, row - 0.43)
        frame = Rectangle(corner, 0.86, 0.86, fill=False, edgecolor=colour, linewidth=width)
        axes.add_patch(frame)
    if np.isfinite(value):
        light = np.dot((0.2126, 0.7152, 0.0722), np.power(colormaps[_MAP](float(value))[:3], 2.2))
        ink = "black" if light > 0.18 else "white"  # there, both have the same contrast
        axes.text(column, row, f"{value:.2f}", color=ink, fontsize=6.5, ha="center", va="center")


def _vector(values: Any) -> Array:
    """Returns the values as a flat array."""
    return _array(values).ravel()


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _matrix(name: str, values: Any) -> Array:
    """Returns the values as an array of two dimensions.

    Raises:
        ArgumentError: they have not two.
    """
    matrix = _array(values)
    if matrix.ndim != 2:
        raise ArgumentError(f"the shape of {name}", matrix.shape, "of two dimensions")
    return matrix
