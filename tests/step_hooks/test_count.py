"""The step count by hand: which number a state has, whoever looks, tells, or does neither."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subspace_optim as so
from subspace_optim.step_hooks import StepCount
from tests.optim.naive import DenseOperator, Quartic

A, B, C = 11, 22, 33  # digests of states


def make(refresh: int = 3) -> tuple[Quartic, so.DominantSubspace]:
    model = Quartic()
    return model, so.DominantSubspace(DenseOperator(model), 2, refresh=refresh)


def sgd(model: Quartic, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, **options)


def take(model: Quartic, *optimizers: torch.optim.Optimizer) -> None:
    """One step of training: a round of the optimizers."""
    for each in optimizers:
        each.zero_grad()
    model().backward()
    for each in optimizers:
        each.step()


def never(_: int) -> bool:
    return False


# The count alone.


def count() -> StepCount:
    return StepCount(DenseOperator(Quartic()))


def test_a_state_that_is_new_to_who_looks_is_a_step() -> None:
    steps = count()
    assert steps.now == 0
    assert [steps.look(state) for state in (A, A, B, C, C, A)] == [1, 1, 2, 3, 3, 4]
    assert steps.looks == 6


def test_asking_for_a_number_counts_nothing() -> None:
    steps = count()
    steps.look(A)
    assert [steps.number(state) for state in (B, A, B)] == [2, 1, 2]
    assert (steps.now, steps.looks) == (1, 1)


def test_a_step_that_many_tell_of_counts_once() -> None:
    steps = count()
    steps.look(A)
    for _ in range(4):  # four steps, of which three follow
        for _ in range(3):
            steps.begin()
        for _ in range(3):
            steps.moved()
    assert steps.now == 4  # the fourth is counted when the next begins, or somebody looks
    assert steps.look(B) == 5
    steps.begin()
    assert steps.now == 5


def test_a_step_that_is_told_of_and_seen_counts_once() -> None:
    steps = count()
    for state in (A, B, C):
        steps.begin()
        steps.look(state)
        steps.moved()
    assert steps.now == 3


def test_a_step_without_a_move_is_none() -> None:
    steps = count()
    steps.look(A)
    for _ in range(5):
        steps.begin()
    assert steps.now == 1


def test_a_look_takes_back_what_was_told_in_error() -> None:
    steps = count()
    steps.look(A)
    for _ in range(3):
        steps.moved()
        steps.begin()
    assert steps.now == 4
    assert steps.look(A) == 1
    assert steps.look(B) == 2


def test_a_loaded_count_goes_on_with_the_step_that_was_told_of_last() -> None:
    steps, other = count(), count()
    steps.look(A)
    steps.moved()
    other.load(*steps.state_dict().values())
    assert other.state_dict() == steps.state_dict() == {"clock": 2, "state": A, "state_clock": 1}
    for each in (steps, other):
        assert each.look(B) == 2
    other.load(*steps.state_dict().values())
    assert other.look(B) == 2


# Through monitors and optimizers: the number of the state that is there at the end.


def number(subspace: so.DominantSubspace) -> int:
    subspace.update()
    return subspace.clock


WATCHED: dict[str, list[Any]] = {  # each monitor's schedule
    "every step": [1],
    "every third": [3],
    "no step": [never],
    "by three monitors": [1, 2, never],
}
KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda model, _: sgd(model),
    "fused": lambda model, _: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "DomSGD": lambda model, s: so.DomSGD(model.parameters(), lr=1e-3, subspace=s),
    "projected": lambda model, s: projected(sgd(model), s),
    "LBFGS": lambda model, _: torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2),
    "SAM": lambda model, _: so.SAM(model.parameters(), lr=1e-3),
    "BulkSAM": lambda model, s: so.BulkSAM(model.parameters(), lr=1e-3, subspace=s),
}


def projected(optimizer: torch.optim.Optimizer, subspace: Any) -> torch.optim.Optimizer:
    so.project_updates(optimizer, subspace, onto="bulk")
    return optimizer


def run_of(kind: str, watched: str) -> tuple[Quartic, so.DominantSubspace, Any]:
    model, subspace = make()
    optimizer = KINDS[kind](model, subspace)
    for every in WATCHED[watched]:
        so.Monitor(optimizer, subspace, every=every)
    return model, subspace, optimizer


def closure_of(model: Quartic, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("watched", WATCHED)
def test_each_step_counts_once_whoever_follows_it(watched: str, kind: str) -> None:
    model, subspace, optimizer = run_of(kind, watched)
    for _ in range(7):
        optimizer.step(closure_of(model, optimizer))
    assert number(subspace) == 8  # θ_0 is the first


def test_optimizers_that_are_followed_together_take_one_step_a_round() -> None:
    model, subspace = make()
    first, *others = model.parameters()
    optimizers = torch.optim.SGD([first], lr=1e-3), torch.optim.Adam(others, lr=1e-3)
    so.Monitor(optimizers, subspace, every=never)
    so.Monitor(optimizers, subspace, every=2)
    for _ in range(5):
        take(model, *optimizers)
    assert number(subspace) == 6


@pytest.mark.parametrize("every", [1, never])
def test_optimizers_that_are_followed_alone_take_a_step_each(every: Any) -> None:
    """The count does not depend on what is recorded."""
    model, subspace = make()
    first, *others = model.parameters()
    optimizers = torch.optim.SGD([first], lr=1e-3), torch.optim.Adam(others, lr=1e-3)
    for each in optimizers:
        so.Monitor(each, subspace, every=every)
    for _ in range(5):
        take(model, *optimizers)
    assert number(subspace) == 11


@settings(max_examples=30)
@given(turns=st.lists(st.sampled_from(["plain", "asks", "look"]), max_size=25), every=st.booleans())
def test_optimizers_that_take_turns_are_counted_together(turns: list[str], every: bool) -> None:
    """One is followed and never asks, one asks and is not followed, and a user asks in between."""
    model, subspace = make()
    plain, asks = sgd(model), so.DomSGD(model.parameters(), lr=1e-3, subspace=subspace)
    so.Monitor(plain, subspace, every=2 if every else never)
    subspace.update()
    for turn in turns:
        if turn == "look":
            subspace.update()
        else:
            take(model, plain if turn == "plain" else asks)
    assert number(subspace) == 1 + sum(turn != "look" for turn in turns)


def test_a_monitor_that_comes_in_the_middle_finds_the_count_there() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    first = so.Monitor(optimizer, subspace, every=never)
    for _ in range(4):
        take(model, optimizer)
    so.Monitor(optimizer, subspace, every=2)
    first.detach()
    for _ in range(3):
        take(model, optimizer)
    assert number(subspace) == 8


def test_steps_that_nobody_follows_are_one_to_who_comes_later() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    subspace.update()
    for _ in range(4):
        take(model, optimizer)
    so.Monitor(optimizer, subspace, every=never)
    for _ in range(3):
        take(model, optimizer)
    assert number(subspace) == 5


# Steps that are none.


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("kind", ["SGD", "SAM", "DomSGD"])
def test_a_step_that_raises_is_none(kind: str, watched: str) -> None:
    model, subspace, optimizer = run_of(kind, watched)

    def fails() -> float:
        closure_of(model, optimizer)()
        raise RuntimeError("interrupted")

    for t in range(6):
        if t in (2, 3):
            with pytest.raises(RuntimeError, match="interrupted"):
                optimizer.step(fails)
        else:
            optimizer.step(closure_of(model, optimizer))
    assert number(subspace) == 5


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("kind", ["SGD", "fused"])
def test_a_step_that_the_scaler_skips_is_none(kind: str, watched: str) -> None:
    model, subspace, optimizer = run_of(kind, watched)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(6):
        optimizer.zero_grad()
        scaler.scale(model() * (math.inf if t in (0, 2, 3) else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert number(subspace) == 4


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("kind", ["SAM", "BulkSAM"])
def test_a_step_that_sam_takes_back_is_none(kind: str, watched: str) -> None:
    """Between θ_t and θ_t it has moved."""
    model, subspace, optimizer = run_of(kind, watched)
    for t in range(6):
        passes = []

        def closure(t: int = t, passes: list[int] = passes) -> Any:
            loss = closure_of(model, optimizer)()
            passes.append(t)
            if t in (2, 3) and len(passes) == 2:
                next(model.parameters()).grad.view(-1)[0] = torch.nan
            return loss

        optimizer.step(closure)
    assert number(subspace) == 5


@pytest.mark.parametrize("watched", WATCHED)
def test_a_step_without_gradients_or_rates_is_none(watched: str) -> None:
    model, subspace, optimizer = run_of("SGD", watched)
    for t in range(8):
        model().backward()
        if t in (1, 2):
            optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.0 if t in (4, 5) else 1e-3
        optimizer.step()
    assert number(subspace) == 5


# Checkpoints.


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("kind", ["SGD", "DomSGD"])
@pytest.mark.parametrize("saved_at", [0, 1, 4, 5])
def test_a_resumed_run_counts_on(saved_at: int, kind: str, order: tuple[int, ...]) -> None:
    def run() -> tuple[Any, ...]:
        model, subspace = make()
        optimizer = KINDS[kind](model, subspace)
        return model, optimizer, subspace, so.Monitor(optimizer, subspace, every=3)

    ends = []
    whole, resumed = run(), run()
    for _ in range(saved_at):
        take(*whole[:2])
    states = copy.deepcopy([part.state_dict() for part in whole])
    take(*resumed[:2])  # has a count of its own, which is replaced
    for part in order:
        resumed[part].load_state_dict(states[part])
    for parts in (whole, resumed):
        seen = []
        for _ in range(7):
            take(*parts[:2])
            seen.append((parts[2].clock, parts[2].stats.refreshes))
        ends.append((seen, number(parts[2])))
    assert ends[0] == ends[1]
    assert ends[0][1] == saved_at + 8


def test_a_copied_subspace_counts_on_by_itself() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    so.Monitor(optimizer, subspace, every=never)
    for _ in range(3):
        take(model, optimizer)
    their_model, theirs = copy.deepcopy((model, subspace))
    take(model, optimizer)
    assert number(theirs) == 4
    with torch.no_grad():
        next(their_model.parameters()).add_(1.0)
    assert (number(theirs), number(subspace)) == (5, 5)
