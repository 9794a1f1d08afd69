"""Copied and pickled, together with model and subspace or alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from tests.contract.cases import OURS, PROJECTED, Case, in_subspace_observing, ours_observing
from tests.contract.runs import Run, same
from tests.contract.settings import Setting
from tests.optim.naive import DenseOperator, assert_near, projector


@ours_observing
def test_copied_together_they_are_an_independent_triple(case: Case) -> None:
    run = Run(case, refresh=3, two_groups=True)
    for _ in range(2):
        run.step()
    setting = run.setting
    together = (setting.model, run.subspace, run.optimizer)
    if not case.has_subspace:
        together = (setting.model, run.setting.operator, run.optimizer)
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
        assert setting.batch is not None
        x, y = setting.batch
        loss = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    else:
        loss = model
    twin = copy.copy(run)
    twin.setting = Setting(model, loss, setting.hessian, setting.operator, setting.batch)
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


@in_subspace_observing
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
    twin.setting = Setting(model, model, model.hessian, operator)
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
    twin.setting = Setting(model, model, model.hessian, run.setting.operator)
    twin.model, twin.subspace, twin.optimizers = model, subspace, optimizers
    start = run.theta()
    plain = copy.deepcopy((model, optimizers))
    whole = copy.copy(run)
    whole.setting = Setting(plain[0], plain[0], model.hessian, run.setting.operator)
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
