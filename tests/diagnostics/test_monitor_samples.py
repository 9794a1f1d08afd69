"""A monitor on a sample: which examples, whose numbers, at what cost, and when it draws anew."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import subspace_optim as so
from subspace_optim.diagnostics.measures.gradients import GROUPS
from tests import clusters
from tests.clusters import clustered, one_hot_mse
from tests.dense import dense_curvature, supervised
from tests.diagnostics.test_sampled import written_out
from tests.optim.naive import dense_eigenbasis, flat

N, CLASSES = 600, 3
ERRORS = (
    "loss_error",
    "gradient_norm_error",
    "chi_gradient_error",
    "dom_lr_error",
    "bulk_lr_error",
)
COLUMNS = {"norm": "gradient_norm", "chi": "chi_gradient", "dom_lr": "dom_lr", "bulk_lr": "bulk_lr"}
Draw = tuple[int, int]


data = partial(clustered, N, inputs=4, classes=CLASSES)
network = partial(clusters.network, inputs=4, hidden=6, classes=CLASSES)


class Spied(so.HessianOperator):
    """Notes what is drawn: how many examples, and by which seed."""

    drawn: list[Draw]

    def sample(self, examples: int, *, seed: int, **options: Any) -> Any:
        self.drawn = [*getattr(self, "drawn", []), (examples, seed)]
        return super().sample(examples, seed=seed, **options)


def fixed(model: nn.Module, hessian: Any, k: int = 3) -> Any:
    """A subspace that costs nothing, so that a row is of loss and gradient alone."""
    size = sum(p.numel() for p in model.parameters())
    subspace: Any = so.FixedSubspace(model, dense_eigenbasis(size, k, 5, torch.float64).vectors)
    subspace.operator = hessian
    return subspace


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A step of training on all data; the update."""
    before = flat(model.parameters())
    optimizer.zero_grad()
    one_hot_mse(model(x), y).backward()
    optimizer.step()
    return flat(model.parameters()) - before


def last_row(monitor: so.Monitor) -> dict[str, Any]:
    return {column: values[-1] for column, values in monitor.history.items()}


def watched(model: nn.Module, hessian: Any, **options: Any) -> tuple[Any, so.Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return optimizer, so.Monitor(optimizer, fixed(model, hessian), **options)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_is_that_of_dense_gradients_of_groups(weighted: bool) -> None:
    model, (x, y) = network(), data()
    loss: Any = one_hot_mse
    if weighted:
        weight = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        loss = nn.CrossEntropyLoss(weight=weight)
    hessian = Spied(model, loss, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(200))
    basis = monitor.source.update()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0x5EED))[:200]
    parts = [(x[rows], y[rows]) for rows in order.tensor_split(GROUPS)]
    dense = [dense_curvature(model, supervised(loss), [part]) for part in parts]
    w = np.array([float(weight[part[1]].sum()) if weighted else len(part[1]) for part in parts])
    update = step(model, optimizer, x, y)
    assert hessian.drawn == [(200, 0x5EED)]
    row = last_row(monitor)
    gradients = np.stack([each.gradient.numpy() for each in dense])
    expected = written_out(gradients, w, 200 / N, basis.vectors.numpy(), update.numpy())
    for name, column in COLUMNS.items():
        assert row[column] == pytest.approx(expected[name][0], rel=1e-6)
        assert row[f"{column}_error"] == pytest.approx(expected[name][1], rel=1e-5)
    losses, p = np.array([float(each.loss) for each in dense]), w / w.sum()
    assert row["loss"] == pytest.approx(p @ losses)
    scatter = (p**2 * (losses - p @ losses) ** 2).sum() / (1 - (p**2).sum())
    assert row["loss_error"] == pytest.approx(math.sqrt((1 - 200 / N) * scatter))
    assert row["examples"] == 200


def test_it_is_near_the_row_of_all_data() -> None:
    """Within four standard errors, of which each is a small part of the number."""
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    subspace = fixed(model, hessian)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sampled = so.Monitor(optimizer, subspace, measures=so.measures.dominant(300))
    whole = so.Monitor(optimizer, subspace, measures=so.measures.dominant(None))
    for _ in range(3):
        step(model, optimizer, x, y)
        found, true = last_row(sampled), last_row(whole)
        for column in ("loss", *COLUMNS.values()):
            error = found[f"{column}_error"]
            assert 0 < error < 0.2 * abs(true[column])
            assert abs(found[column] - true[column]) < 4 * error
            assert true[f"{column}_error"] == 0
        assert (found["examples"], true["examples"]) == (300, N)


# --- which examples ------------------------------------------------------------------------------


