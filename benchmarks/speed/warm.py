"""A refresh that starts from an old basis, beside a cold solve at the same parameters."""

from __future__ import annotations

from typing import Any, Final

import subspace_optim as so
from benchmarks.progress import counted
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.reference import Reference
from benchmarks.speed.timing import ratios, spread, timed

BAR: Final = 16.0
BAR_SINE: Final = 0.02


def measure(problem: Problem, k: int, rounds: int, start: int, age: int = 50) -> dict[str, Any]:
    """Times the refresh of a basis that is ``age`` steps of SGD old.

    Args:
        problem: what to measure.
        k: how many pairs.
        rounds: repetitions; each begins with the same old basis.
        start: steps of SGD before the old basis.
        age: steps since.

    Returns:
        Raw seconds and gradients of the warm and the cold refresh, their products, and the true
        sines of the old basis and of both new ones.
    """
    problem.move_to(start)
    subspace = so.DominantSubspace(problem.hessian(), k)
    stale = subspace.update()
    kept = subspace.state_dict()
    problem.move_to(start + age)
    reference = Reference(problem, k)
    names = ("warm", "cold")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sines: dict[str, list[float]] = {name: [] for name in names}
    products: dict[str, int] = {}
    gradients = []
    for turn in counted("refreshes", range(rounds + 1), unit="round"):
        gradient = gradient_seconds(problem)
        for name in names:
            subspace = so.DominantSubspace(problem.hessian(), k)
            if name == "warm":
                subspace.load_state_dict(kept)
            before = subspace.stats.products
            duration, basis = timed(subspace.refresh)
            products[name] = subspace.stats.products - before
            if turn:
                seconds[name].append(duration)
                sines[name].append(reference.sine(basis.vectors))
        if turn:
            gradients.append(gradient)
    costs = {name: ratios(times, gradients) for name, times in seconds.items()}
    return {
        "start": start,
        "age": age,
        "sine_before": reference.sine(stale.vectors),
        "seconds": seconds,
        "gradients": costs,
        "products": products,
        "sines": sines,
        "bar": {"gradients": BAR, "sine": BAR_SINE},
        "met": spread(costs["warm"]).median <= BAR and max(sines["warm"]) <= BAR_SINE,
    }
