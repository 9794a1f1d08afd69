"""What is attached twice, or to what does not step; and steps inside of autocast."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import subspace_optim as so
from tests.contract.loops import by_gradients, closure_of, make, sgd
from tests.contract.others import Bare, Takes
from tests.optim.naive import Quartic, exact, flat, projector


def test_a_projection_takes_the_place_of_the_one_before() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    first = so.project_updates(optimizer, subspace, "dominant")
    with pytest.warns(so.AttachedTwiceWarning, match=r"onto='dominant'.*onto='bulk' takes its"):
        second = so.project_updates(Takes(optimizer), subspace, "bulk")  # type: ignore[arg-type]
    theta = flat(model.parameters())
    P = projector(model.hessian(theta), 2)
    by_gradients(model, optimizer)
    moved = flat(model.parameters()) - theta
    assert float(moved.norm()) > 0.01
    assert float((P @ moved).norm()) < 1e-8 * float(moved.norm())
    first.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    second.remove()
    assert not optimizer._optimizer_step_pre_hooks
    so.project_updates(optimizer, subspace, "bulk")  # and then without a warning


def test_a_monitor_of_the_same_rows_takes_the_place_of_the_one_before() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    first = so.Monitor(optimizer, subspace)
    other = so.Monitor(optimizer, subspace, every=2)
    by_gradients(model, optimizer)
    with pytest.warns(so.AttachedTwiceWarning, match="keeps its history"):
        second = so.Monitor(optimizer, subspace)
    by_gradients(model, optimizer)
    assert (first.history["step"], second.history["step"]) == ([0], [0])
    assert other.history["step"] == [0]


@pytest.mark.parametrize(
    "ask", [lambda m: m.history, so.Monitor.rows, so.Monitor.state_dict, so.Monitor.detach]
)
def test_parameters_that_move_without_a_step_are_told_of_once(ask: Any) -> None:
    """Here a copy of the optimizer steps, which has no hooks."""
    model, subspace = make()
    monitor = so.Monitor(sgd(model), subspace)
    handle = so.project_updates(sgd(model), subspace, "bulk")
    copied = sgd(model)
    assert monitor.history["step"] == []
    by_gradients(model, copied)
    with pytest.warns(so.UnseenStepsWarning, match="no step of SGD was seen"):
        ask(monitor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.history["step"] == []
        monitor.detach()
    with pytest.warns(so.UnseenStepsWarning, match="since Projection was attached"):
        handle.remove()


def test_a_wrapper_that_moves_the_parameters_itself_is_told_of_once() -> None:
    model, subspace = make()
    optimizer = Bare(sgd(model))
    handle = so.project_updates(optimizer, subspace, "bulk")
    for _ in range(2):
        by_gradients(model, optimizer)
    with pytest.warns(so.UnseenStepsWarning, match="between the steps of SGD.*not seen by Proj"):
        by_gradients(model, optimizer)
    for _ in range(3):
        by_gradients(model, optimizer)  # warnings are errors
    handle.remove()


def test_a_step_that_was_compiled_or_taken_before_is_seen() -> None:
    """``step`` was looked up before anything was attached: the hooks are torch's own."""
    model, subspace = make()
    optimizer = sgd(model)
    step = optimizer.step
    monitor = so.Monitor(optimizer, subspace)
    handle = so.project_updates(optimizer, subspace, "dominant")

    def broken() -> float:
        raise KeyError("data")

    for _ in range(2):
        closure_of(model)()
        step()
        with pytest.raises(KeyError):
            step(broken)  # type: ignore[arg-type]
    assert monitor.history["step"] == [0, 1]
    assert monitor.history["chi_update"] == pytest.approx([1.0, 1.0])
    handle.remove()


def test_a_copy_of_what_is_followed_is_plain() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    monitor = so.Monitor(optimizer, subspace)
    twin, copied = copy.deepcopy((model, optimizer))
    theta = flat(model.parameters())
    by_gradients(twin, copied)
    assert torch.equal(flat(model.parameters()), theta)
    assert not torch.equal(flat(twin.parameters()), theta)
    assert monitor.history["step"] == []


