"""What a monitor adds to training with SGD late, beside what its own cost columns report."""

from __future__ import annotations

import math
import statistics
from typing import Any, Final

import torch

import subspace_optim as so
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.timing import now, ratios, spread, timed

BARS: Final = {"over_columns": 1.15, "row_gradients": 4.0, "unrecorded": 1.02}
SLOWDOWN: Final = 1.25
"""How much longer the training may take for the ``every`` that is recommended."""
_BLOCK: Final = 25
_FURTHER: Final = 8


def measure(problem: Problem, k: int, rounds: int, late: int, steps: int = 200) -> dict[str, Any]:
    """Trains with and without a monitor in turn, from the same parameters over the same batches.

    Args:
        problem: what to train.
        k: dimension of the subspace.
        rounds: repetitions.
        late: steps of SGD before.
        steps: of a run.

    Returns:
        Raw seconds of runs that record every step and of the same runs without; sums of the cost
        columns, and the time that these stand for; what a step costs that is not recorded.
    """
    runs: list[dict[str, float]] = []
    for _ in range(rounds):
        problem.move_to(late)
        unit = _units(problem)
        monitored, monitor = _train(problem, k, late, steps, every=1)
        plain, _ = _train(problem, k, late, steps, every=None)
        gradients = sum(monitor.history["gradients"]) if monitor else 0
        products = sum(monitor.history["products"]) if monitor else 0
        runs.append(
            unit
            | {"monitored": monitored, "plain": plain}
            | {"gradients": gradients, "products": products}
            | {"columns": gradients * unit["gradient"] + products * unit["product"]}
        )
    added = [run["monitored"] - run["plain"] for run in runs]
    over = ratios(added, [run["columns"] for run in runs])
    row = [a / run["gradient"] / steps for a, run in zip(added, runs, strict=True)]
    with_it, without = _unrecorded(problem, k, late, steps)
    unrecorded = ratios(with_it, without)
    every = [
        math.ceil(run["columns"] / steps / ((SLOWDOWN - 1) * run["plain"] / steps)) for run in runs
    ]
    return {
        "steps": steps,
        "runs": runs,
        "over_columns": over,
        "row_gradients": row,
        "unrecorded_seconds": {"with": with_it, "without": without},
        "unrecorded": unrecorded,
        "every": every,
        "slowdown": SLOWDOWN,
        "bars": BARS,
        "met": {
            "over_columns": spread(over).median <= BARS["over_columns"],
            "row_gradients": spread(row).median <= BARS["row_gradients"],
            "unrecorded": spread(unrecorded).median <= BARS["unrecorded"],
        },
    }


def _units(problem: Problem) -> dict[str, float]:
    """Seconds of a gradient and of a product with a graph that is there, now."""
    hessian = problem.hessian()
    vector = torch.ones(problem.size, device=problem.x.device)
    hessian.matvec(vector)
    with hessian.frozen():
        times = [timed(lambda: hessian.matvec(vector))[0] for _ in range(_FURTHER)]
    hessian.release()
    return {"gradient": gradient_seconds(problem), "product": statistics.median(times)}


def _train(
    problem: Problem, k: int, late: int, steps: int, every: int | None
) -> tuple[float, so.Monitor | None]:
    """Seconds of the steps, and the monitor that watched them; ``None`` is training without."""
    problem.move_to(late)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    monitor = None
    if every is not None:
        subspace = so.DominantSubspace(problem.hessian(), k)
        monitor = so.Monitor(optimizer, subspace, every=every)
    begin = now()
    for step in range(steps):
        problem.step(optimizer, late + step)
    seconds = now() - begin
    if monitor is not None:
        monitor.detach()
    return seconds, monitor


def _unrecorded(problem: Problem, k: int, late: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of blocks of steps, with a monitor that does not record them and without, in turn."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for watched in (True, False) * max(2, steps // 10):
        problem.move_to(late)
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
        subspace = so.DominantSubspace(problem.hessian(), k)
        monitor = so.Monitor(optimizer, subspace, every=lambda _: False)
        if not watched:
            monitor.detach()
        problem.step(optimizer, late)  # a warm-up
        begin = now()
        for step in range(_BLOCK):
            problem.step(optimizer, late + step)
        seconds[watched].append(now() - begin)
        monitor.detach()
    return seconds[True], seconds[False]
