"""The loop of all reproductions: what it trains, what it records, and that a kill loses nothing."""

import math

import pytest
import torch
from torch import nn

import subspace_optim as so
from benchmarks.experiment import minibatch
from benchmarks.losses import cross_entropy
from benchmarks.papers.reproduction import Job
from benchmarks.papers.training import Problem, train


def data(examples=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(examples, 4, generator=generator), torch.arange(examples) % 3


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def problem(net, loss_fn=cross_entropy):
    return Problem(net, loss_fn, *data())


def theta(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def by_hand(steps, batch_size, first=0, seed=3):
    """θ after so many plain steps, without the loop under test."""
    net = network()
    x, y = data()
    for step in range(first, first + steps):
        batch = minibatch(12, batch_size or 12, step, seed)
        gradients = torch.autograd.grad(cross_entropy(net(x[batch]), y[batch]), net.parameters())
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    return theta(net)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("first", [0, 4])
def test_steps_are_those_of_the_optimizer_on_the_seeds_minibatches(batch_size, first):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    train(Job(3), "a", problem(net), sgd, steps=7, batch_size=batch_size, first=first)
    torch.testing.assert_close(theta(net), by_hand(7, batch_size, first))


def test_rows_are_taken_before_the_step_and_at_the_end():
    net = network()
    seen = []

    def record(step):
        seen.append(theta(net))
        return {"norm": float(seen[-1].norm())} if step != 4 else None

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    rows = train(Job(3), "a", problem(net), sgd, steps=5, record=record, every=2, first=2)
    assert [row["step"] for row in rows] == [2, 6, 7]
    torch.testing.assert_close(seen[-1], by_hand(5, None, 2))
    assert rows[0]["norm"] == pytest.approx(float(theta(network()).norm()))

    def chosen(step):
        return step in (3, 4)

    rows = train(Job(3), "a", problem(net), sgd, steps=5, record=lambda _: {}, every=chosen)
    assert [row["step"] for row in rows] == [3, 4, 5]


def test_each_minibatch_is_shown_before_the_step():
    net, shown = network(), []

    def before(x, y):
        shown.append((theta(net), x, y))

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    train(Job(3), "a", problem(net), sgd, steps=2, batch_size=5, before=before)
    for step, (at, x, y) in enumerate(shown):
        torch.testing.assert_close(at, by_hand(step, 5))
        batch = minibatch(12, 5, step, 3)
        torch.testing.assert_close(x, data()[0][batch])
        assert y.tolist() == data()[1][batch].tolist()


def test_minibatches_can_be_drawn_with_replacement():
    net, shown = network(), []
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    train(
        Job(3),
        "a",
        problem(net),
        sgd,
        steps=2,
        batch_size=5,
        replacement=True,
        before=lambda x, _: shown.append(x),
    )
    for step, x in enumerate(shown):
        torch.testing.assert_close(x, data()[0][minibatch(12, 5, step, 3, replacement=True)])


def test_a_loss_that_is_not_finite_ends_the_training():
    net = network()

    def steep(output, target):
        return 1e6 * cross_entropy(output, target)

    sgd = torch.optim.SGD(net.parameters(), lr=1e38)
    rows = train(Job(3), "a", problem(net, steep), sgd, steps=50, record=lambda _: {}, every=100)
    assert rows[0] == {"step": 0}
    assert rows[-1]["diverged"] is True
    assert len(rows) == 2


class KilledError(Exception):
    pass


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path, monkeypatch, dropout):
    monkeypatch.setattr("benchmarks.papers.checkpoint.SAVE_EVERY", 0.0)

    def run(scratch, killed_at=None):
        net = network(dropout)
        x, y = data()
        hessian = so.HessianOperator(net, cross_entropy, (x, y), mode="eval")
        subspace = so.DominantSubspace(hessian, 2, seed=0)
        bulk = so.BulkSGD(net.parameters(), lr=0.1, momentum=0.9, subspace=subspace)
        monitor = so.Monitor(bulk, subspace)

        def record(step):
            if step == killed_at:
                raise KilledError
            return {"loss": hessian.loss()}

        losses = []
        rows = train(
            Job(3, scratch=scratch),
            "bulk",
            Problem(net, cross_entropy, x, y),
            bulk,
            steps=8,
            batch_size=5,
            record=record,
            also=(subspace, monitor),
            losses=losses,
        )
        monitor.detach()
        return rows, theta(net), monitor.history, losses

    whole = run(None)
    with pytest.raises(KilledError):
        run(tmp_path, killed_at=5)
    rows, end, history, losses = run(tmp_path)
    assert losses == whole[3]
    assert len(losses) == 8
    assert torch.equal(end, whole[1])
    assert rows == whole[0]
    assert history["step"] == list(range(8))
    assert history["loss"] == whole[2]["loss"]
    # What was finished is not trained again.
    again = run(tmp_path, killed_at=0)
    assert torch.equal(again[1], end)
    assert all(math.isfinite(row["loss"]) for row in again[0])
