"""Saved, loaded, copied, pickled, resumed: what `torch.optim` promises, and a bit more."""

from __future__ import annotations

import copy
import pickle
import warnings
from itertools import permutations
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
from tests.checkpoints import through_a_file
from tests.contract.cases import (
    CASES,
    EACH,
    IN_SUBSPACE,
    LR,
    OBSERVING,
    OURS,
    PROJECTED,
    Case,
    Problem,
    Run,
    network,
    same,
)
from tests.optim.naive import DenseOperator, Quartic, assert_near, flat, projector

each = pytest.mark.parametrize("case", [*EACH, OBSERVING], ids=str)
ours = pytest.mark.parametrize("case", [*OURS, OBSERVING], ids=str)
in_subspace = pytest.mark.parametrize("case", [*IN_SUBSPACE, OBSERVING], ids=str)
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


def problem(case: Case) -> Problem:
    """In float32 for NAdam: torch casts its float32 products of momenta as it loads them."""
    return case.factory(torch.float32 if "NAdam" in case.name else torch.float64)


ORDERS = list(permutations(["model", "subspace", "optimizer"]))


# What a checkpoint of the subspace holds does not depend on who asks for its basis.
RESUMED = [
    *((case, 3) for case in [*EACH, OBSERVING]),
    *((CASES[name], "auto") for name in ("DomSGD", "AdamW, bulk")),
]


@pytest.mark.parametrize(("case", "refresh"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case: Case, refresh: Any) -> None:
    """Whatever is loaded first; the fresh objects have other options and parameters before."""
    own = {"two_groups": case.takes_groups, "refresh": refresh}
    uninterrupted = Run(case, problem(case), **own)
    for _ in range(4):
        uninterrupted.step()
    saved = through_a_file(states(uninterrupted))
    for _ in range(4):
        uninterrupted.step()
    orders = ORDERS if case.name in ("DomSGD", "AdamW, bulk") else [ORDERS[0], ORDERS[-1]]
    for order in orders:
        resumed = Run(case, problem(case), **own, lr=LR / 8)
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


@each
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


@ours
def test_options_of_a_checkpoint_replace_those_that_are_there(case: Case) -> None:
    run, other = Run(case, two_groups=True), Run(case, lr=LR / 8, two_groups=True)
    other.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    for one in (run, other):
        for group in one.groups:
            assert len(group.pop("params")) > 0
            group.pop("differentiable", None)  # torch adds it to what is loaded
    assert run.groups == other.groups
    assert "momentum" in run.groups[0]


@ours
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


@ours
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


# Copies.


@ours
def test_copied_together_they_are_an_independent_triple(case: Case) -> None:
    run = Run(case, refresh=3, two_groups=True)
    for _ in range(2):
        run.step()
    problem = run.problem
    together = (problem.model, run.subspace, run.optimizer)
    if not case.has_subspace:
        together = (problem.model, run.problem.operator, run.optimizer)
    model, subspace, optimizer = copy.deepcopy(together)
    if case.has_subspace:
        assert optimizer.subspace is subspace
        assert subspace is not run.subspace
        assert subspace.parameters.model is model
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not held & {id(p) for p in run.model.parameters()}
    assert optimizer.state_dict().keys() == run.optimizer.state_dict().keys()
    if case.observes:
        assert problem.batch is not None
        x, y = problem.batch
        loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    else:
        loss = model
    twin = copy.copy(run)
    twin.problem = Problem(model, loss, problem.hessian, problem.operator, problem.batch)
    twin.model, twin.subspace, twin.optimizers = model, subspace, [optimizer]
    start = run.values()
    for _ in range(3):
        twin.step()
    assert same(run.values(), start)
    end = twin.values()
    for _ in range(3):
        run.step()
    assert same(run.values(), end)
    assert not same(start, end)
    assert same(twin.values(), end)


@in_subspace
def test_copied_or_pickled_alone_it_says_what_to_set(case: Case) -> None:
    run = Run(case)
    run.step()
    optimizer = run.optimizer
    wrong_order = copy.deepcopy((run.model, optimizer, run.subspace))[1]
    for alone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), wrong_order):
        assert alone.subspace is None
        assert alone.defaults == {"differentiable": False} | optimizer.defaults  # torch adds it
        remembered = [state["momentum_buffer"] for state in alone.state.values()]
        assert same(remembered, (s["momentum_buffer"] for s in optimizer.state.values()))
        own = alone.param_groups[0]["params"]
        assert not {id(p) for p in own} & {id(p) for p in run.model.parameters()}
        before = [p.detach().clone() for p in own]

        def closure(own: Any = own) -> float:
            for p in own:
                p.grad = torch.ones_like(p)
            return 0.0

        if not case.needs_closure:
            closure()

        def step(alone: Any = alone, closure: Any = closure) -> None:
            alone.step(closure) if case.needs_closure else alone.step()

        def add(alone: Any = alone) -> None:
            alone.add_param_group({"params": nn.Linear(1, 1).weight})

        for attempt in (step, add):
            with pytest.raises(so.ArgumentError, match=r"set `optimizer\.subspace`"):
                attempt()
        assert same(before, own)
        assert len(alone.param_groups) == 1


