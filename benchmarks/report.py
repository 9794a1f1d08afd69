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

from benchmarks.experiment import WARMUP, Comparison
from subspace_optim.diagnostics.plots import BULK, DOMINANT

STYLES: tuple[tuple[str, str], ...] = (
    ("black", "-"),
    (DOMINANT, "--"),
    (BULK, "-."),
    ("#009E73", ":"),
    ("#CC79A7", "-"),
    ("#56B4E9", "--"),
    ("#E69F00", "-."),
    ("#999999", ":"),
)
"""Colours of Okabe and Ito's palette; the dashes tell the branches apart in black and white."""


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else math.nan
    return mean, statistics.stdev(finite) if len(finite) > 1 else 0.0


def figures(result: Comparison) -> dict[str, dict[str, Any]]:
    """Returns the figures of each branch; the means are over its measured steps.

    ``step_norm`` is of the minibatch steps that were taken, ``expected_step_norm`` of the step
    that the full gradient at the same points would take in the branch's subspace.
    """
    reference = result.branches.get("SGD")
    table = {}
    for name, branch in result.branches.items():
        rows = result.of(name)
        decrease = result.switch_loss - branch.train_loss
        dom_mean, dom_std = _moments([row["dom_lr"] for row in rows])
        bulk_mean, bulk_std = _moments([row["bulk_lr"] for row in rows])
        chi, _ = _moments([row["chi_gradient"] for row in rows])
        step_norm, _ = _moments([row["update_norm"] for row in rows])
        lr = result.settings.lr
        expected, _ = _moments(
            [lr * row["gradient_norm"] * _share(name, row["chi_gradient"]) for row in rows]
        )
        table[name] = asdict(branch) | {
            "loss_decrease": decrease,
            "fraction_of_sgd": None
            if reference is None or result.switch_loss == reference.train_loss
            else decrease / (result.switch_loss - reference.train_loss),
            "loss_kept": branch.train_loss / result.switch_loss,
            "dom_lr_mean": dom_mean,
            "dom_lr_std": dom_std,
            "bulk_lr_mean": bulk_mean,
            "bulk_lr_std": bulk_std,
            "chi_mean": chi,
            "step_norm": step_norm,
            "expected_step_norm": expected,
            "seconds_per_step": branch.seconds / branch.steps if branch.steps else math.nan,
        }
    return table


def _share(name: str, chi: float) -> float:
    """The fraction of a vector's norm that the branch's projection leaves of it."""
    if name == "DomSGD":
        return chi
    return math.sqrt(max(0.0, 1 - chi * chi)) if name == "BulkSGD" else 1.0


def claims(result: Comparison) -> list[dict[str, Any]]:
    """Returns the paper's claims as inequalities, with the figures that decide them.

    Only for a comparison that is finished and holds SGD, DomSGD and BulkSGD.
    """
    table = figures(result)
    if not result.finished or not {"SGD", "DomSGD", "BulkSGD"} <= set(table):
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
            f"{row['dom_lr_mean']:.2g} ± {row['dom_lr_std']:.1g}",
            f"{row['bulk_lr_mean']:.2g} ± {row['bulk_lr_std']:.1g}",
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


def versions() -> dict[str, str | None]:
    """Returns the versions of what took part."""
    found: dict[str, str | None] = {}
    for name in ("subspace_optim", "torch", "numpy", "mlxtend", "datasets", "scikit-learn"):
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


