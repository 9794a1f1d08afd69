"""Whole runs: what the curvature adds to training, beside the recipe at every step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor

import subspace_optim as so
from benchmarks.progress import counted, doing
from benchmarks.speed.peers import RECIPE, solve
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.reference import Reference
from benchmarks.speed.timing import now, ratios, spread, timed

MAX_ANGLE: Final = 0.05


@dataclass(frozen=True)
class Scenario:
    """A stretch of training.

    Attributes:
        title: in words.
        start: steps of SGD before it; ``None`` stands for late in training.
        steps: its own.
        optimizer: ``"bulk"``, or ``"sgd"``, ``"gd"``, ``"adam"`` read by a monitor.
        lr: learning rate (default: the problem's; of ``"gd"``, 2/λ_1).
        jump: what the rate is multiplied by in the middle, and remains at.
        spike: what it is multiplied by at three quarters, for one step.
        bar: of our cost over the recipe's, where there is one.
        sample: of the subspace.
    """

    title: str
    start: int | None
    steps: int
    optimizer: str
    lr: float | None = None
    jump: float = 1.0
    spike: float = 1.0
    bar: float | None = None
    sample: Literal["auto"] | None = None


_ON_ALL_DATA: Final = {
    "late": Scenario("BulkSGD, late", None, 200, "bulk", bar=1 / 300),
    "early": Scenario("BulkSGD, from the start", 0, 40, "bulk", bar=1 / 10),
    "edge": Scenario("Monitor of gradient descent at the edge of stability", None, 120, "gd"),
    "jump": Scenario("Monitor of SGD, rate times 5 in the middle", None, 120, "sgd", jump=5.0),
    "adam": Scenario("Monitor of Adam", None, 60, "adam", lr=1e-3),
}
_SAMPLED_BARS: Final = {"late": 1 / 1500, "edge": 1 / 40, "jump": 1 / 40, "adam": 1 / 25}
_ON_A_SAMPLE: Final = {
    f"{name}-sampled": replace(
        _ON_ALL_DATA[name], title=f"{_ON_ALL_DATA[name].title}, on a sample", bar=bar, sample="auto"
    )
    for name, bar in _SAMPLED_BARS.items()
}
SCENARIOS: Final[dict[str, Scenario]] = _ON_ALL_DATA | _ON_A_SAMPLE


@dataclass
class Sample:
    """One step of a run: the parameters before it, and the basis that served there."""

    step: int
    theta: Tensor
    vectors: Tensor
    bound: float | None
    estimate: float | None


@dataclass
class Run:
    """What a run took, and what was kept of it."""

    seconds: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def _optimizer(
    problem: Problem, scenario: Scenario, lr: float, subspace: so.DominantSubspace | None
) -> tuple[torch.optim.Optimizer, so.Monitor | None]:
    """The scenario's optimizer, without a subspace its plain twin, and its monitor."""
    parameters = list(problem.model.parameters())
    optimizer: torch.optim.Optimizer
    if scenario.optimizer == "bulk" and subspace is not None:
        return so.BulkSGD(parameters, lr=lr, subspace=subspace), None
    if scenario.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=lr)
    else:
        optimizer = torch.optim.SGD(parameters, lr=lr)
    return optimizer, None if subspace is None else so.Monitor(optimizer, subspace)


def train(
    problem: Problem,
    scenario: Scenario,
    start: int,
    lr: float,
    subspace: so.DominantSubspace | None,
    sampled: Sequence[int] = (),
) -> Run:
    """Trains from the state after ``start`` steps; only the training itself is timed.

    Args:
        problem: its parameters are moved.
        scenario: what to do.
        start: steps of SGD before.
        lr: learning rate.
        subspace: for the optimizer or the monitor; ``None`` is the same run without.
        sampled: steps to keep parameters and basis of, of a run with a subspace.

    Returns:
        The run.
    """
    problem.move_to(start)
    optimizer, monitor = _optimizer(problem, scenario, lr, subspace)
    run = Run()
    title = scenario.title if subspace is not None else f"{scenario.title}: without curvature"
    with doing(title, scenario.steps) as task:
        for step in range(scenario.steps):
            after = 1.0 if step < scenario.steps // 2 else scenario.jump
            spike = scenario.spike if step == scenario.steps * 3 // 4 else 1.0
            for group in optimizer.param_groups:
                group["lr"] = lr * after * spike
            theta = problem.theta() if step in sampled else None
            begin = now()
            problem.step(optimizer, start + step, full=scenario.optimizer == "gd")
            run.seconds += now() - begin
            task.at(step + 1)
            if theta is not None and subspace is not None and subspace.basis is not None:
                stats, vectors = subspace.stats, subspace.basis.vectors
                run.samples.append(Sample(step, theta, vectors, stats.bound, stats.estimate))
    if monitor is not None:
        monitor.detach()
    if subspace is not None:
        run.stats = asdict(subspace.stats)
    return run


