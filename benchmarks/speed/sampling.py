"""Bases of samples: is the error that is told the true one, and what do they cost as data grow?"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Final

from benchmarks.losses import LOSSES
from benchmarks.speed import coverage, growth
from benchmarks.speed.coverage import CASES
from benchmarks.speed.growth import Growing

_LATE: Final = 500
"""Steps of SGD before the MLP is measured."""


def measure(root: str | None, *, quick: bool = False) -> dict[str, Any]:
    """Draws samples and compares, then lets the data grow. On the CPU: its seconds are counted.

    Args:
        root: folder of the data sets.
        quick: few samples, and few examples.

    Returns:
        ``coverage``: of each sample the sine that is expected and the true one, and summaries.
        ``growth``: of each problem, what a certified basis cost at each size.
    """
    samples = []
    for case in CASES.values():
        some = replace(case, seeds=1, draws=1) if quick else case
        for loss, seed in product(LOSSES, range(some.seeds)):
            samples += coverage.coverage(some, loss, seed, root)
    return {
        "coverage": coverage.covered(samples),
        "growth": [growth.grow(problem) for problem in problems(root, quick=quick)],
    }


def problems(root: str | None, *, quick: bool = False) -> list[Growing]:
    """Returns what grows.

    Args:
        root: folder of the data sets.
        quick: with few examples.
    """
    steps = 20 if quick else _LATE
    images, rows = (
        ((100, 200), (1000, 4000))
        if quick
        else (
            (500, 1000, 2500, 5000),
            (10_000, 30_000, 100_000),
        )
    )
    few = [
        Growing("the paper's MLP on MNIST images", images, growth.trained_mlp(root, steps)),
        Growing("least squares, rows of a known spectrum", rows, growth.linear, rounds=3),
    ]
    if quick:
        return few
    more = growth.trained_mlp(root, steps, "mnist")
    return [*few, Growing("the paper's MLP on more of MNIST", (10_000, 30_000), more)]
