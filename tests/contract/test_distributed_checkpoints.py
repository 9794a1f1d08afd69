"""`torch.distributed.checkpoint`, in one process without a group."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_flatten

import subspace_optim as so
from tests.contract.cases import EACH_ALGORITHM, LR, OBSERVING, Case
from tests.contract.runs import Run, same
from tests.contract.settings import Setting
from tests.optim.naive import DenseOperator, Quartic


def fresh(case: Case) -> Setting:
    """In float32 for NAdam: torch casts its float32 products of momenta as it loads them."""
    return case.setting(torch.float32 if "NAdam" in case.name else torch.float64)


# torch.distributed.checkpoint, which needs no process group. LBFGS has no step without closure.

DISTRIBUTED = [case for case in [*EACH_ALGORITHM, OBSERVING] if not case.lbfgs]
distributed = pytest.mark.parametrize("case", DISTRIBUTED, ids=str)


@distributed
def test_the_checkpoint_of_a_fresh_optimizer_costs_no_refresh_no_row_and_no_move(
    case: Case,
) -> None:
    """Torch fills a fresh state by a step with zero gradients and zero rates."""
    run = Run(case, refresh=1)
    before = run.values()
    monitor = None if case.observes else so.Monitor(run.optimizers, run.subspace)
    rates = [group["lr"] for group in run.groups]
    state = get_optimizer_state_dict(run.model, run.optimizers)
    assert same(before, run.values())
    if monitor is not None:
        assert (run.refreshes, run.subspace.clock) == (0, 0)
        assert monitor.history["step"] == []
    assert [group["lr"] for group in run.groups] == rates
    names = {name for name, _ in run.model.named_parameters()}
    assert set(state["state"]) == (set() if case.name.startswith("SGD,") else names)
    if case.ours:
        assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())


@distributed
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_distributed_checkpoints_resume(case: Case, momentum: bool) -> None:
    """Into a fresh optimizer, whose state torch makes by such a step."""
    options: dict[str, Any] = {}
    if not momentum:
        if "momentum" not in case.options or "nesterov" in case.options:
            pytest.skip("there is no momentum to leave out")
        options = {"momentum": 0.0}
    run = Run(case, fresh(case), **options)
    resumed = Run(case, fresh(case), **options, lr=LR / 8)
    for _ in range(2):
        run.step()
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizers))
    resumed.model.load_state_dict(run.model.state_dict())
    if case.observes:
        resumed.subspace.load_state_dict(copy.deepcopy(run.subspace.state_dict()))
    set_optimizer_state_dict(resumed.model, resumed.optimizers, state)
    if not case.observes:
        assert resumed.refreshes == 0
    assert [g["lr"] for g in resumed.groups] == [g["lr"] for g in run.groups]
    for _ in range(2):
        for one in (run, resumed):
            one.step()
    assert same(run.values(), resumed.values())


# torch.distributed.checkpoint of the subspaces themselves, in one process without a group.


def saved_and_loaded(folder: Any, saved: Any, fresh: Any, *, whole: bool) -> None:
    """Through files: the object itself, as torch takes what has a state, or its state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        if whole:
            dcp.save({"subspace": saved}, checkpoint_id=folder)
            dcp.load({"subspace": fresh}, checkpoint_id=folder)
        else:
            dcp.save({"subspace": saved.state_dict()}, checkpoint_id=folder)
            state = {"subspace": fresh.state_dict()}
            dcp.load(state, checkpoint_id=folder)
            fresh.load_state_dict(state["subspace"])


def same_state(first: Any, second: Any) -> bool:
    """Bit by bit, each entry of both."""
    (leaves, spec), (theirs, their_spec) = tree_flatten(first), tree_flatten(second)
    return spec == their_spec and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, theirs, strict=True)
    )


@pytest.mark.parametrize("whole", [True, False], ids=["the object", "its state"])
@pytest.mark.parametrize("refresh", [2, "auto"])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_a_new_subspace_goes_on_from_a_distributed_checkpoint_bit_by_bit(
    k: int, refresh: Any, whole: bool, tmp_path: Any
) -> None:
    def start() -> tuple[Quartic, so.DominantSubspace, torch.optim.Optimizer]:
        model = Quartic()
        subspace = so.DominantSubspace(DenseOperator(model), k, refresh=refresh)
        return model, subspace, so.BulkSGD(model.parameters(), lr=0.02, subspace=subspace)

    def step(parts: tuple[Quartic, so.DominantSubspace, torch.optim.Optimizer]) -> None:
        parts[2].zero_grad()
        parts[0]().backward()
        parts[2].step()

    run, resumed = start(), start()
    for _ in range(3):
        step(run)
    saved_and_loaded(tmp_path, run[1], resumed[1], whole=whole)
    assert same_state(resumed[1].state_dict(), run[1].state_dict())
    resumed[0].load_state_dict(run[0].state_dict())
    for _ in range(4):
        for parts in (run, resumed):
            step(parts)
        assert same(run[0].parameters(), resumed[0].parameters())
        states = [parts[1].state_dict() for parts in (run, resumed)]
        for state in states:
            state["stats"]["seconds"] = 0
        assert same_state(*states)


def test_a_distributed_checkpoint_of_nothing_takes_the_basis_away(tmp_path: Any) -> None:
    empty, subspace = (so.DominantSubspace(DenseOperator(Quartic()), 2) for _ in range(2))
    subspace.update()
    saved_and_loaded(tmp_path, empty, subspace, whole=True)
    assert subspace.basis is None
    assert same_state(subspace.state_dict(), empty.state_dict())


def test_a_distributed_checkpoint_that_is_refused_changes_nothing(tmp_path: Any) -> None:
    """Torch reads into the tensors that it is given before anybody can refuse what they hold."""
    saved, subspace = (so.DominantSubspace(DenseOperator(Quartic(seed=s)), 2) for s in range(2))
    for each in (saved, subspace):
        each.update()
    before, vectors = subspace.state_dict(), subspace.basis.vectors.clone()
    state = saved.state_dict()
    state["vectors"] *= 1.1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save({"subspace": state}, checkpoint_id=tmp_path)
        with pytest.raises(so.ArgumentError, match=r"the loaded vectors is 'off by 0\.21'"):
            dcp.load({"subspace": subspace}, checkpoint_id=tmp_path)
    assert torch.equal(subspace.basis.vectors, vectors)
    assert same_state(subspace.state_dict(), before)


@pytest.mark.parametrize("whole", [True, False], ids=["the object", "its state"])
@pytest.mark.parametrize("observed", [0, 2])
def test_class_gradients_go_on_from_a_distributed_checkpoint(
    observed: int, whole: bool, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 2, 2])
    saved, fresh = (so.ClassGradientSubspace(model, 3) for _ in range(2))
    for i in range(observed):
        saved.observe(x[: 3 + i], y[: 3 + i])
    if not observed:
        fresh.observe(x, y)
    saved_and_loaded(tmp_path, saved, fresh, whole=whole)
    assert same_state(fresh.state_dict(), saved.state_dict())
    for each in (saved, fresh):
        each.observe(x, y)
    assert torch.equal(saved.update().vectors, fresh.update().vectors)
    assert torch.equal(saved.update().eigenvalues, fresh.update().eigenvalues)
