"""What the basis costs: ``python -m benchmarks.cost`` prints and writes the README's cost table.

Times are medians, in units of one gradient over all the data that is timed beside them, in the
same run and in turn. The peak memory is counted on every tensor that is allocated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import subspace_optim as so
from benchmarks import command
from benchmarks.data import load
from benchmarks.experiment import minibatch
from benchmarks.files import BusyError, alone, replacing
from benchmarks.losses import mse
from benchmarks.models import build
from benchmarks.progress import counted, shown
from benchmarks.report import machine, versions
from benchmarks.speed.memory import PeakMemory
from benchmarks.speed.timing import in_turn


def main(arguments: list[str] | None = None) -> int:
    """Runs the measurement.

    Args:
        arguments: as on the command line.

    Returns:
        0; 2 for what cannot be run, with the reason in one sentence; 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train-steps", type=int, default=2000, help="of SGD, before measuring")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/cost.json"))
    options = parser.parse_args(arguments)
    console = command.console(width=110)
    lock = options.output.with_name(f"{options.output.name}.lock")
    try:
        with command.ended_by_signals(), alone(lock), shown("cost", console):
            _run(options, console)
    except BusyError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("cost: interrupted; it writes at its end", file=sys.stderr)
        return command.INTERRUPTED
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    """Measures, writes and prints."""
    data = load("mnist-5k")
    x, y = data.x_train, data.y_train
    model = build("mlp", data, num_outputs=data.num_classes, seed=0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(step: int, optimizer: torch.optim.Optimizer) -> None:
        batch = minibatch(len(x), 50, step, seed=0)
        optimizer.zero_grad()
        mse(model(x[batch]), y[batch]).backward()
        optimizer.step()

    for step in counted("training with SGD", range(options.train_steps)):
        train(step, sgd)

    hessian = so.HessianOperator(model, mse, (x, y))
    subspace = so.DominantSubspace(hessian, options.k, refresh=1)
    refined = so.DominantSubspace(hessian, options.k)
    kept = so.DominantSubspace(hessian, options.k, refresh=10**9)
    # A rate of 1e-12 moves nothing that could change the cost.
    plain = torch.optim.SGD(model.parameters(), lr=1e-12)
    projected = so.BulkSGD(model.parameters(), lr=1e-12, subspace=kept)
    vector = torch.randn(hessian.size)

    def gradient() -> None:
        model.zero_grad()
        mse(model(x), y).backward()

    def prepare() -> None:
        hessian.release()
        hessian.matvec(vector)

    with PeakMemory() as memory:
        subspace.refresh()
    graph_bytes = hessian.stats.graph_bytes
    products = subspace.stats.products
    functions: dict[str, Callable[[], object]] = {
        "one gradient over the data": gradient,
        "the first Hessian product at new parameters": prepare,
        "each further product": lambda: hessian.matvec(vector),
        f"a cold solve, top {options.k} ({products} products)": subspace.refresh,
        f"a refinement of a basis ({options.k + 1} products)": refined.refresh,
        "a step of torch.optim.SGD, batch 50": lambda: train(0, plain),
        "a step of BulkSGD with a kept basis": lambda: train(0, projected),
    }
    seconds = in_turn(functions, options.rounds)
    unit = statistics.median(seconds["one gradient over the data"])
    result = {
        "parameters": hessian.size,
        "examples": len(x),
        "k": options.k,
        "products": products,
        "seconds": seconds,
        "gradients": {name: statistics.median(s) / unit for name, s in seconds.items()},
        "peak_bytes": memory.peak,
        "graph_bytes": graph_bytes,
        "machine": machine(),
        "versions": versions(),
    }
    with replacing(options.output) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("what", "gradients", "milliseconds", "min to max", box=None)
    for name, times in seconds.items():
        table.add_row(
            name,
            f"{statistics.median(times) / unit:.2f}",
            f"{1000 * statistics.median(times):.1f}",
            f"{1000 * min(times):.1f} to {1000 * max(times):.1f}",
        )
    console.print(table)
    console.print(
        f"Peak memory of the cold solve: {memory.peak / 2**20:.1f} MiB, of which the kept graph "
        f"holds {graph_bytes / 2**20:.1f} MiB; the rest are vectors of {hessian.size} parameters "
        "and what one product over the data needs in passing."
    )
    console.print(f"Written: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
