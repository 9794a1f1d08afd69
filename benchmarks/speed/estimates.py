"""Is the estimate true? Trajectories from several seeds, sampled, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import subspace_optim as so
from benchmarks.speed.problems import Problem
from benchmarks.speed.runs import MAX_ANGLE, Sample, Scenario, agreement, checked, train

TRAJECTORIES: Final = (
    Scenario("SGD from the start, rate times 5, a spike", 0, 60, "sgd", jump=5.0, spike=10.0),
    Scenario("Adam from the start", 0, 40, "adam", lr=1e-3),
    Scenario("BulkSGD, late", None, 100, "bulk"),
)
BARS: Final = {
    "true_below_estimate": 0.99,
    "within_max_angle": 0.95,
    "median_estimate_over_true": 5.0,
    "rank_correlation": 0.7,
}


def measure(
    again: Callable[..., Problem],
    k: int,
    late: int,
    *,
    seeds: int = 3,
    samples: int = 15,
    quick: bool = False,
) -> dict[str, Any]:
    """Follows the trajectories, and finds the true sine at evenly spaced steps of each.

    Args:
        again: ``again(seed=s)`` is the problem from another seed.
        k: dimension of the subspace.
        late: steps of SGD before a late start.
        seeds: how many, from 0 on.
        samples: of each trajectory.
        quick: one seed and few steps.

    Returns:
        For each trajectory and for all together: samples, how estimates agree with the truth
        (``runs.agreement``), and how often the true sine was at most ``max_angle``.
    """
    chosen = range(1 if quick else seeds)
    rows: list[dict[str, Any]] = [{"title": t.title, "samples": []} for t in TRAJECTORIES]
    for seed in chosen:
        problem = again(seed=seed)
        for trajectory, row in zip(TRAJECTORIES, rows, strict=True):
            scenario = replace(trajectory, steps=4) if quick else trajectory
            row["samples"] += _follow(problem, k, scenario, late, 2 if quick else samples)
    rows = [_summary(row["title"], row["samples"]) for row in rows]
    pooled = _summary("all", [sample for row in rows for sample in row["samples"]])
    found = {**pooled["agreement"], "within_max_angle": pooled["within_max_angle"]}
    pooled["met"] = all(
        found[name] is not None
        and (found[name] <= bar if name == "median_estimate_over_true" else found[name] >= bar)
        for name, bar in BARS.items()
    )
    return {
        "seeds": list(chosen),
        "max_angle": MAX_ANGLE,
        "bars": BARS,
        "trajectories": rows,
        "all": pooled,
    }


def _follow(
    problem: Problem, k: int, scenario: Scenario, late: int, samples: int
) -> list[dict[str, Any]]:
    start = late if scenario.start is None else scenario.start
    subspace = so.DominantSubspace(problem.hessian(), k, refresh="auto", max_angle=MAX_ANGLE)
    sampled = [scenario.steps - 1 - i * scenario.steps // samples for i in range(samples)]
    run = train(problem, scenario, start, scenario.lr or problem.lr, subspace, sampled)
    kept: list[Sample] = run.samples
    return checked(problem, k, kept)


def _summary(title: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    within = [sample["true_sine"] <= MAX_ANGLE for sample in samples]
    return {
        "title": title,
        "samples": samples,
        "agreement": agreement([(s["true_sine"], s["estimate"]) for s in samples]),
        "within_max_angle": sum(within) / len(within),
    }
