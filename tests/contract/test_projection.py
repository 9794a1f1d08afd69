"""What `project_updates` promises beyond the contract: it comes off, joins, adds up, and nests."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from tests.contract.cases import CASES, EACH_WAY, LR, OURS, PROJECTED, Case, one
from tests.contract.others import DecaysAfter, DecaysBefore
from tests.contract.runs import Run, follow, pair, same, scaled_step
from tests.contract.settings import quartic
from tests.optim.naive import Quartic, assert_near, flat, projector

dominant = pytest.mark.parametrize("case", [c for c in PROJECTED if c.part == "dominant"], ids=str)


def plain_twin(run: Run) -> Run:
    """The same optimizers without a projection, from the same parameters."""
    twin = Run(run.case)
    assert twin.handle is not None
    twin.handle.remove()
    return twin


@dominant
def test_removed_it_is_the_plain_optimizer_bit_for_bit(case: Case) -> None:
    """From the beginning, and in the middle of a run, with the buffers as they are."""
    for before in (0, 2):
        run = Run(case)
        for _ in range(before):
            run.step()
        if case.lbfgs:  # cannot be copied, and has no memory
            model = copy.deepcopy(run.model)
            plain = case.plain([{"params": list(model.parameters()), **case.options}])
        else:
            model, plain = copy.deepcopy((run.model, run.optimizers))  # hooks are not copied
        refreshes = run.refreshes
        run.handle.remove()
        run.handle.remove()  # a second time is no error
        assert not any(o._optimizer_step_pre_hooks for o in run.optimizers)
        assert not any(o._optimizer_step_post_hooks for o in run.optimizers)
        for _ in range(3):
            run.step()
            for optimizer in plain:
                optimizer.zero_grad()
            if case.needs_closure:

                def closure(optimizer: Any = plain[0], model: Any = model) -> Tensor:
                    optimizer.zero_grad()
                    loss = model()
                    loss.backward()
                    return loss

                plain[0].step(closure)
            else:
                model().backward()
                for optimizer in plain:
                    optimizer.step()
        assert same(run.values(), model.parameters())
        assert run.refreshes == refreshes
        assert run.refreshes == before


@dominant
def test_dominant_and_bulk_update_add_up_to_the_plain_update(case: Case) -> None:
    """Each step from the same parameters, along the path of the plain one, with its buffers."""
    runs = [Run(case), Run(CASES[case.name.replace("dominant", "bulk")]), plain_twin(Run(case))]
    plain = runs[2]
    for _ in range(1 if case.lbfgs else 3):  # LBFGS is at the minimum after that
        theta, moves = plain.theta(), []
        for run in runs:
            run.step()
            moves.append(run.theta() - theta)
        assert_near(moves[0] + moves[1], moves[2], 1e-9)
        assert min(float(move.norm()) for move in moves) > 1e-3 * float(moves[2].norm())
        assert abs(float(moves[0] @ moves[1])) < 1e-8 * float(moves[2].norm()) ** 2
        for run in runs[:2]:
            run.model.load_state_dict(plain.model.state_dict())
            for mine, theirs in zip(run.optimizers, plain.optimizers, strict=True):
                if case.lbfgs:
                    continue
                left = [v for s in mine.state_dict()["state"].values() for v in s.values()]
                right = [v for s in theirs.state_dict()["state"].values() for v in s.values()]
                tensors = [isinstance(v, Tensor) for v in left]
                assert tensors == [isinstance(v, Tensor) for v in right]
                assert same(
                    (v for v in left if isinstance(v, Tensor)),
                    (v for v in right if isinstance(v, Tensor)),
                )


def test_ours_add_up_too() -> None:
    """SAM's parts with SAM, SGD's with torch's own."""
    for names in (("DomSGD", "BulkSGD", None), ("DomSAM", "BulkSAM", "SAM")):
        moves = []
        for name in names:
            run = Run(CASES[name]) if name else plain_twin(Run(CASES["SGD momentum, bulk"]))
            theta = run.theta()
            run.step()
            moves.append(run.theta() - theta)
        assert_near(moves[0] + moves[1], moves[2], 1e-9)


