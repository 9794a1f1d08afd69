"""The reproduction of `class_gradient_2020`: its cheapest claim, and that the rest works."""

import functools
import math

import pytest
import torch
from torch import nn

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers import drawing
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.class_gradient_2020 import (
    analysis,
    cost,
    eigenvectors,
    pictures,
    readings,
    runs,
)
from benchmarks.papers.reproduction import Job
from tests.benchmarks.papers.tiny import claim_of, size

PAPER = PAPERS["class_gradient_2020"]
CLASSES = size("class_gradient_2020", "class-gradients")

claim = functools.partial(claim_of, PAPER)


def curve(losses, *, diverged=False):
    return {"loss": losses, "diverged": diverged}


# --- at the real size ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_method_keeps_as_many_gradients_as_the_paper_says():
    memory = claim("memory")
    for name in memory.runs:
        run = PAPER.run(name)
        raw = run.measure(Job(), **run.size("small"))
        assert memory.holds(memory.measure(raw))


# --- at a tiny size ------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_methods_start_from_the_same_network(tiny):
    losses = {
        curve["loss"][0]
        for run in ("resnet9", "resnet9-class", "resnet9-class-one-plain")
        for of_method in tiny("class_gradient_2020", run)["curves"].values()
        for curve in of_method.values()
    }
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("losses", "lost"),
    [
        ([1.0, 99.0, 9.0, 9.0, 9.0], False),
        ([1.0, 11.0, 1.0, 1.0], True),
        ([1.0, 1e22, 7.3, 9.0], True),  # one row is back
        ([1.0, 1.0, math.nan], True),
    ],
)
def test_a_loss_far_above_its_start_has_diverged(losses, lost):
    assert analysis.diverged(curve(losses)) is lost
    assert analysis.diverged(curve([1.0, 0.5], diverged=True))


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def test_a_hopeless_training_is_over():
    data = runs.images(Job(), "mnist-5k", 20, 20)
    training = {"batch_size": 20, "steps": 9, "every": 1}
    lost = runs.curve(Job(), "lost", flat, data, "sgd", lr=1e9, **training)
    assert lost["diverged"]
    assert len(lost["loss"]) == 2
    kept = runs.curve(Job(), "kept", flat, data, "sgd", lr=0.01, **training)
    assert not kept["diverged"]
    assert kept["step"] == list(range(10))


def test_a_hopeless_training_is_over_also_when_it_is_taken_up_again(tmp_path, monkeypatch):
    """Between two rows, by the last of those that were kept."""
    data = runs.images(Job(), "mnist-5k", 20, 20)
    training = {"lr": 1e6, "batch_size": 20, "steps": 9, "every": 4}
    whole = runs.curve(Job(), "lost", flat, data, "sgd", **training)
    assert whole["step"] == [0, 4]

    calls, step = 0, torch.optim.SGD.step

    def fails_once(self, closure=None):
        nonlocal calls
        calls += 1
        if calls == 6:  # a step after row 4, if the training were not over
            raise KeyboardInterrupt
        return step(self, closure)

    job = Job(scratch=tmp_path)
    monkeypatch.setattr("benchmarks.papers.checkpoint.SAVE_EVERY", -1.0)
    monkeypatch.setattr("benchmarks.papers.checkpoint._SHARE", math.inf)
    monkeypatch.setattr(torch.optim.SGD, "step", fails_once)
    monkeypatch.setattr(runs, "HOPELESS", math.inf)
    with pytest.raises(KeyboardInterrupt):
        runs.curve(job, "lost", flat, data, "sgd", **training)
    monkeypatch.setattr(runs, "HOPELESS", 1e4)
    assert runs.curve(job, "lost", flat, data, "sgd", **training) == whole


