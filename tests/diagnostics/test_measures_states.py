"""Rows of a run that is taken up again, and what a failure leaves behind."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch

import subspace_optim as so
from subspace_optim import measures
from tests.diagnostics.test_measures import Norms
from tests.diagnostics.trainings import Setting

# Taken up again.


def fresh(**options: Any) -> tuple[Setting, torch.optim.Optimizer, so.Monitor]:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.05, momentum=0.9)
    return s, optimizer, so.Monitor(optimizer, s.operator, **options)


@pytest.mark.parametrize("several", [measures.stability(), measures.critical_sharpness()])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_interrupted(several: Any) -> None:
    """Also where the next search depends on where the last one ended."""
    s, optimizer, whole = fresh(measures=several)
    for t in range(6):
        if t == 3:
            saved = copy.deepcopy(
                (s.model.state_dict(), optimizer.state_dict(), whole.state_dict())
            )
        s.step([optimizer])
    s, optimizer, resumed = fresh(measures=several)
    s.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for _ in range(3):
        s.step([optimizer])
    assert str(resumed.history) == str(whole.history)  # NaN too


@pytest.mark.parametrize(
    "others", [measures.critical_sharpness(), [measures.stability(), measures.update()], Norms()]
)
def test_a_state_of_other_measures_is_refused_before_anything_changed(others: Any) -> None:
    s, optimizer, monitor = fresh()
    s.step([optimizer])
    _, _, stranger = fresh(measures=others)
    before = str(monitor.state_dict())
    with pytest.raises(so.ArgumentError, match=r"^the loaded state is "):
        monitor.load_state_dict(stranger.state_dict())
    assert str(monitor.state_dict()) == before


# What a failure leaves behind.


class Fails(measures.Measure):
    """One that fails where it is told to, with graphs in memory."""

    columns = ("fails",)

    def __init__(self, where: str) -> None:
        self.where = where

    def before(self, step: measures.Step) -> dict[str, Any]:
        if self.where == "before":
            step.operator.matvec(step.gradient)
            raise RuntimeError("out of memory")
        return {}

    def after(self, step: measures.Step) -> dict[str, Any]:
        with step.at_start() as operator:
            operator.matvec(step.update)
            if self.where == "at_start":
                raise RuntimeError("out of memory")
            theta = step.theta + 0.5 * step.update
            if self.where == "along":
                with operator.at(theta):
                    raise RuntimeError("out of memory")
        if self.where == "after":
            raise RuntimeError("out of memory")
        return {"fails": 0}


@pytest.mark.parametrize("where", ["before", "after", "at_start", "along"])
def test_a_failure_costs_its_row_and_leaves_everything_in_its_place(where: str) -> None:
    plain = Setting()
    other = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, s.operator, measures=[measures.stability(), Fails(where)])
    memory = [p.data_ptr() for p in s.model.parameters()]
    with pytest.warns(so.LogWarning, match=r"step 0 is NaN: out of memory \(RuntimeError\)"):
        s.step([optimizer])
    s.step([optimizer])  # another warning would be an error here
    for _ in range(2):
        plain.step([other])
    assert torch.equal(s.theta, plain.theta)
    assert [p.data_ptr() for p in s.model.parameters()] == memory
    assert all(map(math.isnan, monitor.history["fails"]))
    assert not any(map(math.isnan, monitor.history["update_sharpness"]))  # that of the others
    assert monitor.history["step"] == [0, 1]
    assert monitor._step is None
    assert s.operator._point is None or not s.operator._point.kept
    s.operator.loss()  # it goes on
    assert s.operator.loss() == pytest.approx(float(s.dense(s.x, s.y).loss(s.theta)))


def test_nothing_of_a_step_is_held_after_it() -> None:
    seen: list[weakref.ref[Any]] = []

    class Watch(measures.Measure):
        columns = ("watch",)

        def after(self, step: measures.Step) -> dict[str, Any]:
            seen.extend([weakref.ref(step), weakref.ref(step.gradient), weakref.ref(step.theta)])
            return {}

    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, s.operator, measures=[measures.stability(), Watch()])
    s.step([optimizer])
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert math.isnan(monitor.history["watch"][0])
