"""Cold solves, ours and the peers', each answer checked by float64 products on the device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

from benchmarks.files import first_line
from benchmarks.speed.cold import MODULES, RESIDUAL
from benchmarks.speed.peers import CURVLINOPS, EIGENTHINGS, OURS, PYHESSIAN, SOLVERS, solve, tune
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.reference import Residuals
from benchmarks.speed.timing import ratios, spread, timed

ORDER: Final = (OURS, EIGENTHINGS, CURVLINOPS, PYHESSIAN)
"""Ours first, so that the others have something to be compared with."""


def measure(problem: Problem, k: int, rounds: int, limit: float, rows: dict[str, Any]) -> None:
    """Tunes and times the solvers; those whose package is not there say so.

    Args:
        problem: at its present parameters.
        k: how many pairs.
        rounds: repetitions of each.
        limit: seconds of tuning, after which no further setting of a peer is tried.
        rows: ``"gradient"``, and one for each solver: its setting, seconds, gradients, products,
            the residual in float64, and our time over its own.
    """
    exact = Residuals(problem)
    gradient = gradient_seconds(problem)
    rows["gradient"] = {"seconds": gradient}
    for name in ORDER:
        package = SOLVERS[name].package
        if package is not None and find_spec(MODULES[package]) is None:
            rows[name] = {"left_out": f"{package} is not installed"}
            continue
        rows[name] = {"left_out": "ended while it was at work"}
        try:
            rows[name] = _solver(name, problem, k, rounds, limit, exact)
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way
            rows[name] = {"left_out": f"failed: {first_line(error)}"}
            continue
        row, ours = rows[name], rows[OURS].get("seconds", [])
        row["gradients"] = [seconds / gradient for seconds in row["seconds"]]
        if ours:
            row["ours_over_this"] = spread(ratios(ours, row["seconds"])).median


def _solver(
    name: str, problem: Problem, k: int, rounds: int, limit: float, exact: Residuals
) -> dict[str, Any]:
    setting, _ = tune(name, problem, k, exact, RESIDUAL, limit)
    solve(name, problem, k, setting)  # kernels are chosen and memory is had
    seconds = []
    for _ in range(rounds):
        duration, answer = timed(lambda: solve(name, problem, k, setting))
        seconds.append(duration)
    residual = exact.check(answer.eigenvalues, answer.vectors).residual
    return {
        "setting": setting,
        "seconds": seconds,
        "products": answer.products,
        "residual": residual,
        "reached": residual <= RESIDUAL,
        "eigenvalues": answer.eigenvalues.tolist(),
    }
