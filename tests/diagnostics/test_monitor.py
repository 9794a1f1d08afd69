"""`Monitor`: every number of a row against dense float64, and no trace of it in the training."""

from __future__ import annotations

import copy
import csv
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import subspace_optim as so
from tests.optim.naive import (
    DenseOperator,
    Landscape,
    Quartic,
    flat,
    landscape,
    projector,
    relative_gap,
)

COLUMNS = [
    "step",
    "loss",
    "gradient_norm",
    "examples",
    "loss_error",
    "gradient_norm_error",
    "update_norm",
    "distance",
    "chi_gradient",
    "chi_update",
    "dom_lr",
    "bulk_lr",
    "sharpness",
    "eigenvalues",
    "gap",
    "angle_estimate",
    "chi_gradient_error",
    "dom_lr_error",
    "bulk_lr_error",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "gradients",
    "products",
    "forwards",
]
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)
Make = Callable[..., torch.optim.Optimizer]


def make(
    dtype: torch.dtype = torch.float64, *, k: int = 2, refresh: int = 1
) -> tuple[Quartic, DenseOperator, so.DominantSubspace]:
    model = Quartic(dtype=dtype)
    operator = DenseOperator(model)
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    return model, operator, so.DominantSubspace(operator, k, refresh=refresh, tol=tol)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model().backward()
    for optimizer in optimizers:
        optimizer.step()


def dense_row(
    problem: Landscape | Quartic, theta: Tensor, following: Tensor, start: Tensor, k: int
) -> dict[str, Any]:
    """One row from the definitions, with dense matrices in float64."""
    g, H, u = problem.gradient(theta), problem.hessian(theta), following - theta
    P = projector(H, k)
    dominant, bulk = P @ g, g - P @ g
    eigenvalues = torch.linalg.eigvalsh(H).flip(0)
    return {
        "loss": float(problem.loss(theta)),
        "gradient_norm": float(g.norm()),
        "update_norm": float(u.norm()),
        "chi_gradient": float(dominant.norm() / g.norm()),
        "chi_update": float((P @ u).norm() / u.norm()),
        "dom_lr": float(-(u @ dominant) / (dominant @ dominant)),
        "bulk_lr": float(-(u @ bulk) / (bulk @ bulk)),
        "distance": float((theta - start).norm()),
        "sharpness": float(eigenvalues[0]),
        "eigenvalues": eigenvalues[:k].tolist(),
        "next_eigenvalues": eigenvalues[k : k + 3].tolist(),
        "gap": float(eigenvalues[k - 1] - eigenvalues[k]),
    }


# The numbers.

OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda p, **_: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "Adam": lambda p, **_: torch.optim.Adam(p, lr=0.02),
    "AdamW fused": lambda p, **_: torch.optim.AdamW(p, lr=0.02, fused=True),
    "DomSGD": lambda p, subspace: so.DomSGD(p, lr=0.02, momentum=0.9, subspace=subspace),
    "BulkSGD": lambda p, subspace: so.BulkSGD(p, lr=0.02, weight_decay=0.1, subspace=subspace),
}


@dtypes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_column_of_every_row_is_that_of_a_dense_computation(
    name: str, dtype: torch.dtype
) -> None:
    model, operator, subspace = make(dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), subspace=subspace)
    train(model, optimizer)  # the monitor comes later: distances count from there
    monitor = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(3)]
    )
    path, products = [flat(model.parameters())], []
    for _ in range(10):
        before = operator.stats.products
        train(model, optimizer)
        path.append(flat(model.parameters()))
        products.append(operator.stats.products - before)
    history = monitor.history
    assert list(history) == [*COLUMNS[:-3], "next_eigenvalues", *COLUMNS[-3:]]
    assert history["step"] == list(range(10))
    assert history["products"] == products
    for t in range(10):
        for column, value in dense_row(model, path[t], path[t + 1], path[0], 2).items():
            close = pytest.approx(value, rel=CLOSE[dtype], abs=CLOSE[dtype] / 10)
            assert history[column][t] == close, (column, t)