def test_class_gradients_of_what_diverged_have_no_figures():
    raws = {
        seed: eigenvectors.beside_eigenvectors(Job(), **CLASSES | {"lr": lr})
        for seed, lr in ((0, 1e9), (1, 0.01))
    }
    assert [raw["diverged"] for raw in raws.values()] == [True, False]
    assert raws[0].keys() == raws[1].keys()
    for about in PAPER.claims_about(PAPER.run("class-gradients")):
        if about.kind != "identity":
            assert math.isnan(about.measure(raws[0])), about.name
            assert not about.premise(raws[0])
    for exhibit in PAPER.exhibits:
        if exhibit.runs == ("class-gradients",):
            assert exhibit.draw is None or exhibit.draw({"class-gradients": raws})
            assert exhibit.table is None or exhibit.table({"class-gradients": raws})


@pytest.mark.slow
def test_class_gradients_tell_how_far_the_network_was_trained(tiny):
    trained = eigenvectors.beside_eigenvectors(
        Job(), **CLASSES | {"lr": 0.05, "epochs": 40, "curvatures": 9}
    )
    raw = tiny("class_gradient_2020", "class-gradients")
    assert raw["loss"] > 2 > trained["loss"]
    assert trained["accuracy"] > raw["accuracy"]
    assert trained["accuracy"] > trained["valid_accuracy"] > 0


@pytest.mark.slow
def test_class_gradients_along_a_training_survive_an_interruption(tmp_path, monkeypatch):
    whole = eigenvectors.beside_eigenvectors(Job(), **CLASSES)
    calls, step = 0, torch.optim.SGD.step

    def fails_once(self, closure=None):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step(self, closure)

    job = Job(scratch=tmp_path)
    monkeypatch.setattr("benchmarks.papers.checkpoint.SAVE_EVERY", -1.0)
    monkeypatch.setattr(torch.optim.SGD, "step", fails_once)
    with pytest.raises(KeyboardInterrupt):
        eigenvectors.beside_eigenvectors(job, **CLASSES)
    assert eigenvectors.beside_eigenvectors(job, **CLASSES) == whole


def test_pictures_show_what_diverged_up_to_a_cross():
    """Where its loss leaves the panel, in all columns; and no cross hides another."""
    wild = {"step": [0, 9, 18, 27], "loss": [2.0, 1.0, 99.0, 0.5], "accuracy": [0.1, 0.5, 0.2, 0.9]}
    wild |= {"diverged": True, "epoch": 9}
    lost = {"printed": {0: wild}, "class": {0: wild}}
    above, below = drawing.grid(["", ""])
    pictures._losses(above, lost)
    pictures._lines(below, lost, "accuracy")
    for panel, end in ((above, 6.0), (below, 0.2)):
        one, cross, _, other = panel.get_lines()
        assert one.get_xdata().tolist() == [0, 1, 2]
        assert (one.get_ydata()[-1], *cross.get_ydata()) == (end, end)
        assert cross.get_markersize() > other.get_markersize()


# --- helpers -------------------------------------------------------------------------------------


def test_validation_images_are_others_than_those_for_training():
    found = runs.images(Job(), "mnist-5k", 30, 20, pool=2)
    x, y = found.test
    assert (found.x_train.shape, x.shape) == ((30, 1, 14, 14), (20, 1, 14, 14))
    assert (found.y_train.shape, y.shape, found.num_classes) == ((30,), (20,), 10)
    assert len(torch.cat([found.x_train, x]).flatten(1).unique(dim=0)) == 50
    other = runs.images(Job(seed=1), "mnist-5k", 30, 20, pool=2)
    assert not torch.equal(found.x_train, other.x_train)


def observed(subspace, minibatches):
    for x, y in minibatches:
        subspace.observe(x, y)
    return subspace.update()


def two_minibatches():
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 1, 1])
    return nn.Linear(3, 2), [(torch.randn(4, 3), y), (torch.randn(4, 3), 1 - y)]


