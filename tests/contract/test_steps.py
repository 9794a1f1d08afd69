"""Every optimizer, step by step, beside its dense reference: groups, rates, closures, hooks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import subspace_optim as so
from tests.contract.cases import (
    ALL,
    CASES,
    EACH,
    IN_SUBSPACE,
    LR,
    OBSERVING,
    OURS,
    PROJECTED,
    SOME,
    Case,
    Problem,
    Reference,
    Run,
    UserSubspace,
    data,
    frozen,
    network,
    odd,
    pair,
    quartic,
    same,
)
from tests.optim.naive import assert_near, dense_eigenbasis, flat, projector

whole = pytest.mark.parametrize("case", [*ALL, OBSERVING], ids=str)
one_each = pytest.mark.parametrize("case", [*EACH, OBSERVING], ids=str)
each = pytest.mark.parametrize("case", EACH, ids=str)
some = pytest.mark.parametrize("case", SOME, ids=str)
some_observed = pytest.mark.parametrize("case", [*SOME, OBSERVING], ids=str)
ours = pytest.mark.parametrize("case", OURS, ids=str)
in_subspace = pytest.mark.parametrize("case", IN_SUBSPACE, ids=str)
SAMS = [case for case in OURS if case.sam]
sams = pytest.mark.parametrize("case", SAMS, ids=str)


def follow(run: Run, reference: Reference, steps: int = 3, relative: float = 1e-8) -> None:
    """Each displacement is the reference's, from where the run is."""
    for _ in range(steps):
        theta, expected = run.theta(), reference.step()
        run.step()
        assert_near(run.theta() - theta, expected - theta, relative)
        assert float((expected - theta).norm()) > 0


# The step.


@whole
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
            run.problem.loss().backward()
            gradients = [(p.grad, p.grad.clone()) for p in run.model.parameters()]
            run.apply()
            assert all(torch.equal(gradient, value) for gradient, value in gradients)


@pytest.mark.parametrize("kind", [odd, frozen], ids=lambda f: f.__name__)
@some
def test_unusual_parameters_take_the_same_steps(case: Case, kind: Callable[[], Problem]) -> None:
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


@one_each
def test_a_missing_gradient_is_a_zero_in_the_direction(case: Case) -> None:
    """Its parameter moves all the same, as the projection mixes coordinates; it gets no decay."""
    run, reference = pair(case)
    absent = run.problem.trained[0]
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


@some
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
    [*((case, 0.0) for case in EACH), *((case, torch.tensor(0.0)) for case in SOME)],
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
        problem = one.problem
        groups = [
            {"params": [p], "lr": LR, "initial": lr} | options
            for p, lr in zip(problem.model.weights, (0, 0, LR), strict=True)
        ]
        if one is run:
            run.optimizers = [case.ours(groups, subspace=run.subspace)]
        else:
            reference.optimizers = case.plain(groups)
        for group in one.groups:
            group["lr"] = group["initial"]
    reference.first = [LR] * 3
    pieces = torch.arange(run.problem.operator.size).split([6, 2, 1])
    reference.indices = list(pieces)
    follow(run, reference, 2)
    assert run.refreshes == 2


# Rates and schedulers.


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
    for case in [*EACH, OBSERVING]
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
@some_observed
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


# Closures and hooks.


@pytest.mark.parametrize("case", [c for c in [*SOME, OBSERVING] if not c.joint], ids=str)
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
    expected = run.problem.loss().detach()
    if case.observes:
        run.subspace.observe(*run.problem.batch)
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


def watch(run: Run) -> list[str]:
    """Notes the step hooks, and the parameters that they see."""
    calls: list[str] = []
    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    return calls


@some_observed
def test_step_hooks_fire_once(case: Case) -> None:
    """Twice where a subclass calls `super().step()`: that is torch's, and changes no number."""
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
        run.problem.loss().backward()
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
@pytest.mark.parametrize("failing", [1, 2])
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


# Gradients that are cleared, accumulated, compiled, of other dtypes.


@some_observed
def test_gradients_that_are_zeroed_are_as_good_as_none(case: Case) -> None:
    run, other = Run(case), Run(case)

    def closure() -> Tensor:
        other.zero_grad(set_to_none=False)
        loss = other.problem.loss()
        loss.backward()
        return loss

    for _ in range(3):
        run.step()
        other.step(closure)
    assert same(run.values(), other.values())
    other.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not bool(p.grad.any()) for p in other.model.parameters())
    other.zero_grad()
    assert all(p.grad is None for p in other.model.parameters())


@some_observed
def test_gradients_may_be_accumulated(case: Case) -> None:
    """Two backward passes of half the loss each are one of the loss, to the bit."""
    run, other = Run(case), Run(case)

    def closure() -> Tensor:
        other.zero_grad()
        losses = [other.problem.loss() / 2 for _ in range(2)]
        for loss in losses:
            loss.backward()
        return sum(losses)

    for _ in range(3):
        run.step()
        other.step(closure)
    assert same(run.values(), other.values())


