"""Measures: `stability()` against dense float64, a user's own, and what a failure leaves behind."""

from __future__ import annotations

import copy
import csv
import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import measures
from tests.diagnostics.test_monitor_traces import CASES, run
from tests.optim.naive import Landscape, flat, landscape

STABILITY = [
    "step",
    "update_sharpness",
    "gradient_sharpness",
    "predicted_change",
    "actual_change",
    "critical_sharpness",
    "critical_multiple",
    "critical_threshold",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "gradients",
    "products",
    "forwards",
]
Optimizers = list[torch.optim.Optimizer]


class Setting:
    """A small network in float64, its operator, and the same loss as a plain function."""

    def __init__(self, seed: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        for p in self.model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=random))
        self.x = torch.randn(12, 3, generator=random).double()
        self.y = torch.randn(12, 2, generator=random).double()
        self.operator = self.of(self.x, self.y)

    def of(self, x: Tensor, y: Tensor, **options: Any) -> so.HessianOperator:
        return so.HessianOperator(
            self.model, nn.functional.mse_loss, (x, y), verify=False, **options
        )

    def dense(self, x: Tensor, y: Tensor) -> Landscape:
        return landscape(self.model, nn.functional.mse_loss, x, y)

    def step(self, optimizers: Optimizers, loss_fn: Any = nn.functional.mse_loss) -> None:
        def closure() -> Tensor:
            for each in optimizers:
                each.zero_grad()
            loss = loss_fn(self.model(self.x), self.y)
            loss.backward()
            return loss

        if isinstance(optimizers[0], so.SAM | torch.optim.LBFGS):
            optimizers[0].step(closure)
            return
        closure()
        for each in optimizers:
            each.step()

    @property
    def theta(self) -> Tensor:
        return flat(self.model.parameters())


def one(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    return lambda s: [kind(s.model.parameters(), **options)]


def muon_and_adamw(s: Setting) -> Optimizers:
    matrices = [p for p in s.model.parameters() if p.dim() == 2]
    others = [p for p in s.model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02)]


def projected(kind: Any) -> Any:
    def build(s: Setting) -> Optimizers:
        subspace = so.DominantSubspace(s.operator, 2, refresh=1)
        return [kind(s.model.parameters(), lr=0.05, subspace=subspace)]

    return build


