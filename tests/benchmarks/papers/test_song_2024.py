"""`song_2024`: its cheapest claims at their real size, every run and picture at a tiny one."""

import math
import pathlib

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer", "vgg11", "resnet8"])
def test_the_models_take_their_data(monkeypatch, model):
    monkeypatch.setattr(problems, "real", clouds)
    data = runs.dataset(Job(), model, 6, 1)
    net = runs.network(Job(), model, data, 2)
    assert net(data.x_train).shape == (6, data.num_classes)
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
    assert near["GD to SGD"][-1] <= near["GD"][-1] + near["SGD"][-1]
    assert len(near["eigenvalues"][0]) == len(near["next_eigenvalues"][0]) == 3
    assert sgd["phases"]["warmup"]["step"] == [0, 2]
    assert sgd["phases"]["BulkSGD"]["step"] == [4, 6]
    for name, losses in sgd["losses"].items():  # one at each step, and at the end
        assert len(losses) == 4 + 1
        assert losses[:4:2] == pytest.approx(sgd["phases"][name]["loss"], rel=1e-5)
        assert losses[0] == sgd["losses"]["SGD"][0]
    assert "BulkSGD" not in tiny("song_2024", "sgd-mlp-ce")["phases"]
    assert switching["SGD to GD"]["step"] == [*range(11), *range(10, 14)]


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


# --- how claims decide -------------------------------------------------------------------------


def critical(dom=0.98, bulk=0.52, chi=0.9, sgd=0.5):
    row = {"step": [0, 1], "chi_gradient": [chi, 0.98], "eigenvalues": [[4.0, 2.0]] * 2}
    part = row | {"next_eigenvalues": [[1.0, 0.5], []]}
    return {
        "losses": {
            "SGD": [1.0, 1.0, 1.2, 0.4, sgd],
            "DomSGD": [1.0, 0.4, 0.4, 1.2, dom],
            "BulkSGD": [1.0, 0.9, 0.8, 0.7, bulk],
        },
        "final_distance": {"SGD": 2.0, "DomSGD": 0.5, "BulkSGD": 1.8},
        "phases": {
            "warmup": part,
            "SGD": part,
        },
    }


def test_the_critical_experiment_is_decided_by_the_decrease_of_the_loss():
    raw = critical()
    assert analysis.rank_gap(raw) == pytest.approx(3.0 / 0.75)
    assert CLAIMS["alignment"].measure(raw) == pytest.approx(0.94)
    assert CLAIMS["dom-fails"].measure(raw) == pytest.approx(0.04)
    assert CLAIMS["bulk-works"].measure(raw) == pytest.approx(0.96)
    assert CLAIMS["dom-stays-near"].measure(raw) == 0.25
    assert CLAIMS["dom-fails"].holds(CLAIMS["dom-fails"].measure(raw))
    assert not CLAIMS["dom-fails"].holds(CLAIMS["dom-fails"].measure(critical(dom=0.9)))
    assert not CLAIMS["bulk-works"].holds(CLAIMS["bulk-works"].measure(critical(bulk=0.6)))


def test_without_the_premise_or_training_no_projection_fails_or_works():
    for raw in (critical(chi=0.5), critical(sgd=0.9999)):
        assert math.isnan(CLAIMS["dom-fails"].measure(raw))
        assert math.isnan(CLAIMS["bulk-works"].measure(raw))
    assert math.isnan(CLAIMS["dom-stays-near"].measure(critical(chi=0.5)))


def test_a_branch_that_diverges_achieves_nothing():
    raw = critical(bulk=math.nan)  # as a raw file gives back what is not finite
    assert CLAIMS["bulk-works"].measure(raw) == -math.inf
    assert not CLAIMS["bulk-works"].holds(-math.inf)
    assert math.isnan(CLAIMS["bulk-works"].measure(critical(sgd=math.nan)))


def test_switches_are_judged_by_what_comes_after_them():
    part = {
        "switch_step": 2,
        "step": [0, 1, 2, 2, 3, 4, 5, 6],
        "chi_gradient": [1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 0.1, 0.2],
        "eigenvalues": [[v, 1.0] for v in (1.0, 5.0, 10.0, 10.0, 10.5, 10.0, 9.9, 9.9)],
    }
    raw = {"SGD to GD": part, "GD to SGD": part}
    assert CLAIMS["noise-off"].measure(raw) == pytest.approx(0.15)
    assert CLAIMS["noise-on"].measure(raw) == pytest.approx(0.15)
    assert analysis.jump_of_sharpness(raw) == pytest.approx(0.05)


def test_edges_are_judged_by_late_rows():
    before = {
        "step": [0, 1, 2, 3],
        "eigenvalues": [[1.0], [5.0], [9.0], [19.0]],
        "threshold": [20.0] * 4,
        "sam_edge": [4.0, 3.0, 2.0, 1.0],
        "gradient_norm": [0.4, 0.3, 0.2, 0.1],
    }
    raw = {"before": before}
    assert CLAIMS["edge-of-stability"].measure(raw) == pytest.approx(0.95)
    assert analysis.edge_with_gradient(raw) == pytest.approx(1.0)


def test_at_the_edge_a_branch_that_stands_still_achieves_nothing():
    up_and_down = [1.0, 3.0] * 5  # the switch is in a trough
    part = {"GD": [v - 0.1 * i for i, v in enumerate(up_and_down)], "Dom-GD": [0.8] * 10}
    part["Bulk-GD"] = [0.8 - 0.08 * i for i in range(10)]
    raw = {"losses": part}
    assert CLAIMS["edge-dom-fails"].measure(raw) == pytest.approx(0.0)
    assert CLAIMS["edge-bulk-works"].measure(raw) == pytest.approx(0.8)
    still = {"losses": {name: [1.0] * 10 for name in part}}
    assert math.isnan(CLAIMS["edge-dom-fails"].measure(still))


def rates(means, losses):
    return {"lr": 0.01} | {
        name: {"mean_bulk_lr": mean, "mean_dom_lr": sign * 0.01, "mean_log_loss": math.log(loss)}
        for name, mean, loss, sign in zip(
            runs.OPTIMIZERS, means, losses, (1, -1, 1, 1), strict=True
        )
    }


def test_rates_are_judged_by_their_order():
    raw = rates((0.01, 0.08, 0.4, 2.0), (0.4, 0.3, 0.2, 0.1))
    figures = {"rates-of-gd": 0, "rates-order": 5, "momentum-amplifies": 5, "adam-amplifies": 25}
    for name, figure in (figures | {"bulk-over-dom": 8, "rate-and-speed": 1}).items():
        assert CLAIMS[name].measure(raw) == pytest.approx(figure), name
    swapped = rates((0.01, 0.08, 0.07, 2.0), (0.4, 0.3, 0.2, 0.1))
    assert CLAIMS["rates-order"].measure(swapped) < 1
    assert CLAIMS["rate-and-speed"].holds(analysis.rate_and_speed(swapped))  # 4/5
    assert not CLAIMS["rate-and-speed"].holds(
        analysis.rate_and_speed(rates((0.01, 0.08, 0.4, 2.0), (0.1, 0.3, 0.2, 0.4)))
    )


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
