"""The trainings that certificates are tried on, and how their outcomes are summed up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.speed.drift import BARS, EVENTS, Outcome, Problem, drawn, follow, measure, summary
from benchmarks.speed.tables import TABLES


def outcome(sines: list[float], estimates: list[float]) -> Outcome:
    steps = list(range(len(sines)))
    return Outcome(drawn(0), 50, sines, estimates, [1.0] * len(sines), steps, 7)


def test_every_optimizer_and_event_is_drawn() -> None:
    trainings = [drawn(seed) for seed in range(60)]
    assert {t.optimizer for t in trainings} == {drawn(seed).optimizer for seed in range(10)}
    assert {event for t in trainings for event in t.events.values()} == set(EVENTS)
    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize("seed", range(8))
def test_the_dense_matrix_is_that_of_the_loss_and_fits_its_gradient(seed: int) -> None:
    problem = Problem(drawn(seed))
    matrix = problem.hessian.matrix()
    torch.testing.assert_close(matrix, matrix.T)
    loss = problem.loss(full=True)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    torch.testing.assert_close(problem.hessian.gradient(), gradient)
    assert problem.hessian.loss() == pytest.approx(loss.item())
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed)).double()
    direction *= 1e-6 / direction.norm()
    vector, shifted = torch.split(direction, [p.numel() for p in problem.model.parameters()]), []
    for steps in (1, -2):
        with torch.no_grad():
            for p, v in zip(problem.model.parameters(), vector, strict=True):
                p.add_(v.view(p.shape), alpha=steps)
        shifted.append(problem.hessian.gradient())
    expected = matrix @ direction
    differences = (shifted[0] - shifted[1]) / 2
    assert float((differences - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("event", ["layer", "exchange", "noise", "load"])
def test_an_event_moves_the_parameters(event: str) -> None:
    problem = Problem(drawn(1))
    before = problem.hessian.theta
    earlier = {n: p + 1 for n, p in problem.model.state_dict().items()}
    problem.meet(event, earlier)
    assert not torch.equal(problem.hessian.theta, before)


def test_steps_are_counted_by_what_was_told_of_them() -> None:
    found = summary([outcome([0.01, 0.2, 0.3], [0.02, 0.04, 0.4]), outcome([0.04], [0.01])])
    assert (found["runs"], found["steps"], found["products"]) == (2, 4, 14)
    assert found["above_estimate"] == 0.5
    assert found["kept_beyond"] == 0.25
    assert found["worst_excess"] == pytest.approx(0.15)
    assert found["met"] == {"above_estimate": False, "kept_beyond": False, "worst_excess": True}
    assert found["median_estimate_over_true"] == pytest.approx((0.25 + 4 / 3) / 2)
    assert summary([])["met"]["kept_beyond"] is False, "nothing was measured"


def test_a_training_is_compared_with_the_truth_at_each_step() -> None:
    found = follow(drawn(4))
    assert found.steps == sorted(set(found.steps))
    assert len(found.steps) > 20
    assert found.counts["refreshes"] >= found.counts["cold"] >= 1
    assert np.mean(np.array(found.sines) <= np.array(found.estimates)) > 0.9


@pytest.mark.slow
def test_what_is_measured_is_printed() -> None:
    result = measure(2)
    assert set(result["bars"]) == set(BARS)
    assert sum(row["runs"] for row in result["groups"]["activation"].values()) == 2
    console = Console(width=200)
    with console.capture() as captured:
        console.print(TABLES["drift"]("", result))
    assert "all" in captured.get()
