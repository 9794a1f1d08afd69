"""The experiment on a problem whose outcome is known in closed form, and its interruptions."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

import subspace_optim as so
from benchmarks.experiment import WARMUP, Settings, compare, minibatch
from tests.benchmarks.comparisons import problem, same
from tests.observe import Seen

CURVATURES = torch.tensor([9.0, 4.0, 0.5, 0.25, 0.1], dtype=torch.float64)


class Quadratic(nn.Module):
    """``f(x) = x * θ``: with half the squared error to 0, ``L = ½ Σ h_i θ_i²`` for x² = h."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x):
        return x * self.theta


def half_square(output, target):
    return 0.5 * (output - target).square().sum(1).mean()


def quadratic_data(examples=8):
    return CURVATURES.sqrt().expand(examples, -1).clone(), torch.zeros(
        examples, 5, dtype=torch.float64
    )


def run(**options):
    defaults = {"k": 2, "lr": 0.1, "batch_size": 4, "switch_at": 3, "steps": 5, "measure": 1}
    defaults |= {"warmup_measure": 1, "refresh": 1, "spectrum": 1}
    model = options.pop("model", None) or Quadratic()
    return compare(model, half_square, quadratic_data(), settings=Settings(**(defaults | options)))


def trajectory(steps, kept, start=None, lr=0.1):
    """``θ_t`` of gradient descent on the coordinates ``kept``: each shrinks by ``1 − ηh``."""
    theta = torch.ones(5, dtype=torch.float64) if start is None else start
    return theta * torch.where(kept, (1 - lr * CURVATURES) ** steps, 1.0)


def loss_at(theta):
    return float(0.5 * (CURVATURES * theta**2).sum())


DOMINANT = torch.tensor([True, True, False, False, False])
EVERYTHING = torch.tensor([True] * 5)


def test_branches_follow_the_closed_form():
    result = run()
    switch = trajectory(3, EVERYTHING)
    assert result.finished
    assert result.switch_step == 3
    assert "as asked" in result.switch_reason
    assert result.switch_loss == pytest.approx(loss_at(switch), rel=1e-12)
    for name, kept in (("SGD", EVERYTHING), ("DomSGD", DOMINANT), ("BulkSGD", ~DOMINANT)):
        end = trajectory(5, kept, switch)
        branch = result.branches[name]
        assert branch.train_loss == pytest.approx(loss_at(end), rel=1e-9), name
        assert branch.distance == pytest.approx(float((end - switch).norm()), rel=1e-9), name
        assert branch.steps == 5


def test_rows_hold_the_closed_form():
    result = run()
    for row in result.rows:
        before = {WARMUP: 0}.get(row["phase"], 3)
        kept = {"DomSGD": DOMINANT, "BulkSGD": ~DOMINANT}.get(row["phase"], EVERYTHING)
        start = trajectory(before, EVERYTHING)
        theta = trajectory(row["step"] - before, kept, start)
        gradient = CURVATURES * theta
        assert row["loss"] == pytest.approx(loss_at(theta), rel=1e-9)
        chi = float(gradient[:2].norm() / gradient.norm())
        assert row["chi_gradient"] == pytest.approx(chi, rel=1e-9)
        assert row["eigenvalues"] == pytest.approx([9.0, 4.0], rel=1e-9)
        if row["phase"] in (WARMUP, "SGD"):
            assert row["next_eigenvalues"] == pytest.approx([0.5, 0.25], rel=1e-6)
        rates = {"DomSGD": (0.1, 0.0), "BulkSGD": (0.0, 0.1)}.get(row["phase"], (0.1, 0.1))
        assert row["dom_lr"] == pytest.approx(rates[0], abs=1e-9)
        assert row["bulk_lr"] == pytest.approx(rates[1], abs=1e-9)


def test_all_data_are_passed_in_chunks():
    class Counting(Quadratic):
        sizes: ClassVar[Seen] = Seen()

        def forward(self, x):
            self.sizes.append(len(x))
            return super().forward(x)

    whole, chunked = run(), run(model=Counting(), chunk=3)
    # Minibatches of 4, chunks of 3, 3 and 2, and all 8 for the accuracies.
    assert set(Counting.sizes) == {2, 3, 4, 8}
    for name, branch in whole.branches.items():
        assert chunked.branches[name].train_loss == pytest.approx(branch.train_loss, rel=1e-9)


def test_average_is_exponential_starts_at_0_and_goes_on_in_the_branches():
    result = run()
    average = 0.0
    for row in [*result.of(WARMUP), *result.of("SGD")]:
        average = 0.9 * average + 0.1 * row["chi_gradient"]
        assert row["chi_average"] == pytest.approx(average, rel=1e-12)


