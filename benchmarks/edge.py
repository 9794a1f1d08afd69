"""Known phenomena of the edge of stability, on real data: ``python -m benchmarks.edge``.

A tanh MLP (3072-100-100-10) learns 1,000 images of CIFAR-10 with half the squared error: by
gradient descent, by SGD, by SGD with momentum in small and in large batches, and by Adam on all.
Each run records λ_1 of the loss of all data and the sharpness that the literature says is held at
a threshold: λ_1 for gradient descent, batch sharpness for SGD, preconditioned sharpness for Adam.
Of both it tells the mean and the range over the last third of the rows, as shares of the threshold.

It writes ``results/edge.json`` and the picture, light and dark.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import subspace_optim as so
from benchmarks import command
from benchmarks.data import DataUnavailableError, load
from benchmarks.experiment import minibatch
from benchmarks.files import alone, write_json
from benchmarks.gallery import save
from benchmarks.losses import mse
from benchmarks.models import drawn, mlp
from benchmarks.progress import doing, shown
from benchmarks.report import machine, versions
from subspace_optim.diagnostics.plots import style

Data = tuple[Tensor, Tensor]

ROWS: Final = 24
"""Of a run, at equal distances."""
_THEMES: Final[tuple[tuple[style.ThemeName, str], ...]] = (("light", ""), ("dark", "-dark"))
_LABELS: Final = {
    "sharpness": r"$\lambda_1$",
    "batch_sharpness": "batch sharpness",
    "preconditioned_sharpness": r"preconditioned $\lambda_1$",
}
_UNITS: Final = {
    "threshold": r"2/\eta",
    "small_batch_threshold": r"2(1-\mu)/\eta",
    "large_batch_threshold": r"2(1+\mu)/\eta",
    "adam_threshold": r"38/\eta",
}


@dataclass(frozen=True)
class Run:
    """A training, and what is expected of it.

    Attributes:
        title: for readers.
        optimizer: makes it, of parameters.
        batch_size: of its steps; ``None`` for all data.
        steps: how many.
        held: the column that is expected at the threshold.
        threshold: the column of the threshold.
    """

    title: str
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    batch_size: int | None
    steps: int
    held: str
    threshold: str


# 2/η is above λ_1 of the start where all data make a step; SGD leaves the sharp start at once. The
# rates of momentum are those of plain SGD times 1 − μ where noise rules.
RUNS: Final[dict[str, Run]] = {
    "gd": Run("gradient descent", partial(SGD, lr=0.02), None, 600, "sharpness", "threshold"),
    "sgd-16": Run(
        "SGD, batches of 16", partial(SGD, lr=0.05), 16, 3600, "batch_sharpness", "threshold"
    ),
    "momentum-16": Run(
        "momentum, batches of 16",
        partial(SGD, lr=0.005, momentum=0.9),
        16,
        3600,
        "batch_sharpness",
        "small_batch_threshold",
    ),
    "momentum-500": Run(
        "momentum, batches of 500",
        partial(SGD, lr=0.03, momentum=0.9),
        500,
        400,
        "batch_sharpness",
        "large_batch_threshold",
    ),
    "adam": Run(
        "Adam, all data",
        partial(Adam, lr=3e-4),
        None,
        400,
        "preconditioned_sharpness",
        "adam_threshold",
    ),
}


def images(count: int, root: str | None) -> Data:
    """Returns the first images of CIFAR-10 as standardised numbers, and their classes."""
    data = load("cifar10-5k", root=root)
    pixels = data.x_train[:count].flatten(1)
    return (pixels - pixels.mean(dim=0)) / pixels.std(dim=0), data.y_train[:count]


def measure(run: Run, model: nn.Module, data: Data, *, rows: int = ROWS) -> dict[str, Any]:
    """Trains, and holds what was recorded against the threshold.

    Args:
        run: what is trained how.
        model: is trained.
        data: all that there are.
        rows: that are recorded, about.

    Returns:
        The columns; what they are in ``shares`` of the threshold over the last third; the cost.
    """
    x, y = data
    size = min(run.batch_size or len(x), len(x))
    optimizer = run.optimizer(model.parameters())
    hessian = so.HessianOperator(model, mse, data)
    sharpness = so.DominantSubspace(hessian, 1, refresh=1)
    seen = (
        so.measures.preconditioned_sharpness()
        if isinstance(optimizer, Adam)
        else so.measures.batch_sharpness(batch_size=size, relative_error=0.05)
    )
    every = run.steps // rows | 1  # odd: at its edge a training goes to and fro
    begun = time.process_time()
    measures = [*so.measures.dominant(), seen]
    with (
        so.Monitor(optimizer, sharpness, measures=measures, every=every) as monitor,
        doing(run.title, run.steps) as task,
    ):
        for step in range(run.steps):
            chosen = slice(None) if size == len(x) else minibatch(len(x), size, step, 0)
            optimizer.zero_grad()
            loss = mse(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            task.at(step + 1)
    names = ["step", "loss", "sharpness", run.threshold, *seen.columns[:2]]
    columns = {name: monitor.history[name] for name in dict.fromkeys(names)}
    return {
        "columns": columns,
        "shares": shares(columns, run.threshold),
        "threshold": columns[run.threshold][-1],
        "steps": run.steps,
        "batch_size": size,
        "cpu_seconds": time.process_time() - begun,
    }


def shares(columns: dict[str, list[float]], threshold: str) -> dict[str, dict[str, float]]:
    """Returns mean and range of each sharpness over the threshold, in the last third."""
    count = max(1, len(columns[threshold]) // 3)
    found = {}
    for name in _LABELS:
        if name in columns:
            values = np.array(columns[name][-count:]) / np.array(columns[threshold][-count:])
            found[name] = {
                "mean": float(values.mean()),
                "lowest": float(values.min()),
                "highest": float(values.max()),
            }
    return found


def draw(results: dict[str, Any], theme: style.ThemeName = "light") -> Figure:
    """Draws a panel for each run: its sharpnesses, over the threshold."""
    colours = style.theme_of(theme)
    rows, columns = -(-len(results) // 3), min(3, len(results))
    size = (3.3 * columns, 2.8 * rows)
    panels = style.panels_of(None, colours, size, rows, columns, count=len(results))
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        run, found = RUNS[name], result["columns"]
        single = run.held == "preconditioned_sharpness"  # its threshold says nothing of λ_1
        what = _LABELS[run.held] if single else "sharpness"
        style.paint(panel, colours, "step", f"{run.title}\n{what} / (${_UNITS[run.threshold]}$)")
        threshold = np.array(found[run.threshold])
        for column, colour, line, width in (
            ("sharpness", colours.dominant, "solid", 1.5),
            ("batch_sharpness", colours.bulk, "dashed", 1.6),
            ("preconditioned_sharpness", colours.bulk, "dashed", 1.6),
        ):
            if column not in found or (single and column != run.held):
                continue
            style.stroke(
                panel,
                found["step"],
                np.array(found[column]) / threshold,
                colour,
                width,
                dashes=style.LINES[line][0],
                label=_LABELS[column],
            )
        panel.axhline(1.0, color=colours.ink, linewidth=1.2, linestyle=style.LINES["dotted"][0])
        panel.set_ylim(bottom=0)
        style.key(panel, colours)
    figure: Figure = panels[0].figure.figure
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Measures and draws.

    Args:
        arguments: as on the command line.

    Returns:
        0; 2 for what cannot be run; 130 where it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edge",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which of them", metavar="RUN")
    add("--images", type=int, default=1000)
    add("--width", type=int, default=100)
    add("--seed", type=int, default=0, help="of the parameters")
    add("--quick", action="store_true", help="all of it in miniature: 60 images, 12 steps each")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA)")
    add("--output", type=Path, default=Path("results/edge.json"))
    add("--pictures", type=Path, default=Path("docs/pictures"), help="folder of the picture")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.width = 60, 10
    console = command.console(width=120)
    lock = options.output.with_name(f"{options.output.name}.lock")

    def work() -> int:
        with alone(lock), shown("edge", console):
            return _run(options, console)

    return command.status(
        "edge", work, DataUnavailableError, kept="the runs that ended are written"
    )


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measures, writes and prints; returns the exit status."""
    data = images(options.images, options.data_root)
    results: dict[str, Any] = {}
    written = {
        "runs": results,
        "settings": {name: getattr(options, name) for name in ("images", "width", "seed", "quick")},
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
    }
    for name in options.runs:
        run = replace(RUNS[name], steps=12) if options.quick else RUNS[name]
        model = drawn(options.seed, lambda: mlp(data[0].shape[1], 10, width=options.width))
        results[name] = measure(run, model, data, rows=3 if options.quick else ROWS)
        write_json(options.output, written)
    for theme, suffix in _THEMES:
        save(draw(results, theme), options.pictures / f"edge{suffix}.png")
    _print(results, console)
    console.print(f"Written: {options.output}")
    return 0


def _print(results: dict[str, Any], console: Console) -> None:
    """Prints a line for each run."""
    table = Table("run", "at", "its sharpness, of it", "λ_1, of it", "loss", "s", box=None)
    for column in table.columns:
        column.no_wrap = True
    for name, result in results.items():
        run, found = RUNS[name], result["shares"]
        told = [
            f"{each['mean']:.2f} ({each['lowest']:.2f} to {each['highest']:.2f})"
            for each in (found[run.held], found["sharpness"])
        ]
        loss, seconds = f"{result['columns']['loss'][-1]:.3g}", f"{result['cpu_seconds']:.0f}"
        table.add_row(run.title, f"{result['threshold']:.4g}", *told, loss, seconds)
    console.print(table)
    console.print(
        "Mean and range over the last third, as shares of the threshold; seconds of the processor."
    )


if __name__ == "__main__":
    sys.exit(main())
