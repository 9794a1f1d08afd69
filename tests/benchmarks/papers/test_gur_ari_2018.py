"""Each run, claim and picture of `gur_ari_2018`, at sizes that take seconds."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy.special import lambertw
from scipy.stats import norm
from torch import nn

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.gur_ari_2018 import analysis, measures, pictures, runs, solvable
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.reproduction import Job
from benchmarks.papers.training import Problem, performance, top_of
from tests.benchmarks.papers.tiny import claim_of

PAPER = PAPERS["gur_ari_2018"]

claim = functools.partial(claim_of, PAPER)


@pytest.fixture(scope="module")
def measured(tiny):
    return functools.partial(tiny, "gur_ari_2018")


# --- as published ------------------------------------------------------------------------------


def test_the_gradient_of_the_solvable_model_is_a_quarter_of_what_is_printed():
    run = PAPER.run("two-samples")
    # They depend on neither the dimension nor, at late times, on how late it is.
    raw = run.measure(Job(), **run.size("small") | {"dimension": 20, "steps": 3000})
    names = ("gradient-corrected", "hessian", "top-subspace-is-fixed", "trajectory")
    for name in (f"toy-{each}" for each in names):
        assert claim(name).holds(claim(name).measure(raw)), name
    assert claim("toy-gradient-as-printed").measure(raw) == pytest.approx(3, abs=0.1)
    assert not claim("toy-gradient-as-printed").holds(raw["gradient_printed"][-1])
    np.testing.assert_allclose(raw["lead"], raw["flow"], atol=0.1)  # the rate
    assert raw["trajectory"][-1] < 0.05


# --- what a run is told ------------------------------------------------------------------------


def test_the_rows_of_table_1_are_different_trainings(measured):
    names = ("softmax", "fc-softplus", "fc-slow", "fc-batch-256", "fc-random", "convnet-adam")
    assert len({measured(name)["loss"][-1] for name in names}) == len(names)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("softmax", {nn.Linear}),
        ("fc", {nn.Linear, nn.ReLU}),
        ("fc-softplus", {nn.Linear, nn.Softplus}),
        ("convnet", {nn.Linear, nn.ReLU, nn.Conv2d, nn.MaxPool2d}),
        ("convnet-dropout", {nn.Linear, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.Dropout}),
        ("resnet", {nn.Linear, nn.ReLU, nn.Conv2d, nn.BatchNorm2d}),
    ],
)
def test_the_models_take_their_images(model, kinds):
    data = measures.images(Job(), "mnist-5k", 10, 0, factor=2)
    net = measures.build(Job(), model, data, 2)
    assert net(data.x_train).shape == (10, 10)
    assert {type(layer) for layer in net.modules()} >= kinds


def test_the_mean_is_over_the_last_steps(measured):
    raw = measured("softmax")
    assert raw["at"] == [0, 2, 4, 6]
    assert raw["mean_overlap"] == pytest.approx(np.mean(raw["overlap"][1:]), rel=1e-5)
    assert raw["saved"] == [0, 6]


def test_overlaps_of_the_saved_subspaces(measured):
    raw = measured("fc")
    for d in (2, 10, 20):
        matrix = np.array(raw["preserved"][str(d)])
        assert matrix.shape == (4, 4)
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
        np.testing.assert_allclose(matrix, matrix.T)
    # Tr(P P') of the top 20 is at least that of the top 10 and of the next 10.
    both, top, following = raw["preserved"]["20"], raw["preserved"]["10"], raw["next"]
    assert (2 * np.array(both) >= np.array(top) + np.array(following) - 1e-3).all()
    assert raw["repeat"]["top"] == pytest.approx(1, abs=0.05)


def test_f_top_is_the_sum_of_the_fractions(measured):
    raw = measured("fc-five")
    assert raw["k"] == 5
    for f_top, fractions in zip(raw["f_top"], raw["fractions"], strict=True):
        assert len(fractions) == 10
        assert f_top == pytest.approx(math.fsum(fractions[:5]), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "classes"),
    [("spectrum", 10), ("spectrum-random", 10), ("spectrum-parity", 2), ("spectrum-five", 5)],
)
def test_a_spectrum_has_all_eigenvalues(name, classes, measured):
    raw = measured(name)
    assert raw["k"] == classes
    assert sum(raw["counts"]) == raw["parameters"]
    assert raw["eigenvalues"] == sorted(raw["eigenvalues"], reverse=True)
    assert raw["edges"] == [raw["smallest"], raw["eigenvalues"][0]]


def test_random_labels_are_not_the_digits(measured):
    assert measured("spectrum-random")["loss"] != measured("spectrum")["loss"]


def test_newton_starts_where_the_others_do(measured):
    losses = measured("newton")["loss"]
    assert len({values[0] for values in losses.values()}) == 1
    assert len({values[1] for values in losses.values()}) == 3
    assert {len(values) for values in losses.values()} == {5}


# --- helpers against closed forms --------------------------------------------------------------


def test_the_flow_solves_its_equation():
    reached = torch.linspace(-30, 300, 50, dtype=torch.float64)
    expected = reached.numpy() - lambertw(np.exp(reached.numpy())).real
    np.testing.assert_allclose(solvable._flow(reached), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_rank_without_noise(k):
    assert solvable.rank_without_noise(Job(), k) == k * (k - 1)


@pytest.fixture
def quadratic():
    """Linear regression: a quadratic loss with the Hessian XᵀX/n."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    x *= torch.tensor([3.0, 2.5, 1.0, 0.5, 0.3, 0.1])
    y = torch.randn(30, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(6, 1, bias=False).double()
    model.weight.data = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    return so.HessianOperator(model, measures.half_square, (x, y)), x.T @ x / len(x)


def test_the_decrease_along_the_top_subspace(quadratic):
    hessian, H = quadratic
    g, top, lr = hessian.gradient(), top_of(hessian, 2, 1e-12), 0.05
    before = [p.clone() for p in hessian.parameters.tensors]
    expected = [
        lr * (g @ v) - lr**2 * (v @ H @ v) / 2 for v in (top.vectors.T @ (top.vectors @ g), g)
    ]
    ratio = float(expected[0] / expected[1])
    assert measures.decrease(hessian, top, lr) == pytest.approx(ratio)
    assert all(map(torch.equal, before, hessian.parameters.tensors))


def test_mean_overlaps(quadratic):
    hessian, H = quadratic
    g, top = hessian.gradient(), top_of(hessian, 3, 1e-12)
    expected = g @ H @ g / (g.norm() * (H @ g).norm())
    assert measures.overlap_of(hessian) == pytest.approx(float(expected))
    # At the vertices of a cube in the top subspace each overlap is that of eq. 4.
    signs = torch.tensor([[1, 1, 1], [1, -1, 1], [-1, 1, 1]], dtype=torch.float64)
    estimate = so.diagnostics.expected_overlap(top.eigenvalues)
    assert measures.mean_overlap(hessian, signs @ top.vectors) == pytest.approx(float(estimate))


def test_the_anatomy_of_a_vector():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))  # 6 + 2 and 4 + 2 parameters
    space = so.ParameterSpace(model)
    first = torch.zeros(14)
    first[0], first[9] = 0.6, -0.8  # in the hidden layer, and in the weights of the last
    second = torch.zeros(14)
    second[9] = 1.0
    raw = runs.anatomy(space, [(0, first), (7, second)])
    assert raw["steps"] == [0, 7]
    assert raw["sizes"] == [8, 4, 2]
    assert raw["share"] == [pytest.approx([0.36, 0.64, 0]), [0, 1, 0]]
    assert raw["rms"][0] == pytest.approx([0.6 / math.sqrt(8), 0.4, 0])
    assert raw["low"][0][0] == [-0.6] + [0] * 7  # turned, so that the largest is positive
    assert raw["high"][0][1] == [0, 0.8, 0, 0]
    assert raw["head"] == {"0": [0, 0.8, 0, 0, 0, 0], "7": [0, 1, 0, 0, 0, 0]}
    assert raw["cosine"] == pytest.approx([0.8, 1])


