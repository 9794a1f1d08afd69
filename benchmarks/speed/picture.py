"""The pictures for the docs: cold solves, whole runs, what estimates are worth, and samples."""

from __future__ import annotations

from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed.peers import SOLVERS
from benchmarks.speed.timing import spread
from subspace_optim.diagnostics.plots import BULK, DOMINANT

_COLOURS: Final = dict(
    zip(SOLVERS, (DOMINANT, "#E69F00", "#56B4E9", BULK, "#CC79A7", "#999999"), strict=True)
)
_MARKERS: Final = "osD^v"


def _cold(axes: Axes, models: dict[str, Any]) -> None:
    height = 0.8 / len(SOLVERS)
    for row, model in enumerate(models.values()):
        for place, name in enumerate(SOLVERS):
            solver = model["cold"]["solvers"][name]
            if "left_out" in solver:
                continue
            cost = spread(solver["gradients"])
            y = row + (place - len(SOLVERS) / 2 + 0.5) * height
            span = [[cost.median - cost.smallest], [cost.largest - cost.median]]
            label = name if row == 0 else None
            bars = axes.barh(
                y, cost.median, height, xerr=span, color=_COLOURS[name], label=label, capsize=2
            )
            text = f"{cost.median:.0f}" + ("" if solver["reached"] else " *")
            axes.bar_label(bars, [text], padding=6, fontsize=8)
    axes.set_yticks(range(len(models)), list(models))
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("gradients over the data (* residual not reached)")
    axes.set_title("(a) cold top k, residual 1e-3", fontsize=10, loc="left")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _runs(axes: Axes, models: dict[str, Any]) -> None:
    labels: list[str] = []
    for name, model in models.items():
        for key, run in model["runs"].items():
            gain = spread([1 / ratio for ratio in run["ours_over_recipe"] if ratio > 0] or [1.0])
            bars = axes.barh(len(labels), gain.median, color=DOMINANT)
            axes.bar_label(bars, [f"{gain.median:.0f}"], padding=3, fontsize=8)
            bar = run["scenario"]["bar"]
            if bar is not None:
                axes.plot([1 / bar] * 2, [len(labels) - 0.45, len(labels) + 0.45], color="black")
            labels.append(f"{name}, {key}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 2 * axes.get_xlim()[1])  # room for the last label
    axes.set_xlabel("times cheaper than the recipe at every step (line: target)")
    axes.set_title("(b) whole runs, max_angle 0.05", fontsize=10, loc="left")


def _sines(axes: Axes, models: dict[str, Any]) -> None:
    runs = [(f"{n}, {key}", run) for n, m in models.items() for key, run in m["runs"].items()]
    for index, (label, run) in enumerate(runs):
        axes.plot(
            [row["estimate"] for row in run["samples"] if row["estimate"]],
            [row["true_sine"] for row in run["samples"] if row["estimate"]],
            _MARKERS[index % len(_MARKERS)],
            color=list(_COLOURS.values())[index % len(_COLOURS)],
            fillstyle="full" if index < len(_MARKERS) else "none",
            markersize=4,
            label=label,
        )
    axes.axline((1e-3, 1e-3), (1, 1), color="black", linewidth=0.8)
    axes.axhline(0.05, color="black", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="estimate", ylabel="true sine")
    axes.set(xlim=(None, 1), ylim=(None, 1))
    axes.set_title("(c) the estimate, and the truth", fontsize=10, loc="left")
    axes.legend(fontsize=7)


def picture(result: dict[str, Any]) -> Figure | None:
    """Draws what has been measured of cold solves and whole runs.

    Args:
        result: as it is written to JSON.

    Returns:
        The figure; ``None`` where there is neither.
    """
    drawers = {"cold": [_cold], "runs": [_runs, _sines]}
    panels = []
    for section, drawn in drawers.items():
        models = {n: m for n, m in result["models"].items() if m.get(section)}
        panels += [(draw, models) for draw in drawn if models]
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, (draw, models) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        draw(axes, models)
        axes.grid(alpha=0.3)
    return figure


def _expected(axes: Axes, samples: list[dict[str, Any]]) -> None:
    models = list(dict.fromkeys(row["model"] for row in samples))
    for model, marker, colour in zip(models, _MARKERS, _COLOURS.values(), strict=False):
        rows = [row for row in samples if row["model"] == model and row["estimate"] < 1]
        axes.plot(
            [row["estimate"] for row in rows],
            [row["true_sine"] for row in rows],
            marker,
            color=colour,
            markersize=3,
            alpha=0.5,
            label=model,
        )
    axes.axline((1e-2, 1e-2), (1, 1), color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="sine expected of the sample", ylabel="true sine")
    axes.set_title("(a) the sampling error, and the truth", fontsize=10, loc="left")
    axes.legend(fontsize=8)


def _needed(axes: Axes, samples: list[dict[str, Any]]) -> None:
    """What the expected sine would have to be multiplied by, and what it is multiplied by."""
    told = [row for row in samples if row["estimate"] < 1]
    dimensions = [row["dimensions"] for row in told]
    needed = [row["true_sine"] / row["estimate"] * row["margin"] for row in told]
    axes.plot(dimensions, needed, "o", color=BULK, markersize=3, alpha=0.3, label="true / expected")
    pairs = sorted(zip(dimensions, (row["margin"] for row in told), strict=True))
    axes.plot(*zip(*pairs, strict=True), color=DOMINANT, label="the margin")
    axes.set(xlabel="dimensions that the error varies in", xlim=(0, None), ylim=(0, None))
    axes.set_title("(b) what the margin covers", fontsize=10, loc="left")
    axes.legend(fontsize=8)


def _cost(axes: Axes, problems: list[dict[str, Any]]) -> None:
    """Example-products over the number of examples."""
    for problem, marker in zip(problems, _MARKERS, strict=False):
        for sample, colour, style in (("auto", DOMINANT, "-"), (None, BULK, "--")):
            rows = [row for row in problem["rows"] if row["sample"] == sample]
            axes.plot(
                [row["N"] for row in rows],
                [row["example_products"] for row in rows],
                style,
                marker=marker,
                color=colour,
                label=f"{problem['title']}, {'all data' if sample is None else 'sample=auto'}",
            )
    axes.set(xscale="log", yscale="log", xlabel="examples N", ylabel="products of one example")
    axes.set_title("(c) a basis certified to 0.05", fontsize=10, loc="left")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def sampling_picture(result: dict[str, Any]) -> Figure | None:
    """Draws what has been measured of samples.

    Args:
        result: as it is written to JSON.

    Returns:
        The figure; ``None`` where there is nothing to draw.
    """
    found = result.get("sampling")
    if found is None:
        return None
    figure = Figure(figsize=(13.8, 4.4), layout="constrained")
    expected, needed, cost = figure.subplots(1, 3)
    _expected(expected, found["coverage"]["samples"])
    _needed(needed, found["coverage"]["samples"])
    _cost(cost, found["growth"])
    for axes in (expected, needed, cost):
        axes.grid(alpha=0.3)
    return figure
