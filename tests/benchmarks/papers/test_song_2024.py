"""`song_2024`: its cheapest claims at their real size, every run and picture at a tiny one."""

import math
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.papers import checkpoint, problems
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.reproduction import Job
from benchmarks.papers.song_2024 import analysis, runs
from tests.benchmarks.papers.tiny import clouds, size

PAPER = PAPERS["song_2024"]
CLAIMS = {claim.name: claim for claim in PAPER.claims}

# --- the claims that cost nothing, as they are published ---------------------------------------


@pytest.fixture(scope="module")
def toy():
    run = PAPER.run("toy")
    return run.measure(Job(0), **run.small)


@pytest.mark.parametrize("name", ["toy-gd", "toy-sgd", "toy-dom-fails"])
def test_the_toy_quadratic_shows_all_three_phenomena(toy, name):
    assert CLAIMS[name].holds(CLAIMS[name].measure(toy))


def test_gd_on_the_toy_quadratic_is_its_closed_form(toy):
    steps = np.array(toy["GD"]["step"])
    x, y = (1 - 1e-4 * 1000) ** steps, (1 - 1e-4) ** steps
    np.testing.assert_allclose(toy["GD"]["x"], x, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(toy["GD"]["y"], y, rtol=1e-10)
    with np.errstate(under="ignore"):
        chi = 1000 * x / np.hypot(1000 * x, y)
    np.testing.assert_allclose(toy["GD"]["chi"], chi, rtol=1e-9, atol=1e-300)


def test_sgd_on_the_toy_quadratic_has_its_stationary_noise():
    # x' = (1 − ηλ) x ∓ 100 η y has the variance (100 η y)² / (1 − (1 − ηλ)²) where y stands still.
    run = PAPER.run("toy")
    raw = run.measure(Job(1), lr=1e-4, steps=20_000, keep=20_001)
    x, y = (np.array(raw["SGD"][name])[1000:] for name in ("x", "y"))
    expected = (100 * 1e-4) ** 2 / (1 - 0.9**2)
    # 19,000 steps are some 1,900 independent ones: the variance is right to 3 % at one deviation.
    assert float(np.mean((x / y) ** 2)) == pytest.approx(expected, rel=0.12)
    dom, bulk = raw["Dom-SGD"], raw["Bulk-SGD"]
    assert len(set(dom["y"])) == 1
    assert len(set(bulk["x"])) == 1


# --- at a tiny size ----------------------------------------------------------------------------


@pytest.fixture
def run_of_clouds(monkeypatch):
    """A function that measures a run at its tiny size on made-up data."""
    monkeypatch.setattr(problems, "real", clouds)

    def measure(name, job, **other):
        return PAPER.run(name).measure(job, **size("song_2024", name) | other)

    return measure


@pytest.mark.parametrize(
    "model", ["mlp", "cnn", "transformer", "vgg11", "resnet8", "resnet8-without-norm"]
)
def test_the_models_take_their_data(monkeypatch, model):
    monkeypatch.setattr(problems, "real", clouds)
    data = runs.dataset(Job(), model, 6, 1)
    net = runs.network(Job(), model, data, 2)
    assert net(data.x_train).shape == (6, data.num_classes)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (model == "resnet8")
    if data.x_train.dim() == 4:
        assert runs.dataset(Job(), model, 6, 2).x_train.shape == (6, 3, 16, 16)


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
@pytest.mark.filterwarnings("ignore::subspace_optim.ConvergenceWarning")
def test_what_holds_exactly_holds_at_any_size(tiny):
    edge, near, sgd, rates, switching = (
        tiny("song_2024", name)
        for name in ("edge", "gd-mlp", "sgd-mlp-mse", "rates-mlp", "switching")
    )
    assert CLAIMS["rates-of-gd"].holds(CLAIMS["rates-of-gd"].measure(rates))
    assert edge["before"]["threshold"][0] == pytest.approx(2 / 0.1)
    # The branches begin where the part before ended.
    assert edge["losses"]["GD"][0] == edge["losses"]["Dom-GD"][0] == edge["losses"]["Bulk-GD"][0]
    lengths = {name: len(losses) for name, losses in edge["losses"].items()}
    assert lengths == {"before": 8, "GD": 3, "Dom-GD": 3, "Bulk-GD": 3}
    assert edge["GD"]["step"][0] == edge["switch_step"] == 8
    assert near["GD to SGD"][0] == near["GD"][0] == 0
    assert near["chi_of_sgd"][0] == pytest.approx(near["chi_gradient"][0], abs=1e-3)
    assert near["chi_of_sgd"][-1] != near["chi_gradient"][-1]
    assert near["GD to SGD"][-1] <= near["GD"][-1] + near["SGD"][-1]
    assert len(near["eigenvalues"][0]) == len(near["next_eigenvalues"][0]) == 3
    assert sgd["phases"]["warmup"]["step"] == [0, 2]
    assert sgd["phases"]["BulkSGD"]["step"] == [4, 6]
    for name, losses in sgd["losses"].items():  # one at each step, and at the end
        assert len(losses) == 4 + 1
        assert losses[:4:2] == pytest.approx(sgd["phases"][name]["loss"], rel=1e-5)
        assert losses[0] == sgd["losses"]["SGD"][0]
    # Epochs of 24 examples are one minibatch: all steps are ends, but for what is half-way.
    assert len(sgd["shuffled"]["place"]) == len(sgd["shuffled"]["step"]) > 0
    assert all(0 <= chi <= 1 + 1e-6 for chi in sgd["shuffled"]["chi_gradient"])
    assert "BulkSGD" not in tiny("song_2024", "sgd-mlp-ce")["phases"]
    assert switching["SGD to GD"]["step"] == [*range(11), *range(10, 14)]


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_shuffled_epochs_are_measured_at_their_ends_and_half_way(run_of_clouds):
    raw = run_of_clouds("sgd-mlp-mse", Job(0), examples=200, batch_size=50, shuffled=16)
    first = raw["switch_step"]
    assert first == 4
    part = raw["shuffled"]
    assert part["step"] == [10, 12, 14, 16, 18, 20]
    assert part["place"] == [1, 0, 1, 0, 1, 0]
    assert "shuffled" not in run_of_clouds("sgd-mlp-mse", Job(0), shuffled=0)


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_minibatches_of_each_size_go_on_from_one_point(run_of_clouds):
    raw = run_of_clouds("batches-mlp-ce", Job(0), batch_sizes=[6, 24, 6])
    assert raw["batch_sizes"] == [6, 24, 6]
    same, other = raw["6"], raw["24"]
    assert same["step"] == other["step"] == [8, 10, 12]
    assert same["chi_gradient"][0] == other["chi_gradient"][0]
    assert same["loss"][0] == other["loss"][0]
    assert same["loss"][-1] != other["loss"][-1]
    # What is measured at the switch is what a training of as many steps comes to.
    further = run_of_clouds("batches-mlp-ce", Job(0), batch_sizes=[6], switch=12, steps=1)
    assert further["6"]["loss"][0] == same["loss"][-1]


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_modes_are_two_views_of_one_training_with_batch_norm_and_one_without(run_of_clouds):
    raw = run_of_clouds("resnet8-modes", Job(0), model="resnet8", width=2)
    without = run_of_clouds("resnet8-modes", Job(0))  # an MLP
    assert raw["train"]["step"] == raw["eval"]["step"] == without["eval"]["step"] == [2, 4]
    assert without["train"] == without["eval"]
    assert all(a != b for a, b in zip(raw["train"]["loss"], raw["eval"]["loss"], strict=True))
    # To look changes nothing of the training, nor of the running statistics.
    once = run_of_clouds("resnet8-modes", Job(0), model="resnet8", width=2, every=4)
    for mode, part in once.items():
        assert part == {name: column[1:] for name, column in raw[mode].items()}
    never = run_of_clouds("resnet8-images", Job(0), model="resnet8", width=2, counts=[24])
    assert never["24"]["loss"] == raw["train"]["loss"]


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_losses_of_a_branch_are_taken_at_one_step_in_so_many(run_of_clouds):
    whole, some = (
        run_of_clouds("sgd-mlp-mse", Job(0), shuffled=0, loss_every=every) for every in (1, 2)
    )
    for name, losses in some["losses"].items():
        assert losses == whole["losses"][name][::2]
        assert list(analysis.loss_steps(some, name)) == [4, 6, 8]


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
@pytest.mark.filterwarnings("ignore::subspace_optim.StaleBasisWarning")
def test_a_branch_that_diverges_between_two_losses_ends_in_an_infinite_one(run_of_clouds):
    sizes = {"lr": 40.0, "switch_at": 1, "average": 0.0, "loss_every": 50, "shuffled": 0}
    raw = run_of_clouds("sgd-mlp-mse", Job(0), **sizes, steps=400, measure=400, spectrum=400)
    first, last = raw["losses"]["SGD"]
    assert math.isfinite(first)
    assert last == math.inf
    assert math.isnan(analysis.achieved(raw, "BulkSGD"))


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_a_switch_at_a_fixed_step_is_none_by_the_average(run_of_clouds):
    raw = run_of_clouds("sgd-vgg11", Job(0))
    assert raw["switch_step"] == 4
    assert not analysis.reached(raw)
    warmup = raw["phases"]["warmup"]
    assert warmup["chi_average"] == pytest.approx(warmup["chi_gradient"])


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
@pytest.mark.filterwarnings("ignore::subspace_optim.ConvergenceWarning")
@pytest.mark.parametrize("name", ["momentum-sgd", "momentum-adam"])
def test_branches_with_momentum_begin_where_the_part_before_ended(run_of_clouds, name):
    raw = run_of_clouds(name, Job(0), refresh=1)
    losses = raw["losses"]
    assert {each: len(found) for each, found in losses.items()} == dict.fromkeys(losses, 3 + 1)
    assert losses["plain"][0] == losses["SGD"][0] == losses["Dom"][0] == losses["Bulk"][0]
    assert raw["SGD"]["chi_gradient"][0] == pytest.approx(raw["plain"]["chi_gradient"][0], abs=1e-3)
    # The control has no momentum: whatever was before the switch, its step is the minibatch's.
    assert raw["SGD"]["chi_update"][0] != pytest.approx(raw["plain"]["chi_update"][0], abs=1e-3)
    assert raw["plain"]["step"][0] == raw["switch_step"]
    # Momentum is kept: it moves on at once, and projected it moves in the subspace alone.
    assert raw["Dom"]["chi_update"] == pytest.approx([1.0] * len(raw["Dom"]["step"]), abs=1e-3)
    assert raw["Bulk"]["chi_update"] == pytest.approx([0.0] * len(raw["Bulk"]["step"]), abs=1e-3)
    longer = run_of_clouds(name, Job(0), refresh=1, switch=10)
    begun = raw["losses"]["plain"][2]  # two steps after step 8
    assert longer["losses"]["plain"][0] == pytest.approx(begun, rel=1e-5)


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
@pytest.mark.filterwarnings("ignore::subspace_optim.ConvergenceWarning")
def test_projected_gradients_and_projected_steps_are_one_for_what_is_linear(run_of_clouds):
    """SGD without a buffer is; Adam, which divides by what it saw, is not."""
    steps, gradients, both = (
        run_of_clouds("momentum-sgd", Job(0), refresh=1, switch=0, after=1, projected=which)
        for which in ("update", "gradient", "both")
    )
    for name in ("Dom", "Bulk"):
        assert gradients["losses"][name] == pytest.approx(steps["losses"][name], rel=1e-6)
        assert both["losses"][name] == pytest.approx(steps["losses"][name], rel=1e-6)
    step, seen, twice = (
        run_of_clouds(name, Job(0), refresh=1)
        for name in ("momentum-adam", "momentum-adam-gradient", "momentum-adam-both")
    )
    assert max(seen["Dom"]["chi_update"]) < 0.99
    assert min(twice["Dom"]["chi_update"]) == pytest.approx(1, abs=1e-3)
    assert step["losses"]["plain"] == seen["losses"]["plain"] == twice["losses"]["plain"]
    for name in ("Dom", "Bulk"):  # what Adam divides by is of other gradients
        assert twice["losses"][name][1:] != pytest.approx(step["losses"][name][1:], rel=1e-6)
        assert twice["losses"][name][1:] != pytest.approx(seen["losses"][name][1:], rel=1e-6)


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_other_seeds_and_sizes_give_other_figures(run_of_clouds):
    raws = [
        run_of_clouds("sgd-mlp-mse", Job(seed), width=width, last_switch=1, steps=1)
        for seed in (0, 1)
        for width in (4, 5)
    ]
    assert len({raw["losses"]["SGD"][0] for raw in raws}) == 4


class KilledError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("end", [KilledError, KeyboardInterrupt])
def test_a_killed_experiment_goes_on_to_the_same_figures(tmp_path, monkeypatch, run_of_clouds, end):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", math.inf)
    whole = run_of_clouds("sgd-mlp-ce", Job(0))
    saved = []

    def save_and_die(state, path):
        torch_save(state, path)
        saved.append(state["experiment"]["step"])
        if len(saved) == 7:
            pathlib.Path(path).replace(tmp_path / "compare.pt")
            raise end

    torch_save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", save_and_die)
    job = Job(0, scratch=tmp_path)
    with pytest.raises(end):
        run_of_clouds("sgd-mlp-ce", job)
    assert run_of_clouds("sgd-mlp-ce", job) == whole
    # 4 steps before the switch and 4 in each of two branches, none of them twice.
    assert len(saved) == 4 + 2 * 4 + 3  # and the end of each phase


@pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning")
def test_an_experiment_killed_in_shuffled_epochs_goes_on_from_the_switch(
    tmp_path, monkeypatch, run_of_clouds
):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", math.inf)
    whole = run_of_clouds("sgd-mlp-mse", Job(0))
    torch_save = torch.save

    def save_or_die(state, path):
        if "experiment" not in state:
            raise KilledError
        torch_save(state, path)

    job = Job(0, scratch=tmp_path)
    monkeypatch.setattr(checkpoint.torch, "save", save_or_die)
    with pytest.raises(KilledError):
        run_of_clouds("sgd-mlp-mse", job)
    monkeypatch.setattr(checkpoint.torch, "save", torch_save)
    assert run_of_clouds("sgd-mlp-mse", job) == whole


def test_the_gate_is_of_the_losses_scatter():
    def gate(losses):
        return analysis.over_scatter({"losses": {"SGD": losses}}, "SGD")

    assert gate([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, -0.5]) == pytest.approx(2 / 1.25**0.5)
    assert gate([2.0, 2.0, 2.0, 2.0, 1.9]) == math.inf
    assert gate([1.0, 2.0, 2.0, 2.0, 1.9]) == -math.inf
    assert math.isnan(gate([1.0] * 5))
    assert math.isnan(gate([1.0, 1.0, 1.0, 1.0, math.inf]))


@pytest.mark.parametrize(("chi", "met"), [([0.95, 0.9], True), ([0.95, 0.8], False)])
def test_a_premise_is_of_the_mean_alignment(chi, met):
    raw = {"phases": {"SGD": {"chi_gradient": chi}}, "GD": {"chi_gradient": chi}}
    assert CLAIMS["dom-fails"].premise(raw) is met
    assert CLAIMS["edge-dom-fails"].premise(raw) is met
    assert CLAIMS["gd-not-aligned"].premise({"chi_of_sgd": [0.0, *chi]}) is met


@pytest.mark.parametrize(("before", "met"), [(0.95, (True, False)), (0.05, (False, True))])
def test_the_premise_of_a_switch_is_what_was_before_it(before, met):
    part = {"switch_step": 2, "step": [0, 2, 2, 3], "chi_gradient": [0.5, before, before, 0.5]}
    raw = {"SGD to GD": part, "GD to SGD": part}
    names = ("noise-off", "noise-on")
    assert tuple(CLAIMS[name].premise(raw) for name in names) == met


def test_eigenvalues_of_what_diverged_are_drawn_up_to_there():
    part = {
        "switch_step": 1,
        "step": [0, 1, 2],
        "loss": [1.0, 2.0, math.nan],
        "chi_gradient": [0.5, 0.9, math.nan],
        "eigenvalues": [[3.0, 2.0], [4.0, 2.0], math.nan],
        "next_eigenvalues": [[1.0, 0.5], [1.0, 0.5], math.nan],
    }
    raws = {"switching": {0: {"SGD to GD": part, "GD to SGD": part}}}
    figure = PAPER.exhibit("figure-20").draw(raws)
    eigenvalues = figure.axes[2].lines[:4]
    assert [list(line.get_xdata()) for line in eigenvalues] == [[0, 1]] * 4
    assert [list(line.get_ydata()) for line in eigenvalues] == [[3, 4], [2, 2], [1, 1], [0.5, 0.5]]