@dtypes
@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_rates_of_full_batch_training_of_a_network_are_those_of_dense_matrices(
    name: str, dtype: torch.dtype
) -> None:
    """Relative, without an absolute part, on a Hessian by automatic differentiation."""
    random = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random))
    x, y = torch.randn(12, 3, generator=random), torch.randn(12, 2, generator=random)
    dense = landscape(model, nn.functional.mse_loss, x, y)
    x, y = x.to(dtype), y.to(dtype)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y), verify=False)
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=tol)
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor = so.Monitor(optimizer, subspace)
    path = [flat(model.parameters())]
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        path.append(flat(model.parameters()))
    for t in range(10):
        expected = dense_row(dense, path[t], path[t + 1], path[0], 2)
        for column in ("dom_lr", "bulk_lr", "loss", "sharpness"):
            assert monitor.history[column][t] == pytest.approx(expected[column], rel=CLOSE[dtype])


@dtypes
@pytest.mark.parametrize(
    ("name", "dominant", "bulk"), [("SGD", 1, 1), ("DomSGD", 1, 0), ("BulkSGD", 0, 1)]
)
def test_full_batch_gradient_descent_has_its_rate_where_it_moves(
    name: str, dominant: float, bulk: float, dtype: torch.dtype
) -> None:
    eta = 0.03
    model, _, subspace = make(dtype)
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    else:
        optimizer = getattr(so, name)(model.parameters(), lr=eta, subspace=subspace)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(10):
        train(model, optimizer)
    allowed = eta * (1e-4 if dtype == torch.float32 else 1e-9)
    assert monitor.history["dom_lr"] == pytest.approx([eta * dominant] * 10, abs=allowed)
    assert monitor.history["bulk_lr"] == pytest.approx([eta * bulk] * 10, abs=allowed)


def test_with_all_directions_dominant_the_bulk_rate_is_nan() -> None:
    model, _, subspace = make(k=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace)
    train(model, optimizer)
    assert monitor.history["bulk_lr"] == [pytest.approx(float("nan"), nan_ok=True)]
    assert monitor.history["dom_lr"] == [pytest.approx(0.01)]
    assert monitor.history["chi_gradient"] == [pytest.approx(1.0)]


def test_sharpness_is_the_largest_eigenvalue_not_the_largest_in_magnitude() -> None:
    model, _, subspace = make(k=9)
    model.A.mul_(-1)
    model.c.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace)
    train(model, optimizer)
    assert monitor.history["sharpness"] == [pytest.approx(1.0)]
    assert monitor.history["eigenvalues"] == [pytest.approx([1 - i / 2 for i in range(9)])]


def test_parameters_that_the_optimizer_does_not_train_are_measured_too() -> None:
    """The gradient is the operator's, over all of its parameters, not what is in `.grad`."""
    model, _, subspace = make()
    optimizer = torch.optim.SGD([model.weights[0]], lr=0.01)
    monitor = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(3)]
    )
    theta = flat(model.parameters())
    train(model, optimizer)
    row = dense_row(model, theta, flat(model.parameters()), theta, 2)
    found = {column: monitor.history[column][0] for column in row}
    assert found == {column: pytest.approx(value, rel=1e-8) for column, value in row.items()}


def test_rows_are_of_the_basis_in_use_when_it_serves_for_several_steps() -> None:
    model, _, subspace = make(refresh=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(6):
        train(model, optimizer)
    sharpness, products = monitor.history["sharpness"], monitor.history["products"]
    assert sharpness[0] == sharpness[1] == sharpness[2] != sharpness[3] == sharpness[5]
    assert [count > 0 for count in products] == [True, False, False] * 2
    assert monitor.history["gradients"] == [1] * 6
    assert len(set(monitor.history["loss"])) == 6


# Which steps make a row.


@pytest.mark.parametrize("every", [1, 2, 3, 7, 20])
def test_every_nth_step_makes_a_row_and_others_ask_nothing(every: int) -> None:
    model, operator, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace, every=every)
    asked = []
    for t in range(10):
        before = copy.copy(operator.stats)
        train(model, optimizer)
        if operator.stats != before:
            asked.append(t)
    assert monitor.history["step"] == asked == list(range(0, 10, every))


