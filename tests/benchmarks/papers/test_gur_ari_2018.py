"""Each run, claim and picture of `gur_ari_2018`, at sizes that take seconds."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import lambertw
from scipy.stats import norm
from torch import nn

import subspace_optim as so
from benchmarks.data import DataUnavailableError
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.gur_ari_2018 import (
    analysis,
    edges,
    measures,
    pictures,
    runs,
    solvable,
)
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.gur_ari_2018.measures import of_all_labels
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


def test_f_top_along_the_way_has_the_bases_and_further_steps(measured):
    raw = measured("fc")
    along = dict(zip(raw["f_at"], raw["f"], strict=True))
    assert raw["f_at"] == sorted({*raw["saved"], 5})
    for step, f_top in zip(raw["saved"], raw["f_top"], strict=True):
        assert along[step] == f_top
    assert 0 <= along[5] <= 1
    assert len(raw["accuracy_there"]) == len(raw["saved"])
    assert len(raw["largest"]) == len(raw["at"])
    assert not measured("convnet")["largest"]


def test_a_spectrum_has_all_eigenvalues(measured):
    raw = measured("spectrum")
    assert sum(raw["counts"]) == raw["parameters"]
    assert raw["eigenvalues"] == sorted(raw["eigenvalues"], reverse=True)
    assert raw["edges"] == [raw["smallest"], raw["eigenvalues"][0]]


@pytest.mark.parametrize(
    ("name", "classes"),
    [("outliers", 10), ("outliers-random", 10), ("outliers-parity", 2), ("outliers-five", 5)],
)
def test_the_largest_eigenvalues_are_those_of_the_whole_spectrum(name, classes, measured):
    raw = measured(name)
    assert raw["k"] == classes
    assert len(raw["eigenvalues"]) == 12
    if name == "outliers":  # of the same training
        whole = measured("spectrum")["eigenvalues"][:12]
        np.testing.assert_allclose(raw["eigenvalues"], whole, atol=0.01 * whole[0])


def test_random_labels_are_not_the_digits(measured):
    assert measured("outliers-random")["loss"] != measured("outliers")["loss"]


def test_realisations_of_images_differ_in_the_start(measured):
    raw = measured("right-edge-mnist")
    assert raw["k"] == 10
    assert [len(values) for values in raw["eigenvalues"]] == [30, 30]
    assert len(set(raw["losses"])) == 2


def test_labels_for_testing_are_permuted_where_those_for_training_are(measured):
    raw = measured("fc-random")
    assert raw["overlap_own"] != raw["overlap_test"]
    assert raw["mean_overlap_own"] == pytest.approx(np.mean(raw["overlap_own"][1:]), rel=1e-5)
    assert not measured("softmax")["overlap_own"]


def test_of_every_label_the_gradient_is_the_mean_over_constant_labels(measured):
    outputs = torch.randn(7, 4, dtype=torch.float64)
    none = of_all_labels(outputs, torch.zeros(7))
    of_each = [cross_entropy(outputs, torch.full((7,), label)) for label in range(4)]
    torch.testing.assert_close(none, torch.stack(of_each).mean())
    raw = measured("fc-random-unlabelled")
    late = raw["overlap_unlabelled"][1:]
    assert raw["mean_overlap_unlabelled"] == pytest.approx(np.mean(late), rel=1e-5)
    assert not {*late} & {*raw["overlap_test"], *raw["overlap_own"]}
    assert not measured("fc-random")["overlap_unlabelled"]


def test_linear_regression_has_two_parameters_and_overlaps_by_its_condition(measured):
    raw = measured("regression-linear")
    # gᵀHg / (|g| |Hg|) is at least 2√(λ_1 λ_2) / (λ_1 + λ_2): here 1 and about π²/3.
    assert min(raw["overlap"]) > 0.8
    assert raw["random"] > 0.8
    assert measured("regression")["random"] < 0.5


def test_running_statistics_are_settled_before_training():
    generator = torch.Generator().manual_seed(0)
    x, y = 3 + 2 * torch.randn(500, 4, generator=generator), torch.arange(500) % 2
    norm = nn.BatchNorm1d(4)
    problem = Problem(nn.Sequential(norm, nn.Linear(4, 2)), cross_entropy, x, y)
    theta = problem.theta()
    measures.settle(problem, 0)
    assert torch.allclose(norm.running_mean, x.mean(dim=0), atol=0.3)
    assert torch.allclose(norm.running_var, x.var(dim=0), rtol=0.2)
    assert torch.equal(problem.theta(), theta)
    assert problem.model.training


def test_the_mode_is_that_of_gradient_and_hessian():
    x, y = torch.randn(60, 1, 6, 6), torch.arange(60) % 3
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    problem = Problem(net, cross_entropy, x, y)
    with torch.no_grad():
        trained = float(cross_entropy(net(x), y))  # and running statistics of one batch
        net.eval()
        expected = float(cross_entropy(net(x), y))
        net.train()
    assert measures.whole_hessian(problem, "eval").loss() == pytest.approx(expected, rel=1e-5)
    for mode in ("train", None):  # that of training
        assert measures.whole_hessian(problem, mode).loss() == pytest.approx(trained, rel=1e-5)
    assert net.training


def test_the_start_of_keras():
    data = measures.images(Job(), "digits", 50, 20)
    net = measures.build(Job(), "convnet", data.mapped(lambda x: x.repeat(1, 1, 2, 2)), 4, "glorot")
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            field = layer.weight[0, 0].numel()  # of a linear layer: 1
            outputs, inputs = layer.weight.shape[:2]
            limit = math.sqrt(6 / (field * (inputs + outputs)))
            largest = float(layer.weight.detach().abs().max())
            assert 0.9 * limit < largest <= limit
            assert not layer.bias.any()


def test_exchanged_images_train_on_the_test_set(monkeypatch):
    data = measures.images(Job(), "digits", 300, 100)
    flat = data.mapped(lambda x: x.flatten(1))
    monkeypatch.setattr(problems, "real", lambda name, _, examples: {"mnist": flat}[name])
    found = measures.images(Job(), "mnist-exchanged", 90, 200)
    assert found.x_train.shape == (90, 1, 8, 8)
    assert found.x_test.shape == (200, 1, 8, 8)
    own = {tuple(image.flatten().tolist()) for image in data.x_test}
    assert {tuple(image.flatten().tolist()) for image in found.x_train} <= own
    low, high = measures.images(Job(), "mnist-exchanged", 90, 200, centred=True).x_train.aminmax()
    assert (low, high) == (-0.5, 0.5)
    with pytest.raises(DataUnavailableError, match="no test set"):
        measures.exchanged(replace(data, x_test=None, y_test=None))


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


def test_products_of_a_basis_tell_those_of_all_its_vectors(quadratic):
    hessian, _ = quadratic
    top, weights = top_of(hessian, 3, 1e-12), torch.randn(5, 3)
    vectors = weights.double() @ top.vectors
    expected = measures.mean_overlap(hessian, vectors)
    assert measures.overlap_within(hessian, top, weights) == pytest.approx(expected)


def test_random_vectors_are_of_the_seed_and_of_the_step():
    seeds = {runs._random(Job(seed), step).initial_seed() for seed in (0, 1) for step in (0, 100)}
    assert len(seeds) == 4


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
    def sizes(_model, _loss_fn, batches, mode):
        return [len(x) for x, _ in batches], mode

    monkeypatch.setattr(so, "HessianOperator", sizes)
    of = {(1300, 3, 4, 4): [1000, 300], (1300, 1, 4, 4): [1300], (1300, 5): [1300]}
    for shape, expected in of.items():
        problem = Problem(nn.Identity(), cross_entropy, torch.zeros(shape), torch.zeros(1300))
        assert measures.whole_hessian(problem, "eval") == (expected, "eval")


def test_spectra_are_trained_for_forty_epochs_in_the_paper():
    epochs = {run.name: run.paper["epochs"] for run in PAPER.runs if "epochs" in run.paper}
    shown = (*PAPER.exhibit("figure-4").runs, *PAPER.exhibit("outliers").runs)
    assert epochs == dict.fromkeys(shown, 40)


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


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_no_power_law_has_a_gap(power):
    values = (1 / np.arange(1, 21) ** power).tolist()
    raw = {"k": 10, "saved": [100, 200], "eigenvalues": [values] * 2}
    assert analysis.gap_around_k(raw) == pytest.approx(0, abs=1e-9)
    assert edges.gap_at_k({"k": 10, "eigenvalues": values}) == pytest.approx(0, abs=1e-9)


def test_classes_are_counted_along_axes():
    spectrum = {"k": 5, "eigenvalues": list(range(30, 0, -1))}
    exhibit = PAPER.exhibit("outliers")
    raws = {run: {} for run in exhibit.runs} | {"outliers-five": {0: spectrum}}
    figure = exhibit.draw(raws)
    axes = next(each for each in figure.axes if each.lines and "dashed" in each.get_xlabel())
    assert all(tick == round(tick) for tick in axes.get_xticks())  # not 2.5, 5, 7.5


def test_the_dip_between_the_top_and_the_bulk():
    # A bulk from 1e-3 to 1e-2, and 10 outliers around 1.
    bulk, top = np.logspace(-2, -3, 30), np.logspace(0.3, -0.3, 10)
    raw = {"k": 10, "eigenvalues": [[*top, *bulk]] * 2}
    assert edges.dip(raw) < 0.01
    assert edges.dip(raw, 20) > 0.9
    assert edges.deeper_than_elsewhere(raw) < -0.5
    # Without a gap the density is about the same everywhere, and so it is with one elsewhere.
    plain = {"k": 10, "eigenvalues": [np.logspace(0, -3, 40).tolist()] * 2}
    assert edges.dip(plain) > 0.9
    assert edges.deeper_than_elsewhere(plain) == pytest.approx(0, abs=0.1)
    further = {"k": 20, "eigenvalues": [[*top, *np.logspace(-2, -3, 60)]] * 2}
    assert edges.deeper_than_elsewhere(further) > 0.5


def test_a_log_normal_fits_what_is_log_normal_and_neither_of_its_rivals():
    def misfit(logarithms):
        return edges.log_normal_misfit({"k": 10, "eigenvalues": np.exp(logarithms).tolist()})

    random, rule = np.random.default_rng(0), claim("log-normal-top")
    assert rule.holds(misfit(random.standard_normal((200, 10))))
    assert misfit(random.exponential(size=(200, 10))) > 1.5
    assert misfit(random.random((200, 10))) > 1.5
    # Nor spectra without any scatter, or with little, which a uniform between their ends, or an
    # exponential from their least on, would fit worse than a Gaussian.
    places = np.arange(1, 11)
    for plain in (-np.log(places), np.log(12.0 - places), -np.sqrt(places), -0.2 * places):
        assert not rule.holds(misfit(plain[None]))
        assert not rule.holds(misfit(plain + 0.05 * random.standard_normal((20, 10))))


def test_without_logarithms_there_is_neither_a_dip_nor_a_fit():
    raw = {"k": 2, "eigenvalues": [[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]]}
    assert math.isnan(edges.dip(raw))
    assert math.isnan(edges.deeper_than_elsewhere(raw))
    assert math.isnan(edges.log_normal_misfit(raw))


def test_one_over_i_has_three_eigenvalues_before_the_elbow_whatever_the_classes():
    plain = (1 / np.arange(1, 31)).tolist()
    assert {edges.outliers({"k": k, "eigenvalues": plain}) for k in (2, 10)} == {3}


def test_premises():
    raw = {"loss": [2.0, 9.0, 1.0], "saved": [0, 100], "accuracy_there": [0.1, 0.5]}
    assert analysis.loss_is_halved(raw)
    assert not analysis.loss_is_halved(raw | {"loss": [2.0, 0.5, 1.5]})
    assert analysis.half_are_fitted(raw)
    assert not analysis.half_are_fitted(raw | {"accuracy_there": [0.9, 0.4]})
    assert analysis.nothing_is_fitted({"loss": [2.31, 2.25]})
    assert not analysis.nothing_is_fitted({"loss": [2.31, 2.22, 2.3]})
    assert not analysis.half_are_fitted(raw | {"saved": [0, 50]})
    assert analysis.labels_are_fitted({"accuracy": 0.9})
    assert not analysis.labels_are_fitted({"accuracy": math.nan})
    assert analysis.all_are_fitted({"accuracy": [0.1, 0.99]})
    assert not analysis.all_are_fitted({"accuracy": [1.0, 0.98]})
    assert edges.fitted_on_average({"accuracies": [0.8, 1.0]})
    assert not edges.fitted_on_average({"accuracies": [0.8, 0.9]})


def test_the_density_of_logarithms_is_a_sum_of_gaussians():
    grid = np.linspace(-2, 1, 7)
    expected = (norm.pdf(grid, 0, 0.05) + norm.pdf(grid, -1, 0.05)) / 2
    density = edges.log_density({"eigenvalues": [[1.0], [0.1]]}, grid)
    np.testing.assert_allclose(density, expected, atol=1e-12)


def test_each_row_of_table_1_is_claimed():
    claimed = ("table-1-mnist-and-regression", "table-1-cifar")
    assert {run for name in claimed for run in claim(name).runs} == set(CASES)


def test_the_table_has_the_paper_s_figures_beside_ours():
    raw = {"mean_overlap": 0.8, "mean_overlap_test": 0.1, "accuracy": 0.5}
    raws = {case: {} for case in CASES} | {"fc-random": {0: raw, 2: raw | {"mean_overlap": 0.9}}}
    row = next(row for row in pictures.table_1(raws) if row[2] == "Random labels")
    assert row == ["MNIST", "FC", "Random labels", "0.85", "0.86", "-0.01", "0.10", "0.50", "–"]
    assert pictures.table_1(raws)[1][3] == "–"
