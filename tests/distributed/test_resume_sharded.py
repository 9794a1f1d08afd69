"""A sharded training that is saved goes on on any number of ranks, as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.distributed import resume_worker as worker
from tests.processes import once, together

pytestmark = pytest.mark.distributed


def trained(folder: Path, size: int, *, resumes: bool) -> list[dict[Any, Any]]:
    folder.mkdir()
    together(worker.run, (size, str(folder), resumes), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    """What two ranks have found that were never stopped, and the folder of what they have saved."""
    folder = once(tmp_path_factory, "resumed", lambda at: trained(at / "whole", 2, resumes=False))
    return folder, torch.load(folder / "whole" / "0.pt", weights_only=False)


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_saved_run_goes_on_as_the_uninterrupted_one(uninterrupted, size):
    folder, expected = uninterrupted
    for found in trained(folder / f"{size} ranks", size, resumes=True):
        for refresh, run in expected.items():
            ours = found[refresh]
            if size == 2:
                for a, b in zip(tree_leaves(ours), tree_leaves(run), strict=True):
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            elif refresh != "auto":  # whose refinements draw at random, on each rank by itself
                assert (ours["theta"] - run["theta"]).abs().max() <= 1e-10
                assert ours["counts"] == run["counts"]
                for column, values in run["rows"].items():
                    assert ours["rows"][column] == pytest.approx(values, abs=1e-10), column