def test_a_log_may_detach_its_monitor_or_save_it() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    states: list[Any] = []

    def log(row: dict[str, Any]) -> None:
        states.append(monitor.state_dict())
        if row["step"] == 1:
            monitor.detach()

    monitor = so.Monitor(optimizer, subspace, log=log)
    so.Monitor(optimizer, subspace, every=2)  # its hooks come after
    for _ in range(4):
        by_gradients(model, optimizer)
    assert [state["steps"] for state in states] == [1, 2]
    assert monitor.history["step"] == [0, 1]


@pytest.mark.parametrize("name", ["DomSGD", "BulkSAM", "SAM", "LowRankNewton", "AdamW"])
def test_a_step_inside_autocast_is_the_step_outside_bit_for_bit(name: str) -> None:
    """Optimizers, projections and rows; the passes of SAM there see the parameters displaced."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    ends, rows = [], []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        quartic = Quartic(((4, 3), (4,), (1, 4), (1,)), dtype=torch.float32)
        for p, q in zip(model.parameters(), quartic.parameters(), strict=True):
            p.data.copy_(q)
        operator = so.HessianOperator(model, nn.functional.mse_loss, (x, x[:, :1]))
        subspace = so.DominantSubspace(operator, 2, refresh=1)
        params: Any = list(model.parameters())
        optimizer: Any
        if name == "AdamW":
            optimizer = torch.optim.AdamW(params, lr=0.01)
            so.project_updates(optimizer, subspace, "bulk")
        elif name == "SAM":
            optimizer = so.SAM(params, lr=0.1, rho=0.5)
        else:
            optimizer = getattr(so, name)(params, lr=0.1, subspace=subspace)
        monitor = so.Monitor(optimizer, subspace)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), x[:, :1])
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=inside):  # its cache outlives the steps
            for _ in range(3):
                optimizer.step(closure)
        ends.append([p.detach().clone() for p in params])
        rows.append(str(monitor.history))
    assert all(map(torch.equal, *ends))
    assert rows[0] == rows[1]


class Autocast(TorchFunctionMode):
    """Notes the operations that are computed inside of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.outside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__" and args and isinstance(args[0], Tensor | list):
            if torch.is_autocast_enabled("cpu"):
                self.inside.append(name)
            else:
                self.outside += 1
        return func(*args, **(kwargs or {}))


class Outside(torch.optim.SGD):
    """It leaves autocast itself, so that what is left is what a projection does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.autocast("cpu", enabled=False):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.05)


@pytest.mark.parametrize("name", ["BulkSGD", "LowRankNewton", "SAM", "BulkSAM", "project_updates"])
def test_no_operation_of_a_step_is_computed_inside_of_autocast(name: str) -> None:
    """Which of them autocast would round depends on the device: on CPU it is few."""
    model = Quartic()
    optimizer: Any
    if name == "project_updates":
        optimizer = Outside(model.parameters(), lr=0.05)
        so.project_updates(optimizer, exact(model, 2), "bulk")
    else:
        extra = {} if name == "SAM" else {"subspace": exact(model, 2)}
        optimizer = getattr(so, name)(model.parameters(), lr=0.05, momentum=0.5, **extra)
    for _ in range(2):
        closure_of(model)()
        with torch.autocast("cpu", torch.bfloat16), Autocast() as seen:
            if "SAM" in name:
                optimizer.first_step()
                optimizer.second_step()
            else:
                optimizer.step()
        assert seen.inside == []
        assert seen.outside > 5


@pytest.mark.parametrize("name", ["BulkSGD", "SAM"])
def test_autocast_keeps_no_copy_of_the_parameters_before_a_step(name: str) -> None:
    """It casts a parameter once, for as long as the outermost context lasts."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    losses: list[list[float]] = []
    for whole in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        extra = {} if name == "SAM" else {"subspace": so.FixedSubspace(model, torch.eye(12)[:2])}
        optimizer = getattr(so, name)(model.parameters(), lr=0.5, **extra)
        losses.append([])

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), x)
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=whole):
            for _ in range(3):
                losses[-1].append(optimizer.step(closure).item())
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][1] > losses[0][2]
