"""Seconds, in turn; and what is said of repetitions: median, smallest and largest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from benchmarks.progress import doing

T = TypeVar("T")


class Timer(Protocol):
    """Calls a function, and returns the seconds that it took, and what it returned."""

    def __call__(self, function: Callable[[], T], /) -> tuple[float, T]:
        """As the class says."""


@dataclass(frozen=True)
class Spread:
    """What is said of repetitions; ``str`` of it goes into the tables."""

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.smallest:.3g} to {self.largest:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Returns median, smallest and largest of ``values``, of which there is at least one."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], units: Sequence[float]) -> list[float]:
    """Returns ``values / units`` round by round, for the rounds that both took part in.

    A machine that is slow for a while is slow for both of a pair.
    """
    return [value / unit for value, unit in zip(values, units, strict=False)]


def now() -> float:
    """Returns the time, when all that was asked of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds that a call took, and what it returned."""
    start = now()
    result = function()
    return now() - start, result


def processor_timed(function: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds of the processor that a call took, and what it returned.

    Of work on the CPU: others on the same machine do not count.
    """
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, timer: Timer = timed
) -> dict[str, list[float]]:
    """Returns the seconds of each function, called in turn ``rounds`` times after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with doing("in turn", rounds + 1, unit="round") as task:
        for turn in range(rounds + 1):
            for name, function in functions.items():
                task.at(turn + 1, name)
                duration, _ = timer(function)
                if turn:
                    seconds[name].append(duration)
    return seconds
