"""The top k eigenpairs from nothing: ours and the peers, interleaved, to the same residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Final

from rich.console import Console

from benchmarks.progress import doing
from benchmarks.speed.peers import (
    EIGENTHINGS,
    OURS,
    PYHESSIAN,
    RECIPE,
    SOLVERS,
    Answer,
    solve,
    tune,
)
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.reference import Check, Reference, Residuals
from benchmarks.speed.timing import Timer, ratios, spread, timed

RESIDUAL: Final = 1e-3
BARS: Final = {EIGENTHINGS: 0.65, RECIPE: 0.25}
_SLOW: Final = 10.0
"""Seconds: a solver that takes longer runs once, after it was tuned."""

MODULES: Final = {
    EIGENTHINGS: "hessian_eigenthings",
    "curvlinops-for-pytorch": "curvlinops",
    PYHESSIAN: "pyhessian",
}


class _Checked:
    """Checks answers; one that is bit for bit the last of its solver is not computed again."""

    def __init__(self, reference: Residuals) -> None:
        self.reference = reference
        self.last: dict[str, tuple[Answer, Check]] = {}

    def __call__(self, name: str, answer: Answer) -> Check:
        """Returns how good the answer is."""
        if name in self.last:
            known, check = self.last[name]
            same = (known.vectors == answer.vectors).all()
            if bool(same) and bool((known.eigenvalues == answer.eigenvalues).all()):
                return check
        check = self.reference.check(answer.eigenvalues, answer.vectors)
        self.last[name] = answer, check
        return check


def _left_out(name: str, gradient: float, limit: float) -> str:
    """Why a solver does not take part; empty where it does."""
    package = SOLVERS[name].package
    if package is not None and find_spec(MODULES[package]) is None:
        return f"{package} is not installed"
    expected = SOLVERS[name].gradients * gradient
    if name != OURS and expected > limit:
        return f"about {expected:.0f} s a solve, more than --limit {limit:.0f}"
    return ""


def measure(
    problem: Problem,
    k: int,
    rounds: int,
    limit: float,
    console: Console,
    *,
    solvers: Sequence[str] = tuple(SOLVERS),
    timer: Timer = timed,
    exact: bool = True,
) -> dict[str, Any]:
    """Times the solvers in turn at the problem's present parameters, and checks every answer.

    Args:
        problem: what to measure.
        k: how many pairs.
        rounds: repetitions; of solvers that take longer than 10 s, one.
        limit: seconds; solvers that would take longer are left out, and the result says so. After a
            tenth of it no further setting is tried.
        console: is told of the tuning.
        solvers: keys of ``SOLVERS``, ours among them.
        timer: of the seconds.
        exact: finds the true pairs first, for sines and errors of eigenvalues; on large models that
            takes longer than all the rest, and residuals need it not.

    Returns:
        ``gradient_seconds``, the reference's own residual, and for each solver its setting, raw
        seconds, gradients, products, checks, and the ratio of ours to it in the same round.
    """
    reference = Reference(problem, k) if exact else Residuals(problem)
    checked = _Checked(reference)
    gradient = gradient_seconds(problem, timer=timer)
    table: dict[str, dict[str, Any]] = {}
    for name in solvers:
        reason = _left_out(name, gradient, limit)
        if reason:
            table[name] = {"left_out": reason}
            continue
        with doing(f"tuning {name}"):
            seconds, (setting, check) = timed(
                lambda name=name: tune(name, problem, k, reference, RESIDUAL, limit / 10)  # type: ignore[misc]
            )
        if check is not None:
            found = f"residual {check.residual:.1e}, found in {seconds:.1f} s"
            console.print(f"  {name}: {SOLVERS[name].meaning} {setting}: {found}")
        table[name] = {"setting": setting, "seconds": [], "checks": []}
    gradients: list[float] = []
    for turn in range(rounds):
        gradients.append(gradient_seconds(problem, timer=timer))
        for name, row in table.items():
            if "left_out" in row or (turn and row["seconds"][0] > _SLOW):
                continue
            with doing(name, rounds, unit="round") as task:
                task.at(turn + 1)
                seconds, answer = timer(
                    lambda name=name, row=row: solve(name, problem, k, row["setting"])  # type: ignore[misc]
                )
                row["seconds"].append(seconds)
                row["products"] = answer.products
                row["checks"].append(asdict(checked(name, answer)))
    ours = table[OURS]["seconds"]
    for row in table.values():
        if "left_out" not in row:
            row["reached"] = max(check["residual"] for check in row["checks"]) <= RESIDUAL
            row["gradients"] = ratios(row["seconds"], gradients)
            row["ours_over_this"] = ratios(ours, row["seconds"])
    return {
        "k": k,
        "residual": RESIDUAL,
        "reference_residual": getattr(reference, "residual", None),
        "gradient_seconds": gradients,
        "solvers": table,
        "bars": BARS,
        "met": {
            name: spread(table[name]["ours_over_this"]).median <= bar
            for name, bar in BARS.items()
            if "left_out" not in table.get(name, {"left_out": "not asked for"})
        },
    }