TRAINED: dict[str, Callable[[Setting], Optimizers]] = {
    "SGD": one(torch.optim.SGD, lr=0.1),
    "momentum": one(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": one(torch.optim.Adam, lr=0.02),
    "AdamW foreach": one(torch.optim.AdamW, lr=0.02, foreach=True),
    "AdamW fused": one(torch.optim.AdamW, lr=0.02, fused=True),
    "Muon and AdamW": muon_and_adamw,
    "SAM": one(so.SAM, lr=0.05, rho=0.05),
    "DomSGD": projected(so.DomSGD),
    "BulkSGD": projected(so.BulkSGD),
    "LBFGS": one(torch.optim.LBFGS, lr=0.1, max_iter=3),
}


def crossing(dense: Landscape, theta: Tensor, u: Tensor) -> float:
    """The first point of a grid of half a percent at which the loss is above where it was."""
    start, c = float(dense.loss(theta)), 0.02
    while float(dense.loss(theta + c * u)) <= start:
        c *= 1.005
        if c > 100:
            return math.nan
    return c


def expected_row(dense: Landscape, theta: Tensor, following: Tensor) -> dict[str, float]:
    g, H, u = dense.gradient(theta), dense.hessian(theta), following - theta
    return {
        "update_sharpness": float(u @ H @ u / (u @ u)),
        "gradient_sharpness": float(g @ H @ g / (g @ g)),
        "predicted_change": float(g @ u + u @ H @ u / 2),
        "actual_change": float(dense.loss(following) - dense.loss(theta)),
    }


def by_products() -> list[so.measures.Measure]:
    """The columns of stability(), exactly."""
    return [measures.directional_sharpness(), measures.critical_sharpness(), measures.thresholds()]


@pytest.mark.parametrize("name", TRAINED)
def test_stability_is_that_of_dense_matrices_and_of_a_fine_grid(name: str) -> None:
    s = Setting()
    dense, optimizers = s.dense(s.x, s.y), TRAINED[name](s)
    monitor = so.Monitor(optimizers, s.operator, measures=by_products())
    path = [s.theta]
    for _ in range(6):
        s.step(optimizers)
        path.append(s.theta)
    history, lr = monitor.history, optimizers[0].param_groups[0]["lr"]
    assert list(history) == STABILITY
    assert history["step"] == list(range(6))
    seen = 0
    for t in range(6):
        for column, value in expected_row(dense, path[t], path[t + 1]).items():
            assert history[column][t] == pytest.approx(value, rel=1e-8, abs=1e-10), (column, t)
        assert history["critical_threshold"][t] == pytest.approx(2 / lr)
        u = path[t + 1] - path[t]
        if dense.gradient(path[t]) @ u >= 0:
            assert history["critical_multiple"][t] == 0
            assert history["critical_sharpness"][t] == math.inf
            continue
        multiple = crossing(dense, path[t], u)
        if not math.isnan(multiple) and not math.isnan(history["critical_multiple"][t]):
            seen += 1
            assert history["critical_multiple"][t] == pytest.approx(multiple, rel=1 / 16)
            found = 2 / (history["critical_multiple"][t] * lr)
            assert history["critical_sharpness"][t] == pytest.approx(found)
        assert history["gradients"][t] == (2 if name == "SAM" else 1)  # SAM's edge is told before
        assert history["products"][t] == 2
        assert 2 <= history["forwards"][t] <= 9
    assert seen >= 3


@pytest.mark.parametrize("name", TRAINED)
def test_by_losses_the_curvatures_are_the_same_within_some_per_cent(name: str) -> None:
    """Central differences, as short as rounding allows."""
    s = Setting()
    dense, optimizers = s.dense(s.x, s.y), TRAINED[name](s)
    monitor = so.Monitor(optimizers, s.operator)  # stability() is the default of an operator
    path = [s.theta]
    for _ in range(6):
        s.step(optimizers)
        path.append(s.theta)
    history = monitor.history
    assert list(history) == STABILITY
    for t in range(6):
        row = expected_row(dense, path[t], path[t + 1])
        assert history["actual_change"][t] == pytest.approx(row["actual_change"], abs=1e-10)
        scale = max(abs(row["predicted_change"]), abs(row["actual_change"]))
        for column in ("update_sharpness", "gradient_sharpness"):
            close = pytest.approx(row[column], rel=0.1, abs=0.02)
            assert history[column][t] == close, (column, t)
        assert history["predicted_change"][t] == pytest.approx(
            row["predicted_change"], abs=0.1 * scale
        )
        assert history["products"][t] == 0
        assert 5 <= history["forwards"][t] <= (21 if t == 0 else 17)  # 4 tell the curvatures


@pytest.mark.parametrize("gradient", [True, False])
def test_by_losses_a_quadratic_is_exact_to_rounding(gradient: bool) -> None:
    """Linear least squares, whose Hessian is ``XᵀX/N``, twice over.

    A second difference is as short as rounding allows: about 64 times its bound, 8 times at least.
    """
    torch.manual_seed(1)
    model = nn.Linear(4, 1, bias=False).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    H = 2 * x.T @ x / 20
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    monitor = so.Monitor(optimizer, hessian, measures=measures.stability(gradient=gradient))
    for t in range(5):
        before = model.weight.detach().clone()[0]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        assert model.weight.grad is not None
        g = model.weight.grad.clone()[0]
        optimizer.step()
        u = model.weight.detach()[0] - before
        row = {column: values[t] for column, values in monitor.history.items()}
        assert row["update_sharpness"] == pytest.approx(float(u @ H @ u / (u @ u)), rel=1 / 16)
        assert row["predicted_change"] == pytest.approx(float(g @ u + u @ H @ u / 2), rel=1 / 16)
        assert row["predicted_change"] == pytest.approx(row["actual_change"], rel=1 / 16)
        assert ("gradient_sharpness" in row) is gradient
        if gradient:
            assert row["gradient_sharpness"] == pytest.approx(
                float(g @ H @ g / (g @ g)), rel=1 / 16
            )
        assert row["gradients"] == (1 if gradient else 0)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_stability_leaves_no_trace_in_the_training(name: str, way: str) -> None:
    """Dropout, batch norm, power iteration; accumulation, and a step that a scaler skips."""
    plain, states, _ = run(name, way, None)
    observed, others, monitor = run(name, way, lambda o, s: so.Monitor(o, s.operator))
    torch.testing.assert_close(plain, observed, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(states, others, rtol=0, atol=0)
    assert all(map(math.isfinite, monitor.history["update_sharpness"]))


def test_the_relative_critical_sharpness_is_of_the_other_loss() -> None:
    s = Setting()
    other = s.of(s.x[5:7], s.y[5:7])
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    relative = measures.critical_sharpness(loss_of=other)
    monitor = so.Monitor(optimizer, s.operator, measures=[measures.update(), relative])
    theta = s.theta
    s.step([optimizer])
    multiple = crossing(s.dense(s.x[5:7], s.y[5:7]), theta, s.theta - theta)
    assert abs(multiple / crossing(s.dense(s.x, s.y), theta, s.theta - theta) - 1) > 0.1
    assert monitor.history["critical_multiple"] == [pytest.approx(multiple, rel=1 / 16)]


def test_the_loss_of_another_model_is_refused() -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    with pytest.raises(so.ArgumentError, match=r"^loss_of is 'of other parameters', but must be"):
        so.Monitor(optimizer, s.operator, measures=measures.critical_sharpness(Setting().operator))


def test_rates_that_differ_leave_the_multiple() -> None:
    s = Setting()
    first, *others = s.model.parameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.05}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    monitor = so.Monitor(optimizer, s.operator)
    s.step([optimizer])
    groups = optimizer.param_groups
    groups[1]["lr"] = groups[0]["lr"] = 0.1
    s.step([optimizer])
    schedule.step()
    s.step([optimizer])
    history = monitor.history
    assert [math.isnan(value) for value in history["critical_sharpness"]] == [True, False, False]
    assert history["critical_threshold"][1:] == pytest.approx(
        [20, 2 / optimizer.param_groups[0]["lr"]]
    )
    assert all(multiple > 0 for multiple in history["critical_multiple"])


# A user's own.


@dataclass
class Norms(measures.Measure):
    """Ten lines."""

    power: int = 1
    columns = ("cube", "gradients_of_all")
    lists = {"gradients_of_all": 2}  # noqa: RUF012 (as a user would)

    def after(self, step: measures.Step) -> dict[str, Any]:
        norm = step.gradient.norm()
        return {"cube": norm**3, "gradients_of_all": [float(norm), self.power]}


class Chi(measures.Measure):
    """One that asks for the basis."""

    columns = ("chi",)

    def before(self, step: measures.Step) -> dict[str, Any]:
        return {"chi": so.diagnostics.alignment(step.gradient, step.basis)}


class Late(Chi):
    """One that asks too late."""

    def before(self, step: measures.Step) -> dict[str, Any]:
        return {}

    def after(self, step: measures.Step) -> dict[str, Any]:
        return super().before(step)


class Unknown(measures.Measure):
    """One that returns what it has not named."""

    columns = ("named",)

    def after(self, step: measures.Step) -> dict[str, Any]:
        return {"named": 1, "other": 2}


def test_a_measure_of_ones_own_has_its_columns_everywhere(tmp_path: Path) -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    logs = [tmp_path / "run.csv", tmp_path / "run.jsonl"]
    taken: list[dict[str, Any]] = []
    monitor = so.Monitor(
        optimizer, s.operator, measures=[Norms(2), Norms(2)], log=[*logs, taken.append]
    )
    g = s.dense(s.x, s.y).gradient(s.theta)
    s.step([optimizer])
    names = ["step", "cube", "gradients", "products", "forwards"]
    names += ["gradients_of_all_1", "gradients_of_all_2"]
    assert monitor.history["cube"] == [pytest.approx(float(g.norm() ** 3))]
    assert monitor.history["gradients_of_all"] == [[pytest.approx(float(g.norm())), 2]]
    assert next(iter(monitor.history)) == "step"
    assert list(monitor.to_frame().columns) == list(taken[0]) == names
    with logs[0].open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == names
    assert json.loads(logs[1].read_text()) == taken[0] == monitor.rows()[0]
    monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0


def test_a_plot_of_stability_alone_works(tmp_path: Path) -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, s.operator)
    monitor.plot(tmp_path / "empty.png")
    for _ in range(3):
        s.step([optimizer])
    monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0


