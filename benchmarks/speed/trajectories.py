"""Long trajectories: is the estimate still true after thousands of steps?

Plain SGD on minibatches, a basis of all the data that is followed by ``refresh="auto"``, and at
evenly spaced steps the true sine, from a tight solve of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import torch

import subspace_optim as so
from benchmarks.progress import counted, doing
from benchmarks.speed.problems import Problem
from benchmarks.speed.runs import MAX_ANGLE, Run, Sample, agreement
from benchmarks.speed.timing import processor_timed
from subspace_optim.linalg.rows import largest_sine

_TIGHT: Final = 2e-5
"""Relative residual of the solves that tell the truth."""


def follow(
    problem: Problem,
    k: int,
    steps: int,
    samples: int,
    *,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float | None = None,
    **options: Any,
) -> Run:
    """Trains from the start, and follows the basis at every step.

    Args:
        problem: its parameters are moved.
        k: dimension of the subspace.
        steps: of training.
        samples: how many evenly spaced steps are kept, the last of all among them.
        make: the optimizer, from parameters and ``lr``.
        lr: learning rate (default: the problem's).
        **options: of ``DominantSubspace``, beside ``refresh="auto"``.

    Returns:
        Processor seconds of the basis alone, the statistics of the subspace, and what was kept.
    """
    problem.move_to(0)
    options = {"max_angle": MAX_ANGLE} | options
    subspace = so.DominantSubspace(problem.hessian(), k, refresh="auto", **options)
    optimizer = make(problem.model.parameters(), lr=lr or problem.lr)
    sampled = {steps - 1 - i * steps // samples for i in range(samples)}
    run = Run()
    with doing(f"{problem.name}: trajectory", steps) as task:
        for step in range(steps):
            seconds, basis = processor_timed(subspace.update)
            run.seconds += seconds
            stats = subspace.stats
            if step in sampled:
                kept = Sample(step, problem.theta(), basis.vectors, stats.bound, stats.estimate)
                run.samples.append(kept)
            problem.step(optimizer, step)
            task.at(step + 1, f"{stats.products} products, estimate {stats.estimate:.3f}")
    run.stats = asdict(subspace.stats)
    return run


def true_sine(problem: Problem, k: int, sample: Sample) -> dict[str, Any]:
    """Returns the true sine of a sample's basis, its estimate, and the spectrum around k."""
    problem.set_theta(sample.theta)
    hessian = problem.hessian()
    exact = so.DominantSubspace(hessian, k, tol=_TIGHT, refresh=1, seed=1)
    basis = exact.refresh()
    hessian.release()
    gap = exact.gap
    last = float(basis.eigenvalues[-1])
    return {
        "step": sample.step,
        "true_sine": largest_sine(sample.vectors, basis.vectors),
        "estimate": sample.estimate,
        "bound": sample.bound,
        "largest_eigenvalue": float(basis.eigenvalues[0]),
        "last_eigenvalue": last,
        "next_eigenvalue": None if gap is None else last - gap,
    }


def summary(rows: list[dict[str, Any]], run: Run, steps: int) -> dict[str, Any]:
    """Returns the rows, how estimates agree with them, and what it took."""
    sines = [row["true_sine"] for row in rows]
    return {
        "steps": steps,
        "max_angle": MAX_ANGLE,
        "samples": rows,
        "agreement": agreement([(row["true_sine"], row["estimate"]) for row in rows]),
        "above_estimate": sum(row["true_sine"] > row["estimate"] for row in rows),
        "above_max_angle": sum(sine > MAX_ANGLE for sine in sines),
        "largest_sine": max(sines),
        "processor_seconds": run.seconds,
        "stats": run.stats,
    }


def measure(problem: Problem, k: int, steps: int, samples: int, **options: Any) -> dict[str, Any]:
    """Follows a trajectory, and compares its estimates with the truth.

    Args:
        problem: what to train.
        k: dimension of the subspace.
        steps: of training.
        samples: at which the truth is found.
        **options: as those of ``follow``.

    Returns:
        The rows and their ``summary``.
    """
    run = follow(problem, k, steps, samples, **options)
    rows = [true_sine(problem, k, s) for s in counted("true sines", run.samples, unit="sample")]
    return summary(rows, run, steps)