def test_it_follows_the_subspace() -> None:
    """As many examples as the basis is of, and not the same ones."""
    model, (x, y) = network(), data()
    hessian = Spied(model, one_hot_mse, (x, y))
    subspace = so.DominantSubspace(hessian, 3, sample=150, seed=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(3):
        step(model, optimizer, x, y)
        row = last_row(monitor)
        assert row["examples"] == subspace.stats.examples == 150
        assert all(row[column] > 0 for column in ERRORS)
    by_monitor = [draw for draw in hessian.drawn if draw[1] != 4]
    assert len(by_monitor) == 1  # it is drawn once, and kept
    assert by_monitor[0][0] == 150


@pytest.mark.parametrize(
    "options",
    [{}, {"measures": so.measures.dominant("auto")}, {"measures": so.measures.dominant(None)}],
)
def test_without_a_sample_all_data_are_measured(options: dict[str, Any]) -> None:
    model, (x, y) = network(), data()
    hessian = Spied(model, one_hot_mse, (x, y))
    of_all = options == {"measures": so.measures.dominant(None)}
    subspace = so.DominantSubspace(hessian, 3, sample=150 if of_all else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace, **options)
    theta = flat(model.parameters())
    dense = dense_curvature(model, supervised(one_hot_mse), [(x, y)])
    step(model, optimizer, x, y)
    row = last_row(monitor)
    assert row["loss"] == pytest.approx(dense.loss)
    assert row["gradient_norm"] == pytest.approx(float(dense.gradient.norm()))
    assert row["examples"] == N
    assert all(row[column] == 0 for column in ERRORS)
    assert not torch.equal(theta, flat(model.parameters()))


def test_a_number_is_of_the_monitor_alone() -> None:
    """Of an ordinary basis too, and of other examples than the basis's number."""
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    plain = so.Monitor(
        optimizer, so.DominantSubspace(hessian, 3), measures=so.measures.dominant(100)
    )
    of_sample = so.Monitor(
        optimizer, so.DominantSubspace(hessian, 3, sample=150), measures=so.measures.dominant(100)
    )
    step(model, optimizer, x, y)
    assert last_row(plain)["examples"] == last_row(of_sample)["examples"] == 100


def test_examples_that_are_coupled_are_measured_together() -> None:
    model, (x, y) = network(nn.BatchNorm1d(6)), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(100))
    step(model, optimizer, x, y)
    row = last_row(monitor)
    assert (row["examples"], row["loss_error"]) == (N, 0)
    assert row["gradients"] == 1


def test_a_sample_of_all_is_all() -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(5 * N))
    step(model, optimizer, x, y)
    row = last_row(monitor)
    assert (row["examples"], row["loss_error"]) == (N, 0)


@pytest.mark.parametrize("form", ["list", "loader"])
@pytest.mark.parametrize(
    ("size", "asked", "measured"),
    [(10, 200, 200), (10, 195, 200), (50, 60, 400), (100, 60, 600)],
    ids=["whole", "rounded up", "eight at least", "all that there are"],
)
def test_batches_are_taken_whole_and_eight_of_them(
    form: str, size: int, asked: int, measured: int
) -> None:
    model, (x, y) = network(), data()
    batches: Any = list(zip(x.split(size), y.split(size), strict=True))
    if form == "loader":
        batches = DataLoader(TensorDataset(x, y), batch_size=size)
    hessian = so.HessianOperator(model, one_hot_mse, batches)
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(asked))
    for _ in range(2):
        step(model, optimizer, x, y)
        row = last_row(monitor)
        assert row["examples"] == measured
        assert (row["loss_error"] == 0) == (measured == N)


@pytest.mark.slow
def test_batches_that_come_in_order_have_honest_errors() -> None:
    """Sorted by class: groups of every so-manieth batch would each have all classes in them."""
    model, (x, y) = network(), data()
    order = y.argsort()
    x, y = x[order], y[order]
    batches = list(zip(x.split(5), y.split(5), strict=True))
    hessian = so.HessianOperator(model, one_hot_mse, batches)
    truth, found = hessian.loss(), []
    for seed in range(100):
        subspace = fixed(model, hessian)
        subspace.seed = seed
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # one of 0 is no step
        monitor = so.Monitor(optimizer, subspace, measures=so.measures.dominant(240))
        step(model, optimizer, x, y)
        row = last_row(monitor)
        found.append((row["loss"] - truth, row["loss_error"]))
        monitor.detach()
    off, errors = np.array(found).T
    assert np.mean(np.abs(off) <= 2 * errors) >= 0.9
    assert np.mean(errors) == pytest.approx(np.std(off), rel=0.25)


# --- when it is drawn ----------------------------------------------------------------------------


def test_it_is_drawn_anew_where_it_is_another() -> None:
    """Another size, another mode, other data: else it is kept."""
    model, (x, y) = network(nn.Dropout(0.2)).eval(), data()
    hessian = Spied(model, one_hot_mse, (x, y))
    subspace = fixed(model, hessian)
    subspace.stats = so.subspaces.SubspaceStats(examples=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace)
    counts = []

    def row() -> dict[str, Any]:
        step(model, optimizer, x, y)
        counts.append(len(hessian.drawn))
        return last_row(monitor)

    assert [row()["examples"] for _ in range(2)] == [100, 100]
    subspace.stats.examples = 120
    assert [row()["examples"] for _ in range(2)] == [120, 120]
    model.train()  # the masks couple the examples of a batch
    assert [row()["examples"] for _ in range(2)] == [N, N]
    model.eval()
    assert [row()["examples"] for _ in range(2)] == [120, 120]
    subspace.stats.examples = None
    assert row()["examples"] == N
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    subspace.stats.examples = 120
    assert row()["examples"] == 120
    with torch.no_grad():
        x.mul_(3)  # the copies of its rows are not what they were
    with pytest.warns(so.LogWarning, match="they were written in place, so make a new operator"):
        assert math.isnan(row()["loss"])