# Several optimizers.


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
@pytest.mark.parametrize("part", ["dominant", "bulk"])
def test_joint_steps_are_the_joint_displacement_projected_by_hand(part: str, reverse: bool) -> None:
    """In whatever order they step; projecting each alone would be another thing."""
    run, reference = pair(CASES[f"Muon + AdamW, {part}"])
    if reverse:
        run.optimizers.reverse()
    follow(run, reference, 4)
    assert run.refreshes == 4
    theta = run.theta()
    P = projector(run.setting.hessian(theta), 2)
    assert float(P[:6, 6:].norm()) > 0.1, "the coordinates of the two do not mix"


def skip_one(run: Run, scaler: Any, which: int) -> None:
    """A step of both, of which torch's scaler skips one: it decides for each optimizer."""
    run.zero_grad()
    scaler.scale(run.setting.loss()).backward()
    run.optimizers[which].param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
    for optimizer in run.optimizers:
        scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("which", [0, 1], ids=["skips Muon", "skips AdamW"])
def test_of_joint_optimizers_the_scaler_may_skip_one(which: int) -> None:
    """What the other did is projected before the next forward pass."""
    run = Run(CASES["Muon + AdamW, bulk"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    theta = run.theta()
    P = projector(run.setting.hessian(theta), 2)
    skip_one(run, scaler, which)
    update = run.theta() - theta
    assert float(update.norm()) > 0
    assert float((P @ update).norm()) < 1e-8 * float(update.norm())


@pytest.mark.parametrize("which", [0, 1], ids=["skips Muon", "skips AdamW"])
def test_after_a_skip_joint_optimizers_step_together_again(which: int) -> None:
    """However the step of the skip itself is told: from the second after it they are in step."""
    run = Run(CASES["Muon + AdamW, bulk"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    skip_one(run, scaler, which)
    scaled_step(run, scaler)
    for _ in range(2):
        theta = run.theta()
        P = projector(run.setting.hessian(theta), 2)
        scaled_step(run, scaler)
        update = run.theta() - theta
        assert float((P @ update).norm()) < 1e-8 * float(update.norm())


def test_a_partial_optimizer_is_refused_with_the_way_out() -> None:
    model = Quartic()
    setting = quartic()
    muon, adamw = CASES["Muon + AdamW, bulk"].plain([{"params": list(setting.trained), "lr": LR}])
    subspace = Run(CASES["DomSGD"], setting).subspace
    message = r"project_updates\(\[muon, adamw\], subspace, onto="
    for alone in (muon, adamw, [muon], torch.optim.SGD([setting.trained[1]], lr=0.1)):
        with pytest.raises(so.ArgumentError, match=message):
            so.project_updates(alone, subspace, onto="bulk")
    stranger = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(so.ArgumentError, match="of another model"):
        so.project_updates(stranger, subspace, onto="bulk")
    with pytest.raises(so.ArgumentError, match="onto is 'top', but must be 'dominant' or 'bulk'"):
        so.project_updates([muon, adamw], subspace, onto="top")  # type: ignore[arg-type]
    for nothing in ([], 3, [muon, 3], "adamw"):
        with pytest.raises(so.ArgumentError, match=r"^optimizer is "):
            so.project_updates(nothing, subspace, onto="bulk")  # type: ignore[arg-type]
    for each in (muon, adamw, stranger):
        assert not each._optimizer_step_pre_hooks
        assert not each._optimizer_step_post_hooks


def test_an_optimizer_that_is_given_twice_is_refused_or_comes_off_whole() -> None:
    run = Run(CASES["Adam, bulk"])
    run.handle.remove()
    try:
        handle = so.project_updates([run.optimizer, run.optimizer], run.subspace, onto="bulk")
    except so.ArgumentError:
        return
    run.step()
    handle.remove()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_a_step_that_raises_is_begun_anew() -> None:
    """The closure fails after the first hooks: the next step is a step like any other."""
    run, reference = pair(CASES["Adam, bulk"])

    def broken() -> Tensor:
        raise KeyError("data")

    before = run.values()
    with pytest.raises(KeyError, match="data"):
        run.optimizer.step(broken)
    assert same(before, run.values())
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(1.25)  # so that the basis of before would be the wrong one
    follow(run, reference)


# Optimizers of others.


@pytest.mark.parametrize("cls", [DecaysAfter, DecaysBefore])
@pytest.mark.parametrize("part", ["dominant", "bulk"])
def test_of_a_subclass_that_calls_super_step_the_whole_displacement_is_projected(
    cls: Any, part: str
) -> None:
    """Torch fires the hooks for the inner step too, while the outer one has still to move."""
    case = Case(cls.__name__, {"lr": LR}, part=part, plain=one(cls))
    run, reference = pair(case)
    follow(run, reference)


@pytest.mark.parametrize("cls", [DecaysAfter, DecaysBefore])
def test_of_a_subclass_that_calls_super_step_the_monitor_sees_the_whole_displacement(
    cls: Any,
) -> None:
    run = Run(CASES["Adam, bulk"], refresh=1)
    run.handle.remove()
    run.optimizers = [cls(run.setting.trained, lr=LR)]
    monitor = so.Monitor(run.optimizer, run.subspace)
    norms = []
    for _ in range(3):
        theta = run.theta()
        run.step()
        norms.append(float((run.theta() - theta).norm()))
    assert monitor.history["step"] == [0, 1, 2]
    assert monitor.history["update_norm"] == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("name", ["SAM", "DomSAM"])
@pytest.mark.parametrize("calls", [1, 2], ids=["step", "two calls"])
def test_sam_itself_may_be_projected(name: str, calls: int) -> None:
    """A third party's SAM as well as ours: of `step(closure)` the whole displacement counts."""
    run, other = Run(CASES[name]), Run(CASES["BulkSAM" if name == "SAM" else "DomSAM"])
    so.project_updates(run.optimizer, run.subspace, "bulk" if name == "SAM" else "dominant")
    for _ in range(3):
        if calls == 1:
            run.step()
        else:
            run.closure()
            run.optimizer.first_step(zero_grad=True)
            run.setting.loss().backward()
            run.optimizer.second_step()
        other.step()
        assert_near(run.theta(), other.theta(), 1e-9)


# Monitors.


@pytest.mark.parametrize("case", [*EACH_WAY, CASES["Muon + AdamW, bulk"]], ids=str)
def test_a_monitor_has_the_same_rows_whether_it_came_before_or_after(case: Case) -> None:
    """Rows of the projected update, whose norm is measured here; nothing changes by a bit."""
    alone = Run(case, refresh=1)
    histories = []
    for monitor_first in (True, False):
        run = Run(case, refresh=1)
        if not case.ours:
            run.handle.remove()
        if monitor_first:
            monitor = so.Monitor(run.optimizers, run.subspace)
        if not case.ours:
            run.project()
        if not monitor_first:
            monitor = so.Monitor(run.optimizers, run.subspace)
        norms = []
        for step in range(3):
            theta = run.theta()
            run.step()
            norms.append(float((run.theta() - theta).norm()))
            if monitor_first:
                alone.step()
            assert step or not monitor_first or same(alone.values(), run.values())
        assert same(alone.values(), run.values())
        assert monitor.history["step"] == [0, 1, 2]
        assert monitor.history["update_norm"] == pytest.approx(norms, rel=1e-9)
        if case.part == "dominant":
            assert monitor.history["chi_update"] == pytest.approx([1.0] * 3, abs=1e-9)
        costs = ("gradients", "products")  # who asks first pays
        histories.append({c: v for c, v in monitor.history.items() if c not in costs})
        assert run.refreshes == 3
    assert histories[0] == histories[1]


def test_a_monitor_takes_optimizers_that_find_their_own_rate() -> None:
    """Their groups have a rate of None; here the whole of it is written out."""
    run = Run(CASES["third party, bulk"], refresh=1)
    run.handle.remove()

    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)

    run.optimizers = [Own(run.setting.trained)]
    monitor = so.Monitor(run.optimizer, run.subspace)
    run.step()
    assert abs(monitor.history["dom_lr"][0] - 0.1) < 1e-9
    theta = run.theta()
    so.project_updates(run.optimizer, run.subspace, "bulk")
    run.step()
    update = -0.1 * flat(p.grad for p in run.setting.trained)
    expected = update - projector(run.setting.hessian(theta), 2) @ update
    assert_near(run.theta() - theta, expected, 1e-8)


def test_optimizers_of_ours_are_all_here() -> None:
    classes = {
        cls
        for cls in vars(so).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert {case.ours for case in OURS} == classes


def test_the_reference_would_notice_a_missing_projection() -> None:
    """The plain update and its part are far apart in these problems."""
    run, reference = pair(CASES["Adam, bulk"])
    theta = run.theta()
    expected = reference.step() - theta
    plain = reference.setting.theta() - theta
    assert float((plain - expected).norm()) > 0.1 * float(plain.norm())
