"""Where the time of a solve goes, and long trajectories: what they compute beside times."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import subspace_optim as so
from benchmarks.speed.models import in_mode, measure, parts
from benchmarks.speed.runs import Sample
from benchmarks.speed.tables import models as models_table
from benchmarks.speed.tables import trajectories as trajectories_table
from benchmarks.speed.trajectories import follow, true_sine
from benchmarks.speed.trajectories import measure as measure_trajectory
from tests.benchmarks.small import small_problem


@pytest.fixture
def problem():
    made = small_problem(nn.BatchNorm1d(8))
    made.model.eval()
    return made


def console_text(table):
    console = Console(width=150, record=True, quiet=False, file=io.StringIO())
    console.print(table)
    return console.export_text()


def ticking(function):
    """A timer for which each call takes a second, beside those inside of it."""
    ticking.now += 1
    start = ticking.now
    result = function()
    ticking.now += 1
    return ticking.now - start, result


ticking.now = 0


def test_parts_are_graph_products_and_the_rest(problem):
    """By a clock that ticks at each call: one graph, a block of products each two ticks."""
    found = parts(problem, 3, ticking)
    seconds = found["seconds"]
    assert sum(seconds[name] for name in ("graph", "products", "arithmetic")) == seconds["solve"]
    assert sum(found["share"].values()) == pytest.approx(1.0)
    plain = so.DominantSubspace(problem.hessian(), 3)
    plain.refresh()
    assert found["products"] == plain.stats.products
    assert seconds["graph"] == 1  # once, in the first block of products
    assert seconds["products"] > 1


def test_a_mode_is_left_with_its_buffers(problem):
    norm = problem.model[1]
    before = norm.running_mean.clone()
    with in_mode(problem, "train"):
        assert norm.training
        problem.gradient()
        assert not torch.equal(norm.running_mean, before)
    assert not norm.training
    assert torch.equal(norm.running_mean, before)


def test_training_mode_is_another_matrix_and_peers_are_left_out_where_they_are_not(problem):
    def largest(mode):
        found = measure(problem, 3, 1, mode, Console(quiet=True))
        assert found["mode"] == mode
        table = found["cold"]["solvers"]
        assert table["subspace_optim"]["reached"]
        assert set(table) == {"subspace_optim", "hessian-eigenthings", "curvlinops + eigsh"}
        if all("left_out" in row for name, row in table.items() if name != "subspace_optim"):
            assert found["ours_over_faster_peer"] is found["met"] is None
        return found

    both = {mode: largest(mode) for mode in ("eval", "train")}
    shown = console_text(models_table("small", both))
    assert "where a cold solve spends its time" in shown
    assert shown.count("subspace_optim") == 2


def test_the_true_sine_of_a_turned_basis(problem):
    exact = so.DominantSubspace(problem.hessian(), 3, tol=1e-5, refresh=1).refresh()
    generator = torch.Generator().manual_seed(1)
    outside = exact.project_out(torch.randn(problem.size, generator=generator))
    outside /= outside.norm()
    turned = exact.vectors.clone()
    turned[1] = 0.8 * turned[1] + 0.6 * outside
    row = true_sine(problem, 3, Sample(7, problem.theta(), turned, None, 0.7))
    assert row["true_sine"] == pytest.approx(0.6, abs=1e-3)
    assert (row["step"], row["estimate"]) == (7, 0.7)
    assert row["last_eigenvalue"] > row["next_eigenvalue"]
    assert row["largest_eigenvalue"] == pytest.approx(float(exact.eigenvalues[0]), rel=1e-4)


def test_a_trajectory_is_that_of_the_optimizer_and_is_sampled_evenly(problem):
    run = follow(problem, 2, 6, 3)
    assert [sample.step for sample in run.samples] == [1, 3, 5]
    ended = problem.theta()
    problem.move_to(0)
    sgd = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    for step in range(6):
        problem.step(sgd, step)
    assert torch.equal(problem.theta(), ended)


def test_what_a_trajectory_tells_follows_from_its_rows(problem):
    found = measure_trajectory(problem, 2, 4, 2, make=torch.optim.AdamW, lr=1e-3)
    rows = found["samples"]
    assert len(rows) == 2
    assert found["above_estimate"] == sum(r["true_sine"] > r["estimate"] for r in rows)
    assert found["largest_sine"] == max(r["true_sine"] for r in rows)
    assert found["stats"]["products"] > 0
    shown = console_text(trajectories_table("small", found))
    assert all(f"{row['true_sine']:.4f}" in shown for row in rows)