# --- cost ----------------------------------------------------------------------------------------


def test_the_cost_is_the_share_of_the_data() -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(150))
    for _ in range(2):
        step(model, optimizer, x, y)
        row = last_row(monitor)
        assert (row["gradients"], row["products"]) == (pytest.approx(0.25), 0)


def test_products_of_a_sample_count_by_their_share() -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    subspace = so.DominantSubspace(hessian, 3, sample=150)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace)
    step(model, optimizer, x, y)
    row, stats = last_row(monitor), hessian.stats
    assert row["products"] == stats.full_products < stats.products / 2
    assert row["gradients"] == stats.full_gradients < stats.gradients / 2


def test_between_the_halves_of_a_row_there_are_the_gradients_of_the_groups() -> None:
    """What the docstring says that it holds; after the row, nothing."""
    model, (x, y) = network(), data()
    size = sum(p.numel() for p in model.parameters())
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(150))
    held: list[int] = []

    def look(*_: Any) -> None:
        parts = vars(monitor._step.sampled(150)._gradient).values()  # type: ignore[union-attr]
        held.extend(t.nbytes for t in parts if isinstance(t, Tensor) and t.shape[-1] == size)

    optimizer.register_step_pre_hook(look)
    step(model, optimizer, x, y)
    assert held == [GROUPS * size * 8]
    assert monitor._step is None


# --- beside the rest -----------------------------------------------------------------------------


def test_training_does_not_change_by_a_bit() -> None:
    ends = []
    for options in (None, {}, {"measures": so.measures.dominant(100)}):
        model, (x, y) = network(nn.Dropout(0.3)), data()
        model.eval()[1].train()
        hessian = so.HessianOperator(model, one_hot_mse, list(zip(x.split(20), y.split(20))))  # noqa: B905
        subspace = so.DominantSubspace(hessian, 3, sample=150)
        optimizer = so.BulkSGD(model.parameters(), lr=0.05, momentum=0.9, subspace=subspace)
        if options is not None:
            so.Monitor(optimizer, subspace, **options)
        torch.manual_seed(3)
        for t in range(6):
            step(model, optimizer, x[t::6], y[t::6])
        ends.append((flat(model.parameters()), torch.get_rng_state(), subspace.basis.vectors))
    for other in ends[1:]:
        assert all(map(torch.equal, ends[0], other))


def test_a_run_that_is_taken_up_again_has_the_same_rows(tmp_path: Path) -> None:
    def run(*, stop: int | None) -> list[dict[str, Any]]:
        model, (x, y) = network(), data()
        monitor = state = None
        for t in range(6):
            if t in (0, stop):
                hessian = so.HessianOperator(model, one_hot_mse, (x, y))
                if monitor is not None:
                    state = monitor.state_dict()
                    monitor.detach()
                optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(100))
                if state is not None:
                    monitor.load_state_dict(state)
            step(model, optimizer, x, y)
        assert monitor is not None
        monitor.to_csv(tmp_path / f"{stop}.csv")
        assert set(ERRORS) < set(monitor.to_frame().columns)
        return monitor.rows()

    def measured(rows: list[dict[str, Any]]) -> str:
        return str([{c: v for c, v in row.items() if c != "gradients"} for row in rows])

    assert measured(run(stop=None)) == measured(run(stop=3))
    header = (tmp_path / "None.csv").read_text().splitlines()[0].split(",")
    assert {"examples", *ERRORS} < set(header)


def test_what_diverges_is_a_row_of_nan_and_training_goes_on() -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer, monitor = watched(model, hessian, measures=so.measures.dominant(100))
    step(model, optimizer, x, y)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(so.LogWarning, match=r"of step 1 is NaN: The mean loss over the"):
        step(model, optimizer, x, y)
    row = last_row(monitor)
    assert math.isnan(row["loss"])
    assert math.isnan(row["examples"])


@pytest.mark.parametrize("value", [0, 1, -3, 2.5, "all", True])
def test_sizes_that_cannot_be_are_refused(value: Any) -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with pytest.raises(so.ArgumentError, match=r"^sample is .*Or 'auto', for as many as the basis"):
        so.Monitor(optimizer, so.DominantSubspace(hessian, 3), measures=so.measures.dominant(value))
    assert not optimizer._optimizer_step_pre_hooks


def test_monitors_of_other_samples_are_no_twins() -> None:
    model, (x, y) = network(), data()
    hessian = so.HessianOperator(model, one_hot_mse, (x, y))
    subspace = fixed(model, hessian)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for sample in (None, 50, 100):
        so.Monitor(optimizer, subspace, measures=so.measures.dominant(sample))
    with pytest.warns(so.AttachedTwiceWarning):
        so.Monitor(optimizer, subspace, measures=so.measures.dominant(100))
