"""Every optimizer under every scheduler, and with rates that are tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.contract.cases import CASES, EACH_ALGORITHM, LR, OBSERVING, Case, each_way_observing
from tests.contract.runs import Run, pair
from tests.optim.naive import assert_near


def _chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    )


def _sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


LOW, HIGH = LR / 2, LR * 2
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.75),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),  # 0 at its end
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "ChainedScheduler": _chained,
    "SequentialLR": _sequential,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, LOW, HIGH, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, HIGH, 6, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: lr_scheduler.CyclicLR(o, LOW, HIGH, 2),
    "OneCycleLR with momentum": lambda o: lr_scheduler.OneCycleLR(o, HIGH, 6),
}
METRICS = [3.0, 2.0, 2.5, 1.5, 1.75]


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(METRICS[step])
    else:
        scheduler.step()


def schedule(case: Case, name: str, steps: int) -> list[dict[str, Any]]:
    """The options that the scheduler sets at each step, of one plain optimizer and a number."""
    kind = torch.optim.Adam if case.momentum == "betas" else torch.optim.SGD
    options = {n: case.options[n] for n in ("lr", case.momentum) if n}
    optimizer = kind([nn.Parameter(torch.zeros(()))], **options)
    scheduler, table = SCHEDULERS[name](optimizer), []
    for step in range(steps):
        table.append({n: optimizer.param_groups[0][n] for n in options})
        optimizer.step()
        advance(scheduler, step)
    assert len({row["lr"] for row in table}) > 1, "the schedule is constant"
    return table


def test_every_scheduler_of_torch_is_here() -> None:
    theirs = {n for n in lr_scheduler.__all__ if n != "LRScheduler"}
    assert theirs == {name.removesuffix(" with momentum") for name in SCHEDULERS}


VARIANTS = ("foreach", "fused", "amsgrad")  # the same algorithms, with the same rates


# Every schedule with each way to take its rates, and every optimizer with one that also cycles the
# momentum, where it has any.
_BY_ALL = (
    "DomSGD",
    "BulkSAM",
    "LowRankNewton",
    "ClassGradientQuasiNewton",
    "SGD momentum, dominant",
    "Muon + AdamW, dominant",
)
SCHEDULED = [(CASES[name], schedule) for name in _BY_ALL for schedule in SCHEDULERS] + [
    (case, f"OneCycleLR{' with momentum' if case.momentum else ''}")
    for case in [*EACH_ALGORITHM, OBSERVING]
    if case.name not in _BY_ALL and not set(VARIANTS) & set(case.options)
]


@pytest.mark.parametrize(("case", "name"), SCHEDULED, ids=str)
def test_steps_under_a_scheduler_have_the_rates_that_it_sets(case: Case, name: str) -> None:
    """The reference's are set by hand."""
    if name.endswith("with momentum") and case.momentum is None:
        pytest.skip("there is no momentum to cycle")
    run, reference = pair(case)
    if name == "CosineAnnealingLR" and case.name.startswith(("ASGD", "Rprop")):
        pytest.skip("these move at a rate of zero, of which there is a test")
    with_hand = schedule(case, name, len(METRICS))
    schedulers = [SCHEDULERS[name](each) for each in run.optimizers]
    for step, options in enumerate(with_hand):
        for group in reference.groups:
            group.update(options)
        theta, expected = run.theta(), reference.step()
        run.step()
        distance = float((run.theta() - expected).norm())
        assert distance <= 1e-8 * float((expected - theta).norm()) + 1e-15
        for scheduler in schedulers:
            advance(scheduler, step)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "shape (1,)"])
@each_way_observing
def test_a_tensor_rate_is_the_number(case: Case, shape: tuple[int, ...]) -> None:
    if "foreach" in case.options and "Adam" in case.name:
        pytest.skip("torch's own foreach takes no tensor rates")
    lr = case.options["lr"]
    run, number = Run(case, lr=torch.full(shape, lr)), Run(case, lr=lr)
    halves = [lr_scheduler.ExponentialLR(each, 0.5) for each in run.optimizers]
    for _ in range(3):
        theta = run.theta()
        for one in (run, number):
            one.step()
        # torch's own take a tensor of float32 into their arithmetic, and Muon works in bfloat16.
        relative = 1e-12 if case.ours else 0.05 if case.joint else 1e-6
        assert_near(run.theta() - theta, number.theta() - theta, relative)
        for half in halves:
            half.step()
        for group in number.groups:
            group["lr"] = group["lr"] / 2
    assert isinstance(run.groups[0]["lr"], Tensor)
    assert tuple(run.groups[0]["lr"].shape) == shape
