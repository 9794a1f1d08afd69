"""Norms of matrices that are sharded are those of the whole matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import norm_sharpness_worker as worker
from tests.distributed import sharding
from tests.distributed.sharding import batches, made
from tests.processes import alike, once, together

pytestmark = pytest.mark.distributed


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{}_ranks".format
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has found; the processes run once for all tests."""
    size = request.param
    folder = once(
        tmp_path_factory,
        f"norm_sharpness-{size}",
        lambda at: together(worker.run, (size, str(at)), size),
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def test_points_of_the_ball_and_what_a_search_finds(ranks):
    for name, found in alike(ranks, "layouts").items():
        kind: Any = sharding.Convolutions if name == "convolutions" else sharding.Net
        if "parallel" in name:
            kind = sharding.Parallel
        norm = worker.NORMS.get(name.removeprefix("fsdp "), "spectral")
        expected = worker.found(made(kind), batches(), norm)
        for entry, near in {"best": 1e-10, "nearest": 1e-12}.items():
            torch.testing.assert_close(found[entry], expected[entry], rtol=0, atol=near)
        assert found["dual norm"] == pytest.approx(expected["dual norm"], rel=1e-10), name
        assert found["sharpness"] == pytest.approx(expected["sharpness"], rel=1e-8), name
        assert expected["sharpness"] > 0


def test_a_monitor_of_muon(ranks):
    found = alike(ranks, "monitor")
    expected = worker.trained(made(sharding.Net), batches()[-1:])
    assert found["norm_sharpness"] == pytest.approx(expected["norm_sharpness"], rel=1e-3)
    assert found["norm_threshold"] == pytest.approx(expected["norm_threshold"], rel=1e-8)
