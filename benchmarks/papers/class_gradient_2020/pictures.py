"""What no data can say of the pictures and tables of `class_gradient_2020`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.class_gradient_2020.analysis import (
    Curve,
    curvature_ratio,
    curves_of,
    diverged,
    final_accuracy,
    final_loss,
    losses,
    mean_cosine_between,
)
from benchmarks.papers.drawing import LOOK, finished, first_of, grid, in_turn, line
from benchmarks.papers.reproduction import Raw, RawOfSeeds, Rows
from benchmarks.papers.tables import over_seeds
from subspace_optim.diagnostics import plots

_STYLES: Final = {
    "sgd": ("SGD", LOOK.ink, "-"),
    "printed": ("quasi-Newton as printed", LOOK.bulk, "--"),
    "orthogonal": ("with orthogonal vectors", LOOK.dominant, ":"),
    "damped": ("damped", LOOK.third, "-."),
}
_METHODS: Final = {name: _STYLES[name][0] for name in ("printed", "orthogonal")} | {
    "slowed": "with Newton's rate 1 - μ",
    "added": "with 1 added to each λ",
    "damped": "damped, by both",
}
"""The rows of Tables 1 and 2 beneath SGD's."""
_CROSSES: Final = {"sgd": 14.0, "printed": 11.0, "orthogonal": 7.5, "damped": 4.5}
"""Sizes, so that crosses at one place do not hide one another: later ones are smaller."""
_ROOM: Final = 3.0
"""Losses above this multiple of the loss at the start are beyond the edge of a panel."""
_ACCURACIES: Final = {"0.1": (88, 92), "0.05": (87, 92), "0.01": (82, 90)}
"""Table 1 of the paper, in percent: SGD and quasi-Newton."""
_LOSSES: Final = {"0.1": (0.3574, 0.3304), "0.05": (0.3985, 0.3346), "0.01": (0.5362, 0.3411)}
"""Table 2 of the paper."""

CurvesOfSeeds = Mapping[int, Curve]


def curves(raws: RawOfSeeds) -> dict[str, dict[str, dict[int, Curve]]]:
    """Returns the curves of all runs by rate or batch size, then by method and by seed."""
    found: dict[str, dict[str, dict[int, Curve]]] = {}
    for of_seeds in raws.values():
        for seed, raw in of_seeds.items():
            for method in raw["curves"]:
                for name, curve in curves_of(raw, method).items():
                    found.setdefault(name, {}).setdefault(method, {})[seed] = curve
    return found


# --- figures 1 and 2 -----------------------------------------------------------------------------


def draw_rates(raws: RawOfSeeds) -> Figure:
    """Draws validation loss and accuracy over the epochs, a column for each rate."""
    found = curves(raws)
    rates = sorted(found, key=float, reverse=True)
    titles = [f"η = {rate}" for rate in rates] or [""]
    panels = grid(titles + [""] * len(titles), len(titles), width=3.3, height=2.6)
    for rate, above, below in zip(rates, panels, panels[len(rates) :], strict=False):
        _losses(above, found[rate])
        _lines(below, found[rate], "accuracy")
        above.set(ylabel="validation loss")
        below.set(xlabel="epoch", ylabel="validation accuracy")
    return _keyed(panels)


def draw_batches(raws: RawOfSeeds) -> Figure:
    """Draws the validation loss over the steps, a panel for each batch size."""
    found = curves(raws)
    sizes = sorted(found, key=int)
    examples = max(curve["examples"] for curve in _all(found[sizes[0]])) if sizes else 0
    full = {size: ", the full batch" if int(size) == examples else "" for size in sizes}
    panels = grid([f"batches of {size}{full[size]}" for size in sizes] or [""], width=3.3)
    for panel, size in zip(panels, sizes, strict=False):
        _losses(panel, found[size])
        panel.set(xlabel="step", ylabel="validation loss")
    return _keyed(panels)


def _lines(panel: Axes, found: Mapping[str, CurvesOfSeeds], column: str) -> None:
    """Draws one column of all curves over epochs, or over steps where the run has none.

    What diverged ends in a cross, where its loss leaves the panel, or with its last row.
    """
    high = _highest(found)
    for method, of_seeds in found.items():
        label, colour, dashes = _STYLES[method]
        for curve, first in in_turn(of_seeds):
            x, y = np.array(curve["step"]) / curve.get("epoch", 1), np.array(curve[column], float)
            if diverged(curve):
                lost = np.flatnonzero(losses(curve) >= high)
                rows = lost[0] + 1 if len(lost) else len(x)
                x, y = x[:rows], np.fmin(y[:rows], high)
            one = line(panel, x, y, first, label, color=colour, ls=dashes)
            if diverged(curve):
                (cross,) = panel.plot(x[-1], y[-1], color=colour, marker="x", clip_on=False)
                cross.set(ms=_CROSSES[method], alpha=one.get_alpha())


