"""What no data can say of the pictures and tables of `class_gradient_2020`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.class_gradient_2020.analysis import (
    ACCURACIES,
    LOSSES,
    Curve,
    curvature_ratios,
    curves_of,
    diverged,
    final_accuracy,
    final_loss,
    late_share,
    lead,
    limit,
    longest,
    losses,
    pairs,
    readings,
    trained,
    within_kinds,
)
from benchmarks.papers.drawing import LOOK, finished, first_of, grid, in_turn, line
from benchmarks.papers.reductions import late_mean
from benchmarks.papers.reproduction import Raw, RawOfSeeds, Rows
from benchmarks.papers.tables import over_seeds
from subspace_optim.diagnostics import plots

_STYLES: Final = {
    "sgd": ("SGD", LOOK.ink, "-"),
    "printed": ("quasi-Newton as printed", LOOK.bulk, "--"),
    "class": (r"$\lambda$ over a class", LOOK.dominant, ":"),
    "class-one-plain": ("all three otherwise", LOOK.third, "-."),
}
"""What is drawn of a method; the others are in tables alone."""
_WORDS: Final = {
    "printed": "as printed",
    "class": "λ over a class",
    "one": "λ from 1",
    "plain": "no momentum for Newton",
    "orthogonal": "orthogonal vectors",
}
_CROSSES: Final = {"sgd": 14.0, "printed": 11.0, "class": 7.5, "class-one-plain": 4.5}
"""Sizes, so that crosses at one place do not hide one another: later ones are smaller."""
_ROOM: Final = 3.0
"""Losses above this multiple of the loss at the start are beyond the edge of a panel."""

CurvesOfSeeds = Mapping[int, Curve]


def words(method: str) -> str:
    """Returns the name of a method in a table."""
    return "SGD" if method == "sgd" else ", ".join(_WORDS[word] for word in method.split("-"))


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
    for method, (label, colour, dashes) in _STYLES.items():
        of_seeds = found.get(method, {})
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
    """Draws the cosines of the first seed's class gradients, of its last minibatch."""
    raw = first_of(of_seeds)
    if raw is not None:
        plots.cosine_matrix(raw["last"]["cosines"], raw["last"]["assignment"], axes=axes)


# --- tables --------------------------------------------------------------------------------------


def table_1(raws: RawOfSeeds) -> Rows:
    """Returns accuracies in percent, the paper's and ours."""
    return _beside(raws, ACCURACIES, lambda curve: 100 * final_accuracy(curve))


def table_2(raws: RawOfSeeds) -> Rows:
    """Returns validation losses, the paper's and ours."""
    return _beside(raws, LOSSES, final_loss)


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
        ours = ends.pop("sgd", {})
        rows.append([rate, "SGD", f"{sgd:g}", over_seeds(ours.values()), "", ""])
        for method, theirs in ends.items():
            gains = [theirs[seed] - ours[seed] for seed in theirs if seed in ours]
            paper = [f"{newton:g}", f"{newton - sgd:+.4g}"] if method == "printed" else ["–", "–"]
            mine = [over_seeds(theirs.values()), over_seeds(gains)]
            rows.append([rate, words(method), paper[0], mine[0], paper[1], mine[1]])
    return rows


def table_limits(raws: RawOfSeeds) -> Rows:
    """Returns the largest rate of the ladder at which each method does not diverge."""
    rows = [["network", "method", "paper", "largest η", "trains at 0.1"]]
    for name, of_seeds in raws.items():
        scores = "an eighth of its scores"
        if "unscaled" in name:
            scores = "its scores, wider" if "lower" in name else "its scores"
        elif "without-norm" in name:
            scores = "its scores, without batch norm"
        for method in next(iter(of_seeds.values()), {"curves": ()})["curves"]:
            each = list(of_seeds.values())
            largest = over_seeds(
                found for found in (limit(raw, method) for raw in each) if not math.isnan(found)
            )
            at = [trained(curves_of(raw, method)["0.1"]) for raw in each]
            rows.append([scores, words(method), "0.1", largest, f"{sum(at)} of {len(at)}"])
    return rows


def table_batches(raws: RawOfSeeds) -> Rows:
    """Returns validation losses at the end, by batch size."""
    found = curves(raws)
    methods = ("sgd", "printed", "class")
    rows = [["batch size", *map(words, methods)]]
    for size in sorted(found, key=int):
        ends = [found[size].get(method, {}).values() for method in methods]
        rows.append([size, *(over_seeds(map(final_loss, each)) for each in ends)])
    return rows


def table_readings(raws: RawOfSeeds) -> Rows:
    """Returns how the trainings by each reading ended, beside SGD's."""
    rows = [
        ["batches", "reading", "trained", "accuracy (%)", "loss", "early lead", "SGD ahead late"]
    ]
    for of_seeds in raws.values():
        each = list(of_seeds.values())
        for size in next((raw["curves"]["sgd"] for raw in each), ()):
            sgd = [curves_of(raw, "sgd")[size] for raw in each]
            rows.append([size, "SGD", *_ended(sgd), "–", "–"])
            for method in readings(each[0]):
                both = [pairs(raw, method)[size] for raw in each]
                leads = over_seeds(lead(*pair) for pair in both)
                late = over_seeds(late_share(*pair) for pair in both)
                rows.append([size, words(method), *_ended([n for _, n in both]), leads, late])
    return rows


def _ended(found: list[Curve]) -> list[str]:
    percent = over_seeds(100 * final_accuracy(curve) for curve in found)
    stood = f"{sum(map(trained, found))} of {len(found)}"
    return [stood, percent, over_seeds(map(final_loss, found))]


def table_between(raws: RawOfSeeds) -> Rows:
    """Returns how far class gradients of digits and of images are from orthogonal."""
    rows = [
        ["data", "accuracy", "validation accuracy", "largest eigenvalue", "kinds, same less other"]
    ]
    for run, data in (("digits", "MNIST"), ("kinds", "CIFAR-10")):
        seeds = list(raws[run].values())
        accuracies = [
            over_seeds(raw[name] for raw in seeds) for name in ("accuracy", "valid_accuracy")
        ]
        kinds = over_seeds(map(within_kinds, seeds)) if run == "kinds" else "–"
        rows.append([data, *accuracies, over_seeds(map(longest, seeds)), kinds])
    return rows


def table_assumptions(raws: RawOfSeeds) -> Rows:
    """Returns what the method assumes, and what was measured where SGD did not diverge."""
    found = [raw for raw in raws["class-gradients"].values() if not raw["diverged"]]
    quantities = {
        "largest eigenvalue of the cosines between class gradients": ("1", longest),
        "overlap of the spans of two minibatches": (
            "close to 1",
            lambda raw: late_mean(raw, "kept"),
        ),
        "second term of the Hessian": ("0", lambda raw: raw["second_term"]),
    }
    rows = [["assumption", "as assumed", "measured"]]
    rows += [
        [name, assumed, over_seeds(map(figure, found))]
        for name, (assumed, figure) in quantities.items()
    ]
    return [*rows, *_ratios(found)]


def _ratios(found: list[Raw]) -> Iterator[list[str]]:
    """Yields the median ratio of curvatures at each step that has one."""
    for number, step in enumerate(found[0]["ratios"] if found else ()):
        medians = over_seeds(curvature_ratios(raw)[number] for raw in found)
        yield [f"median of v_kᵀHv_k / λ_k at step {step}", "1", medians]
