"""The paper's figures and its table, from the raw figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import subspace_optim as so
from benchmarks.papers.reproduction import Exhibit, Raw, RawOfSeeds, Rows
from benchmarks.papers.sagun_2017.claims import TABLE, halves, printed, residual_share
from subspace_optim.diagnostics.plots.style import (
    LABEL,
    LINES,
    THEMES,
    Array,
    key,
    label_powers,
    paint,
    panels_of,
    say,
)

_LOOK: Final = THEMES["light"]
_MAP: Final = "viridis"
_RUNS: Final = ("gd-tanh", "gd-relu", "sgd-relu")
_PARTS: Final = {"parts-mnist": "MNIST", "parts-clusters": "ten clusters"}
_SCREE: Final = ("principal components of the inputs", "eigenvalue of the Hessian")
_RATIO: Final = 0.2
"""The left edge is shown up to this share of all eigenvalues."""


def in_turn(of_seeds: Mapping[int, Raw]) -> Iterator[tuple[Raw, bool, dict[str, Any]]]:
    """Yields raw figures, whether they are the first, and the style of their lines.

    The first seed is drawn strongly, and has the labels; the others are thin.
    """
    for number, (_, raw) in enumerate(sorted(of_seeds.items())):
        style = {"linewidth": 0.7, "alpha": 0.5} if number else {"linewidth": 1.6, "alpha": 1.0}
        yield raw, not number, style


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Returns the mean of the seeds, with the smallest and the largest where they differ."""
    found = [float(value) for value in values]
    if not found:
        return "–"
    mean, low, high = (f"{value:.{digits}g}" for value in (np.mean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"


def finished(panels: Sequence[Axes], columns: int = 2) -> Figure:
    """Returns the figure of the panels, each with its key, or saying that it is empty."""
    for panel in panels:
        key(panel, _LOOK, columns=columns)
        say(panel, _LOOK, "nothing measured")
    return panels[0].figure.figure


def title(panel: Axes, text: str) -> None:
    """Writes what a panel shows into its upper right."""
    place: dict[str, Any] = {"transform": panel.transAxes, "ha": "right", "va": "top"}
    panel.text(0.98, 0.97, text, color=_LOOK.ink, fontsize=LABEL, **place)


def cut(panel: Axes, x: float) -> None:
    """Draws a dashed line from the bottom to the top."""
    panel.axvline(x, color=_LOOK.ink, linestyle=LINES["dashed"][0], linewidth=0.8)


# --- figure 1 ------------------------------------------------------------------------------------


def draw_whole(raws: RawOfSeeds) -> Figure:
    """Draws the whole spectrum in order, at the random start and at the end."""
    panels = panels_of(None, _LOOK, (9.0, 3.4), 1, 2)
    for panel, when, text in zip(
        panels, ("start", "end"), ("random point", "after training"), strict=True
    ):
        for raw, first, style in in_turn(raws["growth"]):
            if raw["whole"]:
                spectrum = raw["whole"][when]
                style |= {"marker": ".", "markersize": 4, "color": _LOOK.ink}
                panel.plot(spectrum["index"], spectrum["eigenvalues"], **style)
                if first:
                    share = f"{spectrum['near_zero']:.1%} within λ₁/100 of zero"
                    title(panel, f"{text}, P = {raw['whole']['size']:,}\n{share}")
        paint(panel, _LOOK, "number of the eigenvalue", "eigenvalue")
    return finished(panels)


# --- figures 2 and 3, and Table 1 ----------------------------------------------------------------


def draw_clusters(raws: RawOfSeeds) -> Figure:
    """Draws both scree plots, of the inputs and of the Hessian, a column for each data set."""
    found = raws["sgd-relu"]
    columns = max((len(_near(raw)) for raw in found.values()), default=1)
    panels = panels_of(None, _LOOK, (2.6 * columns, 5.2), 2, columns)
    for raw, first, style in in_turn(found):
        style |= {"marker": "x", "markersize": 3, "linestyle": ""}
        for row, above, below in zip(_near(raw), panels, panels[columns:], strict=False):
            for panel, values, colour in (
                (above, row["principal"], _LOOK.bulk),
                (below, row["top"], _LOOK.dominant),
            ):
                panel.plot(np.arange(1, len(values) + 1), values, color=colour, **style)
                if first:
                    cut(panel, row["clusters"] + 0.5)
            if first:
                title(above, f"{row['clusters']} clusters")
                title(below, f"elbow after {row['elbow']}")
    for number, panel in enumerate(panels):
        paint(panel, _LOOK, "number", "" if number % columns else _SCREE[number // columns])
    return finished(panels)


def _near(raw: Raw) -> list[dict[str, Any]]:
    """Returns the rows of covariance 1."""
    return [row for row in raw["rows"] if row["covariance"] == 1]


def table_clusters(raws: RawOfSeeds) -> Rows:
    """Returns all rows of Table 1, ours beside the paper's."""
    found: dict[tuple[str, str, float, int], list[dict[str, Any]]] = {}
    for run in _RUNS:
        for raw in raws[run].values():
            for row in raw["rows"]:
                if printed(raw, row) is not None:
                    place = (raw["algorithm"], raw["activation"])
                    found.setdefault((*place, row["covariance"], row["clusters"]), []).append(row)
    rows = [
        [
            "training",
            "size",
            "cov",
            "clusters",
            "gap: paper",
            "gap: ours",
            "ratio: paper",
            "ratio: ours",
            "elbow: paper",
            "elbow: ours",
            "mean: paper",
            "mean: ours",
            "std: paper",
            "std: ours",
            "cutoff: paper",
            "cutoff: ours",
        ]
    ]
    for at, theirs in TABLE.items():
        algorithm, activation, covariance, clusters = at
        ours = found.get(at, [])

        def column(name: str, ours: list[dict[str, Any]] = ours) -> Sequence[float]:
            return [row[name] for row in ours]

        rows.append(
            [
                f"{algorithm} {activation}",
                str(3960 + 31 * clusters),
                f"{covariance:g}",
                str(clusters),
                str(theirs.gap),
                listed(column("gap")),
                str(theirs.ratio),
                listed(column("ratio")),
                "–" if theirs.heuristic is None else str(theirs.heuristic),
                listed(column("elbow")),
                f"{theirs.mean:.3g}",
                over_seeds(column("mean")),
                f"{theirs.mean:.3g}",
                over_seeds(column("std")),
                "–" if theirs.cutoff is None else f"{theirs.cutoff:g}",
                over_seeds(column("cutoff")),
            ]
        )
    return rows


def listed(counts: Sequence[float]) -> str:
    """Returns the counts of the seeds, in order."""
    return ", ".join(f"{count:g}" for count in counts) or "–"


# --- figures 4 to 8 ------------------------------------------------------------------------------


def draw_growth(raws: RawOfSeeds) -> Figure:
    """Draws right edges, left edges, and left edges by ratio, a line for each size of network."""
    panels = panels_of(None, _LOOK, (12.0, 3.8), 1, 3)
    right, left, ratio = panels
    for raw, first, style in in_turn(raws["growth"]):
        networks = raw["networks"]
        for network, shade in zip(networks, np.linspace(0, 0.9, len(networks)), strict=True):
            style["color"] = colormaps[_MAP](shade)
            style["label"] = f"P = {network['size']:,}" if first else "_"
            edge = network["right"]
            right.plot(np.arange(1, len(edge) + 1), edge, **style)
            if network["ratios"]:
                curve = np.array(network["ratios"])
                shares = np.linspace(0, 0.5, len(curve))
                inside = shares <= _RATIO
                left.plot(shares[inside] * network["size"], curve[inside], **style)
                ratio.plot(shares[inside], curve[inside], **style)
            else:
                left.plot(0, network["left"][0], marker="o", linestyle="", **style | {"label": "_"})
    paint(right, _LOOK, "number, from the right", "eigenvalue")
    paint(left, _LOOK, "number, from the left", "eigenvalue")
    paint(ratio, _LOOK, "number over P", "eigenvalue")
    return finished(panels, columns=3)


def draw_batches(raws: RawOfSeeds) -> Figure:
    """Draws both edges, after large and after small batches."""
    panels = panels_of(None, _LOOK, (8.6, 3.6), 1, 2)
    for raw, first, style in in_turn(raws["batches"]):
        for network, colour, line in zip(
            raw["networks"], (_LOOK.dominant, _LOOK.bulk), ("solid", "dashed"), strict=True
        ):
            style |= {"color": colour, "linestyle": LINES[line][0]}
            style["label"] = f"batches of {network['batch_size']}" if first else "_"
            for panel, side in zip(panels, ("left", "right"), strict=True):
                panel.plot(np.arange(1, len(network[side]) + 1), network[side], **style)
    for panel, side in zip(panels, ("left", "right"), strict=True):
        paint(panel, _LOOK, f"number, from the {side}", "eigenvalue")
    return finished(panels)


# --- figures 9 and 10 ----------------------------------------------------------------------------


def draw_phases(raws: RawOfSeeds) -> Figure:
    """Draws losses and accuracies by step; a dashed line where the small batches begin."""

    def rows(raw: Raw) -> list[dict[str, Any]]:
        before, after = halves(raw)
        return before + after

    return _losses(raws["phases"], rows, "step", lambda raw: [raw["switch"]])


def draw_line(raws: RawOfSeeds) -> Figure:
    """Draws losses and accuracies on the line; dashed lines at its ends."""
    return _losses(raws["phases"], lambda raw: raw["line"], "alpha", lambda _: [0, 1])


def _losses(
    of_seeds: Mapping[int, Raw],
    rows_of: Callable[[Raw], list[dict[str, Any]]],
    column: str,
    marks: Callable[[Raw], list[float]],
) -> Figure:
    panels = panels_of(None, _LOOK, (9.0, 3.4), 1, 2)
    for raw, first, style in in_turn(of_seeds):
        rows = rows_of(raw)
        x = [row[column] for row in rows]
        for panel, what in zip(panels, ("loss", "accuracy"), strict=True):
            for part, colour, line in (
                ("train", _LOOK.dominant, "solid"),
                ("test", _LOOK.bulk, "dotted"),
            ):
                y = [row[f"{part}_{what}"] for row in rows]
                style |= {"linestyle": LINES[line][0], "color": colour}
                panel.plot(x, y, label=part if first else "_", **style)
            if first:
                for mark in marks(raw):
                    cut(panel, mark)
    xlabel = {"step": "step", "alpha": "α: 0 large batches, 1 small batches"}[column]
    for panel, what in zip(panels, ("loss", "accuracy"), strict=True):
        paint(panel, _LOOK, xlabel, what)
    panels[0].set_yscale("log")
    label_powers(panels[0].yaxis, *panels[0].get_ylim())
    return finished(panels)


# --- section 2 -----------------------------------------------------------------------------------


def draw_parts(raws: RawOfSeeds) -> Figure:
    """Draws the spectral norms of both parts of the Hessian along the training."""
    panels = panels_of(None, _LOOK, (9.0, 3.4), 1, 2)
    for panel, (run, name) in zip(panels, _PARTS.items(), strict=True):
        for raw, first, style in in_turn(raws[run]):
            rows = raw["rows"]
            step = [row["step"] for row in rows]
            for label, colour, line, values in (
                ("H", _LOOK.ink, "solid", [row["hessian"][0] for row in rows]),
                ("G", _LOOK.dominant, "dashed", [row["gauss_newton"][0] for row in rows]),
                ("H − G", _LOOK.bulk, "dotted", [max(map(abs, row["residual"])) for row in rows]),
            ):
                style |= {"linestyle": LINES[line][0], "marker": LINES[line][1]}
                style |= {"markersize": 3, "color": colour}
                panel.plot(step, values, label=label if first else "_", **style)
        paint(panel, _LOOK, "step", "spectral norm")
        if panel.has_data():
            panel.set_xscale("symlog", linthresh=10)
            panel.set_yscale("log")
            title(panel, name)
    return finished(panels, columns=3)


def table_parts(raws: RawOfSeeds) -> Rows:
    """Returns how large the second part is, and how far the top eigenvalues of H and G agree."""
    rows = [["data", "step", "loss", "norm of H − G over that of G", "λ(G)/λ(H), the ten largest"]]
    for run, name in _PARTS.items():
        by_step: dict[int, list[dict[str, Any]]] = {}
        for raw in raws[run].values():
            for row in raw["rows"]:
                by_step.setdefault(row["step"], []).append(row)
        for step, found in by_step.items():
            ratios = [
                np.mean(np.array(row["gauss_newton"][:10]) / np.array(row["hessian"][:10]))
                for row in found
            ]
            rows.append(
                [
                    name,
                    f"{step:,}",
                    over_seeds(row["loss"] for row in found),
                    over_seeds(map(residual_share, found)),
                    over_seeds(float(ratio) for ratio in ratios),
                ]
            )
    return rows


def table_trivial(raws: RawOfSeeds) -> Rows:
    """Returns zeros and near zeros of both matrices, beside what there must be."""
    rows = [["N", "trained", "P", "P − NC", "zeros of G", "|λ(H)| ≤ λ₁/1000", "loss"]]
    found: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for raw in raws["trivial"].values():
        for row in raw["rows"]:
            found.setdefault((row["examples"], row["trained"]), []).append(row)
    for (examples, trained), ours in found.items():
        rows.append(
            [
                str(examples),
                "yes" if trained else "no",
                f"{ours[0]['size']:,}",
                f"{ours[0]['bound']:,}",
                over_seeds((row["zeros"] for row in ours), 4),
                over_seeds((row["hessian"] for row in ours), 4),
                over_seeds(row["loss"] for row in ours),
            ]
        )
    return rows


# --- appendix B ----------------------------------------------------------------------------------


def draw_white(raws: RawOfSeeds) -> Figure:
    """Draws spectra beside their laws, and in the last panel the largest eigenvalues of spikes."""
    laws: list[Raw] = next(iter(raws["white"].values()), {"rows": []})["rows"]
    panels = panels_of(None, _LOOK, (3.2 * (len(laws) + 1), 3.4), 1, len(laws) + 1)
    for panel, law in zip(panels, laws, strict=False):
        _law(panel, law["ratio"], np.array(law["eigenvalues"]))
    _spikes(panels[-1], raws)
    return finished(panels)


def _law(panel: Axes, ratio: float, values: Array) -> None:
    """Draws the density of the eigenvalues that are not zero."""
    lower, upper = so.diagnostics.marchenko_pastur_edges(ratio)
    bins = np.linspace(0.9 * lower, 1.1 * upper, 25)
    heights, _ = np.histogram(values, bins)
    densities = heights / np.diff(bins) / len(values)
    panel.stairs(densities, bins, fill=True, color=_LOOK.grid, label="measured")
    x = torch.linspace(lower, upper, 400, dtype=torch.float64)
    density = so.diagnostics.marchenko_pastur_density(x, ratio)
    panel.plot(x.tolist(), density.tolist(), color=_LOOK.dominant, label="law")
    title(panel, f"γ = {ratio:g}")
    paint(panel, _LOOK, "eigenvalue", "density")


def _spikes(panel: Axes, raws: RawOfSeeds) -> None:
    """Draws the largest eigenvalues of all draws, and the theory."""
    rows = [row for raw in raws["spiked"].values() for row in raw["rows"]]
    colours = (_LOOK.dominant, _LOOK.bulk, _LOOK.third, _LOOK.fourth)
    for ratio, colour in zip(sorted({row["ratio"] for row in rows}), colours, strict=False):
        ours = [row for row in rows if row["ratio"] == ratio]
        spikes = np.linspace(0, 1.1 * max(row["spike"] for row in ours), 100)
        theory = [so.diagnostics.spiked_eigenvalue(1 + s * ratio**0.5, ratio) for s in spikes]
        panel.plot(spikes, theory, color=colour, label=f"theory, γ = {ratio:g}")
        for row in ours:
            x = [row["spike"]] * len(row["largest"])
            panel.plot(x, row["largest"], linestyle="", marker=".", color=colour, alpha=0.6)
    paint(panel, _LOOK, "spike, 1 at the threshold", "largest eigenvalue")


EXHIBITS: Final = (
    Exhibit(
        "figure-1",
        "The whole spectrum at a random point, and after training from there",
        ("growth",),
        draw=draw_whole,
        note="In the paper both spectra are a flat line at zero, but for a few eigenvalues at the "
        "ends.",
    ),
    Exhibit(
        "figures-2-3",
        "Principal components of clusters, and scree plots of the Hessian",
        ("sgd-relu",),
        draw=draw_clusters,
        note="Dashed: after as many as there are clusters. In the paper the large principal "
        "components are not exactly as many as the clusters, and the eigenvalues above the gap "
        "are.",
    ),
    Exhibit(
        "table-1",
        "Outliers by the largest gap, the largest ratio and the elbow",
        _RUNS,
        table=table_clusters,
        note="Counts of the seeds in order. The paper's standard deviations repeat its means in "
        "all nineteen rows, which no spectrum with a few outliers has. Rows of covariance 10 end "
        "at a higher loss than those of 1.",
    ),
    Exhibit(
        "figures-4-6",
        "Edges of the spectrum as the network grows, on the same data",
        ("growth",),
        draw=draw_growth,
        note="In the paper the right edge keeps its shape, the left edge shifts with the size, and "
        "by ratio it keeps its shape too.",
    ),
    Exhibit(
        "figures-7-8",
        "Edges of the spectrum after large and small batches",
        ("batches",),
        draw=draw_batches,
        note="In the paper as many eigenvalues are large after both, those of the large batches "
        "larger; the negative ones are orders of magnitude smaller.",
    ),
    Exhibit(
        "figure-9",
        "Large batches, and small ones from where these end",
        ("phases",),
        draw=draw_phases,
        note="In the paper losses jump and accuracies drop at the switch; in the end small batches "
        "have a test accuracy about 1 % higher.",
    ),
    Exhibit(
        "figure-10",
        "The line through the ends of both parts",
        ("phases",),
        draw=draw_line,
        note="In the paper there is no barrier between the ends, and beyond the end of the large "
        "batches the loss rises more steeply.",
    ),
    Exhibit(
        "section-2",
        "The Gauss-Newton matrix and the rest of the Hessian along the training",
        tuple(_PARTS),
        draw=draw_parts,
        table=table_parts,
        note="The paper argues that the rest can be ignored as training progresses; it has no "
        "figure of it.",
    ),
    Exhibit(
        "section-2-1",
        "Trivial eigenvalues where there are few examples",
        ("trivial",),
        table=table_trivial,
        note="The paper counts P − N for one output. Softmax takes another N from the rank of "
        "G, and units that no example activates take more.",
    ),
    Exhibit(
        "appendix-b",
        "A linear model on white data, and with one large variance",
        ("white", "spiked"),
        draw=draw_white,
        note="The paper states the theory, without a figure. The spectra are of the first seed, "
        "the spikes of all.",
    ),
)