@pytest.mark.parametrize("case", OURS, ids=str)
def test_pickled_and_given_a_subspace_it_goes_on(case: Case) -> None:
    run = Run(case, refresh=1)
    run.step()
    model, optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    twin = copy.copy(run)
    operator = DenseOperator(model)
    twin.problem = Problem(model, model, model.hessian, operator)
    twin.model, twin.optimizers = model, [optimizer]
    twin.subspace = so.DominantSubspace(operator, 2, refresh=1, tol=1e-12)
    if case.has_subspace:
        optimizer.subspace = twin.subspace
    for _ in range(2):
        for one in (run, twin):
            one.step()
    assert same(run.values(), twin.values())


COPIED = [case for case in PROJECTED if case.part == "bulk" and not case.lbfgs]


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_a_copy_of_a_projected_optimizer_is_plain_until_it_is_projected(case: Case) -> None:
    """Torch copies and pickles no hooks; the copy has the buffers, and goes on from there.

    (Torch's LBFGS cannot be copied at all.)
    """
    run = Run(case)
    for _ in range(2):
        run.step()
    model, subspace, optimizers = copy.deepcopy((run.model, run.subspace, run.optimizers))
    twin = copy.copy(run)
    twin.problem = Problem(model, model, model.hessian, run.problem.operator)
    twin.model, twin.subspace, twin.optimizers = model, subspace, optimizers
    start = run.theta()
    plain = copy.deepcopy((model, optimizers))
    whole = copy.copy(run)
    whole.problem = Problem(plain[0], plain[0], model.hessian, run.problem.operator)
    whole.model, whole.optimizers = plain
    whole.step()
    twin.project()
    for one in (run, twin):
        one.step()
    assert same(run.values(), twin.values())
    update = whole.theta() - start
    dominant = projector(model.hessian(start), 2) @ update
    assert float(dominant.norm()) > 1e-6 * float(update.norm())
    assert_near(run.theta() - start, update - dominant, 1e-8)


# Checkpoints of torch's own SGD, and of older torch.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
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
    dominant = projector(run.problem.hessian(theta), 2) @ update
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
    run.optimizers = [case.ours(run.problem.trained, **case.options | options, **extra)]
    return run


@ours
def test_the_state_of_torch_sgd_can_be_loaded_into_each_and_stepped(case: Case) -> None:
    """What it lacks has the value of the constructor; what it has counts."""
    run, other = given_as_defaults(case), given_as_defaults(case, momentum=0.75)
    other.groups[0]["lr"] = LR / 2  # later, as newton_lr is scaled by the rate of the beginning
    plain = torch.optim.SGD(run.problem.trained, lr=LR / 2, momentum=0.75)
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


@in_subspace
def test_the_basis_of_a_bf16_model_stays_float32_in_a_checkpoint(case: Case) -> None:
    """Torch casts an optimizer's state to the dtype of its parameters: the basis is not in it."""
    factory = case.factory if case.observes else network
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


# torch.distributed.checkpoint, which needs no process group. LBFGS has no step without closure.

DISTRIBUTED = [case for case in [*EACH, OBSERVING] if not case.lbfgs]
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
@pytest.mark.parametrize("momentum", [False, True])
def test_distributed_checkpoints_resume(case: Case, momentum: bool) -> None:
    """Into a fresh optimizer, whose state torch makes by such a step."""
    options: dict[str, Any] = {}
    if not momentum:
        if "momentum" not in case.options or "nesterov" in case.options:
            pytest.skip("there is no momentum to leave out")
        options = {"momentum": 0.0}
    run = Run(case, problem(case), **options)
    resumed = Run(case, problem(case), **options, lr=LR / 8)
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


@pytest.mark.parametrize("whole", [True, False])
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


@pytest.mark.parametrize("whole", [True, False])
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
