"""What a sharded model costs a rank, against the whole model in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import costs_worker as worker
from tests.processes import once, together

pytestmark = pytest.mark.distributed

P = sum(p.numel() for p in worker.Deep().parameters())
MODULE = 8 * sum(p.numel() for p in worker.Deep().blocks[-1].parameters())
"""Bytes of the largest module that is gathered, of LAYERS + 1."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, id="2_ranks"),
        pytest.param(4, id="4_ranks", marks=pytest.mark.slow),
    ],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank has found; the processes run once for all tests."""
    size = request.param
    folder = once(
        tmp_path_factory,
        f"sharded_costs-{size}",
        lambda at: together(worker.run, (size, str(at)), size),
    )
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def test_a_rank_holds_its_share_and_a_few_modules(ranks):
    for found in ranks:
        for name, whole in found["whole"].items():
            beyond = found["streamed"][name]["peak"] - whole["peak"] / len(ranks)
            # Weights, direction, what was found of it, and buffers: a block has two directions.
            assert beyond <= 6 * MODULE, (name, beyond / MODULE)


def test_no_tensor_is_of_all_coordinates(ranks):
    for found in ranks:
        assert any(P in shape for shape in found["whole"]["solve"]["shapes"])
        for how in ("kept", "streamed"):
            for name, costs in found[how].items():
                for shape in costs["shapes"]:
                    # Some vectors of what lies here may have more numbers than one has.
                    few = shape.numel() < P / 2 or shape.numel() % found["here"] == 0
                    assert P not in shape, (how, name, shape)
                    assert few, (how, name, shape)


def test_collectives_of_a_product_are_those_of_the_passes_and_a_few(ranks):
    groups = worker.LAYERS + 1
    for found in ranks:
        counts = {
            how: {name: costs["collectives"] for name, costs in found[how].items()}
            for how in ("kept", "streamed")
        }
        # The graph is kept: a product gathers its direction, and scatters what it finds.
        passes = {"gather": groups, "scatter": groups}
        assert counts["kept"]["product"] == {**passes, "sum": 2}
        twice = {name: 2 * count for name, count in passes.items()}
        assert counts["kept"]["two, frozen"] == {**twice, "sum": 1 + 2}
        # It is made anew: one meeting and the loss of a batch, the end of the data, and a meeting.
        assert counts["streamed"]["two, frozen"]["sum"] == 1 + 2 * 4
        assert counts["streamed"]["product"]["sum"] == 1 + 4
        assert counts["streamed"]["block"]["sum"] == 1 + 4  # three products


def test_a_block_of_inner_products_is_one_all_reduce(ranks):
    for found in ranks:
        for how in ("kept", "streamed"):
            for name in ("coefficients", "projection"):
                assert found[how][name]["collectives"] == {"sum": 1}
        # Of what is known only a digest of the parameters is summed.
        assert found["kept"]["known"]["collectives"] == {"sum": 1}
        assert found["kept"]["gradient"]["collectives"] == {"sum": 1}