def _losses(panel: Axes, found: Mapping[str, CurvesOfSeeds]) -> None:
    """Draws losses up to a multiple of that at the start."""
    _lines(panel, found, "loss")
    low = min(np.nanmin(one.get_ydata()) for one in panel.get_lines())
    panel.set(yscale="log", ylim=(0.8 * low, _highest(found)))


def _highest(found: Mapping[str, CurvesOfSeeds]) -> float:
    """Returns the loss at the upper edge of a panel."""
    return _ROOM * float(max(curve["loss"][0] for curve in _all(found)))


def _all(found: Mapping[str, CurvesOfSeeds]) -> Iterator[Curve]:
    return (curve for of_seeds in found.values() for curve in of_seeds.values())


def _keyed(panels: list[Axes]) -> Figure:
    """Returns the figure, with one key for all panels: four long names fit above none of them."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure = finished(panels, columns=0)
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def cosines(axes: Axes, of_seeds: Mapping[int, Raw]) -> None:
    """Draws the cosines of the class gradients of the first seed's last minibatch."""
    raw = first_of(of_seeds)
    if raw is not None:
        plots.cosine_matrix(raw["cosines"], raw["assignment"], axes=axes)


# --- tables --------------------------------------------------------------------------------------


def table_1(raws: RawOfSeeds) -> Rows:
    """Returns accuracies in percent, the paper's and ours."""
    return _beside(raws, _ACCURACIES, lambda curve: 100 * final_accuracy(curve))


def table_2(raws: RawOfSeeds) -> Rows:
    """Returns validation losses, the paper's and ours."""
    return _beside(raws, _LOSSES, final_loss)


def _beside(
    raws: RawOfSeeds,
    printed: Mapping[str, tuple[float, float]],
    end: Callable[[Curve], float],
) -> Rows:
    """Returns a row for each rate and method, with what it gains on SGD."""
    found = curves(raws)
    rows = [["η", "method", "paper", "ours", "on SGD: paper", "on SGD: ours"]]
    for rate, (sgd, newton) in printed.items():
        ends = {
            method: {seed: end(curve) for seed, curve in of_seeds.items()}
            for method, of_seeds in found.get(rate, {}).items()
        }
        ours = ends.get("sgd", {})
        rows.append([rate, "SGD", f"{sgd:g}", over_seeds(ours.values()), "", ""])
        for method, label in _METHODS.items():
            theirs = ends.get(method, {})
            gains = [theirs[seed] - ours[seed] for seed in theirs if seed in ours]
            paper = [f"{newton:g}", f"{newton - sgd:+.4g}"] if method == "printed" else ["–", "–"]
            mine = [over_seeds(theirs.values()), over_seeds(gains)]
            rows.append([rate, label, paper[0], mine[0], paper[1], mine[1]])
    return rows


def table_above(raws: RawOfSeeds) -> Rows:
    """Returns how the trainings above η = 0.1 ended."""
    found = curves(raws)
    rows = [["η", "method", "accuracy at the end (%)", "loss at the end", "diverged"]]
    for rate in sorted(found, key=float):
        for method, of_seeds in found[rate].items():
            ended = list(of_seeds.values())
            percent = over_seeds(100 * final_accuracy(curve) for curve in ended)
            lost = f"{sum(map(diverged, ended))} of {len(ended)}"
            loss = over_seeds(map(final_loss, ended))
            rows.append([rate, _STYLES[method][0], percent, loss, lost])
    return rows


def table_batches(raws: RawOfSeeds) -> Rows:
    """Returns validation losses at the end, by batch size."""
    found = curves(raws)
    rows = [["batch size", *(label for label, _, _ in _STYLES.values())]]
    for size in sorted(found, key=int):
        ends = [found[size].get(method, {}).values() for method in _STYLES]
        rows.append([size, *(over_seeds(map(final_loss, each)) for each in ends)])
    return rows


def table_assumptions(raws: RawOfSeeds) -> Rows:
    """Returns what the method assumes, and what was measured."""
    found = list(raws["class-gradients"].values())
    return [
        ["assumption", "as assumed", "measured"],
        ["mean |cosine| of two class gradients", "0", over_seeds(map(mean_cosine_between, found))],
        ["median of v_kᵀHv_k / λ_k", "1", over_seeds(map(curvature_ratio, found))],
        *_ratios(found),
        ["second term of the Hessian", "0", over_seeds(raw["second_term"] for raw in found)],
    ]


def _ratios(found: list[Raw]) -> Iterator[list[str]]:
    """Yields the median ratio of curvatures at each step that has one."""
    for step in found[0]["ratios"] if found else ():
        medians = [np.median(raw["ratios"][step]) for raw in found if step in raw["ratios"]]
        yield [f"the same at step {step}", "1", over_seeds(medians)]