COMPILED = [*OURS, *(CASES[f"{n}, dominant"] for n in ("AdamW fused", "Muon + AdamW", "LBFGS"))]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_a_compiled_model_takes_the_same_steps(case: Case) -> None:
    """The optimizer has the parameters of the compiled model, the operator the model in it."""
    torch.compiler.reset()
    run, other = Run(case), None
    problem = quartic()
    compiled = torch.compile(problem.model, backend="eager")
    problem = Problem(problem.model, compiled, problem.hessian, problem.operator)
    other = Run(case, problem, params=list(compiled.parameters()))
    for _ in range(2):
        for one in (run, other):
            one.step()
    assert_near(other.theta(), run.theta(), 1e-12)


@one_each
def test_float32_parameters_take_the_same_steps(case: Case) -> None:
    run, reference = pair(case, lambda: case.factory(torch.float32))
    relative = 0.05 if case.joint else 1e-3  # Muon works in bfloat16 inside
    if case.lbfgs:
        run.groups[0]["max_iter"] = reference.groups[0]["max_iter"] = 3
    follow(run, reference, 3, relative)
    assert run.subspace.update().dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("case", [c for c in PROJECTED if c in EACH], ids=str)
def test_of_bf16_parameters_the_displacement_is_projected_in_float32(case: Case) -> None:
    """It is what the plain optimizer made of them, rounded; the result is rounded once."""
    lr = 16.0 if "Adadelta" in case.name else 0.5
    run, reference = pair(case, lambda: network(torch.bfloat16), lr=lr)
    theta, expected = run.theta(), reference.step()
    run.step()
    basis = run.subspace.basis
    assert basis is not None
    assert basis.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    update = reference.problem.theta() - theta
    error = (run.theta() - expected).abs()
    assert bool((error <= 1.01 * half_ulp + 1e-4 * update.norm()).all())
    assert float(error.norm()) < 0.2 * float((expected - theta).norm())


@ours
def test_bf16_parameters_have_a_float32_basis_and_buffers_of_bf16(case: Case) -> None:
    """Beside the reference in float64: what is left is the rounding of model and parameters."""
    lr = case.options["lr"] * 16
    run = Run(case, network(torch.bfloat16), lr=lr, refresh=1)
    exact = network()
    exact.model.load_state_dict(run.model.state_dict())
    expected = Reference(run, exact, lr=lr).step()
    theta = run.theta()
    run.step()
    assert run.subspace.update().dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    buffers = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    assert len(buffers) == 4
    assert all(buffer.dtype == torch.bfloat16 for buffer in buffers)
    error = float((run.theta() - expected).norm())
    assert error < 0.15 * float((expected - theta).norm())


@pytest.mark.parametrize("case", [c for c in OURS if c.ours in (so.DomSGD, so.BulkSGD)], ids=str)
def test_bf16_parameters_are_rounded_once_at_the_end(case: Case) -> None:
    run = Run(case, network(torch.bfloat16), lr=10.3, refresh=1)
    run.closure()
    theta = run.theta()
    update = -10.3 * flat(p.grad for p in run.model.parameters())
    dominant = projector(run.problem.hessian(theta), 2) @ update
    moved = dominant if case.part == "dominant" else update - dominant
    run.apply()
    expected = theta + moved
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    error = (run.theta() - expected).abs()
    assert bool((error <= 1.01 * half_ulp + 1e-4 * update.norm()).all())
    assert float(error.norm()) < 0.1 * float(moved.norm())


# Gradient scalers.


def scaled_step(run: Run, scaler: Any, bad: float | None = None, at: int = 0) -> None:
    """A step with a scaler; one element of the first parameter's gradient may be bad.

    Args:
        run: whose step.
        scaler: as users have it.
        bad: the element, or none.
        at: in which backward pass of SAM.
    """
    passes = 2 if run.case.sam else 1
    run.zero_grad()
    for number in range(passes):
        scaler.scale(run.problem.loss()).backward()
        if bad is not None and number == at:
            for optimizer in run.optimizers:
                optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = bad
        if run.case.sam and number == 0:
            run.optimizer.first_step(zero_grad=True)
    if run.case.sam:
        scaler.unscale_(run.optimizer)
        run.optimizer.second_step()
    else:
        for optimizer in run.optimizers:
            scaler.step(optimizer)
    scaler.update()


