"""Closures, step hooks, and the two calls of SAM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.contract.cases import (
    EACH_WAY,
    IN_SUBSPACE,
    LR,
    OBSERVING,
    Case,
    each_way_observing,
    sams,
)
from tests.contract.runs import Run, same, watch
from tests.contract.settings import quartic


@pytest.mark.parametrize("case", [c for c in [*EACH_WAY, OBSERVING] if not c.joint], ids=str)
def test_a_closure_runs_as_often_as_it_has_to_with_gradients_on(case: Case) -> None:
    """Once, twice for SAM, for LBFGS as often as without projection; its first loss is returned."""
    run, other = Run(case), Run(case)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return run.closure()

    number = 2 if case.sam else 1
    if case.lbfgs:
        plain = quartic()
        theirs = case.plain([{"params": plain.trained, **case.options}])[0]

        def plain_closure() -> Tensor:
            calls.append(True)
            theirs.zero_grad()
            loss = plain.loss()
            loss.backward()
            return loss

        theirs.step(plain_closure)
        number = len(calls)
        assert number > 2
        calls.clear()
    expected = run.setting.loss().detach()
    if case.observes:
        run.subspace.observe(*run.setting.batch)
    with torch.no_grad():
        loss = run.optimizer.step(closure)
    assert calls == [True] * number
    assert torch.equal(loss, expected)
    other.step()
    assert same(run.values(), other.values())


@pytest.mark.parametrize("case", [c for c in IN_SUBSPACE if not c.sam], ids=str)
def test_a_closure_runs_before_the_basis_is_used(case: Case) -> None:
    """It moves the parameters, as no closure should: basis and gradient are those of after it."""
    run, other = Run(case), Run(case)
    refreshes = []

    def closure() -> Tensor:
        refreshes.append(run.refreshes)
        for p in run.model.parameters():
            p.data.mul_(1.25)
        return run.closure()

    run.optimizer.step(closure)
    for p in other.model.parameters():
        p.data.mul_(1.25)
    other.step()
    assert refreshes == [0]
    assert same(run.values(), other.values())


@each_way_observing
def test_step_hooks_fire_once(case: Case) -> None:
    """Twice where a subclass calls `super().step()`: that is torch's, and changes no number."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # so that torch has wrapped its step too
    run = Run(case)
    calls = watch(run)
    once = (
        ["before", "before", "after", "after"] if "subclass" in case.name else ["before", "after"]
    )
    for _ in range(2):
        calls.clear()
        run.step()
        assert calls == once * len(run.optimizers)


@sams
def test_the_two_calls_of_sam_fire_the_hooks_once_and_make_its_step(case: Case) -> None:
    run, other = Run(case), Run(case)
    seen: list[tuple[str, list[Tensor]]] = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(("before", run.values())))
    run.optimizer.register_step_post_hook(lambda *_: seen.append(("after", run.values())))
    scheduler = lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
    for step in range(3):
        start = run.values()
        run.closure()
        run.optimizer.first_step(zero_grad=True)
        assert not seen
        assert all(p.grad is None for p in run.model.parameters())
        assert not same(start, run.values())
        run.setting.loss().backward()
        run.optimizer.second_step()
        assert [name for name, _ in seen] == ["before", "after"]
        assert same(seen[0][1], start)
        assert same(seen[1][1], run.values())
        seen.clear()
        scheduler.step()
        other.groups[0]["lr"] = LR / 2**step
        other.step()
        assert same(run.values(), other.values())


@sams
def test_the_calls_of_sam_come_in_their_order(case: Case) -> None:
    run = Run(case)
    run.closure()
    before = run.values()
    with pytest.raises(RuntimeError, match=r"needs the gradient at two points: call step\(closure"):
        run.optimizer.step()
    with pytest.raises(RuntimeError, match="without first_step"):
        run.optimizer.second_step()
    assert same(before, run.values())
    run.optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        run.optimizer.first_step()


@sams
@pytest.mark.parametrize("failing", [1, 2], ids=["first pass", "second pass"])
def test_an_error_in_the_closure_of_sam_leaves_the_parameters(case: Case, failing: int) -> None:
    run, other = Run(case), Run(case)
    before, calls = run.values(), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("data")
        return run.closure()

    with pytest.raises(KeyError, match="data"):
        run.optimizer.step(closure)
    assert same(before, run.values())
    for one in (run, other):
        one.step()
    assert same(run.values(), other.values())