def test_what_two_measures_ask_for_is_computed_once() -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    several = [by_products(), by_products(), Norms(), measures.loss_and_gradient()]
    monitor = so.Monitor(optimizer, s.operator, measures=several)
    s.step([optimizer])
    assert monitor.history["products"] == [2]
    assert sum(list(monitor.history).count(column) for column in STABILITY) == len(STABILITY)
    # The gradient before the step, and its graph after it.
    assert monitor.history["gradients"][0] <= 2


@pytest.mark.parametrize(
    ("several", "message"),
    [
        ([Norms(1), Norms(2)], "Norms and Norms, both with a column 'cube'"),
        ([Chi(), Late()], "Chi and Late, both with a column 'chi'"),
    ],
)
def test_two_measures_of_one_column_are_refused(several: Any, message: str) -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    with pytest.raises(so.ArgumentError, match=message):
        so.Monitor(optimizer, s.operator, measures=several)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("measure", [Unknown(), Late()])
def test_a_measure_that_is_wrong_costs_a_row_of_nan_and_one_warning(measure: Any) -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    subspace = so.DominantSubspace(s.operator, 1)
    monitor = so.Monitor(optimizer, subspace, measures=measure)
    with pytest.warns(so.LogWarning, match="The row of step 0 is NaN"):
        s.step([optimizer])
    s.step([optimizer])  # another warning would be an error here
    assert all(map(math.isnan, monitor.history[measure.columns[0]]))
    assert monitor.history["step"] == [0, 1]


