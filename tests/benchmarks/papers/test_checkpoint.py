"""What a training keeps: when it is told to end, now and then, and never a foreign file."""

import os
import signal

import pytest
import torch
from torch import nn

from benchmarks.files import ForeignFileError
from benchmarks.losses import cross_entropy
from benchmarks.papers import checkpoint
from benchmarks.papers.checkpoint import Checkpoint, end_when_kept
from benchmarks.papers.reproduction import Job
from benchmarks.papers.training import Problem, train

CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch):
    """Signals to end are handled as in a worker."""
    monkeypatch.setattr(checkpoint, "_ending", [])
    before = signal.signal(signal.SIGTERM, end_when_kept)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def trained(scratch, record):
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(12, 4), torch.arange(12) % 3
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    problem = Problem(net, cross_entropy, x, y)
    rows = train(Job(scratch=scratch), "plain", problem, sgd, steps=6, record=record)
    return rows, [p.tolist() for p in net.parameters()]


def test_told_to_end_a_training_finishes_its_step_and_keeps_all_its_rows(tmp_path, told):
    whole = trained(None, lambda step: {"figure": step**2})
    measured = []

    def record(step):
        measured.append(step)
        if step == 2:
            told()
        return {"figure": step**2}

    with pytest.raises(SystemExit) as ended:
        trained(tmp_path, record)
    assert ended.value.code == 143
    assert measured == [0, 1, 2]  # and the save of every few seconds was far off
    kept = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert [row["step"] for row in kept["rows"]] == [0, 1, 2]
    checkpoint._ending.clear()
    assert trained(tmp_path, record) == whole
    assert measured == [0, 1, 2, 3, 4, 5, 6]


def test_a_second_signal_and_one_outside_of_a_training_end_at_once(tmp_path, told):
    def record(step):
        told()
        told()
        pytest.fail("it went on")

    with pytest.raises(SystemExit):
        trained(tmp_path, record)
    assert not list(tmp_path.iterdir())
    checkpoint._ending.clear()
    with pytest.raises(SystemExit):
        told()


def test_a_large_state_is_kept_more_rarely(tmp_path, monkeypatch):
    """Every 10 seconds, but keeping takes at most a fiftieth of the time."""
    clock, kept = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def state(seconds):
        kept.append(clock[0])
        clock[0] += seconds
        return {}

    for seconds, times in ((0.0, [11, 22, 33, 44, 55]), (1.0, [11, 63])):
        clock[0] = 0.0
        kept.clear()
        here = Checkpoint(tmp_path / "a.pt")
        for second in range(1, 66):
            clock[0] = max(clock[0], float(second))
            here.keep(lambda seconds=seconds: state(seconds))
        assert kept == times
    assert Checkpoint(None).keep(lambda: pytest.fail("nothing is kept"), over=True) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 and no more"])
def test_a_foreign_checkpoint_is_told_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "plain.pt"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=f"{path} is no checkpoint of this run"):
        trained(tmp_path, None)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [[1], {"rows": []}, {"states": [{}, {}]}])
def test_a_checkpoint_of_another_form_is_told(tmp_path, content):
    torch.save(content, tmp_path / "plain.pt")
    with pytest.raises(ForeignFileError, match=r"Remove it to begin anew\."):
        trained(tmp_path, None)
    Checkpoint(tmp_path / "none.pt").take_up(CPU, lambda _: pytest.fail("there is none"))
