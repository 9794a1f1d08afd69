"""What the basis costs: ``python -m benchmarks.cost`` prints and writes the README's cost table.

Times are medians, in units of one gradient over all the data that is timed beside them, in the
same run and in turn. The peak memory is counted on every tensor that is allocated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import subspace_optim as so
from benchmarks import command
from benchmarks.files import alone, write_json
from benchmarks.progress import shown
from benchmarks.report import machine, versions
from benchmarks.speed.memory import PeakMemory
from benchmarks.speed.problems import problem
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

    def work() -> int:
        with alone(lock), shown("cost", console):
            return _run(options, console)

    return command.status("cost", work, kept="it writes at its end")


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measures, writes and prints; returns the exit status."""
    made = problem("mlp")
    made.move_to(options.train_steps)
    hessian, parameters = made.hessian(), list(made.model.parameters())
    subspace = so.DominantSubspace(hessian, options.k, refresh=1)
    refined = so.DominantSubspace(hessian, options.k)
    kept = so.DominantSubspace(hessian, options.k, refresh=10**9)
    # A rate of 1e-12 moves nothing that could change the cost.
    plain = torch.optim.SGD(parameters, lr=1e-12)
    projected = so.BulkSGD(parameters, lr=1e-12, subspace=kept)
    vector = torch.randn(hessian.size)

    def prepare() -> None:
        hessian.release()
        hessian.matvec(vector)

    with PeakMemory() as memory:
        subspace.refresh()
    graph_bytes = hessian.stats.graph_bytes
    products = subspace.stats.products
    functions: dict[str, Callable[[], object]] = {
        "one gradient over the data": made.gradient,
        "the first Hessian product at new parameters": prepare,
        "each further product": lambda: hessian.matvec(vector),
        f"a cold solve, top {options.k} ({products} products)": subspace.refresh,
        f"a refinement of a basis ({options.k + 1} products)": refined.refresh,
        "a step of torch.optim.SGD, batch 50": lambda: made.step(plain, 0),
        "a step of BulkSGD with a kept basis": lambda: made.step(projected, 0),
    }
    seconds = in_turn(functions, options.rounds)
    unit = statistics.median(seconds["one gradient over the data"])
    result = {
        "parameters": hessian.size,
        "examples": len(made.x),
        "k": options.k,
        "products": products,
        "seconds": seconds,
        "gradients": {name: statistics.median(s) / unit for name, s in seconds.items()},
        "peak_bytes": memory.peak,
        "graph_bytes": graph_bytes,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(options.output, result)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