def _jsonable(value: Any) -> Any:
    """Replaces what JSON has no word for: NaN and infinities become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return value


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
    text = json.dumps(_jsonable(summary), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _label(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel="training step", ylabel=ylabel)
    axes.grid(alpha=0.25)


def picture(result: Comparison, title: str) -> Figure:
    """Draws loss, alignment, eigenvalues, effective rates and distance."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    (loss, chi, spectrum), (dom, bulk, distance) = figure.subplots(2, 3)
    warm, k = result.of(WARMUP), result.settings.k
    present = [name for name in result.branches if result.of(name)]
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(present)}
    tight = {"linewidth": 1.4, "markersize": 2.5}

    def curve(axes: Axes, rows: list[dict[str, Any]], column: str, **style: Any) -> None:
        axes.plot([r["step"] for r in rows], [r[column] for r in rows], **(tight | style))

    curve(loss, warm, "loss", color="0.55", label="SGD, before the switch")
    curve(chi, warm, "chi_gradient", color="0.75", linestyle="", marker="o", label="measured")
    curve(chi, warm, "chi_average", color="0.3", label="moving average, before")
    for name in present:
        rows, (color, dash) = result.of(name), styles[name]
        style = {"color": color, "linestyle": dash, "label": name}
        curve(loss, rows, "loss", **style)
        curve(chi, rows, "chi_average", **style)
        curve(distance, rows, "distance", **style)
        for axes, column in ((dom, "dom_lr"), (bulk, "bulk_lr")):
            mean, _ = _moments([row[column] for row in rows])
            curve(axes, rows, column, color=color, linestyle=dash, alpha=0.45, linewidth=0.8)
            # Adding zero turns a rounded -0.0000 into 0.0000.
            label = f"{name}, mean {round(mean, 4) + 0.0:.4f}"
            axes.axhline(mean, color=color, linestyle=dash, label=label)
    loss.set_yscale("log")
    losses = [row["loss"] for row in result.rows]
    if losses:  # room for the legend below the curves
        loss.set_ylim(min(losses) / 1.9, max(losses) * 1.1)
    loss.legend(fontsize=7, loc="lower left")
    if present:
        close = loss.inset_axes((0.47, 0.52, 0.5, 0.44))
        for name in present:
            color, dash = styles[name]
            curve(close, result.of(name), "loss", color=color, linestyle=dash)
        close.tick_params(labelsize=7)
        close.grid(alpha=0.25)
    _label(loss, "a  training loss", "loss (log scale)")
    chi.axhline(result.settings.switch_chi, color="0.5", linewidth=0.8, linestyle=":")
    chi.set_ylim(0, 1.02)
    chi.legend(fontsize=8, loc="lower right")
    _label(chi, "b  alignment of the gradient", rf"$\chi_{{{k}}}(\nabla L)$")

    path = warm + (result.of("SGD") if "SGD" in present else [])
    top = [row for row in path if row["eigenvalues"]]
    if top:
        steps = [row["step"] for row in top]
        values = [row["eigenvalues"] for row in top]
        spectrum.plot(steps, values, color=DOMINANT, linewidth=0.9)
        spectrum.plot([], [], color=DOMINANT, label=rf"$\lambda_1$ to $\lambda_{{{k}}}$")
    following = [row for row in path if row["next_eigenvalues"]]
    if following:
        steps = [row["step"] for row in following]
        values = [row["next_eigenvalues"] for row in following]
        spectrum.plot(steps, values, color=BULK, linewidth=0.9, linestyle="--")
        label = rf"$\lambda_{{{k + 1}}}$ to $\lambda_{{{2 * k}}}$"
        spectrum.plot([], [], color=BULK, linestyle="--", label=label)
    if top:
        spectrum.legend(fontsize=8)
    kind = "Ritz values, random subspace" if result.settings.control else "Hessian eigenvalues, SGD"
    _label(spectrum, f"c  {kind}", r"$\lambda$")
    for axes, letter, name in ((dom, "d", "Dom-LR"), (bulk, "e", "Bulk-LR")):
        _label(axes, f"{letter}  {name} after the switch", "effective learning rate")
        if present:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.12 * (len(present) + 1) * (high - low))
            axes.legend(fontsize=8, loc="upper left")
    _label(distance, "f  distance from the switch", r"$\|\theta_t - \theta_{\mathrm{switch}}\|$")
    if present:
        distance.legend(fontsize=8)
    if result.switch_step is not None:
        for axes in (loss, chi, spectrum):
            axes.axvline(result.switch_step, color="0.5", linewidth=0.8, linestyle=":")
    return figure
