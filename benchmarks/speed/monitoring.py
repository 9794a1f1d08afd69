"""What a monitor adds to training with SGD late, beside what its own cost columns report."""

from __future__ import annotations

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
SPACINGS: Final = (1, 10, 100, 1000, 3000, 10_000)
_BLOCK: Final = 25
_TURNS: Final = 20
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
    with_it, without = _unrecorded(problem, k, late, max(rounds, 2))
    unrecorded = ratios(with_it, without)
    spaced = {
        every: _spaced(problem, k, late, every, rows=5)
        for every in (SPACINGS if steps > 100 else (1, 3))
    }
    return {
        "steps": steps,
        "runs": runs,
        "over_columns": over,
        "row_gradients": row,
        "unrecorded_seconds": {"with": with_it, "without": without},
        "unrecorded": unrecorded,
        "spaced": spaced,
        "slowdown": SLOWDOWN,
        "every": next((n for n, row in spaced.items() if row["slowdown"] <= SLOWDOWN), None),
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


def _unrecorded(
    problem: Problem, k: int, late: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Median seconds of a step that a monitor does not record, and of one without a monitor.

    Blocks of steps with and without take turns; a round has many, since what is looked for is a
    hundredth of a step.
    """
    medians: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for watched in (True, False) * _TURNS:
            problem.move_to(late)
            optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
            subspace = so.DominantSubspace(problem.hessian(), k)
            monitor = so.Monitor(optimizer, subspace, every=lambda _: False)
            if not watched:
                monitor.detach()
            problem.step(optimizer, late)  # a warm-up
            seconds[watched] += [_timed_step(problem, optimizer, late + i) for i in range(_BLOCK)]
            monitor.detach()
        for watched, times in seconds.items():
            medians[watched].append(statistics.median(times))
    return medians[True], medians[False]


def _timed_step(problem: Problem, optimizer: torch.optim.Optimizer, step: int) -> float:
    return timed(lambda: problem.step(optimizer, step))[0]


def _spaced(problem: Problem, k: int, late: int, every: int, rows: int) -> dict[str, float]:
    """The mean cost columns of rows so far apart, after the first, and what they slow down to.

    The more steps lie between two rows, the staler the basis is, and the more a row costs.
    """
    problem.move_to(late)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    monitor = so.Monitor(optimizer, so.DominantSubspace(problem.hessian(), k), every=every)
    plain = []
    for step in range(rows * every + 1):
        before = len(monitor.history["step"])
        seconds = _timed_step(problem, optimizer, late + step)
        if len(monitor.history["step"]) == before:
            plain.append(seconds)
    monitor.detach()
    unit = _units(problem)
    gradients, products = (
        statistics.fmean(monitor.history[column][1:]) for column in ("gradients", "products")
    )
    row = gradients * unit["gradient"] + products * unit["product"]
    step_seconds = statistics.median(plain) if plain else _step_seconds(problem, late)
    return {
        "gradients": gradients,
        "products": products,
        "row_in_gradients": row / unit["gradient"],
        "slowdown": 1 + row / (every * step_seconds),
    }


def _step_seconds(problem: Problem, late: int) -> float:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    return statistics.median(_timed_step(problem, optimizer, late + i) for i in range(50))
