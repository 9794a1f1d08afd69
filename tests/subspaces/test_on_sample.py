"""``sample=``: the angle to the subspace of all data, by dense Hessians in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.subspaces.rule import Situation
from tests.checkpoints import through_a_file
from tests.clusters import clustered, network, one_hot_mse
from tests.dense import dense_curvature, supervised

N, K = 4000, 3
MAX_ANGLE = 0.1


clusters = partial(clustered, N, classes=K, spread=0.4, sort=True)


class Training:
    """A small network that trains, its subspace, and the true one."""

    def __init__(
        self,
        *,
        seed: int = 0,
        sample: Any = "auto",
        draw: int = 0,
        layers: tuple[nn.Module, ...] = (),
        **options: Any,
    ) -> None:
        self.x, self.y = clusters(seed=seed)
        self.model = network(*layers, seed=seed)
        hessian = so.HessianOperator(self.model, one_hot_mse, (self.x, self.y))
        options = {"max_angle": MAX_ANGLE} | options
        self.subspace = so.DominantSubspace(hessian, K, sample=sample, seed=draw, **options)
        self.seed, self.steps = seed, 0

    def train(self, make: Callable[..., torch.optim.Optimizer], lr: float) -> None:
        self.optimizer = make(self.model.parameters(), lr=lr)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(1000 * self.seed + self.steps)
            batch = torch.randint(N, (50,), generator=generator)
            self.optimizer.zero_grad()
            one_hot_mse(self.model(self.x[batch]), self.y[batch]).backward()
            self.optimizer.step()
            self.steps += 1

    def true_sine(self) -> float:
        dense = dense_curvature(self.model, supervised(one_hot_mse), [(self.x, self.y)])
        top = torch.linalg.eigh(dense.hessian).eigenvectors.T.flip(0)[:K]
        return largest_sine(self.subspace.update().vectors, top.contiguous())


TRAININGS = {
    "sgd": (torch.optim.SGD, 0.1),
    "adam": (torch.optim.Adam, 1e-2),
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.slow
def test_the_true_sine_is_at_most_the_estimate_and_the_estimate_the_limit(name):
    good, kept, ratios, moved, sampled = [], [], [], 0, 0
    for seed in range(4):
        training = Training(seed=seed)
        training.train(*TRAININGS[name])
        training.step(20)
        good.append(True)
        for _ in range(12):
            training.step(2)
            sine, stats = training.true_sine(), training.subspace.stats
            good[-1] &= sine <= stats.estimate
            kept.append(sine <= MAX_ANGLE)
            ratios.append(stats.estimate / sine)
            assert stats.sampling_error <= stats.estimate <= MAX_ANGLE
        sampled += (stats.examples or N) < N
        assert (stats.sampling_error > 0) == ((stats.examples or N) < N)
        moved += stats.refreshes
    assert sampled >= 1
    assert moved > 12  # the bases were not kept for nothing happening
    assert sum(good) >= 3  # of 4 draws, of which 95 % are promised
    assert np.mean(kept) == 1
    assert np.median(ratios) <= 4


def test_a_sample_costs_less_than_all_data():
    costs = {}
    for sample in (None, "auto"):
        training = Training(sample=sample, seed=3)
        training.train(torch.optim.SGD, 0.1)
        training.step(20)
        for _ in range(20):
            training.subspace.update()
            training.step()
        stats = training.subspace.stats
        costs[sample] = stats.full_products
        shares = stats.full_gradients / stats.gradients
        assert shares == 1 if sample is None else shares < 0.7
    assert costs["auto"] < 0.7 * costs[None]


@pytest.mark.slow
def test_a_sample_of_a_given_size():
    good = []
    for sample in (150, 600, 2000):
        for seed in range(14):
            training = Training(seed=seed, sample=sample, draw=seed)
            training.train(torch.optim.SGD, 0.1)
            training.step(20)
            sine, stats = training.true_sine(), training.subspace.stats
            assert stats.examples == sample
            assert 0 < stats.sampling_error <= stats.estimate
            good.append(sine <= stats.estimate)
    assert np.mean(good) >= 0.9  # 95 % are promised


def test_the_sampling_error_falls_with_the_size():
    errors = []
    for sample in (500, 1500, 3500):
        training = Training(sample=sample, seed=3)
        training.train(torch.optim.SGD, 0.1)
        training.step(20)
        training.subspace.update()
        errors.append(training.subspace.stats.sampling_error)
    # Like (1/n − 1/N)^½.
    expected = [(1 / n - 1 / N) ** 0.5 for n in (500, 1500, 3500)]
    ratios = np.array(errors) / np.array(expected)
    assert errors == sorted(errors, reverse=True)
    assert ratios.max() <= 2 * ratios.min()


@pytest.mark.parametrize("sample", [N, 10 * N])
def test_as_many_as_there_are(sample):
    training = Training(sample=sample)
    training.train(torch.optim.SGD, 0.1)
    training.step(20)
    assert training.true_sine() <= training.subspace.stats.estimate
    assert training.subspace.stats.sampling_error == 0


def test_without_a_gap_all_data_are_used():
    training = Training()
    training.train(torch.optim.SGD, 0.1)
    training.step(20)
    # Below the K outliers is a bulk of many: none of them stands alone.
    subspace = so.DominantSubspace(training.subspace.operator, 12, sample="auto", max_angle=1e-3)
    exact = so.DominantSubspace(training.subspace.operator, 12, max_angle=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = subspace.update(), exact.update()
    assert subspace.stats.examples in (None, N)
    assert subspace.stats.sampling_error == 0
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.3)], ids=str)
def test_data_that_cannot_be_divided_are_used_whole(layer):
    training, plain = (Training(sample=sample, layers=(layer,)) for sample in ("auto", None))
    for each in (training, plain):
        each.train(torch.optim.SGD, 0.1)
    assert torch.equal(training.subspace.update().vectors, plain.subspace.update().vectors)
    assert training.subspace.stats.examples is None


def test_few_examples_are_used_whole():
    x, y = clustered(300, classes=K, spread=0.4, sort=True)
    hessian = so.HessianOperator(network(), one_hot_mse, (x, y))
    subspace = so.DominantSubspace(hessian, K, sample="auto")
    subspace.update()
    assert subspace.stats.examples is None
    assert subspace.stats.sampling_error == 0


def test_whole_batches_of_a_list():
    x, y = clusters()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x[order].split(50), y[order].split(50), strict=True))
    model = network()
    subspace = so.DominantSubspace(
        so.HessianOperator(model, one_hot_mse, batches), K, sample="auto", max_angle=MAX_ANGLE
    )
    basis = subspace.update()
    dense = dense_curvature(model, supervised(one_hot_mse), [(x, y)])
    top = torch.linalg.eigh(dense.hessian).eigenvectors.T.flip(0)[:K]
    assert largest_sine(basis.vectors, top.contiguous()) <= subspace.stats.estimate
    assert subspace.stats.examples % 50 == 0
    assert subspace.stats.examples < N


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_alike():
    def run(resume_at: int | None) -> list[Any]:
        training = Training(seed=3)
        training.train(torch.optim.Adam, 1e-2)
        training.step(10)
        found = []
        for step in range(14):
            training.step()
            found.append(training.subspace.update().vectors.clone())
            if step == resume_at:
                state = through_a_file(training.subspace.state_dict())
                hessian = so.HessianOperator(training.model, one_hot_mse, (training.x, training.y))
                training.subspace = so.DominantSubspace(
                    hessian, K, sample="auto", max_angle=MAX_ANGLE
                )
                training.subspace.load_state_dict(state)
        stats = training.subspace.stats
        return [*found, stats.refreshes, stats.estimate, stats.examples, stats.sampling_error]

    straight, resumed = run(None), run(5)
    for ours, theirs in zip(straight, resumed, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_a_mode_that_changes_draws_and_solves_anew():
    training = Training(layers=(nn.BatchNorm1d(8),))
    training.model.eval()
    training.subspace.update()
    assert training.subspace.stats.examples is not None
    training.model.train()
    training.subspace.update()
    assert training.subspace.stats.examples is None
    plain = so.DominantSubspace(training.subspace.operator, K, max_angle=MAX_ANGLE)
    assert torch.equal(training.subspace.update().vectors, plain.update().vectors)


def test_what_is_told_does_not_grow_by_asking():
    training = Training(seed=3)
    training.subspace.update()
    rule, state = training.subspace.rule, training.subspace.operator.state()
    told = rule.stats.bound, rule.stats.estimate
    for _ in range(3):
        rule.is_due(Situation(state, state, 0))
    assert (rule.stats.bound, rule.stats.estimate) == told


def test_the_options_are_those_that_were_given():
    training = Training(seed=3)
    given = training.subspace.rule.options()
    training.subspace.update()
    assert training.subspace.rule.options() == given
    assert given == {"refresh": "auto", "max_angle": MAX_ANGLE, "sample": "auto"}


@pytest.mark.parametrize("sample", [1, 0, -5, 2.5, True, "all"])
def test_a_sample_that_cannot_be(sample):
    with pytest.raises(so.ArgumentError, match=r"`?sample`?.*(integer|at least).*auto"):
        Training(sample=sample)


@pytest.mark.parametrize("refresh", [1, 10])
def test_a_rule_that_counts_steps_takes_all_data(refresh):
    with pytest.raises(so.ArgumentError, match=r"sample.*refresh is 'auto'"):
        Training(sample=500, refresh=refresh)


def test_forced_refreshes_and_the_optimizers():
    training = Training()
    training.optimizer = so.BulkSGD(training.model.parameters(), lr=0.1, subspace=training.subspace)
    training.step(5)
    before = training.subspace.stats.refreshes
    training.subspace.refresh()
    assert training.subspace.stats.refreshes > before
    assert training.true_sine() <= training.subspace.stats.estimate