def test_switch_comes_where_the_average_reaches_its_value():
    rows = run().of(WARMUP)
    third = rows[2]["chi_average"]
    assert third > max(row["chi_average"] for row in rows[:2])
    result = run(switch_at=None, switch_chi=third - 1e-6, last_switch=50)
    assert result.switch_step == rows[2]["step"] + 1
    assert "reached" in result.switch_reason
    late = run(switch_at=None, switch_chi=1.01, last_switch=4)
    assert late.switch_step == 4
    assert "not yet" in late.switch_reason


def test_random_control_measures_a_random_subspace():
    result = run(control="random", switch_at=0, steps=40)
    ritz = torch.tensor([row["eigenvalues"] for row in result.of("SGD")])
    # Ritz values of random planes: within the spectrum, and far from the top two on average.
    assert ritz.max() <= 9.0 + 1e-9
    assert ritz.min() >= 0.1 - 1e-9
    assert ritz[:, 0].mean() < 8.0
    bulk = result.branches["BulkSGD"].train_loss
    assert bulk != pytest.approx(loss_at(trajectory(40, ~DOMINANT)), rel=1e-3)


def test_minibatches_are_epochs_of_all_examples():
    drawn = torch.cat([minibatch(12, 4, step, seed=1) for step in range(3)])
    assert sorted(drawn.tolist()) == list(range(12))
    again = torch.cat([minibatch(12, 4, step, seed=1) for step in range(3)])
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, torch.cat([minibatch(12, 4, s, seed=1) for s in range(3, 6)]))
    assert not torch.equal(drawn, torch.cat([minibatch(12, 4, s, seed=2) for s in range(3)]))


def test_minibatches_with_replacement_draw_each_example_by_itself():
    drawn = [minibatch(12, 4, step, 1, replacement=True) for step in range(3000)]
    assert torch.equal(drawn[7], minibatch(12, 4, 7, seed=1, replacement=True))
    assert len({tuple(batch.tolist()) for batch in drawn[:50]}) > 45
    share = torch.bincount(torch.cat(drawn), minlength=12) / 12_000
    # A twelfth each, to 3 % at one deviation.
    torch.testing.assert_close(share, torch.full((12,), 1 / 12), rtol=0.12, atol=0.0)
    # An example is twice in a minibatch as often as chance has it: 1 - 11·10·9/12³ of them.
    twice = sum(len(set(batch.tolist())) < 4 for batch in drawn) / len(drawn)
    assert twice == pytest.approx(1 - 11 * 10 * 9 / 12**3, abs=0.04)


def test_the_experiment_draws_as_its_settings_say():
    x, y = quadratic_data()
    x = x * torch.arange(1, 9)[:, None] / 4  # examples that differ
    net, chosen = Quadratic(), {"k": 2, "lr": 0.1, "batch_size": 4, "switch_at": 2}
    result = compare(net, half_square, (x, y), ["SGD"], steps=1, replacement=True, **chosen)
    theta = torch.ones(5, dtype=torch.float64)
    for step in range(2):
        batch = minibatch(8, 4, step, 0, replacement=True)
        theta = theta - 0.1 * x[batch].square().mean(0) * theta
    assert result.switch_loss == pytest.approx(float(half_square(x * theta, y)))


SMALL = Settings(
    k=3, lr=0.1, batch_size=8, switch_at=7, steps=9, warmup_measure=3, measure=4, refresh=3
)


@pytest.fixture(scope="module")
def whole():
    model, loss_fn, data = problem()
    return compare(model, loss_fn, data, settings=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 6, 7, 8, 12, 17, 30])
def test_resumed_run_equals_the_uninterrupted_one(stop_after, whole):
    taken = []

    def stop(experiment, measured):
        taken.append(copy.deepcopy(experiment.state_dict()))
        if len(taken) == stop_after:
            raise KeyboardInterrupt

    model, loss_fn, data = problem()
    part = compare(model, loss_fn, data, settings=SMALL, on_progress=stop)
    assert not part.finished
    assert same(part.rows, whole.rows[: len(part.rows)])
    model, loss_fn, data = problem()
    rest = compare(model, loss_fn, data, settings=SMALL, resume_from=taken[-1])
    assert rest.finished
    assert same(rest.rows, whole.rows)
    for name, branch in whole.branches.items():
        other = rest.branches[name]
        assert (other.train_loss, other.distance) == (branch.train_loss, branch.distance)
        assert (other.steps, other.products) == (branch.steps, branch.products)


def test_model_is_left_as_it_was():
    model, loss_fn, data = problem()
    before = copy.deepcopy(model.state_dict())
    compare(model, loss_fn, data, settings=SMALL)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_diverged_before_the_switch_is_an_error_not_a_comparison():
    with pytest.raises(so.NonFiniteError):  # θ is 1e100 after a step, and 1e200 after two
        run(lr=1e100, switch_at=2, warmup_measure=2, spectrum=0)
