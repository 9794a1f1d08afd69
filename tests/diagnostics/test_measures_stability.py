"""The measures of `stability()`, by products and by losses, against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim import measures
from tests.diagnostics.test_monitor_traces import CASES, run
from tests.diagnostics.trainings import (
    STABILITY,
    TRAINED,
    Setting,
    by_products,
    crossing,
    expected_row,
)


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
