"""Every optimizer, step by step, beside its dense reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from tests.contract.cases import (
    CASES,
    EACH_ALGORITHM,
    EACH_WAY,
    LR,
    OURS,
    Case,
    each_algorithm,
    each_way,
    everything,
    in_subspace,
)
from tests.contract.runs import Reference, Run, follow, pair, same
from tests.contract.settings import Setting, frozen, odd
from tests.optim.naive import assert_near, flat


@everything
def test_steps_are_the_references_in_place_and_gradients_are_only_read(case: Case) -> None:
    """Two groups with rates and options of their own, where the optimizer takes groups."""
    run, reference = pair(case, two_groups=case.takes_groups)
    seen: list[Any] = []

    def closure() -> Tensor:
        loss = run.closure()
        seen[:] = [(p, p.data_ptr(), p.grad, p.grad.clone()) for p in run.model.parameters()]
        return loss

    for _ in range(3):
        theta, expected = run.theta(), reference.step()
        run.step(closure)
        assert_near(run.theta() - theta, expected - theta, 1e-8)
        assert len(seen) == (4 if case.observes else 3)
        for p, address, gradient, value in seen:
            assert p.data_ptr() == address
            assert p.grad is gradient
            assert torch.equal(gradient, value)
            assert p.requires_grad
            assert p.is_leaf


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"nesterov": True},
        {"dampening": 0.4},
        {"nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"foreach": False},
        {"foreach": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [c for c in OURS if c.part != "newton"], ids=str)
def test_each_option_of_sgd_is_the_references_and_gradients_are_only_read(
    case: Case, options: dict[str, Any]
) -> None:
    """Gradients accumulate here, so that a buffer which is a gradient would be seen."""
    plain, other = Run(case), Run(case, **options)
    run, reference = pair(case, **options)
    follow(run, reference)
    for _ in range(3):
        for one in (plain, other):
            one.step()
    assert same(plain.values(), other.values()) == ("foreach" in options)
    if not case.needs_closure:
        for _ in range(2):
            run.setting.loss().backward()
            gradients = [(p.grad, p.grad.clone()) for p in run.model.parameters()]
            run.apply()
            assert all(torch.equal(gradient, value) for gradient, value in gradients)


@pytest.mark.parametrize("kind", [odd, frozen], ids=lambda f: f.__name__)
@each_way
def test_unusual_parameters_take_the_same_steps(case: Case, kind: Callable[[], Setting]) -> None:
    """Tied, non-contiguous and 0-d ones; or frozen ones, which the optimizer may hold."""
    if kind is odd and case.lbfgs:
        pytest.skip("torch's own takes no non-contiguous parameters")
    run = Run(case, kind(), everything=not (case.lbfgs or case.joint))
    reference = Reference(run, kind())
    before = run.values()
    strides = [p.stride() for p in run.model.parameters()]
    first = next(iter(run.model.parameters()))
    # Left over from before the freeze: torch's own optimizers would go on with it.
    stale = torch.ones_like(first) if case.ours else None
    assert first.is_contiguous() == (kind is frozen)

    def closure() -> Tensor:
        loss = run.closure()
        if kind is frozen:
            first.grad = stale
        return loss

    closure()
    for _ in range(2):
        theta, expected = run.theta(), reference.step()
        run.step(closure)
        assert_near(run.theta() - theta, expected - theta, 1e-8)
    assert strides == [p.stride() for p in run.model.parameters()]
    if kind is frozen:
        frozen_now = [p.grad is stale or not p.requires_grad for p in run.model.parameters()]
        assert frozen_now == [True, True, False, False]
        moved = [not torch.equal(p, b) for p, b in zip(run.model.parameters(), before, strict=True)]
        assert moved == [False, False, True, True]
    else:
        assert run.model.encoder is run.model.decoder


@each_algorithm
def test_a_missing_gradient_is_a_zero_in_the_direction(case: Case) -> None:
    """Its parameter moves all the same, as the projection mixes coordinates; it gets no decay."""
    run, reference = pair(case)
    absent = run.setting.trained[0]
    expected = reference.step(missing=[absent])
    theta = run.theta()

    def closure() -> Tensor:
        loss = run.closure()
        absent.grad = None
        return loss

    run.step(closure)
    assert_near(run.theta() - theta, expected - theta, 1e-8)
    if not case.lbfgs:
        assert all(absent not in each.state for each in run.optimizers) or "Adagrad" in case.name
    elsewhere = torch.equal(flat([absent]), theta[: absent.numel()])
    assert elsewhere == (case.ours is so.SAM)


@each_way
def test_without_any_gradient_nothing_happens(case: Case) -> None:
    run = Run(case, lr=LR, refresh=1)
    before = run.values()
    for optimizer in run.optimizers:
        if case.lbfgs:
            optimizer.step(lambda: torch.tensor(0.0))
        else:
            assert optimizer.step(lambda: 3.0) == 3.0
            if not case.needs_closure:
                assert optimizer.step() is None
    assert same(before, run.values())
    if case.ours:
        stats = run.subspace.stats
        assert (stats.refreshes, run.subspace.clock, len(run.optimizer.state)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("case", "zero"),
    [*((case, 0.0) for case in EACH_ALGORITHM), *((case, torch.tensor(0.0)) for case in EACH_WAY)],
    ids=str,
)
def test_with_all_rates_zero_nothing_moves_and_no_basis_is_made(case: Case, zero: Any) -> None:
    """The step with which torch prepares a checkpoint is no training step, but makes buffers."""
    if isinstance(zero, Tensor) and "foreach" in case.options:
        pytest.skip("torch's own foreach takes no tensor rates")
    run = Run(case, refresh=1)
    monitor = so.Monitor(run.optimizers, run.subspace)
    rates = [group["lr"] for group in run.groups]
    for group in run.groups:
        group["lr"] = zero
    before = run.values()
    if case.lbfgs:
        run.step()
    else:
        run.closure()
        run.apply()  # of SAM too: without any rate it needs no closure
        own = [p for group in run.groups for p in group["params"]]
        stateful = {p for each in run.optimizers for p in each.state}
        assert stateful == (set() if case.name.startswith("SGD,") else set(own))
    assert same(before, run.values()) or "Rprop" in case.name  # its smallest step is above 0
    assert (run.refreshes, run.subspace.clock) == (0, 0)
    assert monitor.history["step"] == []
    for group, rate in zip(run.groups, rates, strict=True):
        group["lr"] = rate
    if not case.lbfgs:
        run.step()
        assert run.refreshes == 1
        assert monitor.history["step"] == [0]
        if "ASGD" not in case.name:  # takes the rate of the step before
            assert not same(before, run.values())


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
@pytest.mark.parametrize("part", ["dominant", "bulk"])
def test_an_optimizer_that_moves_at_a_rate_of_zero_is_projected_there_too(
    name: str, part: str
) -> None:
    """ASGD takes the rate of the step before, Rprop its own: a schedule may go to 0."""
    run, reference = pair(CASES[f"{name}, {part}"])
    follow(run, reference, 2)
    for group in (*run.groups, *reference.groups):
        group["lr"] = 0.0
    follow(run, reference, 1)


@in_subspace
def test_one_rate_above_zero_moves(case: Case) -> None:
    run, reference = pair(case)
    options = {n: v for n, v in run.groups[0].items() if n not in ("params", "lr", "first_lr")}
    for one in (run, reference):
        setting = one.setting
        groups = [
            {"params": [p], "lr": LR, "initial": lr} | options
            for p, lr in zip(setting.model.weights, (0, 0, LR), strict=True)
        ]
        if one is run:
            run.optimizers = [case.ours(groups, subspace=run.subspace)]
        else:
            reference.optimizers = case.plain(groups)
        for group in one.groups:
            group["lr"] = group["initial"]
    reference.first = [LR] * 3
    pieces = torch.arange(run.setting.operator.size).split([6, 2, 1])
    reference.indices = list(pieces)
    follow(run, reference, 2)
    assert run.refreshes == 2