def test_the_printed_reading_is_that_of_the_package():
    model, minibatches = two_minibatches()
    read = observed(readings.ReadSubspace(model, 2, readings.Reading()), minibatches)
    expected = observed(so.ClassGradientSubspace(model, 2), minibatches)
    torch.testing.assert_close(read.vectors, expected.vectors)
    torch.testing.assert_close(read.eigenvalues, expected.eigenvalues)


def test_a_class_that_was_never_seen_has_no_vector_and_an_eigenvalue_of_one():
    for reading in readings.READINGS.values():
        if not reading.orthogonal:
            subspace = readings.ReadSubspace(nn.Linear(3, 3), 3, reading)
            found = observed(subspace, two_minibatches()[1])
            assert (found.vectors[2].norm(), found.eigenvalues[2]) == (0.0, 1.0)


def test_readings_differ_in_what_they_are_named_after():
    model, minibatches = two_minibatches()
    by = {
        name: observed(readings.ReadSubspace(model, 2, readings.READINGS[name]), minibatches[:1])
        for name in ("printed", "class", "one", "plain")
    }
    printed = by["printed"].eigenvalues
    shares = torch.tensor([1 / 4, 3 / 4])  # of the classes in the minibatch
    torch.testing.assert_close(by["class"].eigenvalues, printed / shares)
    torch.testing.assert_close(by["one"].eigenvalues, (0.1 * printed.square() + 0.9).sqrt())
    torch.testing.assert_close(by["plain"].eigenvalues, printed)
    assert len(readings.READINGS) == 16


@pytest.mark.parametrize("method", ["printed", "class-plain"])
def test_momentum_is_that_of_all_the_step_or_of_sgd_alone(method):
    """The second step, by hand, from the subspace's own terms."""
    model, minibatches = two_minibatches()
    optimizer, subspace = readings.optimizer_of(method, model, 2, 0.05)
    buffer = torch.zeros(8)
    for x, y in minibatches:
        subspace.observe(x, y)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        buffer = 0.9 * buffer + gradient
        H, theta = subspace.update(), nn.utils.parameters_to_vector(model.parameters())
        newton = gradient if method == "class-plain" else buffer
        expected = theta - 0.05 * (buffer - H.vectors.T @ (H.vectors @ buffer))
        expected -= H.vectors.T @ (H.vectors @ newton / H.eigenvalues)
        optimizer.step()
        found = nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(found, expected)


def test_averages_of_a_reading_go_on_from_a_state():
    model, minibatches = two_minibatches()
    reading = readings.READINGS["class-one"]
    first, second = (readings.ReadSubspace(model, 2, reading) for _ in range(2))
    observed(first, minibatches[:1])
    second.load_state_dict(first.state_dict())
    for name in ("vectors", "eigenvalues"):
        mine, other = (observed(each, minibatches[1:]) for each in (first, second))
        assert torch.equal(getattr(mine, name), getattr(other, name))


def test_class_gradients_are_means_of_the_gradients_of_the_own_logit():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    found = eigenvectors.class_gradients(model, 2, x, y)
    for k in (0, 1):
        weight, bias = torch.zeros(2, 3), torch.zeros(2)
        weight[k], bias[k] = x[y == k].mean(dim=0), 1.0  # of z_k = w_k·x + b_k
        expected = torch.cat([weight.flatten(), bias])
        torch.testing.assert_close(found.vectors[k], expected / expected.norm())


