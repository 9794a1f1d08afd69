"""Ranks that share the minibatches are one process that has them whole, to the last bit alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from tests.dense import projector
from tests.distributed import class_gradients_worker as worker
from tests.processes import once, together

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found; the processes run once for all tests."""
    folder = once(
        tmp_path_factory, "class_gradients", lambda at: together(worker.run, (2, str(at)), 2)
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def alike(ranks: list[dict[str, Any]], scenario: str) -> Any:
    """What both ranks have found in a scenario, bit by bit."""
    first, second = ([*tree_leaves(results[scenario])] for results in ranks)
    assert len(first) > 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return ranks[0][scenario]


def whole(step: int) -> tuple[Tensor, Tensor]:
    (x, y), (more_x, more_y) = worker.shard(step, 0), worker.shard(step, 1)
    return torch.cat([x, more_x]), torch.cat([y, more_y])


@pytest.mark.parametrize("scenario", ["as_printed", "coupled", "orthogonal"])
def test_averages_are_those_of_the_whole_minibatches(ranks, scenario):
    """Also of a class that one rank alone has, or none; and of a wrapped model."""
    found, model = alike(ranks, scenario), worker.mlp()
    subspace = so.ClassGradientSubspace(model, worker.C, orthogonal=scenario == "orthogonal")
    for step, readings in enumerate(found):
        subspace.observe(*whole(step))
        expected = worker.readings(subspace)
        tolerance = {"rtol": 1e-12, "atol": 1e-13}
        torch.testing.assert_close(readings["eigenvalues"], expected["eigenvalues"], **tolerance)
        V, W = readings["vectors"], expected["vectors"]
        if scenario == "orthogonal":
            V, W = projector(V), projector(W)
        torch.testing.assert_close(V, W, rtol=0, atol=1e-12)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)


ERRORS = {
    "class": ("ArgumentError", "ValueError", "a class in y is 12, but must be from 0 to 3", 1),
    "not finite": ("NonFiniteError", "NonFiniteError", "was not added to the averages", None),
    "parameters": ("ArgumentError", "ArgumentError", "must be ranks of equal parameters", None),
    "averages": ("ArgumentError", "ArgumentError", "must be ranks of equal averages", None),
    "argument": ("ArgumentError", "ValueError", "decay is 2.0, but must be", 1),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_one_rank_is_an_error_of_both(ranks, case):
    own, others, message, culprit = ERRORS[case]
    for rank, results in enumerate(ranks):
        kind, text = results["errors"][case]
        assert kind == (own if culprit in (None, rank) else others)
        assert message in text
        named = culprit is not None and rank != culprit
        assert (f"Rank {culprit} of process_group failed" in text) == named


def test_an_error_changes_nothing_and_observations_go_on(ranks):
    assert all(results["errors"]["unchanged"] == [True, True] for results in ranks)
    found = alike([results["errors"] for results in ranks], "next")
    subspace = so.ClassGradientSubspace(worker.mlp(), worker.C)
    for step in (0, 1):
        subspace.observe(*whole(step))
    for name, expected in worker.readings(subspace).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
