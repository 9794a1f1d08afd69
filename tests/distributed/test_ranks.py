"""One rank fails, or differs: all raise the same, take the same decisions, and go on together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from tests.distributed import ranks_worker as worker
from tests.optim.naive import DenseOperator, Quartic, assert_near, flat, projector
from tests.processes import once, together

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has found; the processes run once for all tests."""
    folder = once(tmp_path_factory, "ranks", lambda at: together(worker.run, (str(at),), 2))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def assert_alike(first: Any, second: Any) -> None:
    """The same bits, whatever holds them."""
    leaves = [tree_leaves(each) for each in (first, second)]
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_one_error(found: list[dict[str, Any]], text: str, culprit: int | None = 1) -> None:
    """Both ranks raised, and the one that did not fail names the other."""
    for rank, result in enumerate(found):
        assert text in result["text"]
        named = culprit is not None and rank != culprit
        assert (f"Rank {culprit} of process_group failed: " in result["text"]) == named


def decided(result: dict[str, Any]) -> tuple[bool, bool, list[str]]:
    kinds = result["kinds"]
    return bool(kinds), "RuntimeError" in kinds, result["warnings"]


@pytest.mark.parametrize("work", ["first", "solve", "renew"])
def test_memory_that_runs_out_anywhere_on_one_rank_is_a_failure_of_both(ranks, work):
    """At whichever operation: both warn or raise, hold the same, and have a basis afterwards."""
    cases = [name for name in ranks[0]["memory"] if name.startswith(work)]
    assert len(cases) >= 5
    failures = 0
    for name in cases:
        (failed, after, next_time, then), (theirs, their_after, their_next, their_then) = (
            results["memory"][name] for results in ranks
        )
        assert decided(failed) == decided(theirs), name
        assert_alike(after, their_after)
        failures += after["stats"]["failures"]
        assert next_time == their_next == {"kinds": [], "text": "", "warnings": []}
        assert_alike(then, their_then)
        assert then["solved"]
        assert then["failures_in_a_row"] == 0
    assert failures > len(cases) / 2


def test_the_basis_after_a_failure_is_that_of_the_parameters(ranks):
    model = Quartic()
    for _ in range(2):
        worker.move(model)
    dense = model.hessian(flat(model.parameters()))
    for name, (_, _, _, then) in ranks[0]["memory"].items():
        if not name.startswith("first"):
            vectors = then["vectors"]
            assert_near(vectors.T @ vectors, projector(dense, worker.K), 2e-2)


def test_a_network_is_measured_on_after_either_rank_has_failed(ranks):
    kinds = []
    for first, second in zip(*(results["network"] for results in ranks), strict=True):
        assert decided(first[0]) == decided(second[0])
        kinds.append(decided(first[0]))
        assert_alike(first[1], second[1])
        assert first[2] == second[2] == {"kinds": [], "text": "", "warnings": []}
        assert_alike(first[3], second[3])
    assert kinds[0] == (False, False, [])
    assert (False, False, ["StaleBasisWarning"]) in kinds


def test_failures_of_one_rank_in_a_row_are_counted_on_both(ranks):
    first, second = (results["in_a_row"] for results in ranks)
    for step, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        assert decided(mine[0]) == decided(theirs[0])
        raised, _, warned = decided(mine[0])
        assert raised == (step in (2, 3))
        assert warned == (["StaleBasisWarning"] if step < 2 else [])
        assert mine[1] == theirs[1] == min(step + 1, 4)
        assert_alike(mine[2], theirs[2])
    assert_one_error([first[2][0], second[2][0]], "no room for a copy")


@pytest.mark.parametrize("name", ["k", "seed", "max_angle", "tol", "refresh"])
def test_an_option_that_differs_is_one_error_on_both(ranks, name):
    first, second = (results["options"][name] for results in ranks)
    assert first == second
    assert "ArgumentError" in first["kinds"]
    assert f"{name} on the ranks of process_group is [" in first["text"]
    assert "but must be the same on all of them" in first["text"]