def test_a_step_with_all_rates_zero_is_no_step() -> None:
    model, operator, subspace = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace, every=2)
    for lr in (0.0, 0.01, 0.0, torch.tensor(0.0), 0.01, 0.0, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        before = operator.stats.products
        train(model, optimizer)
        assert lr or operator.stats.products == before
    assert monitor.history["step"] == [0, 2]


def test_one_rate_above_zero_is_a_step() -> None:
    model, _, subspace = make()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    monitor = so.Monitor(optimizer, subspace)
    train(model, optimizer)
    assert monitor.history["step"] == [0]


def test_two_optimizers_make_one_row_a_round() -> None:
    """Between θ before the first and θ after the last, whichever of them begins."""
    model, _, subspace = make()
    first, *others = model.parameters()
    sgd = torch.optim.SGD([first], lr=0.01, momentum=0.9)
    adam = torch.optim.Adam(others, lr=0.02)
    monitor = so.Monitor(
        [sgd, adam], subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(3)]
    )
    path = [flat(model.parameters())]
    for order in ((sgd, adam), (adam, sgd), (sgd, adam)):
        train(model, *order)
        path.append(flat(model.parameters()))
    assert monitor.history["step"] == [0, 1, 2]
    assert subspace.stats.refreshes == 3
    for t in range(3):
        row = dense_row(model, path[t], path[t + 1], path[0], 2)
        found = {column: monitor.history[column][t] for column in row}
        assert found == {c: pytest.approx(v, rel=1e-8, abs=1e-12) for c, v in row.items()}


def test_checkpoints_of_fresh_optimizers_make_no_row() -> None:
    """torch prepares them one after the other, each with a step at rate zero: still no round."""
    model, _, subspace = make()
    first, *others = model.parameters()
    optimizers = torch.optim.SGD([first], lr=0.01, momentum=0.9), torch.optim.Adam(others, lr=0.02)
    monitor = so.Monitor(optimizers, subspace)
    get_optimizer_state_dict(model, list(optimizers))
    assert monitor.history["step"] == []
    assert subspace.stats.refreshes == 0
    train(model, *optimizers)
    assert monitor.history["step"] == [0]


def shift(model: nn.Module) -> None:
    """As a checkpoint that is loaded would."""
    for p in model.parameters():
        p.data.mul_(0.5)


def test_a_step_that_raised_leaves_the_next_row_right() -> None:
    """After an error in the closure the loop is resumed, from other parameters."""
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(3)]
    )

    def closure() -> float:
        raise MemoryError

    train(model, optimizer)
    start = flat(Quartic().parameters())
    with pytest.raises(MemoryError):
        optimizer.step(closure)
    shift(model)
    theta = flat(model.parameters())
    train(model, optimizer)
    row = dense_row(model, theta, flat(model.parameters()), start, 2)
    found = {column: monitor.history[column][-1] for column in row}
    assert found == {column: pytest.approx(value, rel=1e-8) for column, value in row.items()}
    assert len(monitor.history["step"]) == 2


def test_a_refresh_that_raised_costs_its_row_alone() -> None:
    """Training goes on, with one warning until a row can be measured again."""
    model, operator, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace)
    operator.failure = RuntimeError("out of memory")
    theta = flat(model.parameters())
    with pytest.warns(so.LogWarning, match=r"step 0 is NaN: out of memory \(RuntimeError\)"):
        train(model, optimizer)
    train(model, optimizer)  # another warning would be an error here
    assert not torch.equal(flat(model.parameters()), theta)
    operator.failure = None
    train(model, optimizer)
    assert monitor.history["step"] == [0, 1, 2]
    assert [math.isnan(loss) for loss in monitor.history["loss"]] == [True, True, False]


# Attached and detached.


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_detached_it_asks_nothing_and_keeps_its_history() -> None:
    model, operator, subspace = make()
    first, *others = model.parameters()
    optimizers = torch.optim.SGD([first], lr=0.01), torch.optim.Adam(others, lr=0.02)
    monitor = so.Monitor(optimizers, subspace)
    train(model, *optimizers)
    monitor.detach()
    products = operator.stats.products
    train(model, *optimizers)
    monitor.detach()  # once more does no harm
    assert operator.stats.products == products
    assert [hooks(o) for o in optimizers] == [0, 0]
    assert monitor.history["step"] == [0]


