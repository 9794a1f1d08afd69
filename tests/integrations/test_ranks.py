"""Two processes in the loops of others: what is measured is of the batches of both."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.integrations import ranks_worker as worker
from tests.processes import together

pytestmark = [pytest.mark.clients, pytest.mark.distributed]


@pytest.mark.parametrize("loop", worker.LOOPS)
def test_rows_are_of_all_ranks_and_the_training_is_the_same(loop: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning" if loop == "fabric" else loop)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(worker.run, (2, port, str(tmp_path), loop), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    plain, seen = (ranks[0][watched]["parameters"] for watched in (False, True))
    for before, after in zip(plain, seen, strict=True):
        assert all(map(torch.equal, before, after))
    histories = [found[True]["history"] for found in ranks]
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(histories[0], histories[1], **same)
    assert histories[0]["step"] == list(range(worker.STEPS))
    model = worker.WithLoss()

    def loss(t: int, at: int) -> float:
        with torch.no_grad():
            for p, value in zip(model.parameters(), seen[at], strict=True):
                p.copy_(value)
            batches = [found[True]["batches"][t] for found in ranks]
            assert not torch.equal(batches[0][0], batches[1][0])
            return sum(float(model(x, labels=y)["loss"].double()) for x, y in batches) / 2

    for t in range(worker.STEPS):
        expected = loss(t, t + 1) - loss(t, t)
        assert histories[0]["actual_change"][t] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_trainer_that_counts_labels_over_all_ranks_is_measured_by_these(tmp_path: Path) -> None:
    """Each rank's loss is its part of a sum over labels that both have counted together."""
    pytest.importorskip("transformers")
    from tests.integrations.test_transformers import sentences
    from tests.integrations.test_transformers_losses import collated, loss_of

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(worker.counted, (2, port, str(tmp_path)), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    of_all = [collated(sentences(16, seed=3))]
    for t in range(2):
        here = [rank["data"] for rank in ranks]
        expected = loss_of(here[0]["path"][t], of_all)
        assert [each["loss"][t] for each in here] == pytest.approx([expected] * 2, rel=2e-6)
        here = [rank["steps"] for rank in ranks]
        batches = [b for each in here for b in each["batches"][2 * t : 2 * t + 2]]
        expected = loss_of(here[0]["path"][t], batches)
        assert [each["loss"][t] for each in here] == pytest.approx([expected] * 2, rel=2e-6)
