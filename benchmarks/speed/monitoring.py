"""What a monitor adds to training with SGD late, beside what its own cost columns report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

import torch

import subspace_optim as so
from benchmarks.progress import counted
from benchmarks.speed.monitor_errors import coverage
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.timing import now, processor_timed, ratios, spread, timed

BARS: Final = {"over_columns": 1.15, "row_gradients": 4.0, "unrecorded": 1.02}
SLOWDOWN: Final = 1.25
"""How much longer the training may take for the ``every`` that is recommended."""
SPACINGS: Final = (1, 10, 100, 1000, 3000, 10_000)
WATCHING: Final[dict[str, dict[str, Any]]] = {
    "all data": {"sample": None},
    "auto": {"sample": "auto"},
    "auto, an angle of 0.1": {"sample": "auto", "max_angle": 0.1},
    "1,000 examples": {"sample": 1000},
}
"""What the basis is of, and so loss and gradient: options of ``DominantSubspace``."""
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
    spacings = SPACINGS if steps > 100 else (1, 3)
    return {
        "steps": steps,
        "runs": runs,
        "over_columns": over,
        "row_gradients": row,
        "unrecorded_seconds": {"with": with_it, "without": without},
        "unrecorded": unrecorded,
        **spaced(problem, k, late, spacings),
        "coverage": coverage(problem, k, late, draws=500 if steps > 100 else 2),
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


def spaced(
    problem: Problem, k: int, late: int, spacings: Sequence[int], rows: int = 5
) -> dict[str, Any]:
    """What rows so far apart slow a training down to, for all that ``WATCHING`` names in turn.

    The more steps lie between two rows, the staler the basis is, and the more a row costs.

    Args:
        problem: what to train.
        k: dimension of the subspace.
        late: steps of SGD before.
        spacings: values of ``every``.
        rows: after the first, whose cold solve does not count.

    Returns:
        ``spaced``: for each spacing and name the mean cost columns, and by how much longer the
        training takes; ``every``: the first spacing that keeps it within ``SLOWDOWN``, by name.
    """
    found: dict[int, dict[str, Any]] = {}
    for every in spacings:
        names = counted(f"rows {every} steps apart", list(WATCHING), unit="way")
        found[every] = {name: _apart(problem, k, late, every, rows, name) for name in names}
    within = {
        name: next((n for n in spacings if found[n][name]["slowdown"] <= SLOWDOWN), None)
        for name in WATCHING
    }
    return {"spaced": found, "slowdown": SLOWDOWN, "every": within}


def _apart(problem: Problem, k: int, late: int, every: int, rows: int, name: str) -> dict[str, Any]:
    """Trains with a monitor. On the CPU its own seconds count, for others are at work too."""
    clock = timed if problem.x.is_cuda else processor_timed
    problem.move_to(late)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    hessian = problem.hessian()
    subspace = so.DominantSubspace(hessian, k, **WATCHING[name])
    monitor = so.Monitor(optimizer, subspace, every=every)
    seconds = [
        clock(lambda step=step: problem.step(optimizer, late + step))[0]  # type: ignore[misc]
        for step in range(rows * every + 1)
    ]
    monitor.detach()
    hessian.release()
    recorded = [seconds[step] for step in monitor.history["step"][1:]]
    plain = [
        clock(lambda step=step: problem.step(optimizer, late + step))[0]  # type: ignore[misc]
        for step in range(50)
    ]
    if every > 1:
        plain = [s for step, s in enumerate(seconds) if step % every]
    one = statistics.median(plain)
    history = {column: values[1:] for column, values in monitor.history.items()}
    unit = gradient_seconds(problem) if problem.x.is_cuda else _gradient_on_cpu(problem)
    return {
        "gradients": statistics.fmean(history["gradients"]),
        "products": statistics.fmean(history["products"]),
        "examples": history["examples"],
        "row_seconds": recorded,
        "row_in_gradients": statistics.fmean(recorded) / unit,
        "step_seconds": one,
        "slowdown": 1 + (statistics.fmean(recorded) - one) / (every * one),
    }


def _gradient_on_cpu(problem: Problem) -> float:
    return min(processor_timed(problem.gradient)[0] for _ in range(3))