def test_a_hessian_in_chunks_is_the_whole_one():
    x, y = torch.randn(1300, 3, 2, 2), torch.arange(1300) % 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    v = torch.randn(52)
    whole = so.HessianOperator(model, cross_entropy, (x, y))
    chunked = measures.whole_hessian(Problem(model, cross_entropy, x, y))
    torch.testing.assert_close(chunked.matvec(v), whole.matvec(v))
    right = (model(x).argmax(dim=1) == y).double().mean()
    assert performance(model, x, y)["accuracy"] == pytest.approx(float(right))


def test_images_with_colours_are_in_chunks(monkeypatch):
    monkeypatch.setattr(Problem, "hessian", lambda _, chunk: chunk)
    for shape, chunk in (((1, 3, 4, 4), 1000), ((1, 1, 4, 4), None), ((1, 5), None)):
        problem = Problem(nn.Identity(), cross_entropy, torch.zeros(shape), torch.zeros(1))
        assert measures.whole_hessian(problem) == chunk


def test_spectra_are_trained_for_forty_epochs_in_the_paper():
    epochs = {run.name: run.paper["epochs"] for run in PAPER.runs if "epochs" in run.paper}
    assert epochs == dict.fromkeys(PAPER.exhibit("figure-4").runs, 40)


def test_first_classes():
    data = measures.images(Job(), "digits", 50, 20)
    part = problems.first_classes(data, 3)
    assert part.num_classes == 3
    assert part.y_train.unique().tolist() == part.y_test.unique().tolist() == [0, 1, 2]
    assert torch.equal(part.x_train, data.x_train[data.y_train < 3])
    assert len(part.x_test) == int((data.y_test < 3).sum())


