"""What the speed comparison says of samples: true sines, shares that are covered, costs by size."""

import math

import pytest
import torch
from rich.console import Console
from torch import nn

import subspace_optim as so
from benchmarks.losses import mse
from benchmarks.speed.coverage import (
    CASES,
    SHARES,
    STAGES,
    Case,
    coverage,
    covered,
    in_batches,
    summary,
    tell,
)
from benchmarks.speed.growth import LINEAR_SPECTRUM, Growing, certified, grow, growth_of, linear
from benchmarks.speed.picture import sampling_picture
from benchmarks.speed.tables import TABLES
from subspace_optim.linalg.rows import largest_sine
from tests.dense import dense_curvature, supervised

K = 3


@pytest.fixture
def problem():
    """A linear model on rows of known variances, whose classes do not matter to its Hessian."""
    generator = torch.Generator().manual_seed(0)
    variances = torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.05, 0.02], dtype=torch.float64)
    x = torch.randn(300, 7, generator=generator, dtype=torch.float64) * variances.sqrt()
    return nn.Linear(7, 1, bias=False).double(), x, torch.zeros(300, dtype=torch.long)


def top(matrix, k):
    return torch.linalg.eigh(matrix).eigenvectors.T.flip(0)[:k].contiguous()


def row(estimate, true, **about):
    fixed = {
        "model": "mlp",
        "dataset": "digits",
        "loss": "mse",
        "k": 10,
        "stage": "late",
        "share": 0.1,
    }
    fixed |= {"gap": 0.3, "batch": None, "dimensions": 12.0, "margin": 2.0}
    return fixed | {"estimate": estimate, "true_sine": true} | about


def test_a_thousand_samples_of_all_models_are_drawn():
    counts = {name: case.seeds * case.draws for name, case in CASES.items()}
    assert sum(counts.values()) * len(SHARES) * len(STAGES) * 2 >= 1000
    assert {case.model for case in CASES.values()} == {"mlp", "cnn", "transformer"}


def test_of_all_data_the_basis_is_the_dense_one_and_the_error_none(problem):
    model, x, y = problem
    found = tell(so.HessianOperator(model, mse, (x, y)), len(x), K, 0)
    dense = dense_curvature(model, supervised(mse), [(x, y)]).hessian
    assert found["examples"] == len(x)
    assert found["estimate"] == 0
    assert largest_sine(found["vectors"], top(dense, K)) < 1e-2  # residual 1e-3


@pytest.mark.parametrize("batch", [None, 10])
def test_a_sample_has_the_basis_of_other_rows_as_expected(problem, batch):
    model, x, y = problem
    data = (x, y) if batch is None else in_batches(x, y, batch)
    whole = top(x.T @ x / len(x), K)
    sines = []
    for seed in range(20):
        found = tell(so.HessianOperator(model, mse, data), 90, K, seed)
        assert found["examples"] == 90
        sines.append((largest_sine(found["vectors"], whole), found["estimate"]))
    assert len({true for true, _ in sines}) == 20  # each seed draws another sample
    assert sum(true <= estimate for true, estimate in sines) >= 17
    # The sine of sampled principal components, of first order (Anderson 1963), without a margin.
    variances = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    terms = [float(variances[2] * v / (variances[2] - v) ** 2) for v in variances[K:]]
    expected = math.sqrt((1 / 90 - 1 / 300) * sum(terms))
    assert expected / 2 <= sum(true for true, _ in sines) / 20 <= 2 * expected


def test_a_batch_that_cannot_be_cut_is_told_of():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).train()
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    with pytest.raises(ValueError, match="mean over examples"):
        tell(so.HessianOperator(model, mse, (x, y)), 20, 1, 0)


def test_samples_are_summed_up():
    rows = [row(0.2, 0.1), row(0.3, 0.1), row(0.1, 0.2), row(1.0, 0.7), row(0.4, 0.1)]
    found = summary(rows)
    assert (found["samples"], found["told"]) == (5, 4)
    assert found["covered"] == pytest.approx(4 / 5)
    assert found["covered_told"] == pytest.approx(3 / 4)
    assert found["median_ratio"] == pytest.approx(2.5)  # of 0.5, 2, 3, 4
    assert found["margin"] == 2
    # true / expected without the margin is 1, 2/3, 4 and 1/2: 0.85 of the way from 1 to 4.
    assert found["margin_needed"] == pytest.approx(1 + 0.85 * 3)


