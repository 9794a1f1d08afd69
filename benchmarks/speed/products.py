"""What a Hessian product costs, in gradients over the same data."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

import subspace_optim as so
from benchmarks.speed.problems import Problem
from benchmarks.speed.timing import Timer, now, ratios, spread, timed

BAR = 1.6
_FURTHER = 8


class MeteredHessian(so.HessianOperator):
    """Counts the seconds that are spent in products, the first with its one-time work included."""

    seconds = 0.0
    _inside = False

    def _metered(self, product: Any, argument: Tensor) -> Tensor:
        if self._inside:
            return product(argument)  # type: ignore[no-any-return]
        self._inside = True
        start = now()
        try:
            return product(argument)  # type: ignore[no-any-return]
        finally:
            self.seconds += now() - start
            self._inside = False

    def matvec(self, v: Tensor) -> Tensor:
        """As the operator has it."""
        return self._metered(super().matvec, v)

    def matmat(self, vectors: Tensor) -> Tensor:
        """As the operator has it."""
        return self._metered(super().matmat, vectors)


def gradient_seconds(problem: Problem, repetitions: int = 5, timer: Timer = timed) -> float:
    """Returns the median time of one gradient over the data, now."""
    return statistics.median(timer(problem.gradient)[0] for _ in range(repetitions))


def _solve_average(problem: Problem, k: int, budget: int | None) -> tuple[float, int]:
    """Seconds for each product of a cold solve, and their number."""
    data = (problem.x, problem.y)
    hessian = MeteredHessian(problem.model, problem.loss, data, memory_budget=budget)
    so.DominantSubspace(hessian, k).refresh()
    return hessian.seconds / hessian.stats.products, hessian.stats.products


def measure(problem: Problem, k: int, rounds: int) -> dict[str, Any]:
    """Times gradients and products in turn, at the problem's present parameters.

    Args:
        problem: what to measure.
        k: of the cold solves whose products are averaged.
        rounds: repetitions, after a warm-up.

    Returns:
        ``seconds`` (raw, a list each), ``gradients`` (the ratio to the gradients of the same
        round, a list each), and ``solve_products``.
    """
    names = ("gradient", "first", "further", "average", "streamed average")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    vector = torch.ones(problem.size, device=problem.x.device)
    count = 0
    for turn in range(rounds + 1):
        hessian = problem.hessian()
        lap = [gradient_seconds(problem), timed(lambda h=hessian: h.matvec(vector))[0]]  # type: ignore[misc]
        with hessian.frozen():
            further = timed(lambda h=hessian: [h.matvec(vector) for _ in range(_FURTHER)])[0]  # type: ignore[misc]
        hessian.release()
        average, count = _solve_average(problem, k, None)
        streamed, _ = _solve_average(problem, k, 0)
        if turn:
            for name, value in zip(
                names, [*lap, further / _FURTHER, average, streamed], strict=True
            ):
                seconds[name].append(value)
    gradients = {name: ratios(times, seconds["gradient"]) for name, times in seconds.items()}
    return {
        "seconds": seconds,
        "gradients": gradients,
        "solve_products": count,
        "bar": {"average": BAR},
        "met": spread(gradients["average"]).median <= BAR,
    }
