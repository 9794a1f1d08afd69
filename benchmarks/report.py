"""What a comparison says: the figures, the claims, the table, the picture and the files."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.experiment import WARMUP, Branch, Comparison
from benchmarks.files import jsonable
from benchmarks.optimizers import PAPERS, kinship
from subspace_optim.diagnostics.plots import BULK, DOMINANT

COLOURS = {"plain": "black", "dominant": DOMINANT, "bulk": BULK, "newton": "#009E73"}
"""A family's colour, of Okabe and Ito's palette, which colour-blind readers tell apart."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("", "o", "s", "^", "D", "v")
"""An optimizer's line, the same for all its versions: dashes first, and then markers too."""


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns how to draw each of the optimizers: colour by family, line by what is projected.

    Optimizers of one family that are projected versions of nothing else are told apart by their
    lines too.
    """
    kin = {name: kinship(name) for name in names}
    # Newton's methods are versions of nothing: they count their lines by themselves.
    ranks: dict[bool, list[str]] = {True: [], False: []}
    for family, base in kin.values():
        if base not in ranks[family == "newton"]:
            ranks[family == "newton"].append(base)
    drawn = {}
    for name, (family, base) in kin.items():
        rank = ranks[family == "newton"].index(base)
        drawn[name] = {
            "color": COLOURS[family],
            "linestyle": DASHES[rank % len(DASHES)],
            "marker": MARKERS[rank // len(DASHES) % len(MARKERS)],
            # What projections fall together with is still seen beneath them.
            "linewidth": 2.4 if family == "plain" else 1.3,
        }
    return drawn


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else math.nan
    return mean, statistics.stdev(finite) if len(finite) > 1 else 0.0


def figures(result: Comparison) -> dict[str, dict[str, Any]]:
    """Returns the figures of each branch; the means are over its measured steps.

    ``step_norm`` is of the minibatch steps that were taken, ``expected_step_norm`` of the step
    that the full gradient at the same points would take in the branch's subspace, for SGD and its
    projections without momentum and weight decay.
    """
    reference = result.branches.get("SGD")
    table = {}
    for name, branch in result.branches.items():
        rows = result.of(name)
        decrease = result.switch_loss - branch.train_loss
        columns = ("dom_lr", "bulk_lr", "chi_gradient", "update_norm")
        moments = {column: _moments([row[column] for row in rows]) for column in columns}
        lr = _rate_of_gradient(name, branch)
        expected, _ = _moments(
            [lr * row["gradient_norm"] * _share(name, row["chi_gradient"]) for row in rows]
        )
        table[name] = asdict(branch) | {
            "loss_decrease": decrease,
            "fraction_of_sgd": None
            if reference is None or result.switch_loss == reference.train_loss
            else decrease / (result.switch_loss - reference.train_loss),
            "loss_kept": branch.train_loss / result.switch_loss,
            "dom_lr_mean": moments["dom_lr"][0],
            "dom_lr_std": moments["dom_lr"][1],
            "bulk_lr_mean": moments["bulk_lr"][0],
            "bulk_lr_std": moments["bulk_lr"][1],
            "chi_mean": moments["chi_gradient"][0],
            "step_norm": moments["update_norm"][0],
            "expected_step_norm": expected,
            "seconds_per_step": branch.seconds / branch.steps if branch.steps else math.nan,
        }
    return table


def _rate_of_gradient(name: str, branch: Branch) -> float:
    """The rate at which a branch follows its gradient alone; NaN where it does not."""
    if name not in PAPERS or len(branch.options) != 1:
        return math.nan
    options = branch.options[0]
    changed = any(options.get(option) for option in ("momentum", "weight_decay", "maximize"))
    return math.nan if changed else float(options["lr"])


def _share(name: str, chi: float) -> float:
    """The fraction of a vector's norm that the branch's projection leaves of it."""
    if name == "DomSGD":
        return chi
    return math.sqrt(max(0.0, 1 - chi * chi)) if name == "BulkSGD" else 1.0


def claims(result: Comparison) -> list[dict[str, Any]]:
    """Returns the paper's claims as inequalities, with the figures that decide them.

    Only for a comparison that is finished and holds SGD, DomSGD and BulkSGD, without momentum and
    weight decay.
    """
    table = figures(result)
    plain = all(
        not math.isnan(_rate_of_gradient(*item))
        for item in result.branches.items()
        if item[0] in PAPERS
    )
    if not result.finished or not set(PAPERS) <= set(table) or not plain:
        return []
    sgd, dom, bulk = table["SGD"], table["DomSGD"], table["BulkSGD"]
    k = result.settings.k
    statements = [
        ("DomSGD keeps at least 98.5 % of its starting loss", dom["loss_kept"], ">=", 0.985),
        ("BulkSGD achieves at least 90 % of SGD's decrease", bulk["fraction_of_sgd"], ">=", 0.9),
        (f"mean chi_{k} of the gradient along SGD is at least 0.9", sgd["chi_mean"], ">=", 0.9),
        (
            "BulkSGD's expected step is at most half of SGD's in norm",
            bulk["expected_step_norm"] / sgd["expected_step_norm"],
            "<=",
            0.5,
        ),
        (
            "BulkSGD's minibatch steps are on average at most half of SGD's in norm",
            bulk["step_norm"] / sgd["step_norm"],
            "<=",
            0.5,
        ),
    ]
    return [
        {
            "claim": claim,
            "value": value,
            "relation": relation,
            "bound": bound,
            "holds": value is not None and (value >= bound if relation == ">=" else value <= bound),
        }
        for claim, value, relation, bound in statements
    ]


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _rounded(rate: float) -> str:
    return f"{round(rate, 4) + 0.0:.4f}"  # adding zero turns a rounded -0.0000 into 0.0000


def print_report(result: Comparison, console: Console) -> None:
    """Prints the table and the claims."""
    if result.switch_step is None:
        console.print("Interrupted before the switch: no branch to compare.")
        return
    console.print(
        f"Branched at step {result.switch_step}: {result.switch_reason}. "
        f"Training loss there: {result.switch_loss:.4f}."
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    columns = ("loss", "train %", "test %", "of SGD's", "Dom-LR", "Bulk-LR")
    for column in (*columns, "distance", "s/step", "products"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in figures(result).items():
        table.add_row(
            name,
            f"{row['train_loss']:.4f}",
            _percent(row["train_accuracy"]),
            _percent(row["test_accuracy"]),
            _percent(row["fraction_of_sgd"]),
            f"{_rounded(row['dom_lr_mean'])} ± {_rounded(row['dom_lr_std'])}",
            f"{_rounded(row['bulk_lr_mean'])} ± {_rounded(row['bulk_lr_std'])}",
            f"{row['distance']:.3f}",
            f"{row['seconds_per_step']:.3f}",
            str(row["products"]),
        )
    console.print(table)
    console.print(
        "Training loss and accuracies at the end, and the decrease of the loss in % of SGD's. "
        "Rates: mean ± standard deviation over the measured steps. Distance: from the switch. "
        "Seconds per step and Hessian products include the measurements.",
        style="dim",
    )
    for name, branch in result.branches.items():
        if branch.stopped:
            console.print(f"  {name} was stopped: {branch.stopped}", highlight=False)
    for claim in claims(result):
        mark = "yes" if claim["holds"] else "NO "
        console.print(
            f"  {mark}  {claim['claim']}: {claim['value']:.3f} "
            f"({claim['relation']} {claim['bound']:g})",
            highlight=False,
        )


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(*more: str) -> dict[str, str | None]:
    """Returns the versions of what took part, by the names of the packages."""
    found: dict[str, str | None] = {}
    ours = ("subspace_optim", "torch", "numpy", "mlxtend", "datasets", "scikit-learn")
    for name in (*ours, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _plain(row: dict[str, Any], k: int) -> dict[str, Any]:
    """A row with one column for each eigenvalue; those that were not asked for are empty."""
    flat = dict(row)
    values = [*flat.pop("eigenvalues"), *flat.pop("next_eigenvalues")]
    return flat | {
        f"eigenvalue_{i + 1}": values[i] if i < len(values) else "" for i in range(2 * k)
    }


def write_history(result: Comparison, path: Path, *, only_last: bool = False) -> None:
    """Writes the rows as a table, or adds the last one to it."""
    rows = [_plain(row, result.settings.k) for row in result.rows[-1 if only_last else 0 :]]
    if not rows:
        return
    names = ["phase", *(name for name in rows[0] if name != "phase")]
    with path.open("a" if only_last else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if not only_last:
            writer.writeheader()
        writer.writerows(rows)


def write_summary(result: Comparison, path: Path, arguments: dict[str, Any]) -> None:
    """Writes all figures, with what they were measured on."""
    summary = {
        "finished": result.finished,
        "switch": {
            "step": result.switch_step,
            "reason": result.switch_reason,
            "loss": result.switch_loss,
        },
        "claims": claims(result),
        "branches": figures(result),
        "arguments": arguments,
        "settings": asdict(result.settings),
        "seeds": {"model": result.settings.seed, "minibatches": result.settings.seed},
        "machine": machine(),
        "versions": versions(),
    }
    path.write_text(json.dumps(jsonable(summary), indent=2) + "\n", encoding="utf-8")


def _label(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel="training step", ylabel=ylabel)
    axes.grid(alpha=0.25)


def _folded(name: str) -> str:
    """A long name on two lines, broken before a capital letter."""
    breaks = [i for i in range(1, len(name)) if name[i].isupper() and name[i - 1].islower()]
    if len(name) <= 16 or not breaks:
        return name
    middle = min(breaks, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def _labels_at_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Writes the names at the right edge, in the order of the curves' ends and apart.

    Args:
        axes: whose limits are final.
        ends: the last point of each curve, and its colour.
    """
    inverse = axes.transAxes.inverted()
    heights = {
        name: float(inverse.transform(axes.transData.transform((x, y)))[1])
        for name, (x, y, _) in ends.items()
    }
    order = sorted(ends, key=heights.__getitem__)
    apart, last = 0.048, len(ends) - 1
    placed = [min(max(heights[name], 0.0), 1.0) for name in order]
    for i in range(1, len(placed)):  # upwards, each above the one before ...
        placed[i] = max(placed[i], placed[i - 1] + apart)
    # ... and down again from the upper edge.
    placed = [min(height, 1.0 - apart * (last - i)) for i, height in enumerate(placed)]
    for name, height in zip(order, placed, strict=True):
        x, _, color = ends[name]
        edge = float(inverse.transform(axes.transData.transform((x, 1.0)))[0])
        axes.annotate(
            _folded(name),
            (edge, heights[name]),
            (1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6},
        )