def test_estimates_of_1_are_right_and_tell_nothing():
    found = summary([row(1.0, 0.7), row(1.0, 0.9)])
    assert (found["covered"], found["told"], found["median_ratio"]) == (1, 0, None)


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row(0.2, 0.1)] * 19 + [row(0.1, 0.2)], True),
        ([row(0.2, 0.1)] * 18 + [row(0.1, 0.2)] * 2, False),
        ([row(0.4, 0.1)] * 20, False),
    ],
    ids=["95 %", "90 %", "too large"],
)
def test_the_bars(rows, met):
    assert covered(rows)["met"] is met


def test_groups_have_all_samples_of_their_kind():
    rows = [row(0.2, 0.1), row(0.2, 0.3, loss="ce", gap=0.05), row(0.04, 0.01, dimensions=80.0)]
    groups = covered(rows)["groups"]
    assert groups["loss"]["mse, k = 10"] == summary([rows[0], rows[2]])
    assert groups["loss"]["ce, k = 10"]["covered"] == 0
    assert set(groups["gap"]) == {"below 0.1", "0.2 to 0.4"}
    assert groups["dimensions"]["from 40"] == summary([rows[2]])
    assert set(groups["estimate"]) == {"below 0.05", "0.2 to 0.5"}
    assert all(sum(g["samples"] for g in group.values()) == 3 for group in groups.values())


@pytest.mark.slow
def test_a_case_is_followed_through_early_and_late():
    rows = coverage(Case("mlp", "digits", 60, seeds=1, draws=1), "mse", 0, None)
    assert [r["stage"] for r in rows] == [stage for stage in STAGES for _ in SHARES]
    assert len({r["gap"] for r in rows}) == len(STAGES)  # training moved the matrix
    assert all(0 < r["true_sine"] <= 1 for r in rows)
    assert [r["examples"] for r in rows[: len(SHARES)]] == [16, 16, 16, 20, 30]  # 8 pieces of 2


def test_the_hessian_of_the_linear_problem_has_the_spectrum():
    model, loss, (x, y) = linear(20_000, k=4, inputs=8)
    hessian = dense_curvature(model, supervised(loss), [(x, y)]).hessian.double()
    largest, smallest, below = LINEAR_SPECTRUM
    outliers = torch.linspace(largest, smallest, 4)
    expected = torch.cat([outliers, below / torch.arange(1, 5)]).double()
    torch.testing.assert_close(hessian.diagonal(), expected, rtol=0.06, atol=0)  # 6 sigma
    off = hessian - hessian.diagonal().diag()
    assert off.abs().max() <= 6 * largest / math.sqrt(20_000)


def test_a_certificate_beside_the_true_sine():
    model, loss, data = linear(6000, k=3, inputs=20)
    exact = top(data[0].double().T @ data[0].double() / 6000, 3).float()
    sampled, whole = (certified(model, loss, data, 3, s, 0, exact) for s in ("auto", None))
    for found in (sampled, whole):
        assert found["true_sine"] <= found["estimate"] <= 0.05
        assert found["seconds"] > 0
    assert (whole["examples"], whole["sampling_error"]) == (6000, 0)
    assert whole["example_products"] % 6000 == 0
    assert sampled["examples"] < 6000
    assert sampled["sampling_error"] > 0
    assert sampled["example_products"] < whole["example_products"]


def test_growth_is_of_the_large_sizes():
    assert growth_of([(1000, 1.0), (2500, 4.0), (5000, 6.0), (9000, 5.0)]) == pytest.approx(1.5)
    assert growth_of([(1000, 1.0), (5000, 6.0)]) is None


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_is_measured_is_printed_and_drawn(rounds):
    problem = Growing("rows", (600, 3000, 4000), lambda n: linear(n, k=2, inputs=6), 2, rounds)
    found = grow(problem)
    assert [(r["N"], r["sample"]) for r in found["rows"]] == [
        (n, sample) for n in (600, 3000, 4000) for sample in ("auto", None)
    ]
    assert [len(r["rounds"]) for r in found["rows"]] == [rounds] * 6
    for key in ("seconds", "example_products"):
        large = [r[key] for r in found["rows"] if r["sample"] == "auto" and r["N"] >= 2500]
        assert found["growth"][key] == pytest.approx(max(large) / min(large))
        assert found["met"][key] is (found["growth"][key] <= 1.5)
    result = {"coverage": covered([row(0.2, 0.1), row(0.1, 0.2)]), "growth": [found]}
    console = Console(width=200, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(TABLES["sampling"]("", result))
    text = captured.get()
    assert "MISSED" in text
    assert "4,000" in text
    figure = sampling_picture({"sampling": result})
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2, 2]
    assert sampling_picture({}) is None
