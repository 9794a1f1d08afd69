"""What the speed comparison says of a monitor on a sample: its cost, and if its errors hold."""

import math

import pytest
import torch
from rich.console import Console

import subspace_optim as so
from benchmarks.losses import mse
from benchmarks.speed.monitor_errors import COLUMNS, SHARES, coverage, summary
from benchmarks.speed.monitoring import BARS, WATCHING, spaced
from benchmarks.speed.problems import Problem
from benchmarks.speed.tables import TABLES
from tests.clusters import clustered, network
from tests.dense import dense_curvature, supervised


@pytest.fixture
def problem():
    """A network with three outliers in its spectrum, and examples in no order."""
    x, y = clustered(400)
    made = Problem("small", network(), x, y, 3, 0.05)
    made.states[0] = made.theta()
    return made


def test_a_summary_is_that_of_the_draws_that_told_anything():
    told = [(1.0, 0.4), (2.0, 0.6), (3.0, 0.2), (math.nan, math.nan)]
    found = summary(1.9, told)
    assert found["told"] == 0.75
    assert found["mean"] == 2.0
    assert found["deviation"] == pytest.approx(math.sqrt(2 / 3))
    assert found["error"] == 0.4
    assert found["covered"] == pytest.approx(1 / 3)  # 0.9 of 0.8 is outside, and 1.1 of 0.4
    nothing = summary(1.0, told[3:])
    assert (nothing["told"], nothing["covered"], nothing["mean"]) == (0, None, None)


def test_the_truth_is_that_of_all_data_with_the_step_that_is_next(problem):
    late = 20
    found = coverage(problem, 3, late, draws=4)
    assert found["draws"] == 4
    assert [row["column"] for row in found["rows"]] == [*COLUMNS] * (2 * len(SHARES))
    assert {row["state"] for row in found["rows"]} == {0, late}
    problem.move_to(late)
    gradient = dense_curvature(problem.model, supervised(mse), [(problem.x, problem.y)]).gradient
    basis = so.DominantSubspace(problem.hessian(), 3, sample="auto").update()
    theta = problem.theta()
    problem.step(torch.optim.SGD(problem.model.parameters(), lr=problem.lr), late)
    update = problem.theta() - theta
    outside = basis.project_out(gradient)
    truth = {row["column"]: row["truth"] for row in found["rows"] if row["state"] == late}
    assert truth["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    expected = float(-(update @ outside) / (outside @ outside))
    assert truth["bulk_lr"] == pytest.approx(expected, rel=1e-4)


def test_rows_cost_what_they_are_measured_to_and_the_first_is_left_out(problem):
    found = spaced(problem, 3, 5, (1, 4), rows=2)
    for every, ways in found["spaced"].items():
        assert list(ways) == list(WATCHING)
        for row in ways.values():
            assert len(row["row_seconds"]) == len(row["examples"]) == 2
            one, rows = row["step_seconds"], row["row_seconds"]
            expected = 1 + (sum(rows) / 2 - one) / (every * one)
            assert row["slowdown"] == pytest.approx(expected)
    assert found["spaced"][4]["all data"]["gradients"] >= 1


def test_the_tables_hold_what_was_measured(problem):
    overheads = {name: [1.0] for name in BARS} | {"bars": BARS, "met": dict.fromkeys(BARS, True)}
    found = overheads | {"steps": 4, "coverage": coverage(problem, 3, 5, draws=2)}
    found |= spaced(problem, 3, 5, (2,), rows=2)
    console = Console(width=200, record=True)
    console.print(TABLES["monitor"]("small", found))
    text = console.export_text()
    assert "rows far apart" in text
    assert "What 2 samples tell" in text
    for name in (*WATCHING, *COLUMNS):
        assert name in text
