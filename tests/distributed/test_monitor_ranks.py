"""A monitor of two ranks has the rows of one process on the joined batches, on both ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import dense_curvature, supervised
from tests.distributed import monitor_worker as worker
from tests.processes import once, together

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has found; the processes run once for all tests."""
    folder = once(tmp_path_factory, "monitor_ranks", lambda at: together(worker.run, (str(at),), 2))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scenario", [each.__name__ for each in worker.SCENARIOS])
def test_rows_are_the_same_on_both_ranks_to_the_last_bit(ranks: Results, scenario: str) -> None:
    first, second = (results[scenario] for results in ranks)
    assert list(first) == list(second)
    for column, values in first.items():
        torch.testing.assert_close(values, second[column], rtol=0, atol=0, equal_nan=True)


BY_DIFFERENCES = {"update_sharpness", "gradient_sharpness", "predicted_change"}
"""Of losses, which are rounded otherwise where they are summed otherwise."""


def test_the_current_batch_is_that_of_all_ranks_joined(ranks: Results) -> None:
    found, batches = ranks[0]["current_batch"], worker.problem().batches
    pairs = [worker.joined(batches[i : i + 2]) for i in range(0, len(batches), 2)]
    expected = worker.watched(pairs)
    assert list(found) == list(expected)
    for column, values in expected.items():
        rtol = 1 / 16 if column in BY_DIFFERENCES else 1e-7
        torch.testing.assert_close(found[column], values, rtol=rtol, atol=1e-9, equal_nan=True)
    assert found["update_sharpness"].isfinite().all()
    assert found["examples"].tolist() == [8] * worker.STEPS


def test_gradients_of_its_own_on_each_rank_are_not_taken_for_the_row(ranks: Results) -> None:
    """Each is near to that of all data: along them the ranks would measure different lines."""
    found = ranks[0]["nearly_equal"]
    assert found["a gradients"].tolist() == [1] * 3
    for column in ("gradient_sharpness", "update_sharpness", "predicted_change"):
        torch.testing.assert_close(found[f"a {column}"], found[f"b {column}"], rtol=0.1, atol=0.01)


def test_a_minibatch_is_one_of_each_rank(ranks: Results) -> None:
    found, p = ranks[0]["minibatches"], worker.problem()
    dense = {
        (i, j): dense_curvature(p.model, supervised(p.loss_fn), [p.batches[i], p.batches[j]])
        for i in range(0, 8, 2)
        for j in range(1, 8, 2)
    }
    quotients, seen = [], []
    for gradient in found["of_each"]:
        pair = min(dense, key=lambda ij: float((dense[ij].gradient - gradient).norm()))
        g, hessian = dense[pair].gradient, dense[pair].hessian
        torch.testing.assert_close(gradient, g, rtol=0, atol=1e-12)
        quotients.append(float(g @ hessian @ g / (g @ g)))
        seen.append(pair)
    for own in zip(*seen, strict=True):
        assert len(set(own)) == 4  # each of a rank's batches once
    value, error, count = found["found"].tolist()
    assert (value, error, count) == (pytest.approx(sum(quotients) / 4, rel=1e-6), 0, 4)
    assert found["batch_sharpness"].isfinite().all()
