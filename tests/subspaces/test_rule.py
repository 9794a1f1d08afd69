"""Rules of one's own: what `DominantSubspace` asks of them, takes over, saves and refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from subspace_optim.subspaces import Situation
from tests.optim.naive import DenseOperator, Quartic


class EveryOther(so.RefreshRule):
    """Due at every other question, which it counts."""

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.asked, self.on = 0, on

    def is_due(self, seen: Situation) -> bool:
        self.asked += 1
        return self.on and self.asked % 2 == 0

    def numbers(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def tensors(self) -> dict[str, Tensor]:
        return {"marks": torch.full((3,), float(self.asked))}

    def take(self, saved: Any) -> None:
        self.asked = saved.count("asked")
        saved.tensor("marks", (3,), torch.float32, torch.device("cpu"))


def make(refresh: Any) -> tuple[Quartic, so.DominantSubspace]:
    model = Quartic()
    return model, so.DominantSubspace(DenseOperator(model), 2, refresh=refresh)


def move(model: Quartic) -> None:
    model.weights[0].data.mul_(1.01)


def refreshes(model: Quartic, subspace: so.DominantSubspace, steps: int) -> list[int]:
    counts = []
    for _ in range(steps):
        subspace.update()
        counts.append(subspace.stats.refreshes)
        move(model)
    return counts


def test_a_rule_of_ones_own_decides_and_stays_the_object_that_was_given() -> None:
    rule = EveryOther()
    model, subspace = make(rule)
    assert refreshes(model, subspace, 6) == [1, 1, 2, 2, 3, 3]  # the first is not asked about
    assert subspace.rule is rule
    assert rule.pairs.basis is subspace.basis
    assert rule.stats is subspace.stats
    rule.on = False
    assert refreshes(model, subspace, 3) == [3, 3, 3]


@pytest.mark.parametrize("number", [1, 3])
def test_a_number_is_the_rule_that_counts_steps(number: int) -> None:
    model, subspace = make(number)
    other, twin = make(so.EveryNSteps(number))
    assert refreshes(model, subspace, 7) == refreshes(other, twin, 7)
    assert torch.equal(subspace.basis.vectors, twin.basis.vectors)


def test_auto_is_the_rule_that_follows_the_angle() -> None:
    model, subspace = make("auto")
    other, twin = make(so.ByAngle(0.05))
    assert refreshes(model, subspace, 7) == refreshes(other, twin, 7)
    assert subspace.stats.estimate == twin.stats.estimate


def test_a_rule_goes_on_from_what_it_has_saved() -> None:
    model, subspace = make(EveryOther())
    refreshes(model, subspace, 4)
    _, twin = make(EveryOther())
    twin.load_state_dict(subspace.state_dict())
    assert twin.rule.asked == subspace.rule.asked == 3
    assert torch.equal(twin.basis.vectors, subspace.basis.vectors)


@pytest.mark.parametrize("first", ["auto", 2, EveryOther])
@pytest.mark.parametrize("second", ["auto", 2, EveryOther])
def test_of_the_state_of_another_rule_the_pairs_are_taken_where_they_are_of_use(
    first: Any, second: Any
) -> None:
    """An angle that was estimated by one rule is not known to another."""
    model, subspace = make(first() if callable(first) else first)
    refreshes(model, subspace, 3)
    _, twin = make(second() if callable(second) else second)
    twin.load_state_dict(subspace.state_dict())
    if first == second:
        assert twin.stats.estimate == subspace.stats.estimate
        assert torch.equal(twin.basis.vectors, subspace.basis.vectors)
        return
    assert twin.stats.estimate is None
    assert (twin.basis is None) == (second == "auto")
    twin.update()
    assert (twin.stats.estimate is None) == (second != "auto")


def test_a_situation_is_the_same_after_a_load() -> None:
    seen = []

    class Watching(EveryOther):
        def is_due(self, seen_now: Situation) -> bool:
            seen.append(seen_now)
            return False

    model, subspace = make(Watching())
    subspace.update()
    move(model)
    saved = subspace.state_dict()
    subspace.update()
    twin = so.DominantSubspace(DenseOperator(model), 2, refresh=Watching())
    twin.load_state_dict(saved)
    twin.update()
    assert seen[0] == seen[1]
    assert seen[0].now != seen[0].then


def test_a_rule_serves_one_subspace() -> None:
    rule = so.EveryNSteps(2)
    make(rule)
    with pytest.raises(so.ArgumentError, match="refresh is 'the rule of another subspace'"):
        make(rule)


def test_a_constructor_that_fails_leaves_the_rule_to_another_subspace() -> None:
    rule = so.EveryNSteps(2)
    with pytest.raises(so.ArgumentError, match="tol"):
        so.DominantSubspace(DenseOperator(Quartic()), 2, refresh=rule, tol=-1)
    make(rule)


def test_a_rule_that_was_not_set_up_is_refused() -> None:
    class Bare(EveryOther):
        def __init__(self) -> None:
            self.asked = 0

    with pytest.raises(so.ArgumentError, match=r"not set up.*super\(\).__init__\(\)"):
        make(Bare())


def test_a_rule_that_finds_no_pairs_is_told_so() -> None:
    class Idle(EveryOther):
        def solve(self) -> None:
            pass

    _, subspace = make(Idle())
    with pytest.raises(so.ArgumentError, match=r"what solve\(\) of Idle has found is 'nothing'"):
        subspace.update()
    assert subspace.basis is None


def test_a_refresh_that_fails_leaves_the_rule_as_it_was() -> None:
    rule = EveryOther()
    model, subspace = make(rule)
    subspace.update()
    before = {name: value for name, value in vars(rule).items() if name != "stats"}
    subspace.operator.failure = RuntimeError("no memory")
    move(model)
    with pytest.warns(so.StaleBasisWarning):
        subspace.refresh()
    assert {name: value for name, value in vars(rule).items() if name != "stats"} == before


@pytest.mark.parametrize("refresh", ["auto", 2, EveryOther])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(refresh: Any, copied: Any) -> None:
    model, subspace = make(refresh() if callable(refresh) else refresh)
    refreshes(model, subspace, 3)
    other, twin = copied((model, subspace))
    assert refreshes(model, subspace, 4) == refreshes(other, twin, 4)
    assert twin.rule is not subspace.rule


@pytest.mark.parametrize("refresh", ["never", 0, 1.5, None, so.EveryNSteps])
def test_what_is_no_rule_is_refused(refresh: Any) -> None:
    with pytest.raises(so.ArgumentError, match=r"refresh is .*Or 'auto'.*or a RefreshRule"):
        make(refresh)
