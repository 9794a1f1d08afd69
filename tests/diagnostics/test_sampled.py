"""What a sample tells of a gradient, against sums written out, and over all samples there are."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim.diagnostics import alignment, bulk_lr, dom_lr
from subspace_optim.diagnostics.sampled import Groups, SampledGradient
from tests.optim.naive import dense_eigenbasis

Array = np.ndarray[Any, np.dtype[np.float64]]
NAMES = ("norm", "chi", "dom_lr", "bulk_lr")


# --- written out ---------------------------------------------------------------------------------


def square(x: Array, w: Array, unsampled: float) -> float:
    """‖x̄‖² − v, by the definitions."""
    p = w / w.sum()
    mean = sum(p[j] * x[j] for j in range(len(x)))
    scatter = sum(p[j] ** 2 * ((x[j] - mean) ** 2).sum() for j in range(len(x)))
    return float((mean**2).sum() - unsampled * scatter / (1 - (p**2).sum()))


def quantities(x: Array, w: Array, f: float, vectors: Array, update: Array) -> dict[str, float]:
    """Squares and rates of a sample: χ and the norm by their squares, as their errors are."""
    P = vectors.T @ vectors
    inside, outside = x @ P, x - x @ P
    mean = (w[:, None] * x).sum(0) / w.sum()
    dominant, bulk = square(inside, w, 1 - f), square(outside, w, 1 - f)
    return {
        "norm": dominant + bulk,
        "chi": dominant / (dominant + bulk),
        "dom_lr": -(update @ P @ mean) / dominant,
        "bulk_lr": -(update @ (mean - P @ mean)) / bulk,
    }


def written_out(
    x: Array, w: Array, f: float, vectors: Array, update: Array
) -> dict[str, tuple[float, float]]:
    """Values and standard errors: each group is really taken out, and all computed anew."""
    whole = quantities(x, w, f, vectors, update)
    p = w / w.sum()
    squares = dict.fromkeys(NAMES, 0.0)
    for j in range(len(x)):
        others = np.arange(len(x)) != j
        left = quantities(x[others], w[others], f * (1 - p[j]), vectors, update)
        for name in NAMES:
            squares[name] += (1 - p[j]) ** 2 * (left[name] - whole[name]) ** 2
    errors = {n: math.sqrt((1 - f) * s / (1 - (p**2).sum())) for n, s in squares.items()}
    for name in ("norm", "chi"):
        root = math.sqrt(whole[name]) if whole[name] > 0 else math.nan
        whole[name], errors[name] = root, errors[name] / (2 * root)
    whole["chi"] = min(whole["chi"], 1.0)
    return {name: (whole[name], errors[name]) for name in NAMES}


def found_by(gradient: SampledGradient, update: Tensor) -> dict[str, tuple[float, float]]:
    found = {
        "norm": gradient.norm(),
        "chi": gradient.alignment(),
        "dom_lr": gradient.dom_lr(update),
        "bulk_lr": gradient.bulk_lr(update),
    }
    return {name: (float(each.value), float(each.error)) for name, each in found.items()}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 9999),
    groups=st.integers(3, 20),
    size=st.integers(3, 30),
    share=st.floats(0, 0.95),
    noise=st.floats(0.01, 2),
    data=st.data(),
)
def test_values_and_errors_are_those_of_the_definitions(
    seed: int, groups: int, size: int, share: float, noise: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, size - 1))
    basis = dense_eigenbasis(size, k, seed, torch.float64)
    random = np.random.default_rng(seed)
    w = random.uniform(0.2, 3, groups)
    x = random.normal(size=size) + noise * random.normal(size=(groups, size))
    update = random.normal(size=size)
    gradient = SampledGradient(torch.tensor(x), torch.tensor(w), share, basis)
    expected = written_out(x, w, share, basis.vectors.numpy(), update)
    for name, (value, error) in found_by(gradient, torch.tensor(update)).items():
        if math.isnan(value):  # what the square of the noise has swallowed
            parts = quantities(x, w, share, basis.vectors.numpy(), update)
            dominant = parts["chi"] * parts["norm"]
            bulk = parts["norm"] - dominant
            needed = {"norm": [parts["norm"]], "dom_lr": [dominant], "bulk_lr": [bulk]}
            assert min(needed.get(name, [parts["norm"], parts["chi"]])) <= 1e-12
        else:
            # A quotient of what is nearly zero has few digits.
            assert value == pytest.approx(expected[name][0], rel=1e-6)
            assert error == pytest.approx(expected[name][1], rel=1e-5, abs=1e-9)


def test_in_single_precision_nothing_is_lost_of_a_small_bulk() -> None:
    """χ is 1 to eight digits: the bulk is a difference that float32 does not hold."""
    basis = dense_eigenbasis(40, 5, 3, torch.float32)
    random = torch.Generator().manual_seed(0)
    outside = basis.project_out(torch.randn(12, 40, generator=random) + 2)
    inside = basis.project(torch.randn(12, 40, generator=random) + 2)
    x = inside + 1e-4 * outside
    update = torch.randn(40, generator=random)
    rows = torch.linalg.qr(basis.vectors.double().T).Q.T
    expected = written_out(
        x.double().numpy(), np.ones(12), 0.3, rows.numpy(), update.double().numpy()
    )
    found = found_by(SampledGradient(x.clone(), torch.ones(12), 0.3, basis), update)
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=2e-2)


# --- all the samples that there are --------------------------------------------------------------


@pytest.mark.parametrize("drawn", [3, 5, 6])
def test_over_all_samples_of_a_population_squares_have_no_bias(drawn: int) -> None:
    """The mean over all samples is the square of the population's mean, to rounding."""
    N = 7
    population = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)).double()
    truth = float(population.mean(0).square().sum())
    groups = Groups(torch.ones(drawn), drawn / N)
    squares, noise = [], []
    for chosen in combinations(range(N), drawn):
        sample = population[list(chosen)]
        squares.append(float(groups.squares(sample @ sample.T)[0]))
        noise.append(float(sample.mean(0).square().sum()) - truth)
    assert np.mean(squares) == pytest.approx(truth, rel=1e-12)
    assert np.mean(noise) > 0.01 * truth  # of a plain square there is one


