"""Measures: a user's own, two that ask for the same, and whose source is anything."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim import measures
from tests.diagnostics.trainings import STABILITY, Setting, by_products


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
