"""A damaged state of an optimizer is refused before anything has changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import subspace_optim as so
from tests.contract.cases import OURS, Case
from tests.contract.runs import Run, same

State = dict[str, Any]


def buffer(change: Callable[[torch.Tensor], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        entries = state["state"][1]
        entries["momentum_buffer"] = change(entries["momentum_buffer"])

    return apply


def option(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state["param_groups"][0].update({name: value})


DAMAGE: dict[str, Callable[[State], None]] = {
    "NaN": buffer(lambda b: b * math.nan),
    "one infinity": buffer(lambda b: b.index_fill(0, torch.tensor([0]), math.inf)),
    "another shape": buffer(lambda b: b.repeat(2)),
    "a number": buffer(lambda b: 0.5),
    "a list": buffer(lambda b: b.tolist()),
    "no dict": lambda state: state["state"].update({1: 3.0}),
    "a rate of NaN": option("lr", math.nan),
    "a negative rate": option("lr", -1.0),
    "an infinite momentum": option("momentum", math.inf),
    "a name": option("momentum", "0.9"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("case", OURS, ids=str)
def test_a_damaged_state_is_refused_and_changes_nothing(case: Case, damage: str) -> None:
    run, twin = Run(case), Run(case)
    for one in (run, twin):
        one.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    DAMAGE[damage](state)
    with pytest.raises(so.ArgumentError):
        run.optimizer.load_state_dict(state)
    for one in (run, twin):
        one.step()
    assert same(run.values(), twin.values())


@pytest.mark.parametrize("case", OURS, ids=str)
def test_a_run_that_diverged_can_be_copied(case: Case) -> None:
    """With its subspace; it is only not to be gone on with from a file."""
    run = Run(case)
    run.step()
    for entries in run.optimizer.state.values():
        entries["momentum_buffer"].fill_(math.nan)
    copied = copy.deepcopy((run.model, run.optimizer))[1]
    assert all(bool(e["momentum_buffer"].isnan().all()) for e in copied.state.values())
