"""A step happens or leaves everything as it was, wherever memory runs out or Ctrl-C is pressed.

An exception is raised at the first, the second, the third ... tensor operation of a step, up to
the last. After each the parameters are bit for bit those of before the step, or those of a twin
that was not disturbed, and so is what the optimizer knows; and the run goes on.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from tests.contract.cases import CASES, OURS, Case
from tests.contract.runs import Run, same
from tests.contract.settings import Setting, quartic
from tests.failing import Fails, FailsAfter
from tests.optim.naive import GivenSubspace, dense_eigenbasis

EACH_PROJECTED = [
    CASES[f"{name}, bulk"]
    for name in (
        "SGD",
        "SGD momentum",
        "SGD foreach",
        "Adam",
        "AdamW foreach",
        "third party",
        "subclass of Adam",
        "LBFGS",
    )
]
JOINT = CASES["Muon + AdamW, bulk"]


OUT_OF_MEMORY = (CASES["BulkSGD"], CASES["BulkSAM"], CASES["Adam, bulk"])


def errors(cases: list[Case]) -> Any:
    """An interrupt in each, which `except Exception` lets pass; of some, want of memory too."""
    pairs = [(case, KeyboardInterrupt) for case in cases]
    pairs += [(case, torch.OutOfMemoryError) for case in cases if case in OUT_OF_MEMORY]
    ids = [f"{case}, {error.__name__}" for case, error in pairs]
    return pytest.mark.parametrize(("case", "error"), pairs, ids=ids)


def failing(step: Callable[[], object], at: int, error: Any, kind: Any = Fails) -> int | None:
    """Returns how many operations the step has, or None if it was made to fail."""
    mode = kind(at, error("injected"))
    try:
        with mode:
            step()
    except error:
        return None
    return mode.seen


def fixed(case: Case) -> Run:
    """A run whose basis is given: the operations are those of the optimizer, of two groups."""
    setting: Setting = quartic()
    subspace = GivenSubspace(setting.operator.parameters, dense_eigenbasis(9, 2, 3, torch.float64))
    run = Run(case, setting, subspace=subspace, two_groups=case.takes_groups)
    if case.lbfgs:
        run.groups[0]["max_iter"] = 2  # of 20, each with the operations of all others
    return run


def known(run: Run) -> list[Any]:
    """All that the optimizers hold, copied."""
    return [copy.deepcopy(each.state_dict()["state"]) for each in run.optimizers]


def alike(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[n], right[n]) for n in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(alike, left, right))
    return bool(left == right)


def assert_steps_are_whole(case: Case, warm: bool, error: Any, kind: Any = Fails) -> None:
    """A step that fails at any of its operations happens, or leaves parameters and state."""
    run, twin = fixed(case), fixed(case)
    for one in (run, twin) if warm else ():
        one.step()
    at, count = 0, None
    while count is None:
        at += 1
        values, state = run.values(), known(run)
        count = failing(run.step, at, error, kind)
        if not (same(values, run.values()) and alike(state, known(run))):
            twin.step()
            assert same(twin.values(), run.values()), at
            assert alike(known(twin), known(run)), at
            values = []
    assert at > count > 10
    assert values == [], "the step that was not disturbed did not happen"


@errors(OURS)
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "with buffers"])
def test_a_step_of_ours_happens_or_leaves_parameters_and_state(
    case: Case, warm: bool, error: Any
) -> None:
    """From the first step on, whose state is still empty, and with buffers."""
    assert_steps_are_whole(case, warm, error)


@pytest.mark.parametrize("name", ["SAM", "BulkSAM", "BulkSGD", "LowRankNewton"])
def test_a_step_that_is_interrupted_after_an_operation_makes_none_twice(name: str) -> None:
    assert_steps_are_whole(CASES[name], True, KeyboardInterrupt, FailsAfter)


@errors([case for case in OURS if case.sam])
@pytest.mark.parametrize("zero_grad", [False, True], ids=["keeps gradients", "zero_grad"])
def test_neither_call_of_sam_leaves_it_displaced_or_stuck(
    case: Case, zero_grad: bool, error: Any
) -> None:
    run, twin = fixed(case), fixed(case)

    def ascend(one: Run) -> None:
        one.closure()
        one.optimizer.first_step(zero_grad=zero_grad)

    at, count = 0, None
    while count is None:  # the first call fails: the parameters are where it found them
        at += 1
        values = run.values()
        run.closure()
        count = failing(lambda: run.optimizer.first_step(zero_grad=zero_grad), at, error)
        if count is None:
            assert same(values, run.values()) or run.optimizer._before is not None
            run.optimizer.second_step() if run.optimizer._before is not None else None
            with torch.no_grad():
                for p, value in zip(run.model.parameters(), values, strict=True):
                    p.copy_(value)
    run, count, at = fixed(case), None, 0
    while count is None:
        at += 1
        values, state = run.values(), known(run)
        ascend(run)
        run.closure()
        count = failing(run.optimizer.second_step, at, error)
        if not (same(values, run.values()) and alike(state, known(run))):
            ascend(twin)
            twin.closure()
            twin.optimizer.second_step()
            assert same(twin.values(), run.values()), at
            assert alike(known(twin), known(run)), at
            values = []
    assert values == []
    assert at > 5


@errors([*EACH_PROJECTED, JOINT])
def test_a_projected_step_happens_or_leaves_the_parameters(case: Case, error: Any) -> None:
    """Of all optimizers that step in turn. Their moments may have begun to change: no copies."""
    run, twin = fixed(case), fixed(case)
    for one in (run, twin):
        one.step()
    at, count, moved = 0, None, False
    while count is None:
        at += 1
        values, state = run.values(), known(run)
        count = failing(run.step, at, error)
        moved = not same(values, run.values())
        if moved:
            twin.step()
            assert same(twin.values(), run.values()), at
        elif not case.lbfgs:  # which begins anew
            for before, now in zip(state, known(run), strict=True):
                counts = [n for n, v in before.items() for n in v if isinstance(v, Tensor)]
                assert not counts
                assert before.keys() == now.keys()
                assert all(alike(before[p].get("step"), now[p].get("step")) for p in before)
        for mine, theirs in zip(run.optimizers, twin.optimizers, strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert moved
    assert at > count > 10


def test_entries_of_a_first_projected_step_that_failed_are_gone() -> None:
    """Adam makes them for all of its parameters, before the first has moved."""
    run = fixed(CASES["Adam, dominant"])
    at, count = 0, None
    while count is None:
        at += 1
        values = run.values()
        count = failing(run.step, at, torch.OutOfMemoryError)
        if same(values, run.values()):
            assert not run.optimizer.state
        elif count is None:  # it happened, and the exception came after
            run = fixed(CASES["Adam, dominant"])


@pytest.mark.parametrize("name", ["BulkSGD", "Adam, bulk"])
def test_a_monitor_for_which_there_is_no_memory_ends_no_training(name: str) -> None:
    """Failures of the step itself are raised, as without it; the others are rows of NaN."""
    watched, alone = Run(CASES[name], refresh=10_000), Run(CASES[name], refresh=10_000)
    monitor = so.Monitor(watched.optimizers, watched.subspace)
    for one in (watched, alone):
        one.step()
    raised = {}
    for one in (watched, alone):
        at, raised[one] = 0, 0
        while True:
            at += 1
            mode = Fails(at, torch.OutOfMemoryError("injected"))
            values = one.values()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    with mode:
                        one.step()
                except torch.OutOfMemoryError:
                    raised[one] += 1
                    continue
            assert not same(values, one.values())
            kinds = [w.category for w in caught]
            assert set(kinds) <= {so.LogWarning, so.StaleBasisWarning}
            lengths = {len(column) for column in monitor.history.values()}
            assert len(lengths) == 1
            if mode.seen < at:
                break
    assert min(raised.values()) > 5
    rows = monitor.history
    lost = [t for t, norm in enumerate(rows["update_norm"]) if math.isnan(norm)]
    assert len(lost) > 5
    assert rows["step"] == list(range(len(rows["step"])))
    # A measure that fails costs its own columns: those that were known before it are kept.
    assert any(not math.isnan(rows["sharpness"][t]) for t in lost)
    assert any(math.isnan(value) for value in rows["sharpness"])


@pytest.mark.parametrize("name", ["BulkSGD", "Adam, bulk"])
def test_an_interrupt_while_a_row_is_measured_leaves_rows_and_step_whole(name: str) -> None:
    run, twin = Run(CASES[name], refresh=10_000), Run(CASES[name], refresh=10_000)
    monitor = so.Monitor(run.optimizers, run.subspace)
    for one in (run, twin):
        one.step()
    at, count = 0, None
    while count is None:
        at += 1
        values = run.values()
        count = failing(run.step, at, KeyboardInterrupt)
        if not same(values, run.values()):
            twin.step()
            assert same(twin.values(), run.values())
        assert len({len(column) for column in monitor.history.values()}) == 1
        if not CASES[name].ours:
            twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert at > 40


@pytest.mark.parametrize("case", [CASES["DomSGD"], CASES["Adam, bulk"]], ids=str)
def test_a_step_with_a_refresh_inside_happens_or_leaves_the_parameters(case: Case) -> None:
    """From a fresh basis at each step; what fails in the solve comes before anything has moved."""
    run = Run(case, refresh=1)
    run.step()
    at, count, step = 0, None, 23
    while count is None:
        at += step
        values = run.values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", so.StaleBasisWarning)
            count = failing(run.step, at, KeyboardInterrupt)
        assert count is not None or same(values, run.values()) or at > 40
    assert at > 40
    assert not same(values, run.values())
