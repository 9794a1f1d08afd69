"""Saved, loaded, resumed: what `torch.optim` promises, and a bit more."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch

import subspace_optim as so
from tests.checkpoints import through_a_file
from tests.contract.cases import (
    CASES,
    EACH_ALGORITHM,
    IN_SUBSPACE,
    LR,
    OBSERVING,
    OURS,
    Case,
    each_algorithm,
    in_subspace_observing,
    ours_observing,
)
from tests.contract.runs import Run, same
from tests.contract.settings import Setting, network
from tests.optim.naive import Quartic, assert_near, flat, projector

RESTRICTED = [case for case in IN_SUBSPACE if case.ours in (so.DomSGD, so.BulkSGD)]
restricted = pytest.mark.parametrize("case", RESTRICTED, ids=str)


def states(run: Run) -> dict[str, Any]:
    """What a user saves: model, subspace, and each optimizer."""
    parts = {"model": run.model, "subspace": run.subspace}
    parts |= {f"optimizer {i}": each for i, each in enumerate(run.optimizers)}
    return {name: part.state_dict() for name, part in parts.items()}


def load(run: Run, saved: dict[str, Any], order: list[str]) -> None:
    for name in order:
        if name == "model":
            run.model.load_state_dict(saved[name])
        elif name == "subspace":
            run.subspace.load_state_dict(saved[name])
        else:
            for i, optimizer in enumerate(run.optimizers):
                optimizer.load_state_dict(saved[f"optimizer {i}"])


def fresh(case: Case) -> Setting:
    """In float32 for NAdam: torch casts its float32 products of momenta as it loads them."""
    return case.setting(torch.float32 if "NAdam" in case.name else torch.float64)


ORDERS = list(permutations(["model", "subspace", "optimizer"]))


# What a checkpoint of the subspace holds does not depend on who asks for its basis.
RESUMED = [
    *((case, 3) for case in [*EACH_ALGORITHM, OBSERVING]),
    *((CASES[name], "auto") for name in ("DomSGD", "AdamW, bulk")),
]


@pytest.mark.parametrize(("case", "refresh"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case: Case, refresh: Any) -> None:
    """Whatever is loaded first; the fresh objects have other options and parameters before."""
    own = {"two_groups": case.takes_groups, "refresh": refresh}
    uninterrupted = Run(case, fresh(case), **own)
    for _ in range(4):
        uninterrupted.step()
    saved = through_a_file(states(uninterrupted))
    for _ in range(4):
        uninterrupted.step()
    orders = ORDERS if case.name in ("DomSGD", "AdamW, bulk") else [ORDERS[0], ORDERS[-1]]
    for order in orders:
        resumed = Run(case, fresh(case), **own, lr=LR / 8)
        for p in resumed.model.parameters():
            p.data.add_(1.0)
        load(resumed, copy.deepcopy(saved), list(order))  # torch takes the buffers themselves
        for _ in range(4):
            resumed.step()
        assert same(uninterrupted.values(), resumed.values())
        if not case.observes:
            assert uninterrupted.subspace.clock == resumed.subspace.clock
            mine, theirs = uninterrupted.subspace.stats, resumed.subspace.stats
            assert (mine.refreshes, mine.products) == (theirs.refreshes, theirs.products)
            assert mine.refreshes == 3 or refresh == "auto" or not case.has_subspace


@each_algorithm
def test_a_state_dict_goes_through_a_file_with_its_options(case: Case) -> None:
    run = Run(case, two_groups=case.takes_groups)
    for _ in range(2):
        run.step()
    for optimizer in run.optimizers:
        state = optimizer.state_dict()
        loaded = through_a_file(state)
        assert loaded["param_groups"] == state["param_groups"]
        assert loaded["state"].keys() == state["state"].keys()
        for index, entries in state["state"].items():
            assert loaded["state"][index].keys() == entries.keys()
    # Only the plain optimizers' own buffers: the basis has a state of its own.
    if case.ours:
        names = {name for state in run.optimizer.state.values() for name in state}
        assert names == {"momentum_buffer"}
        optional = {"subspace", "basis", "params"}
        assert not optional & {n for g in run.optimizer.state_dict()["param_groups"] for n in g} - {
            "params"
        }


@ours_observing
def test_options_of_a_checkpoint_replace_those_that_are_there(case: Case) -> None:
    run, other = Run(case, two_groups=True), Run(case, lr=LR / 8, two_groups=True)
    other.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    for one in (run, other):
        for group in one.groups:
            assert len(group.pop("params")) > 0
            group.pop("differentiable", None)  # torch adds it to what is loaded
    assert run.groups == other.groups
    assert "momentum" in run.groups[0]


@ours_observing
def test_hooks_of_state_dicts_fire_once(case: Case) -> None:
    run = Run(case)
    calls: list[str] = []
    optimizer = run.optimizer
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_a_hook_may_mend_a_checkpoint_before_it_is_loaded() -> None:
    """As with torch's own, whose hooks see the state first, and may return another."""
    run = Run(OURS[0])
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][0]["lr"] = None

    def mend(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [group | {"lr": LR} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    run.optimizer.register_load_state_dict_pre_hook(mend)
    run.optimizer.load_state_dict(state)
    assert run.groups[0]["lr"] == LR


@ours_observing
def test_names_of_parameters_are_kept(case: Case) -> None:
    """Torch takes `named_parameters()`, and has the names in its checkpoints."""
    run = Run(case)
    named = list(run.model.named_parameters())
    extra = {"subspace": run.subspace} if case.has_subspace else {}
    optimizer = case.ours(named, **case.options, **extra)
    other = Run(case)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in named]
    run.optimizers = [optimizer]
    for one in (run, other):
        one.step()
    assert same(run.values(), other.values())
    assert "LR" not in repr(optimizer)
    assert case.ours.__name__ in repr(optimizer)


# Checkpoints of torch's own SGD, and of older torch.


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
@restricted
def test_the_state_of_torch_sgd_can_be_loaded_and_the_other_way(
    case: Case, momentum: float
) -> None:
    """After it both have the same buffers: the next update is torch's, projected."""
    run = Run(case, lr=0.9)
    twin = Quartic()
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=momentum)
    for _ in range(2):
        theirs.zero_grad()
        twin().backward()
        theirs.step()
    run.model.load_state_dict(twin.state_dict())
    run.optimizer.load_state_dict(through_a_file(theirs.state_dict()))
    theta = run.theta()
    run.step()
    theirs.zero_grad()
    twin().backward()
    theirs.step()
    update = flat(twin.parameters()) - theta
    dominant = projector(run.setting.hessian(theta), 2) @ update
    expected = dominant if case.part == "dominant" else update - dominant
    assert_near(run.theta() - theta, expected, 1e-9)
    theirs.load_state_dict(run.optimizer.state_dict())
    mine, yours = run.optimizer.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()