def test_an_option_that_one_rank_cannot_use_is_an_error_of_both(ranks):
    found = [results["options"]["wrong"] for results in ranks]
    assert_one_error(found, "k is 0, but must be an integer from 1 to 9")


KINDS = {
    "ExceptionGroup": "Exception",
    "UnicodeDecodeError": "UnicodeError",
    "CalledProcessError": "Exception",
    "TwoArgumentsError": "RuntimeError",
    "MuteError": "ValueError",
    "FileNotFoundError": "FileNotFoundError",
    "NonFiniteError": "NonFiniteError",
    "ArgumentError": "ValueError",
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("where", [0, 1], ids=["in a sum", "outside of it"])
def test_an_error_of_any_kind_is_told_as_the_nearest_that_a_message_makes(ranks, name, where):
    own, theirs = (ranks[rank]["kinds"][name][where] for rank in (1, 0))
    assert own["kinds"][0] == name
    assert theirs["kinds"][0] == KINDS[name]
    assert theirs["kinds"][0] in own["kinds"], "what is done about an error depends on its kind"
    assert theirs["text"].startswith("Rank 1 of process_group failed: ")
    assert len(theirs["text"]) > len("Rank 1 of process_group failed: ")
    for results in ranks:
        assert results["kinds"][name][2].tolist() == [2, 2, 2]


def test_ranks_that_do_different_things_hear_of_it_and_none_waits(ranks):
    (sums, calls, works, histories, *rest), second = (results["different"] for results in ranks)
    for result in (sums, calls):
        assert "RuntimeError" in result["kinds"]
    assert (
        "rank 0: the sum of a tensor of shape (4,); rank 1: the sum of a tensor of shape (3,)"
        in (sums["text"])
    )
    assert "rank 1: a comparison" in calls["text"]
    assert "what is due on the ranks of process_group is ['renew', 'refresh']" in works["text"]
    assert "the basis on the ranks of process_group is [" in histories["text"]
    assert "load one state on all ranks" in histories["text"]
    assert [sums, calls, works, histories] == second[:4]
    for found in (rest, second[4:]):
        agreed, decisions, nothing, total = found
        assert agreed == [[True, False], [True, True]]
        assert decisions == [True, False]
        assert nothing is None
        assert total.tolist() == [2, 2, 2]


def test_a_wrapped_model_without_a_group_is_warned_of(ranks):
    for results in ranks:
        warned = {name: found["warnings"] for name, found in results["without_group"].items()}
        of_ranks = ["RanksWarning"]
        wrapped = dict.fromkeys(("wrapped", "held"), of_ranks)
        assert warned == {"plain": [], **wrapped, "with a group": []}


def test_training_goes_on_from_a_distributed_checkpoint_bit_by_bit(ranks):
    for results in ranks:
        for own, theirs in results["checkpoint"]:
            assert_alike(own, theirs)
    assert_alike(ranks[0]["checkpoint"], ranks[1]["checkpoint"])


# --- without other processes --------------------------------------------------------------------


def test_one_process_has_no_ranks_and_meets_nobody():
    alone = DenseOperator(Quartic()).ranks
    assert (alone.size, alone.rank, alone.group) == (1, 0, None)
    assert alone.any(lambda: True) is True
    assert alone.any(lambda: None) is None
    alone.check_alike("", k=1)
    with pytest.raises(KeyError), alone.all_or_none():
        raise KeyError("as it is")


def test_the_ranks_of_a_difference_are_those_of_its_terms():
    model = torch.nn.Linear(2, 2)
    data = torch.ones(3, 2), torch.zeros(3, 2)
    loss = torch.nn.functional.mse_loss
    hessian = so.HessianOperator(model, loss, data)
    residual = so.ResidualOperator(hessian, so.GaussNewtonOperator(model, loss, data))
    assert residual.ranks is hessian.ranks