# --- what claims, pictures and tables say --------------------------------------------------------


def test_the_mean_over_later_subspaces_is_from_one_start_or_from_all_after_some_training():
    matrix = [[1, 0, 0], [0, 1, 0.9], [0, 0.9, 1]]
    raw = {"saved": [0, 100, 200], "preserved": {"1": matrix}}
    assert analysis.by_dimension(raw) == {1: 0.9}
    assert analysis.by_dimension(raw, 0) == {1: 0}


def test_classes_are_counted_along_axes():
    spectrum = {"k": 5, "edges": [0, 1], "counts": [1], "eigenvalues": list(range(30, 0, -1))}
    exhibit = PAPER.exhibit("figure-4")
    raws = {run: {} for run in exhibit.runs} | {"spectrum-five": {0: spectrum}}
    figure = exhibit.draw(raws)
    axes = next(each for each in figure.axes if each.lines and "dashed" in each.get_xlabel())
    assert all(tick == round(tick) for tick in axes.get_xticks())  # not 2.5, 5, 7.5


def test_the_dip_between_the_top_and_the_bulk():
    # A bulk from 1e-3 to 1e-2, and 10 outliers around 1.
    bulk, top = np.logspace(-2, -3, 30), np.logspace(0.3, -0.3, 10)
    assert analysis.dip({"k": 10, "eigenvalues": [[*top, *bulk]] * 2}) < 0.01
    # Without a gap the density is about the same everywhere.
    assert analysis.dip({"k": 10, "eigenvalues": [np.logspace(0, -3, 40).tolist()] * 2}) > 0.9


def test_the_density_of_logarithms_is_a_sum_of_gaussians():
    grid = np.linspace(-2, 1, 7)
    expected = (norm.pdf(grid, 0, 0.05) + norm.pdf(grid, -1, 0.05)) / 2
    density = analysis.log_density({"eigenvalues": [[1.0], [0.1]]}, grid)
    np.testing.assert_allclose(density, expected, atol=1e-12)


def test_each_row_of_table_1_is_claimed():
    claimed = ("table-1-mnist-and-regression", "table-1-cifar")
    assert {run for name in claimed for run in claim(name).runs} == set(CASES)


def test_the_table_has_the_paper_s_figures_beside_ours():
    raw = {"mean_overlap": 0.8, "mean_overlap_test": 0.1, "accuracy": 0.5}
    raws = {case: {} for case in CASES} | {"fc-random": {0: raw, 2: raw | {"mean_overlap": 0.9}}}
    row = next(row for row in pictures.table_1(raws) if row[2] == "Random labels")
    assert row == ["MNIST", "FC", "Random labels", "0.85", "0.86", "-0.01", "0.10", "0.50"]
    assert pictures.table_1(raws)[1][3] == "–"