def given_as_defaults(case: Case, **options: Any) -> Run:
    """A run whose options are arguments of the constructor, and in no group."""
    run = Run(case)
    extra = {"subspace": run.subspace} if case.has_subspace else {}
    run.optimizers = [case.ours(run.setting.trained, **case.options | options, **extra)]
    return run


@ours_observing
def test_the_state_of_torch_sgd_can_be_loaded_into_each_and_stepped(case: Case) -> None:
    """What it lacks has the value of the constructor; what it has counts."""
    run, other = given_as_defaults(case), given_as_defaults(case, momentum=0.75)
    other.groups[0]["lr"] = LR / 2  # later, as newton_lr is scaled by the rate of the beginning
    plain = torch.optim.SGD(run.setting.trained, lr=LR / 2, momentum=0.75)
    run.optimizer.load_state_dict(through_a_file(plain.state_dict()))
    for _ in range(2):
        for one in (run, other):
            one.step()
    assert same(run.values(), other.values())


@pytest.mark.parametrize("case", [*OURS, OBSERVING], ids=str)
def test_a_checkpoint_of_an_older_torch_goes_on(case: Case) -> None:
    """Its groups lack the options that came later."""
    run, other = given_as_defaults(case), given_as_defaults(case)
    for one in (run, other):
        one.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    dropped = {"foreach", "fused", "differentiable", "maximize", "adaptive"}
    for option in dropped & set(state["param_groups"][0]):
        del state["param_groups"][0][option]
    run.optimizer.load_state_dict(through_a_file(state))
    for one in (run, other):
        one.step()
    assert same(run.values(), other.values())


@in_subspace_observing
def test_the_basis_of_a_bf16_model_stays_float32_in_a_checkpoint(case: Case) -> None:
    """Torch casts an optimizer's state to the dtype of its parameters: the basis is not in it."""
    factory = case.setting if case.observes else network
    run = Run(case, factory(torch.bfloat16), refresh=1)
    run.step()
    run.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    vectors = run.subspace.update().vectors
    run.subspace.load_state_dict(through_a_file(run.subspace.state_dict()))
    again = run.subspace.update().vectors
    assert vectors.dtype == torch.float32
    if case.observes:
        assert torch.equal(again, vectors)
    else:
        assert torch.equal(run.subspace.basis.vectors, vectors)
