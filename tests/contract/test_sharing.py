"""Subspaces that several optimizers share, and directions that are turned round."""

from __future__ import annotations

import inspect

import pytest
import torch

import subspace_optim as so
from tests.contract.cases import CASES, EACH_ALGORITHM, Case, in_subspace
from tests.contract.runs import Run, same
from tests.contract.settings import Setting, data, frozen, quartic
from tests.optim.naive import GivenSubspace, dense_eigenbasis


@in_subspace
@pytest.mark.parametrize("other", ["DomSGD", "BulkSAM", "AdamW, bulk"])
def test_two_optimizers_that_share_a_subspace_pay_once_for_each_state(
    case: Case, other: str
) -> None:
    """And each takes the step that it takes with a subspace of its own."""
    run = Run(case, refresh=1)
    second = Run(CASES[other], run.setting, subspace=run.subspace)
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
    second = Run(CASES[other], run.setting, subspace=run.subspace)
    states = set()
    for _ in range(2):
        for one in (run, second):
            if one.case.has_subspace:
                states.add(run.setting.operator.parameters.digest())
            one.step()
    assert run.refreshes == len(states) == (2 if other == "SAM" else 4)


def maximizes(case: Case) -> bool:
    if case.ours:
        return "maximize" in inspect.signature(case.ours).parameters
    return all("maximize" in optimizer.defaults for optimizer in Run(case).optimizers)


MAXIMIZING = [case for case in EACH_ALGORITHM if maximizes(case)]


@pytest.mark.parametrize("case", MAXIMIZING, ids=str)
def test_to_maximize_is_to_minimize_the_negative(case: Case) -> None:
    """With the same basis object, as the negative has another dominant subspace."""
    basis = dense_eigenbasis(9, 2, 3, torch.float64)
    ends = []
    for sign in (1, -1):
        plain = quartic()
        setting = Setting(
            plain.model, lambda p=plain, s=sign: s * p.loss(), plain.hessian, plain.operator
        )
        fixed = GivenSubspace(setting.operator.parameters, basis)
        assert isinstance(fixed, so.subspaces.Subspace)
        run = Run(case, setting, subspace=fixed, maximize=sign == 1)
        before = float(plain.loss().detach())
        for _ in range(3):
            run.step()
        ends.append(run.values())
        if case.name in ("DomSGD", "BulkSGD", "SAM"):
            assert float(plain.loss().detach()) > before
    assert same(*ends)


def test_those_that_maximize_are_these() -> None:
    without = {case.name.split(",")[0] for case in EACH_ALGORITHM} - {
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