def test_the_basis_can_be_asked_for() -> None:
    s = Setting()
    subspace = so.DominantSubspace(s.operator, 2, tol=1e-10, refresh=1)
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, subspace, measures=Chi())
    dense, theta = s.dense(s.x, s.y), s.theta
    s.step([optimizer])
    V, g = torch.linalg.eigh(dense.hessian(theta)).eigenvectors[:, -2:], dense.gradient(theta)
    assert monitor.history["chi"] == [pytest.approx(float((V.T @ g).norm() / g.norm()), rel=1e-7)]


SOURCES: dict[str, Callable[[Setting], Any]] = {
    "DominantSubspace": lambda s: so.DominantSubspace(s.operator, 2),
    "GaussNewtonOperator": lambda s: so.GaussNewtonOperator(
        s.model, nn.functional.mse_loss, (s.x, s.y)
    ),
    "FiniteDifferenceHessian": lambda s: so.FiniteDifferenceHessian(
        s.model, nn.functional.mse_loss, (s.x, s.y)
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_is_any_operator_or_a_subspace_with_one(name: str) -> None:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    source = SOURCES[name](s)
    monitor = so.Monitor(optimizer, source, measures=by_products())
    theta, operator = s.theta, getattr(source, "operator", source)
    g = s.dense(s.x, s.y).gradient(theta)
    expected = float(g @ operator.matvec(g) / (g @ g))
    s.step([optimizer])
    close = pytest.approx(expected, rel=1e-6)
    assert monitor.history["gradient_sharpness"] == [close]
    assert monitor.history["update_sharpness"] == [close]  # a step of gradient descent
    assert monitor.history["critical_multiple"][0] > 0


# Taken up again.


def fresh(**options: Any) -> tuple[Setting, torch.optim.Optimizer, so.Monitor]:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.05, momentum=0.9)
    return s, optimizer, so.Monitor(optimizer, s.operator, **options)


@pytest.mark.parametrize("several", [measures.stability(), measures.critical_sharpness()])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_interrupted(several: Any) -> None:
    """Also where the next search depends on where the last one ended."""
    s, optimizer, whole = fresh(measures=several)
    for t in range(6):
        if t == 3:
            saved = copy.deepcopy(
                (s.model.state_dict(), optimizer.state_dict(), whole.state_dict())
            )
        s.step([optimizer])
    s, optimizer, resumed = fresh(measures=several)
    s.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for _ in range(3):
        s.step([optimizer])
    assert str(resumed.history) == str(whole.history)  # NaN too


@pytest.mark.parametrize(
    "others", [measures.critical_sharpness(), [measures.stability(), measures.update()], Norms()]
)
def test_a_state_of_other_measures_is_refused_before_anything_changed(others: Any) -> None:
    s, optimizer, monitor = fresh()
    s.step([optimizer])
    _, _, stranger = fresh(measures=others)
    before = str(monitor.state_dict())
    with pytest.raises(so.ArgumentError, match=r"^the loaded state is "):
        monitor.load_state_dict(stranger.state_dict())
    assert str(monitor.state_dict()) == before


# What a failure leaves behind.


class Fails(measures.Measure):
    """One that fails where it is told to, with graphs in memory."""

    columns = ("fails",)

    def __init__(self, where: str) -> None:
        self.where = where

    def before(self, step: measures.Step) -> dict[str, Any]:
        if self.where == "before":
            step.operator.matvec(step.gradient)
            raise RuntimeError("out of memory")
        return {}

    def after(self, step: measures.Step) -> dict[str, Any]:
        with step.at_start() as operator:
            operator.matvec(step.update)
            if self.where == "at_start":
                raise RuntimeError("out of memory")
            theta = step.theta + 0.5 * step.update
            if self.where == "along":
                with operator.at(theta):
                    raise RuntimeError("out of memory")
        if self.where == "after":
            raise RuntimeError("out of memory")
        return {"fails": 0}


@pytest.mark.parametrize("where", ["before", "after", "at_start", "along"])
def test_a_failure_costs_its_row_and_leaves_everything_in_its_place(where: str) -> None:
    plain = Setting()
    other = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, s.operator, measures=[measures.stability(), Fails(where)])
    memory = [p.data_ptr() for p in s.model.parameters()]
    with pytest.warns(so.LogWarning, match=r"step 0 is NaN: out of memory \(RuntimeError\)"):
        s.step([optimizer])
    s.step([optimizer])  # another warning would be an error here
    for _ in range(2):
        plain.step([other])
    assert torch.equal(s.theta, plain.theta)
    assert [p.data_ptr() for p in s.model.parameters()] == memory
    assert all(map(math.isnan, monitor.history["fails"]))
    assert not any(map(math.isnan, monitor.history["update_sharpness"]))  # that of the others
    assert monitor.history["step"] == [0, 1]
    assert monitor._step is None
    assert s.operator._point is None or not s.operator._point.kept
    s.operator.loss()  # it goes on
    assert s.operator.loss() == pytest.approx(float(s.dense(s.x, s.y).loss(s.theta)))


def test_nothing_of_a_step_is_held_after_it() -> None:
    seen: list[weakref.ref[Any]] = []

    class Watch(measures.Measure):
        columns = ("watch",)

        def after(self, step: measures.Step) -> dict[str, Any]:
            seen.extend([weakref.ref(step), weakref.ref(step.gradient), weakref.ref(step.theta)])
            return {}

    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, s.operator, measures=[measures.stability(), Watch()])
    s.step([optimizer])
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert math.isnan(monitor.history["watch"][0])
