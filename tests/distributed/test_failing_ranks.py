"""A rank of a sharded model that fails, or is gone, is an error of all others within the limit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import failing_worker as worker
from tests.processes import apart

pytestmark = pytest.mark.distributed


def run(folder: Path, ends: str) -> dict[int, dict[str, Any]]:
    """What the ranks have found that could still tell."""
    for process in [apart(worker.run, (rank, str(folder), ends)) for rank in range(2)]:
        process.join(120)
        assert process.exitcode is not None
    return {int(path.stem): torch.load(path) for path in folder.glob("*.pt")}


def test_a_rank_that_raises_is_an_error_of_all_and_training_goes_on(tmp_path):
    found = run(tmp_path, "raised")
    assert found[1]["text"] == "no loss on rank one"
    assert found[0]["text"] == "Rank 1 of process_group failed: no loss on rank one"
    for result in found.values():
        assert result["kind"] == "ValueError"
        assert result["seconds"] < 4 * worker.LIMIT
        assert result["trained"]


def test_a_rank_that_is_killed_is_one_clear_error_of_the_other(tmp_path):
    found = run(tmp_path, "killed")
    assert found.keys() == {0}
    assert found[0]["kind"] == "RuntimeError"
    assert found[0]["text"].startswith("The ranks have lost each other: one has ended, or did not")
    assert found[0]["seconds"] < 4 * worker.LIMIT