def _rates(axes: Axes, result: Comparison, column: str, drawn: dict[str, dict[str, Any]]) -> None:
    """Draws mean and standard deviation of a rate, a line for each optimizer."""
    for height, (name, style) in enumerate(drawn.items()):
        mean, deviation = _moments([row[column] for row in result.of(name)])
        if math.isnan(mean):
            continue
        axes.errorbar(mean, height, xerr=deviation, color=style["color"], marker="o", markersize=4)
        axes.annotate(
            _rounded(mean),
            (1.02, height),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color=style["color"],
            va="center",
            annotation_clip=False,
        )
    axes.set_yticks(range(len(drawn)), map(_folded, drawn), fontsize=8)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.grid(alpha=0.25, axis="x")
    axes.tick_params(axis="x", labelsize=8)


def picture(result: Comparison, title: str) -> Figure:
    """Draws loss, alignment, eigenvalues, effective rates and distance.

    The colour is the optimizer's family, the line what it is a version of; one key for all panels.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(6, 3, width_ratios=(1.25, 1, 1))
    whole, after = figure.add_subplot(grid[:2, 0]), figure.add_subplot(grid[2:, 0])
    chi, spectrum = figure.add_subplot(grid[:2, 1]), figure.add_subplot(grid[:2, 2])
    dom, bulk = figure.add_subplot(grid[2:4, 1]), figure.add_subplot(grid[2:4, 2])
    distance, key = figure.add_subplot(grid[4:, 1]), figure.add_subplot(grid[4:, 2])
    warm, k = result.of(WARMUP), result.settings.k
    present = [name for name in result.branches if result.of(name)]
    drawn = styles(present)
    tight = {"linewidth": 1.4, "markersize": 3, "markevery": 0.2}

    def curve(axes: Axes, rows: list[dict[str, Any]], column: str, **style: Any) -> None:
        axes.plot([r["step"] for r in rows], [r[column] for r in rows], **(tight | style))

    curve(whole, warm, "loss", color="0.55", label="SGD, before the switch")
    dots: dict[str, Any] = {"color": "0.75", "linestyle": "", "marker": "o", "markevery": 1}
    curve(chi, warm, "chi_gradient", **dots, label="measured")
    curve(chi, warm, "chi_average", color="0.3", label="moving average")
    ends = {}
    for name in present:
        rows, style = result.of(name), drawn[name]
        last = result.branches[name]
        path = [(row["step"], row["loss"]) for row in rows]
        path.append(((result.switch_step or 0) + last.steps, last.train_loss))
        path = [point for point in path if math.isfinite(point[1])]
        for axes in (whole, after):
            axes.plot(*zip(*path, strict=True), **(tight | style))
        ends[name] = (*path[-1], style["color"])
        curve(chi, rows, "chi_average", **style)
        curve(distance, rows, "distance", **style)
    whole.set_yscale("log")
    _label(whole, "a  training loss", "loss (log scale)")
    if warm:
        whole.legend(fontsize=8, loc="upper right")
    _label(after, "b  training loss after the switch", "loss")
    if present:
        _limit_loss(after, result, present)
        _labels_at_ends(after, ends)
    chi.axhline(result.settings.switch_chi, color="0.5", linewidth=0.8, linestyle=":")
    chi.set_ylim(0, 1.02)
    if warm:
        chi.legend(fontsize=8, loc="lower right")
    _label(chi, "c  alignment of the gradient", rf"$\chi_{{{k}}}(\nabla L)$")

    path_of_sgd = warm + (result.of("SGD") if "SGD" in present else [])
    top = [row for row in path_of_sgd if row["eigenvalues"]]
    if top:
        steps = [row["step"] for row in top]
        values = [row["eigenvalues"] for row in top]
        spectrum.plot(steps, values, color=DOMINANT, linewidth=0.9)
        spectrum.plot([], [], color=DOMINANT, label=rf"$\lambda_1$ to $\lambda_{{{k}}}$")
    following = [row for row in path_of_sgd if row["next_eigenvalues"]]
    if following:
        steps = [row["step"] for row in following]
        values = [row["next_eigenvalues"] for row in following]
        spectrum.plot(steps, values, color=BULK, linewidth=0.9, linestyle="--")
        label = rf"$\lambda_{{{k + 1}}}$ to $\lambda_{{{2 * k}}}$"
        spectrum.plot([], [], color=BULK, linestyle="--", label=label)
    if top:
        spectrum.legend(fontsize=8)
    kind = "Ritz values, random subspace" if result.settings.control else "Hessian eigenvalues, SGD"
    _label(spectrum, f"d  {kind}", r"$\lambda$")
    for axes, letter, column, name in (
        (dom, "e", "dom_lr", "Dom-LR"),
        (bulk, "f", "bulk_lr", "Bulk-LR"),
    ):
        _rates(axes, result, column, drawn)
        axes.set_title(f"{letter}  {name} after the switch", fontsize=10, loc="left")
        axes.set_xlabel("effective learning rate: mean ± standard deviation", fontsize=8)
        axes.locator_params(axis="x", nbins=5)
    bulk.tick_params(labelleft=False)  # the rows of the panel beside it
    _label(distance, "g  distance from the switch", r"$\|\theta_t - \theta_{\mathrm{switch}}\|$")
    key.axis("off")
    for name in present:
        key.plot([], [], **(tight | drawn[name]), label=name)
    if present:
        key.legend(
            title="all panels: colour by family, line by optimizer",
            title_fontsize=8,
            fontsize=9,
            loc="center",
            handlelength=4,
            frameon=False,
        )
    if result.switch_step is not None:
        for axes in (whole, chi, spectrum):
            axes.axvline(result.switch_step, color="0.5", linewidth=0.8, linestyle=":")
    return figure


def _limit_loss(axes: Axes, result: Comparison, names: Sequence[str]) -> None:
    """Sets the limits of the loss: what diverges leaves at the top, and squeezes no other curve."""
    losses = [row["loss"] for name in names for row in result.of(name)]
    losses += [result.branches[name].train_loss for name in names]
    finite = [loss for loss in losses if math.isfinite(loss)]
    start = result.switch_loss
    low = min([*finite, start])
    high = min(max([*finite, start]), max(1.6 * start, start + 2 * (start - low)))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
