"""`song_2024`: its cheapest claims at their real size, every run and picture at a tiny one."""

import json
import math
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.data import Dataset
from benchmarks.papers import checkpoint, problems
from benchmarks.papers.reproduction import Job
from benchmarks.papers.song_2024 import PAPER, claims, runs

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


# --- every run and picture, tiny ---------------------------------------------------------------


def made_up(name, _job, examples, test=None):
    """Three classes that lie apart, in the shape of the data set of that name."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(examples) % 3
    if name == "sst2-1k":
        x = torch.randint(2, 9, (examples, 5), generator=generator)
        return Dataset(name, x, y % 2, None, None, 2, "words", vocabulary=9)
    shape = (36,) if name == "mnist-5k" else (3, 32, 32)
    x = torch.randn(examples, *shape, generator=generator) + y.view(-1, *[1] * len(shape))
    return Dataset(name, x, y, None, None, 3, "clouds")


TINY = {
    "examples": 24,
    "last_switch": 4,
    "steps": 4,
    "look": 2,
    "measure": 2,
    "spectrum": 2,
    "sgd_first": 10,
    "gd_first": 10,
    "after": 10,
    "every": 2,
    "switch": 8,
    "pool": 1,
    "chunk": 12,
    "width": 4,
}


def tiny(run):
    """The run with as little of everything as works."""
    less = {} if run.name == "toy" else {n: v for n, v in TINY.items() if n in run.small}
    return replace(run, small=dict(run.small) | less)


@pytest.fixture(scope="module")
def raws():
    """One seed of every run; those that differ in the model alone are all that of the MLP."""
    patch = pytest.MonkeyPatch()
    patch.setattr(problems, "real", made_up)
    made = {}
    for run in map(tiny, PAPER.runs):
        size = run.small | {"model": "mlp"} if "model" in run.small else run.small
        key = (run.measure, str(sorted((n, v) for n, v in size.items() if n != "tol")))
        if key not in made:
            made[key] = run.measure(Job(0), **size)
        made[run.name] = made[key]
    patch.undo()
    return {run.name: {0: json.loads(json.dumps(made[run.name]))} for run in PAPER.runs}


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer", "vgg11", "resnet8"])
def test_the_models_take_their_data(monkeypatch, model):
    monkeypatch.setattr(problems, "real", made_up)
    data = runs.dataset(Job(), model, 6, 1)
    net = runs.network(Job(), model, data, 2)
    assert net(data.x_train).shape == (6, data.num_classes)
    if data.x_train.dim() == 4:
        assert runs.dataset(Job(), model, 6, 2).x_train.shape == (6, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::subspace_optim.NoGapWarning"
)  # tiny nets have none, now and then
@pytest.mark.filterwarnings("ignore::subspace_optim.ConvergenceWarning")
class TestTiny:
    def test_every_exhibit_shows_it(self, raws):
        for exhibit in PAPER.exhibits:
            if exhibit.draw is not None:
                figure = exhibit.draw(raws)
                assert all(axes.has_data() for axes in figure.axes), exhibit.name
                figure.draw_without_rendering()  # warns of a key that leaves a panel no room
            if exhibit.table is not None:
                head, *rows = exhibit.table(raws)
                runs_shown = [f"`{run}`" for run in exhibit.runs]
                methods = list(runs.OPTIMIZERS)
                assert [row[0] for row in rows] in (runs_shown, methods)
                assert all(len(row) == len(head) for row in rows)

    def test_an_exhibit_shows_what_there_is(self, raws):
        some = {name: seeds for name, seeds in raws.items() if "mlp" in name}
        for exhibit in PAPER.exhibits:
            for show in (exhibit.draw, exhibit.table):
                if show is not None:
                    show({run: some.get(run, {}) for run in exhibit.runs})

    def test_every_claim_has_its_figure(self, raws):
        for claim in PAPER.claims:
            for run in claim.runs:
                assert isinstance(claim.measure(raws[run][0]), float), claim.name

    def test_what_holds_exactly_holds_at_any_size(self, raws):
        assert CLAIMS["rates-of-gd"].holds(claims.plain_rate(raws["rates-mlp"][0]))
        edge = raws["edge"][0]
        assert edge["before"]["threshold"][0] == pytest.approx(2 / 0.1)
        # The branches begin where the part before ended, and Dom and Bulk add up to the gradient.
        starts = {name: losses[0] for name, losses in edge["losses"].items()}
        assert starts["GD"] == starts["Dom-GD"] == starts["Bulk-GD"]
        lengths = {name: len(losses) for name, losses in edge["losses"].items()}
        assert lengths == {"before": 8, "GD": 10, "Dom-GD": 10, "Bulk-GD": 10}
        assert edge["GD"]["step"][0] == edge["switch_step"] == 8
        near = raws["gd-mlp"][0]
        assert near["GD to SGD"][0] == near["GD"][0] == 0
        assert near["GD to SGD"][-1] <= near["GD"][-1] + near["SGD"][-1]
        assert len(near["eigenvalues"][0]) == len(near["next_eigenvalues"][0]) == 3
        sgd = raws["sgd-mlp-mse"][0]
        assert sgd["phases"]["warmup"]["step"] == [0, 2]
        assert sgd["phases"]["BulkSGD"]["step"] == [4, 6]
        for name, losses in sgd["losses"].items():  # one at each step, and at the end
            assert len(losses) == 4 + 1
            assert losses[:4:2] == pytest.approx(sgd["phases"][name]["loss"])
            assert losses[0] == sgd["losses"]["SGD"][0]
        assert "BulkSGD" not in raws["sgd-mlp-ce"][0]["phases"]
        switched = raws["switching"][0]["SGD to GD"]
        assert switched["step"] == [*range(11), *range(10, 21)]

    def test_other_seeds_and_sizes_give_other_figures(self, monkeypatch):
        monkeypatch.setattr(problems, "real", made_up)
        run = tiny(PAPER.run("sgd-mlp-mse"))
        raws = [
            run.measure(Job(seed), **run.small | {"width": width})
            for seed in (0, 1)
            for width in (4, 5)
        ]
        assert len({raw["losses"]["SGD"][0] for raw in raws}) == 4


class KilledError(Exception):
    pass


@pytest.mark.parametrize("end", [KilledError, KeyboardInterrupt])
def test_a_killed_experiment_goes_on_to_the_same_figures(tmp_path, monkeypatch, end):
    monkeypatch.setattr(problems, "real", made_up)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", math.inf)
    run = tiny(PAPER.run("sgd-mlp-mse"))
    whole = run.measure(Job(0), **run.small)
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
        run.measure(job, **run.small)
    assert run.measure(job, **run.small) == whole
    # 4 steps before the switch and 4 in each of three branches, none of them twice.
    assert len(saved) == 4 + 3 * 4 + 4  # and the end of each phase


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
    assert claims.rank_gap(raw) == pytest.approx(3.0 / 0.75)
    assert claims.alignment_of_sgd(raw) == pytest.approx(0.94)
    assert claims.achieved("DomSGD")(raw) == pytest.approx(0.04)
    assert claims.achieved("BulkSGD")(raw) == pytest.approx(0.96)
    assert claims.moved("DomSGD")(raw) == 0.25
    assert CLAIMS["dom-fails"].holds(CLAIMS["dom-fails"].measure(raw))
    assert not CLAIMS["dom-fails"].holds(CLAIMS["dom-fails"].measure(critical(dom=0.9)))
    assert not CLAIMS["bulk-works"].holds(CLAIMS["bulk-works"].measure(critical(bulk=0.6)))


def test_without_the_premise_or_training_no_projection_fails_or_works():
    for raw in (critical(chi=0.5), critical(sgd=0.9999)):
        assert math.isnan(claims.achieved("DomSGD")(raw))
        assert math.isnan(claims.achieved("BulkSGD")(raw))
    assert math.isnan(claims.moved("DomSGD")(critical(chi=0.5)))


def test_a_branch_that_diverges_achieves_nothing():
    raw = critical(bulk=math.nan)  # as a raw file gives back what is not finite
    assert claims.achieved("BulkSGD")(raw) == -math.inf
    assert not CLAIMS["bulk-works"].holds(-math.inf)
    assert math.isnan(claims.achieved("BulkSGD")(critical(sgd=math.nan)))


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
    assert claims.jump_of_sharpness(raw) == pytest.approx(0.05)


def test_edges_are_judged_by_late_rows():
    before = {
        "step": [0, 1, 2, 3],
        "eigenvalues": [[1.0], [5.0], [9.0], [19.0]],
        "threshold": [20.0] * 4,
        "sam_edge": [4.0, 3.0, 2.0, 1.0],
        "gradient_norm": [0.4, 0.3, 0.2, 0.1],
    }
    raw = {"before": before}
    assert claims.sharpness_at_edge("threshold")(raw) == pytest.approx(0.95)
    assert claims.edge_with_gradient(raw) == pytest.approx(1.0)


def test_at_the_edge_a_branch_that_stands_still_achieves_nothing():
    up_and_down = [1.0, 3.0] * 5  # the switch is in a trough
    part = {"GD": [v - 0.1 * i for i, v in enumerate(up_and_down)], "Dom-GD": [0.8] * 10}
    part["Bulk-GD"] = [0.8 - 0.08 * i for i in range(10)]
    raw = {"losses": part}
    assert claims.achieved_at_edge("Dom-GD", "GD")(raw) == pytest.approx(0.0)
    assert claims.achieved_at_edge("Bulk-GD", "GD")(raw) == pytest.approx(0.8)
    still = {"losses": {name: [1.0] * 10 for name in part}}
    assert math.isnan(claims.achieved_at_edge("Dom-GD", "GD")(still))


def rates(means, losses):
    return {"lr": 0.01} | {
        name: {"mean_bulk_lr": mean, "mean_dom_lr": 0.01, "mean_log_loss": math.log(loss)}
        for name, mean, loss in zip(runs.OPTIMIZERS, means, losses, strict=True)
    }


def test_rates_are_judged_by_their_order():
    raw = rates((0.01, 0.08, 0.4, 2.0), (0.4, 0.3, 0.2, 0.1))
    assert claims.order_of_bulk_lr(raw) == pytest.approx(5.0)
    assert claims.plain_rate(raw) == pytest.approx(0.0)
    assert claims.momentum_amplifies(raw) == pytest.approx(5.0)
    assert claims.adam_amplifies(raw) == pytest.approx(25.0)
    assert claims.bulk_over_dom(raw) == pytest.approx(8.0)
    assert claims.rate_and_speed(raw) == 1.0
    swapped = rates((0.01, 0.08, 0.07, 2.0), (0.4, 0.3, 0.2, 0.1))
    assert claims.order_of_bulk_lr(swapped) < 1
    assert CLAIMS["rate-and-speed"].holds(claims.rate_and_speed(swapped))  # 4/5
    assert not CLAIMS["rate-and-speed"].holds(
        claims.rate_and_speed(rates((0.01, 0.08, 0.4, 2.0), (0.1, 0.3, 0.2, 0.4)))
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
