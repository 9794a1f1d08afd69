"""Loggers that others write to as well: the right step, a prefix, and no steps of ours."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import subspace_optim as so
from tests.diagnostics.test_monitor_logs import watched


class Run:
    """A run of W&B: values wait for the next commit, and each commit is a step of the run."""

    def __init__(self) -> None:
        self.step = 0
        self.waiting: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None, **_: Any) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        assert step is None  # a step of the run is refused once it is past
        self.waiting |= values
        if commit:
            self.steps.append(self.waiting)
            self.waiting = {}
            self.step += 1


def module(run: Any) -> Any:
    """``wandb`` as a module, whose functions are those of the run."""
    return SimpleNamespace(run=run, define_metric=run and run.define_metric, log=run and run.log)


@pytest.mark.parametrize("given", [lambda run: run, module, lambda run: run.log])
def test_rows_join_the_steps_of_a_run_and_take_none_of_their_own(given: Any) -> None:
    run = Run()
    monitor, step = watched(log=given(run))
    for t in range(3):
        step()
        run.log({"loss": float(t)})
    assert run.axes == {"subspace/step": None, "subspace/*": "subspace/step"}
    assert [each["subspace/step"] for each in run.steps] == [0, 1, 2]
    assert [each["loss"] for each in run.steps] == [0.0, 1.0, 2.0]
    norms = [each["subspace/update_norm"] for each in run.steps]
    assert norms == monitor.history["update_norm"]


def test_no_row_is_lost_to_a_run_that_logs_seldom() -> None:
    run = Run()
    _, step = watched(log=run)
    for _ in range(3):
        step()
    run.log({"loss": 1.0})
    assert [each["subspace/step"] for each in run.steps] == [0, 1, 2]
    assert "loss" in run.steps[-1]


def test_wandb_without_a_run_is_told_before_anything_happens() -> None:
    wandb = SimpleNamespace(run=None, define_metric=print, log=print)
    with pytest.raises(so.ArgumentError, match=r"Call wandb\.init\(\) before\.$"):
        watched(log=wandb)


def with_method(rows: list[Any]) -> Any:
    """As ``mlflow`` and Lightning's loggers."""

    def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
        rows.append((step, metrics))

    return SimpleNamespace(log_metrics=log_metrics)


@pytest.mark.parametrize("given", [lambda owner: owner, lambda owner: owner.log_metrics])
def test_log_metrics_gets_the_step_and_what_is_finite(given: Any) -> None:
    rows: list[Any] = []
    monitor, step = watched(log=given(with_method(rows)), every=2)
    for _ in range(5):
        step()
    assert [number for number, _ in rows] == [0, 2, 4]
    for index, (_, metrics) in enumerate(rows):
        assert all(name.startswith("subspace/") for name in metrics)
        assert all(map(math.isfinite, metrics.values()))
        assert metrics["subspace/sharpness"] == monitor.history["sharpness"][index]
        assert metrics["subspace/eigenvalue_1"] == monitor.history["eigenvalues"][index][0]
        assert "subspace/sam_edge" not in metrics  # NaN: there is no SAM


def test_logging_gets_a_line(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.rows")
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hessian = so.HessianOperator(
        model, torch.nn.functional.mse_loss, (torch.randn(4, 3), torch.randn(4, 1))
    )
    so.Monitor(optimizer, hessian, measures=so.measures.update(), log=logger)
    torch.nn.functional.mse_loss(model(torch.ones(1, 3)), torch.ones(1, 1)).backward()
    with caplog.at_level(logging.INFO, logger="tests.rows"):
        optimizer.step()
    (record,) = caplog.records
    assert record.getMessage().startswith("step 0: subspace/update_norm ")