def test_as_a_context_it_detaches_also_after_an_error() -> None:
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(KeyError), so.Monitor(optimizer, subspace) as monitor:  # noqa: PT012
        assert hooks(optimizer) == 2
        train(model, optimizer)
        raise KeyError
    assert hooks(optimizer) == 0
    train(model, optimizer)
    assert monitor.history["step"] == [0]


def test_monitors_do_not_disturb_each_other() -> None:
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inner, outer = so.Monitor(optimizer, subspace), so.Monitor(optimizer, subspace, every=2)
    for _ in range(4):
        train(model, optimizer)
    for column, values in outer.history.items():
        if column not in ("gradients", "products"):  # who asks first pays
            assert str(values) == str(inner.history[column][::2])


# Out of the house.


def recorded(steps: int = 3) -> so.Monitor:
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(1)]
    )
    for _ in range(steps):
        train(model, optimizer)
    return monitor


NAMES = [c for c in COLUMNS if "eigenvalues" not in c]
EIGENVALUES = ["eigenvalue_1", "eigenvalue_2", "next_eigenvalue_1"]


def assert_table(rows: Iterator[dict[str, Any]], history: dict[str, list[Any]]) -> None:
    """Each number is in the table without loss; what JSON writes as null is NaN."""
    count = 0
    for t, row in enumerate(rows):
        assert list(row) == [*NAMES, *EIGENVALUES]
        values = [math.nan if row[name] is None else float(row[name]) for name in row]
        lists = [*history["eigenvalues"][t], *history["next_eigenvalues"][t]]
        expected = [*(history[column][t] for column in NAMES), *lists]
        assert values == [pytest.approx(v, rel=0, abs=0, nan_ok=True) for v in expected]
        count += 1
    assert count == len(history["step"])


@pytest.mark.parametrize("kind", [Path, str])
def test_to_csv_writes_the_history_without_loss(tmp_path: Path, kind: Any) -> None:
    monitor = recorded()
    monitor.to_csv(kind(tmp_path / "run.csv"))
    with (tmp_path / "run.csv").open(newline="", encoding="utf-8") as file:
        assert_table(iter(csv.DictReader(file)), monitor.history)


def test_to_csv_without_rows_writes_the_names(tmp_path: Path) -> None:
    recorded(0).to_csv(tmp_path / "run.csv")
    assert (tmp_path / "run.csv").read_text().split() == [",".join([*NAMES, *EIGENVALUES])]