def agreement(pairs: Sequence[tuple[float, float | None]]) -> dict[str, float | None]:
    """Returns how estimates of the sine compare with the truth.

    Args:
        pairs: (true sine, estimate) of each sample; those without an estimate do not count.

    Returns:
        How often the truth is at most the estimate, the median of estimate over truth, and the
        rank correlation; ``None`` where there are too few pairs.
    """
    known = [(t, e) for t, e in pairs if e is not None and t > 0]
    varied = min((len(set(column)) for column in zip(*known, strict=True)), default=0) > 1
    return {
        "true_below_estimate": statistics.fmean(t <= e for t, e in known) if known else None,
        "median_estimate_over_true": statistics.median(e / t for t, e in known) if known else None,
        "rank_correlation": float(spearmanr(*zip(*known, strict=True))[0]) if varied else None,
    }


def checked(problem: Problem, k: int, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Returns the true sine of each sample's basis, beside its bound and its estimate."""
    rows = []
    for sample in counted("true sines", samples, unit="sample"):
        problem.set_theta(sample.theta)
        reference = Reference(problem, k)
        rows.append(
            {
                "step": sample.step,
                "true_sine": reference.sine(sample.vectors),
                "bound": sample.bound,
                "estimate": sample.estimate,
                "reference_residual": reference.residual,
            }
        )
    return rows


def measure(
    problem: Problem,
    k: int,
    scenario: Scenario,
    *,
    late: int,
    samples: int,
    rounds: int,
    recipe_seconds: float | None = None,
) -> dict[str, Any]:
    """Times a run with and without curvature in turn, then checks its bases one by one.

    Args:
        problem: what to measure.
        k: dimension of the subspace.
        scenario: what to do.
        late: steps of SGD before a late start.
        samples: steps at which the true sine is found, afterwards, at the parameters kept there.
        rounds: pairs of runs; their medians count.
        recipe_seconds: of one solve by the recipe at the start, if it is known already.

    Returns:
        Raw seconds, our cost in seconds, gradients and over the recipe at every step, the
        statistics of the subspace, and true sines beside bounds and estimates.
    """
    start = late if scenario.start is None else scenario.start
    problem.move_to(start)
    gradient = gradient_seconds(problem)
    lr = scenario.lr or problem.lr
    if scenario.optimizer == "gd":
        lr = 2 / float(so.DominantSubspace(problem.hessian(), 1).refresh().eigenvalues[0])
    if recipe_seconds is None:
        recipe_seconds, _ = timed(lambda: solve(RECIPE, problem, k, None))
    # From the end backwards: the last step is the one that a drift shows in.
    sampled = [scenario.steps - 1 - i * scenario.steps // samples for i in range(samples)]
    with_it, plain = [], []
    for turn in range(rounds):
        subspace = so.DominantSubspace(
            problem.hessian(), k, max_angle=MAX_ANGLE, sample=scenario.sample
        )
        with_it.append(train(problem, scenario, start, lr, subspace, () if turn else sampled))
        plain.append(train(problem, scenario, start, lr, None))
    added = [a.seconds - b.seconds for a, b in zip(with_it, plain, strict=True)]
    recipe_total = recipe_seconds * scenario.steps
    rows = checked(problem, k, with_it[0].samples)
    largest = max(row["true_sine"] for row in rows)
    ratio = ratios(added, [recipe_total] * rounds)
    return {
        "scenario": asdict(scenario),
        "start": start,
        "lr": lr,
        "gradient_seconds": gradient,
        "recipe_seconds": recipe_seconds,
        "seconds_with": [run.seconds for run in with_it],
        "seconds_plain": [run.seconds for run in plain],
        "added_seconds": added,
        "added_gradients": [seconds / gradient for seconds in added],
        "ours_over_recipe": ratio,
        "stats": with_it[0].stats,
        "samples": rows,
        "largest_sine": largest,
        "agreement": agreement([(row["true_sine"], row["estimate"]) for row in rows]),
        "met": None
        if scenario.bar is None
        else spread(ratio).median <= scenario.bar and largest <= MAX_ANGLE,
    }
