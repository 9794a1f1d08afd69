"""What the speed comparison computes beside times: checks, statistics, the recipe, files."""

import json

import numpy as np
import pytest
import torch

from benchmarks.losses import mse
from benchmarks.speed.__main__ import Results, _parser
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.products import MeteredHessian
from benchmarks.speed.recipe import recipe
from benchmarks.speed.reference import Reference
from benchmarks.speed.runs import Scenario, agreement, train
from benchmarks.speed.scaling import exponent
from benchmarks.speed.timing import in_turn, ratios, spread
from tests.benchmarks.small import small_problem
from tests.dense import dense_curvature, supervised


@pytest.fixture
def problem():
    return small_problem(lr=0.1)


def dense(problem):
    """Eigenvalues descending and eigenvectors as rows of the dense float64 Hessian."""
    double = (problem.x.double(), problem.y)
    matrix = dense_curvature(problem.model, supervised(mse), [double]).hessian
    values, vectors = torch.linalg.eigh(matrix)
    return matrix, values.flip(0), vectors.T.flip(0)


def test_spread_and_ratios_are_round_by_round():
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0]) == [2.0, 3.0]
    found = spread([3.0, 1.0, 2.0])
    assert (found.median, found.smallest, found.largest) == (2.0, 1.0, 3.0)
    assert str(found) == "2 (1 to 3)"
    assert str(spread([1.0])) == "1"


def test_functions_are_timed_in_turn_after_a_warm_up():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_reference_is_the_dense_matrix_and_its_top_pairs(problem):
    matrix, values, vectors = dense(problem)
    reference = Reference(problem, 3)
    v = torch.randn(problem.size, dtype=torch.float64)
    torch.testing.assert_close(reference.product(v), matrix @ v)
    torch.testing.assert_close(reference.eigenvalues, values[:3])
    assert reference.sine(vectors[:3]) < 1e-6
    assert reference.residual < 1e-5


def test_check_tells_residual_sine_and_eigenvalue_error_of_a_rotated_answer(problem):
    """A rotation of v_3 towards v_4 by an angle whose sine is s has all three in closed form."""
    _, values, vectors = dense(problem)
    sine = 0.1
    answer = vectors[:3].clone()
    answer[2] = (1 - sine**2) ** 0.5 * vectors[2] + sine * vectors[3]
    check = Reference(problem, 3).check(values[:3], answer)
    residual = sine * abs(values[2] - values[3]) / values[0]
    assert check.sine == pytest.approx(sine, rel=1e-4)
    assert check.residual == pytest.approx(float(residual), rel=1e-3)
    assert check.eigenvalues < 1e-8
    shifted = Reference(problem, 3).check(values[:3] + 0.01 * values[0], 5 * vectors[:3])
    assert shifted.eigenvalues == pytest.approx(0.01, rel=1e-4)
    assert shifted.residual == pytest.approx(0.01, rel=1e-3)


def test_recipe_finds_the_pairs_of_largest_magnitude(problem):
    matrix, values, _ = dense(problem)
    found, vectors, products = recipe(problem, 3)
    largest = values[values.abs().argsort(descending=True)[:3]].sort(descending=True).values
    np.testing.assert_allclose(found, largest, rtol=1e-4)
    images = vectors.double() @ matrix
    torch.testing.assert_close(images, found.double()[:, None] * vectors, atol=1e-3, rtol=0)
    assert products > 3


def test_recipe_takes_the_mean_over_all_batches(problem, monkeypatch):
    whole = recipe(problem, 2)[0]
    monkeypatch.setattr("benchmarks.speed.recipe._BATCH", 7)
    torch.testing.assert_close(recipe(problem, 2)[0], whole)


def test_states_are_those_of_sgd_and_come_back(problem):
    start = problem.theta()
    problem.move_to(4)
    later = problem.theta()
    sgd = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    problem.set_theta(start)
    for number in range(4):
        problem.step(sgd, number)
    torch.testing.assert_close(problem.theta(), later, rtol=0, atol=0)
    problem.move_to(0)
    assert torch.equal(problem.theta(), start)


def test_a_run_keeps_parameters_and_its_plain_twin_follows_them(problem):
    """A monitor changes nothing: the run with it ends where the plain one does."""
    import subspace_optim as so

    subspace = so.DominantSubspace(problem.hessian(), 2)
    scenario = Scenario("", 0, 6, "sgd", jump=5.0)
    run = train(problem, scenario, 0, 0.1, subspace, [1, 5])
    ended = problem.theta()
    train(problem, scenario, 0, 0.1, None)
    assert torch.equal(problem.theta(), ended)
    assert [sample.step for sample in run.samples] == [1, 5]
    sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    problem.move_to(0)
    problem.step(sgd, 0)
    assert torch.equal(run.samples[0].theta, problem.theta())


def test_agreement_of_estimates():
    found = agreement([(0.1, 0.2), (0.2, 0.3), (0.3, 0.29), (0.1, None)])
    assert found["true_below_estimate"] == pytest.approx(2 / 3)
    assert found["median_estimate_over_true"] == pytest.approx(1.5)
    assert found["rank_correlation"] == pytest.approx(0.5)
    assert set(agreement([(0.1, None)]).values()) == {None}


def test_exponent_of_a_power_law():
    assert exponent([1.0, 2.0, 8.0], [3.0, 12.0, 192.0]) == pytest.approx(2.0)


def test_peak_is_what_lives_at_the_same_time():
    def work():
        a = torch.zeros(1000)
        del a
        b = torch.zeros(500)
        return b + 1

    assert peak_bytes(work, torch.device("cpu")) == 4000


def test_metered_products_are_the_operator_s(problem):
    hessian = MeteredHessian(problem.model, mse, (problem.x, problem.y))
    v = torch.randn(problem.size)
    torch.testing.assert_close(hessian.matvec(v), problem.hessian().matvec(v))
    assert hessian.seconds > 0


def test_results_are_whole_and_without_nan(tmp_path):
    options = _parser().parse_args(["--output", str(tmp_path / "new" / "speed.json")])
    results = Results(options.output, options)
    results.data["models"]["mlp"] = {"value": float("nan")}
    results.write()
    read = json.loads(options.output.read_text())
    assert read["models"] == {"mlp": {"value": None}}
    assert {"machine", "versions", "finished"} <= set(read)
    assert [path.name for path in options.output.parent.iterdir()] == ["speed.json"]