# Torch's scaler takes no closures, and its fused SGD with momentum leaves the buffers as it found
# the memory if the very first step is skipped.
SCALED = [case for case in SOME if not case.lbfgs and not case.name.startswith("SGD fused")]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_a_step_that_the_scaler_skips_is_no_step(case: Case, bad: float) -> None:
    """The next one is that of a run that has not met the overflow."""
    run, other = Run(case, refresh=1), Run(case)
    monitor = so.Monitor(run.optimizers, run.subspace)
    calls = watch(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = run.values()
    for at in range(2 if case.sam else 1):
        scale = scaler.get_scale()
        scaled_step(run, scaler, bad, at)
        assert same(before, run.values())
        assert (run.refreshes, run.subspace.clock) == (0, 0)
        assert monitor.history["step"] == []
        if at + 1 == (2 if case.sam else 1):
            assert scaler.get_scale() == scale / 2
            scale /= 2
    if "fused" not in case.options:  # fused kernels look for infinities themselves
        assert calls == []
        assert all(not each.state for each in run.optimizers) or "Adagrad" in case.name
    for _ in range(2):
        scaled_step(run, scaler)
        other.step()
        assert_near(run.theta(), other.theta(), 1e-12)
    assert run.refreshes == 2
    assert monitor.history["step"] == [0, 1]


@sams
def test_an_overflow_of_the_scale_itself_lowers_it_until_sam_steps(case: Case) -> None:
    """Both passes overflow here, as they do in training: scale times gradient is infinite."""
    run, other = Run(case, quartic(torch.float32)), Run(case, quartic(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-90)
    before = run.values()
    scaled_step(run, scaler)
    assert same(before, run.values())
    assert scaler.get_scale() == 2.0**37
    scaled_step(run, scaler)
    other.step()
    assert_near(run.theta(), other.theta(), 1e-6)


@sams
def test_gradients_whose_squares_overflow_are_finite_to_sam(case: Case) -> None:
    """With the scale 2^100 the gradients are finite float32 numbers, and the sum of squares is not.

    If that skipped the step, the scaler, which sees no infinity, would never lower the scale.
    """
    run, other = Run(case, quartic(torch.float32)), Run(case, quartic(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaled_step(run, scaler)
    other.step()
    assert_near(run.theta(), other.theta(), 1e-6)


# Subspaces that are shared, and directions that are turned round.


@in_subspace
@pytest.mark.parametrize("other", ["DomSGD", "BulkSAM", "AdamW, bulk"])
def test_two_optimizers_that_share_a_subspace_pay_once_for_each_state(
    case: Case, other: str
) -> None:
    """And each takes the step that it takes with a subspace of its own."""
    run = Run(case, refresh=1)
    second = Run(CASES[other], run.problem, subspace=run.subspace)
    monitor = so.Monitor(second.optimizers, run.subspace)
    start = run.values()
    for turn in range(1, 3):
        ends = []
        for one in (run, second):
            for p, value in zip(run.model.parameters(), start, strict=True):
                p.data.copy_(value)
            one.step()
            ends.append(run.values())
        assert run.refreshes == turn
        assert run.subspace.clock <= 2 * turn
        start = ends[0]
        if turn == 1:
            for name, end in zip((case.name, other), ends, strict=True):
                alone = Run(CASES[name], refresh=1)
                alone.step()
                assert same(alone.values(), end)
    assert monitor.history["step"] == [0, 1]


@pytest.mark.parametrize("other", ["DomSGD", "SAM", "AdamW, dominant"])
@in_subspace
def test_optimizers_that_take_turns_refresh_once_a_state(case: Case, other: str) -> None:
    run = Run(case, refresh=1)
    second = Run(CASES[other], run.problem, subspace=run.subspace)
    states = set()
    for _ in range(2):
        for one in (run, second):
            if one.case.has_subspace:
                states.add(run.problem.operator.parameters.digest())
            one.step()
    assert run.refreshes == len(states) == (2 if other == "SAM" else 4)


def maximizes(case: Case) -> bool:
    if case.ours:
        return "maximize" in inspect.signature(case.ours).parameters
    return all("maximize" in optimizer.defaults for optimizer in Run(case).optimizers)


MAXIMIZING = [case for case in EACH if maximizes(case)]


@pytest.mark.parametrize("case", MAXIMIZING, ids=str)
def test_to_maximize_is_to_minimize_the_negative(case: Case) -> None:
    """With the same basis object, as the negative has another dominant subspace."""
    basis = dense_eigenbasis(9, 2, 3, torch.float64)
    ends = []
    for sign in (1, -1):
        plain = quartic()
        problem = Problem(
            plain.model, lambda p=plain, s=sign: s * p.loss(), plain.hessian, plain.operator
        )
        fixed = UserSubspace(problem, basis)
        assert isinstance(fixed, so.subspace.Subspace)
        run = Run(case, problem, subspace=fixed, maximize=sign == 1)
        before = float(plain.loss().detach())
        for _ in range(3):
            run.step()
        ends.append(run.values())
        if case.name in ("DomSGD", "BulkSGD", "SAM"):
            assert float(plain.loss().detach()) > before
    assert same(*ends)


def test_those_that_maximize_are_these() -> None:
    without = {case.name.split(",")[0] for case in EACH} - {
        c.name.split(",")[0] for c in MAXIMIZING
    }
    assert without == {
        "LowRankNewton",
        "ClassGradientQuasiNewton",
        "third party",
        "Muon + AdamW",
        "LBFGS",
    }


def test_the_data_of_a_network_are_what_the_frozen_one_has() -> None:
    model, x, _ = data()
    assert torch.equal(model(x), frozen().model(x))