def test_over_all_deals_to_groups_squares_have_no_bias() -> None:
    N, drawn = 6, 4
    population = torch.randn(N, 3, generator=torch.Generator().manual_seed(2)).double()
    truth = float(population.mean(0).square().sum())
    groups = Groups(torch.full((2,), 2.0), drawn / N)
    squares = []
    for chosen in permutations(range(N), drawn):
        means = population[list(chosen)].view(2, 2, 3).mean(1)
        squares.append(float(groups.squares(means @ means.T)[0]))
    assert np.mean(squares) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("drawn", [2, 4, 6])
def test_over_all_samples_the_error_of_a_mean_is_the_true_one(drawn: int) -> None:
    N = 7
    population = torch.randn(N, generator=torch.Generator().manual_seed(3)).double()
    groups = Groups(torch.ones(drawn), drawn / N)
    told, true = [], []
    for chosen in combinations(range(N), drawn):
        value, error = groups.estimate(groups.means(population[list(chosen)]))
        told.append(float(error) ** 2)
        true.append(float(value - population.mean()) ** 2)
    assert np.mean(told) == pytest.approx(np.mean(true), rel=1e-12)


@settings(max_examples=40)
@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=12))
def test_groups_count_by_their_weights(weights: list[float]) -> None:
    """A square is a quadratic form in the groups, and linear in their inner products.

    With groups of variance 1/w its mean is the square itself if the entries of the form add up to
    one, and its diagonal with 1/w to zero.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    J, groups = len(w), Groups(w, 0.0)
    form = torch.zeros(J, J, dtype=torch.float64)
    for i in range(J):
        for j in range(i + 1):
            unit = torch.zeros(J, J, dtype=torch.float64)
            unit[i, j] = unit[j, i] = 1
            found = groups.squares(unit)[0]
            form[i, j] = form[j, i] = found / (1 if i == j else 2)
    assert float(form.sum()) == pytest.approx(1, rel=1e-9)
    assert float((form.diagonal() / w).sum()) == pytest.approx(0, abs=1e-9)
    spread = float(groups.estimate(groups.means(torch.eye(J)[0]))[1]) ** 2
    p = w / w.sum()
    own = torch.eye(J, dtype=torch.float64)[0] - p[0]
    expected = float((p.square() * own.square()).sum() / (1 - p.square().sum()))
    assert spread == pytest.approx(expected, rel=1e-9)


# --- draw by draw --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_two_standard_errors_cover_the_truth(weighted: bool) -> None:
    """500 draws of two fifths of a population with outliers, in groups that may be unequal."""
    N, n, size, k = 2000, 800, 12, 3
    random = np.random.default_rng(5)
    basis = dense_eigenbasis(size, k, 1, torch.float64)
    mean = random.normal(size=size) / 3
    population = mean + random.standard_t(6, size=(N, size)) * random.uniform(0.5, 4, size)
    update = torch.tensor(random.normal(size=size))
    full = torch.tensor(population.mean(0))
    truth = {
        "norm": float(full.norm()),
        "chi": float(alignment(full, basis)),
        "dom_lr": float(dom_lr(update, full, basis)),
        "bulk_lr": float(bulk_lr(update, full, basis)),
    }
    cuts = np.linspace(0, n, 17).astype(int)[1:-1]
    if weighted:
        cuts = (n * (np.arange(1, 16) / 16) ** 1.7).astype(int)
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    errors: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(500):
        parts = np.split(random.permutation(N)[:n], cuts)
        x = torch.tensor(np.stack([population[part].mean(0) for part in parts]))
        w = torch.tensor([float(len(part)) for part in parts])
        for name, (value, error) in found_by(SampledGradient(x, w, n / N, basis), update).items():
            values[name].append(value)
            errors[name].append(error)
    for name in NAMES:
        off = np.abs(np.array(values[name]) - truth[name])
        assert np.mean(off <= 2 * np.array(errors[name])) >= 0.9, name
        # The true standard deviation is known to 3 % from 500 draws, and 15 degrees of freedom
        # take 2 % off the mean of the errors.
        assert np.mean(errors[name]) == pytest.approx(np.std(values[name]), rel=0.12), name
        # No bias beside a third of the error; the noise would add more to the norm.
        assert abs(np.mean(values[name]) - truth[name]) < np.mean(errors[name]) / 3, name


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_all_examples_it_is_the_gradient_itself_without_an_error(dtype: torch.dtype) -> None:
    basis = dense_eigenbasis(20, 4, 0, dtype)
    random = torch.Generator().manual_seed(0)
    x, update = torch.randn(8, 20, generator=random).to(dtype), torch.ones(20, dtype=dtype)
    full = x.mean(0)
    found = found_by(SampledGradient(x.clone(), torch.ones(8), 1.0, basis), update)
    close = 1e-5 if dtype == torch.float32 else 1e-12
    assert found["norm"] == (pytest.approx(float(full.norm()), rel=close), 0)
    assert found["chi"] == (pytest.approx(float(alignment(full, basis)), rel=close), 0)
    assert found["dom_lr"] == (pytest.approx(float(dom_lr(update, full, basis)), rel=close), 0)
    assert found["bulk_lr"] == (pytest.approx(float(bulk_lr(update, full, basis)), rel=close), 0)


def test_noise_is_no_gradient() -> None:
    """Groups that cancel: a plain square is zero too, but one less what noise is in it is below."""
    basis = dense_eigenbasis(6, 2, 0, torch.float64)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    x = torch.cat([x, -x])
    found = found_by(SampledGradient(x, torch.ones(8), 0.1, basis), torch.ones(6).double())
    assert all(math.isnan(value) and math.isnan(error) for value, error in found.values())


def test_one_group_tells_nothing_but_the_mean() -> None:
    groups = Groups(torch.ones(1), 0.1)
    value, error = groups.estimate(groups.means(torch.tensor([3.0])))
    assert float(value) == 3
    assert math.isnan(float(error))
    assert groups.squares(torch.ones(1, 1)).isnan().all()


def test_in_all_dimensions_there_is_no_bulk() -> None:
    basis = dense_eigenbasis(5, 5, 0, torch.float32)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + 3
    found = found_by(SampledGradient(x, torch.ones(8), 0.1, basis), torch.ones(5))
    assert found["chi"] == (pytest.approx(1), pytest.approx(0, abs=1e-5))
    assert all(map(math.isnan, found["bulk_lr"]))
    assert found["dom_lr"][0] != 0


def test_autocast_does_not_round_it() -> None:
    basis = dense_eigenbasis(20, 4, 0, torch.float32)
    random = torch.Generator().manual_seed(0)
    x, update = torch.randn(8, 20, generator=random), torch.randn(20, generator=random)
    expected = found_by(SampledGradient(x.clone(), torch.ones(8), 0.1, basis), update)
    with torch.autocast("cpu", torch.bfloat16):
        found = found_by(SampledGradient(x.clone(), torch.ones(8), 0.1, basis), update)
    assert found == expected