def test_a_span_is_that_of_rows_of_any_length_and_leaves_out_zeros():
    rows = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    basis = eigenvectors.span(rows)
    projector = basis.vectors.T @ basis.vectors
    torch.testing.assert_close(projector, torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_the_second_term_is_that_of_the_dense_matrices():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    linear = nn.Linear(3, 2, dtype=torch.float64)
    deep = nn.Sequential(
        nn.Linear(3, 3, dtype=torch.float64), nn.ReLU(), nn.Linear(3, 2, dtype=torch.float64)
    )
    hessian = so.HessianOperator(linear, cross_entropy, (x, y))
    assert eigenvectors.second_term(Job(), hessian, (x, y), 4) < 1e-12
    hessian = so.HessianOperator(deep, cross_entropy, (x, y))
    whole = hessian.matmat(torch.eye(hessian.size, dtype=torch.float64))
    of_model = so.GaussNewtonOperator(deep, cross_entropy, (x, y))
    rest = whole - of_model.matmat(torch.eye(hessian.size, dtype=torch.float64))
    estimate = eigenvectors.second_term(Job(), hessian, (x, y), 500)
    assert estimate == pytest.approx(float(rest.norm() / whole.norm()), rel=0.2)
    assert estimate > 0.1  # with ReLU too: the layers multiply


def test_memory_is_counted_once_for_each_storage():
    model = nn.Linear(3, 2)
    optimizer, _ = readings.optimizer_of("sgd", model, 2, 0.1)
    cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
    assert cost.held(model, optimizer, None) == 1.0  # gradients
    optimizer.step()
    assert cost.held(model, optimizer, None) == 2.0  # ... and momentum


@pytest.mark.parametrize("norm", [False, True])
def test_examples_pass_backward_once_or_once_for_each_class(norm):
    layers = [nn.Linear(3, 2), *([nn.BatchNorm1d(2)] if norm else [])]
    model, y = nn.Sequential(*layers), torch.tensor([0, 1, 0, 1, 1])
    subspace = so.ClassGradientSubspace(model, 2)
    x = torch.randn(5, 3)
    passes = cost.backward_passes(model, lambda: subspace.observe(x, y))
    assert passes == (10 if norm else 5)
    assert cost.backward_passes(model, lambda: model(x)) == 0


def test_spans_that_differ_have_a_rank_of_both():
    """As numpy's rank of all directions, but for an angle that its rule cannot tell."""
    raw = eigenvectors.turned(Job(), parameters=60, classes=3, angles=[0.0, 1e-4, 0.1, 90.0])
    assert raw == {"angles": [0.0, 1e-4, 0.1, 90.0], "ranks": [3, 3, 6, 6]}
    equal_spans = claim("rank-tells-small-angles")
    assert equal_spans.holds(equal_spans.measure({"ranks": [10, 10, 20, 20]}))
    assert not equal_spans.holds(equal_spans.measure({"ranks": [10, 10, 10, 20]}))


def test_cosines_between_classes_are_of_unit_vectors(tiny):
    between = torch.tensor(tiny("class_gradient_2020", "digits")["of_all"]["between"])
    assert between.diagonal() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(between, between.T, rtol=0, atol=1e-5)
    assert between.abs().max() <= 1 + 1e-5


def test_kinds_that_go_together_have_larger_cosines():
    """Of vehicles that are all alike, and animals that are orthogonal to all: one pair of 21."""
    between = torch.eye(10)
    for a in analysis.VEHICLES:
        for b in analysis.VEHICLES:
            between[a, b] = 1.0
    raw = {"of_all": {"between": between.tolist()}}
    assert analysis.within_kinds(raw) == pytest.approx(6 / (6 + 15))
    assert analysis.longest(raw) == pytest.approx(4)
    assert claim("kinds-go-together").holds(analysis.within_kinds(raw))


def test_sgds_largest_rate_is_the_last_at_which_it_trains():
    learned, stuck = (
        {"loss": [2.3] * 4, "accuracy": [a] * 4, "diverged": False} for a in (0.3, 0.1)
    )
    raw = {"classes": 10, "curves": {"sgd": {"0.1": learned, "0.2": learned, "0.4": stuck}}}
    assert analysis.sgds_largest_trained(raw) == pytest.approx(2)
    raw["curves"]["sgd"] = {"0.1": stuck, "0.2": stuck}
    assert analysis.sgds_largest_trained(raw) == pytest.approx(0.5)


def test_losses_that_are_no_numbers_count_as_infinite():
    assert analysis.losses(curve([1.0, math.nan])).tolist() == [1.0, math.inf]
