"""The paper's figures and its table, from the raw figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import subspace_optim as so
from benchmarks.papers.drawing import (
    LOOK,
    finished,
    first_of,
    grid,
    in_turn,
    line,
    mark,
    over_seeds,
    shade,
)
from benchmarks.papers.reproduction import Exhibit, Raw, RawOfSeeds, Rows
from benchmarks.papers.sagun_2017.claims import (
    OFFSETS,
    TABLE,
    Offsets,
    agreeing,
    halves,
    printed,
    residual_share,
)
from subspace_optim.diagnostics.plots.style import Array

_RUNS: Final = ("gd-tanh", "gd-relu", "sgd-relu")
_PARTS: Final = {"parts-mnist": "MNIST", "parts-clusters": "ten clusters"}
_SCREE: Final = ("principal components of the inputs", "eigenvalue of the Hessian")
_BOTH: Final = ({"color": LOOK.dominant}, {"color": LOOK.bulk, "ls": "--"})
"""The looks of two lines that belong together."""
_RATIO: Final = 0.2
"""The left edge is shown up to this share of all eigenvalues."""


# --- figure 1 ------------------------------------------------------------------------------------


def draw_whole(raws: RawOfSeeds) -> Figure:
    """Draws the whole spectrum in order, at the random start and at the end."""
    panels = grid(["random point", "after training"], width=4.5, height=3.4)
    for panel, when in zip(panels, ("start", "end"), strict=True):
        for raw, first in in_turn(raws["growth"]):
            if raw["whole"]:
                found, size = raw["whole"][when], f"P = {raw['whole']['size']:,}"
                x, y = found["index"], found["eigenvalues"]
                line(panel, x, y, first, color=LOOK.ink, marker=".", ms=4)
                if first:
                    share = f"{found['near_zero']:.1%} within λ₁/100 of zero"
                    panel.set_title(f"{panel.get_title()}, {size}\n{share}")
        panel.set(xlabel="number of the eigenvalue", ylabel="eigenvalue")
    return finished(panels)


# --- figures 2 and 3, and Table 1 ----------------------------------------------------------------


def draw_clusters(raws: RawOfSeeds) -> Figure:
    """Draws both scree plots, of the inputs and of the Hessian, a column for each data set."""
    found = raws["sgd-relu"]
    columns = max((len(_near(raw)) for raw in found.values()), default=1)
    panels = grid([""] * 2 * columns, columns, width=2.6, height=2.6)
    for raw, first in in_turn(found):
        for row, above, below in zip(_near(raw), panels, panels[columns:], strict=False):
            for panel, values, colour in (
                (above, row["principal"], LOOK.bulk),
                (below, row["top"], LOOK.dominant),
            ):
                number = range(1, len(values) + 1)
                line(panel, number, values, first, color=colour, marker="x", ms=3, ls="")
                if first:
                    mark(panel, row["clusters"] + 0.5)
            if first:
                above.set_title(f"{row['clusters']} clusters")
                below.set_title(f"elbow after {row['elbow']}")
    for at, panel in enumerate(panels):
        panel.set(xlabel="number", ylabel="" if at % columns else _SCREE[at // columns])
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
    agreement = {"within one": (0, 0, 0), "less the offsets": OFFSETS}
    return rows + [_agreement(raws, name, less) for name, less in agreement.items()]


def _agreement(raws: RawOfSeeds, name: str, less: Offsets) -> list[str]:
    """Returns a row: how many of our counts are within one of those printed, less offsets."""
    found = [agreeing(raw, less) for run in _RUNS for raw in raws[run].values()]
    cells = []
    for at in range(len(less)):
        answers = [answer for columns in found for answer in columns[at]]
        cells += ["", f"{sum(answers)} of {len(answers)}"]
    return [name, "", "", "", *cells, *[""] * 6]


def listed(counts: Sequence[float]) -> str:
    """Returns the counts of the seeds, in order."""
    return ", ".join(f"{count:g}" for count in counts) or "–"


# --- figures 4 to 8 ------------------------------------------------------------------------------


def draw_growth(raws: RawOfSeeds) -> Figure:
    """Draws right edges, left edges, and left edges by ratio, a line for each size of network."""
    right, left, ratio = grid([""] * 3, width=4.0, height=3.8)
    for raw, first in in_turn(raws["growth"]):
        networks = raw["networks"]
        for number, network in enumerate(networks):
            name, colour = f"P = {network['size']:,}", shade(number, len(networks))
            edge = network["right"]
            line(right, range(1, len(edge) + 1), edge, first, name, color=colour)
            if network["ratios"]:
                curve = np.array(network["ratios"])
                shares = np.linspace(0, 0.5, len(curve))
                inside = shares <= _RATIO
                x = shares[inside]
                line(left, x * network["size"], curve[inside], first, name, color=colour)
                line(ratio, x, curve[inside], first, name, color=colour)
            else:
                line(left, 0, network["left"][0], first, name, color=colour, marker="o", ls="")
    right.set(xlabel="number, from the right", ylabel="eigenvalue")
    left.set(xlabel="number, from the left", ylabel="eigenvalue")
    ratio.set(xlabel="number over P", ylabel="eigenvalue")
    return finished([right, left, ratio])


def draw_batches(raws: RawOfSeeds) -> Figure:
    """Draws both edges, after large and after small batches."""
    panels = grid(["", ""], width=4.3, height=3.6)
    for panel, side in zip(panels, ("left", "right"), strict=True):
        for raw, first in in_turn(raws["batches"]):
            for network, look in zip(raw["networks"], _BOTH, strict=True):
                name, edge = f"batches of {network['batch_size']}", network[side]
                line(panel, range(1, len(edge) + 1), edge, first, name, **look)
        panel.set(xlabel=f"number, from the {side}", ylabel="eigenvalue")
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
    loss, accuracy = grid(["", ""], width=4.5, height=3.4)
    for raw, first in in_turn(of_seeds):
        rows = rows_of(raw)
        x = [row[column] for row in rows]
        for panel, what in ((loss, "loss"), (accuracy, "accuracy")):
            for part, look in zip(("train", "test"), _BOTH, strict=True):
                line(panel, x, [row[f"{part}_{what}"] for row in rows], first, part, **look)
            if first:
                for at in marks(raw):
                    mark(panel, at)
    xlabel = {"step": "step", "alpha": "α: 0 large batches, 1 small batches"}[column]
    loss.set(yscale="log", xlabel=xlabel, ylabel="loss")
    accuracy.set(xlabel=xlabel, ylabel="accuracy")
    return finished([loss, accuracy])


# --- section 2 -----------------------------------------------------------------------------------


def draw_parts(raws: RawOfSeeds) -> Figure:
    """Draws the spectral norms of both parts of the Hessian along the training."""
    panels = grid(list(_PARTS.values()), width=4.5, height=3.4)
    for panel, run in zip(panels, _PARTS, strict=True):
        for raw, first in in_turn(raws[run]):
            rows = raw["rows"]
            step = [row["step"] for row in rows]
            for name, colour, dashes, marker, values in (
                ("H", LOOK.ink, "-", "o", [row["hessian"][0] for row in rows]),
                ("G", LOOK.dominant, "--", "s", [row["gauss_newton"][0] for row in rows]),
                ("H − G", LOOK.bulk, ":", "^", [max(map(abs, row["residual"])) for row in rows]),
            ):
                look = {"color": colour, "ls": dashes, "marker": marker, "ms": 3}
                line(panel, step, values, first, name, **look)
            panel.set_xscale("symlog", linthresh=10)
        panel.set(yscale="log", xlabel="step", ylabel="spectral norm")
    return finished(panels)


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
    white = first_of(raws["white"])
    laws: list[Raw] = [] if white is None else white["rows"]
    titles = [f"γ = {law['ratio']:g}" for law in laws]
    panels = grid([*titles, "spikes, theory and draws"], width=3.2, height=3.4)
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
    panel.stairs(densities, bins, fill=True, color=LOOK.grid, label="measured")
    x = torch.linspace(lower, upper, 400, dtype=torch.float64)
    density = so.diagnostics.marchenko_pastur_density(x, ratio)
    panel.plot(x.tolist(), density.tolist(), color=LOOK.dominant, label="law")
    panel.set(xlabel="eigenvalue", ylabel="density")


def _spikes(panel: Axes, raws: RawOfSeeds) -> None:
    """Draws the largest eigenvalues of all draws, and the theory."""
    rows = [row for raw in raws["spiked"].values() for row in raw["rows"]]
    colours = (LOOK.dominant, LOOK.bulk, LOOK.third, LOOK.fourth)
    for ratio, colour in zip(sorted({row["ratio"] for row in rows}), colours, strict=False):
        ours = [row for row in rows if row["ratio"] == ratio]
        spikes = np.linspace(0, 1.1 * max(row["spike"] for row in ours), 100)
        theory = [so.diagnostics.spiked_eigenvalue(1 + s * ratio**0.5, ratio) for s in spikes]
        panel.plot(spikes, theory, color=colour, label=f"γ = {ratio:g}")
        for row in ours:
            x = [row["spike"]] * len(row["largest"])
            panel.plot(x, row["largest"], linestyle="", marker=".", color=colour, alpha=0.6)
    panel.set(xlabel="spike, 1 at the threshold", ylabel="largest eigenvalue")


EXHIBITS: Final = (
    Exhibit(
        "figure-1",
        "The whole spectrum at a random point, and after training from there",
        ("growth",),
        draw=draw_whole,
        note="In the paper, by its text, almost all eigenvalues are at or near zero, at random "
        "points too.",
    ),
    Exhibit(
        "figures-2-3",
        "Principal components of clusters, and scree plots of the Hessian",
        ("sgd-relu",),
        draw=draw_clusters,
        note="In the paper, by its text, the large principal components are not exactly as many as "
        "the clusters, and the eigenvalues above the gap are. Dashed: after as many as there are "
        "clusters.",
    ),
    Exhibit(
        "table-1",
        "Outliers by the largest gap, the largest ratio and the elbow",
        _RUNS,
        table=table_clusters,
        note="In the paper the standard deviations repeat the means in all nineteen rows, which no "
        "spectrum with a few outliers has, and in 13 of them the largest ratio is one beyond the "
        "largest gap: the columns seem to count from different places. The last two rows tell how "
        "many of our counts are within one of the paper's, and of the paper's less 1 (gap) and "
        "less 2 (ratio). Counts are those of the seeds in order. Rows of covariance 10 end at a "
        "higher loss than those of 1.",
    ),
    Exhibit(
        "figures-4-6",
        "Edges of the spectrum as the network grows, on the same data",
        ("growth",),
        draw=draw_growth,
        note="In the paper, by its text, the right edge keeps its shape, the left edge shifts with "
        "the size, and by ratio the left edges appear to be converging to one shape. Dots: the "
        "smallest eigenvalue of the networks of which it alone is known.",
    ),
    Exhibit(
        "figures-7-8",
        "Edges of the spectrum after large and small batches",
        ("batches",),
        draw=draw_batches,
        note="In the paper, by its text, as many eigenvalues are large after both, those of the "
        "large batches larger; the negative ones are orders of magnitude smaller.",
    ),
    Exhibit(
        "figure-9",
        "Large batches, and small ones from where these end",
        ("phases",),
        draw=draw_phases,
        note="In the paper, by its text, losses jump and accuracies drop at the switch, and small "
        "batches reach a slightly better accuracy, by about 1 %.",
    ),
    Exhibit(
        "figure-10",
        "The line through the ends of both parts",
        ("phases",),
        draw=draw_line,
        note="In the paper, by its text, there is no barrier between the ends, and the line beyond "
        "them confirms that the end of the large batches is the sharper. Part II has not converged "
        "here: its end is at a loss well above the other. Between them the loss is not always "
        "below an even change from end to end: at seed 2 up to 1.6 times it, with a small hump; at "
        "seed 3 up to 1.3 times, rising all the way.",
    ),
    Exhibit(
        "section-2",
        "The Gauss-Newton matrix and the rest of the Hessian along the training",
        tuple(_PARTS),
        draw=draw_parts,
        table=table_parts,
        note="In the paper it is argued that the rest can be ignored as training progresses; there "
        "is no figure of it.",
    ),
    Exhibit(
        "section-2-1",
        "Trivial eigenvalues where there are few examples",
        ("trivial",),
        table=table_trivial,
        note="In the paper outputs are real numbers, for which at least P − N are trivial. "
        "Softmax takes another N from the rank of G, and units that no example activates take "
        "more.",
    ),
    Exhibit(
        "appendix-b",
        "A linear model on white data, and with one large variance",
        ("white", "spiked"),
        draw=draw_white,
        note="In the paper there is the theory alone, without a figure. The spectra are of the "
        "first seed, the spikes of all.",
    ),
)