@pytest.mark.parametrize("write", ["to_csv", "plot"])
def test_a_path_that_cannot_be_is_refused_before_anything_is_drawn(
    write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn for nothing")

    monkeypatch.setattr("subspace_optim.diagnostics.plots.dashboard", drawn)
    monitor = recorded()
    with pytest.raises(so.ArgumentError, match=r"^path is .*no such folder.* Make its folder, or"):
        getattr(monitor, write)(tmp_path / "missing" / "run.csv")
    with pytest.raises(so.ArgumentError, match=r"^path is .*a folder.* Add the name of the file"):
        getattr(monitor, write)(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = recorded()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(so.ArgumentError, match=r"run\.csv \(No space left on device\)'"):
        monitor.to_csv(tmp_path / "run.csv")


def test_to_frame_holds_the_history() -> None:
    monitor = recorded()
    frame = monitor.to_frame()
    assert frame["step"].tolist() == [0, 1, 2]
    assert_table(iter(frame.to_dict("records")), monitor.history)
    assert len(recorded(0).to_frame()) == 0


def test_without_pandas_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = recorded(1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'subspace_optim\[plots\]'"):
        monitor.to_frame()


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "^every is 0, but must be an integer of at least 1"),
        ({"every": 1.5}, "^every is 1.5, but must be an integer of at least 1"),
        ({"every": True}, "^every is True, but must be an integer of at least 1.* Or a function"),
        ({"measures": so.measures.next_eigenvalues(0)}, "^n of next_eigenvalues is 0, .* 1 to 7"),
        ({"measures": so.measures.next_eigenvalues(8)}, "^n of next_eigenvalues is 8, .* 1 to 7"),
        (
            {"measures": [so.measures.preconditioned_sharpness()]},
            r"^measures is 'preconditioned_sharpness\(\) of SGD', but must be that of Adam",
        ),
        ({"measures": []}, "^measures is 'empty', but must be at least one measure"),
        ({"measures": "loss"}, "^measures is 'loss', but must be a measure of subspace_optim"),
        ({"measures": so.measures.update}, r"^measures is 'update', .* Call the function: "),
        ({"log": 3}, "^log is 'int', but must be a path that ends in .csv or .jsonl"),
        ({"log": "run.txt"}, "^log is 'run.txt', but must be a path that ends"),
        ({"log": [print, None]}, "^log is 'NoneType', but must be a path"),
        ({"log": "no/such/folder/run.csv"}, r"^log is 'no/such/folder/run.csv \(no such fold"),
        ({"optimizer": nn.Linear(2, 2).parameters()}, "^optimizer is 'Parameter', but must be a"),
        ({"optimizer": []}, "^optimizer is 'an empty sequence', but must be at least one"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
            "^optimizer is 'of another model', but must be .* Build operator and subspace from",
        ),
        ({"source": None}, "^source is 'NoneType', but must be a subspace, such as Dominant"),
        ({"source": nn.Linear(2, 2)}, "^source is 'Linear', but must be a subspace, such as"),
    ],
)
def test_a_bad_argument_is_named_and_no_hook_is_left(options: dict[str, Any], message: str) -> None:
    model, operator, subspace = make()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"optimizer": own, "source": subspace} | options
    with pytest.raises(so.ArgumentError, match=message):
        so.Monitor(**arguments)
    given = arguments["optimizer"]
    assert hooks(own) == 0
    assert not isinstance(given, torch.optim.Optimizer) or hooks(given) == 0
    assert operator.stats.products == 0


def test_one_optimizer_of_another_model_among_several_is_named() -> None:
    """It would be waited for in each round, though it never moves what is measured."""
    model, _, subspace = make()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(so.ArgumentError, match="of another model"):
        so.Monitor([own, stranger], subspace)


@pytest.mark.parametrize("value", [None, 3])
def test_what_is_neither_an_optimizer_nor_a_sequence_is_named(value: Any) -> None:
    with pytest.raises(so.ArgumentError, match=r"^optimizer is "):
        so.Monitor(value, make()[2])


def test_the_cases_are_well_conditioned() -> None:
    """The dense rows divide by this gap."""
    assert relative_gap(Quartic().hessian(flat(Quartic().parameters())), 2) > 0.01


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("kind", ["not finite", "raises", "no gradient"])
def test_steps_that_move_nothing_count_no_more_with_a_monitor(kind: str, every: int) -> None:
    """With refresh=3 a step that was counted twice would bring the next basis forward."""
    ends = []
    for watched in (False, True):
        model, _, subspace = make(refresh=3)
        cls = so.DomSAM if kind == "not finite" else so.BulkSGD
        optimizer = cls(model.parameters(), lr=0.05, subspace=subspace)
        if watched:
            so.Monitor(optimizer, subspace, every=every)
        failing = [False]

        def closure(
            model: Any = model, optimizer: Any = optimizer, failing: list[bool] = failing
        ) -> Any:
            optimizer.zero_grad()
            if failing[0] and kind == "raises":
                raise RuntimeError("interrupted")
            loss = model()
            loss.backward()
            if failing[0] and kind == "not finite":
                next(model.parameters()).grad.view(-1)[0] = torch.nan
            if failing[0] and kind == "no gradient":
                optimizer.zero_grad()
            return loss

        for t in range(8):
            failing[0] = t in (2, 4)
            with suppress(RuntimeError):
                optimizer.step(closure)
        ends.append((flat(model.parameters()), subspace.stats.refreshes, subspace.clock))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
