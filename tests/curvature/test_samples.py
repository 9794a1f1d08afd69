"""Samples of an operator's data: which examples they hold, and whose matrix they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import subspace_optim as so
from subspace_optim.curvature.samples import dealt
from tests.dense import dense_curvature, probes, supervised

N = 120


class Net(nn.Module):
    """A small network on inputs whose first entry is the number of the example."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, 1:])


class Coupled(nn.Module):
    """Takes from each example the mean of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Numbers(nn.Module):
    """A parameter for each example: the Hessian of its square is 2/n at those of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x[:, 0].long()]


def problem(*layers: nn.Module, seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(*layers).double()
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.arange(N)
    return model, x, torch.randint(2, (N,), generator=generator)


def examples_of(data: Any, drawn: int, seed: int) -> list[int]:
    """The numbers of the examples that are drawn from data of this form."""
    hessian = so.HessianOperator(Numbers(), lambda out, _: out.square().mean(), data)
    view = hessian.sample(drawn, seed=seed)
    diagonal = view.matmat(torch.eye(N, dtype=torch.float64)).diagonal()
    numbers = diagonal.nonzero().flatten().tolist()
    torch.testing.assert_close(
        diagonal[numbers], torch.full((len(numbers),), 2 / len(numbers)).double()
    )
    return numbers


@pytest.mark.parametrize("drawn", [40, 17, 119])
def test_rows_of_one_batch(drawn):
    model, x, y = problem()
    view = so.HessianOperator(model, F.cross_entropy, (x, y)).sample(drawn, seed=1)
    assert view.examples == (drawn, N)
    rows = examples_of((x, y), drawn, 1)
    assert len(rows) == drawn  # without replacement
    dense = dense_curvature(model, supervised(F.cross_entropy), [(x[rows], y[rows])])
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), vectors @ dense.hessian)
    torch.testing.assert_close(view.gradient(), dense.gradient)
    assert view.loss() == pytest.approx(dense.loss)


def test_the_operator_itself_stays_as_it_was():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    before = hessian.matmat(probes(hessian.size))
    view = hessian.sample(30, seed=0)
    view.matmat(probes(view.size))
    assert hessian.examples is None
    assert torch.equal(hessian.matmat(probes(hessian.size)), before)
    assert hessian.loss() != view.loss()


def test_a_larger_sample_holds_the_smaller_one_and_another_seed_is_another():
    _, x, y = problem()
    small, large, other = (examples_of((x, y), *draw) for draw in ((20, 3), (50, 3), (20, 4)))
    assert set(small) < set(large)
    assert small != other
    assert small == examples_of((x, y), 20, 3)


def in_batches(x: Tensor, y: Tensor, form: str) -> Any:
    if form == "list":
        return list(zip(x.split(10), y.split(10), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=10)


@pytest.mark.parametrize("form", ["list", "loader"])
def test_whole_batches_of_several(form):
    model, x, y = problem(Coupled())
    data = in_batches(x, y, form)
    view = so.HessianOperator(model, F.cross_entropy, data).sample(35, seed=0)
    assert view.examples == (40, N)
    numbers = examples_of(data, 35, 0)
    chosen = sorted({number // 10 for number in numbers})
    assert numbers == [10 * b + i for b in chosen for i in range(10)]
    batches = [(x[10 * b : 10 * b + 10], y[10 * b : 10 * b + 10]) for b in chosen]
    dense = dense_curvature(model, supervised(F.cross_entropy), batches)
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), vectors @ dense.hessian)


def test_batches_of_any_form():
    model, x, y = problem()
    data = [{"x": a, "y": b} for a, b in zip(x.split(15), y.split(15), strict=True)]

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["x"]), batch["y"]), len(batch["y"])

    view = so.HessianOperator.from_loss(model, loss, data).sample(30, seed=0)
    assert view.examples == (30, N)
    pairs = list(zip(x.split(15), y.split(15), strict=True))
    rows = examples_of(pairs, 30, 0)
    dense = dense_curvature(model, loss, [{"x": x[rows], "y": y[rows]}])
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), vectors @ dense.hessian)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5), Coupled()], ids=str)
def test_a_batch_whose_examples_are_coupled_is_not_cut(layer):
    model, x, y = problem(layer)
    assert so.HessianOperator(model, F.cross_entropy, (x, y)).sample(40, seed=0) is None


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)], ids=str)
def test_in_eval_mode_it_is(layer):
    model, x, y = problem(layer)
    view = so.HessianOperator(model.eval(), F.cross_entropy, (x, y)).sample(40, seed=0)
    assert view.examples == (40, N)


def test_too_few_examples_are_not_cut():
    model, x, y = problem()
    assert so.HessianOperator(model, F.cross_entropy, (x[:30], y[:30])).sample(20, seed=0) is None


def test_the_matrix_of_a_sum_is_estimated_for_all_examples():
    model, x, y = problem()
    total = nn.CrossEntropyLoss(reduction="sum")
    view = so.HessianOperator(model, total, (x, y)).sample(40, seed=0)
    rows = examples_of((x, y), 40, 0)
    batch = (x[rows], y[rows])
    dense = dense_curvature(model, supervised(F.cross_entropy), [batch])
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), N * vectors @ dense.hessian)


def test_class_weights_weigh_the_examples_of_a_sample():
    model, x, y = problem()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0], dtype=torch.float64))
    view = so.HessianOperator(model, loss, (x, y)).sample(40, seed=0)
    rows = examples_of((x, y), 40, 0)
    batch = (x[rows], y[rows])
    # One batch: its loss is the mean that is meant, whatever its weight.
    dense = dense_curvature(model, supervised(loss), [batch])
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), vectors @ dense.hessian)
    parts: list[Tensor] = []
    view.batch_matmat(vectors, lambda part: parts.append(part.clone()))
    torch.testing.assert_close(sum(parts), vectors @ dense.hessian)


@pytest.mark.parametrize("budget", [None, 0])
def test_the_parts_of_batches_add_up_to_the_products(budget):
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y), memory_budget=budget)
    view = hessian.sample(40, seed=0)
    vectors, parts = probes(view.size), []
    products = view.batch_matmat(vectors, lambda part: parts.append(part.clone()))
    assert len(parts) == 8
    torch.testing.assert_close(sum(parts), products)
    torch.testing.assert_close(products, view.matmat(vectors))
    assert len({float(part.norm()) for part in parts}) == 8


def test_each_batch_of_a_list_is_a_part():
    model, x, y = problem()
    data = list(zip(x.split(30), y.split(30), strict=True))
    hessian = so.HessianOperator(model, F.cross_entropy, data)
    vectors, parts = probes(hessian.size), []
    hessian.batch_matmat(vectors, lambda part: parts.append(part.clone()))
    for part, batch in zip(parts, data, strict=True):
        dense = dense_curvature(model, supervised(F.cross_entropy), [batch])
        torch.testing.assert_close(part, vectors @ dense.hessian / 4)


def test_products_are_counted_by_their_share():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    hessian.matmat(probes(hessian.size, count=2))
    hessian.sample(30, seed=0).matmat(probes(hessian.size, count=4))
    assert hessian.stats.products == 6
    assert hessian.stats.full_products == 2 + 4 * 30 / N


def test_the_parameters_may_move():
    model, x, y = problem()
    view = so.HessianOperator(model, F.cross_entropy, (x, y)).sample(40, seed=0)
    view.matmat(probes(view.size))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    rows = examples_of((x, y), 40, 0)
    dense = dense_curvature(model, supervised(F.cross_entropy), [(x[rows], y[rows])])
    vectors = probes(view.size)
    torch.testing.assert_close(view.matmat(vectors), vectors @ dense.hessian)


def test_gauss_newton_and_residual_have_samples_too():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    gauss_newton = so.GaussNewtonOperator(model, F.cross_entropy, (x, y))
    view = so.ResidualOperator(hessian, gauss_newton).sample(40, seed=2)
    rows = examples_of((x, y), 40, 2)
    own = x[rows], y[rows]
    vectors, parts = probes(view.size), []
    expected = dense_curvature(model, supervised(F.cross_entropy), [own]).hessian
    expected = vectors @ expected - so.GaussNewtonOperator(model, F.cross_entropy, own).matmat(
        vectors
    )
    torch.testing.assert_close(view.matmat(vectors), expected)
    products = view.batch_matmat(vectors, lambda part: parts.append(part.clone()))
    torch.testing.assert_close(products, expected)
    torch.testing.assert_close(sum(parts), expected)
    assert view.examples == (40, N)


def test_finite_differences_have_samples():
    model, x, y = problem()
    operator = so.FiniteDifferenceHessian(model, F.cross_entropy, (x, y))
    view = operator.sample(40, seed=0)
    rows = examples_of((x, y), 40, 0)
    dense = dense_curvature(model, supervised(F.cross_entropy), [(x[rows], y[rows])])
    vectors = probes(view.size)
    expected = vectors @ dense.hessian
    torch.testing.assert_close(view.matmat(vectors), expected, rtol=1e-6, atol=1e-6)


# Groups of a sample.


def dense_groups(view: Any, model: nn.Module, loss: Any, parts: list[Any]) -> None:
    """The groups of a sample are these parts, in some order."""
    found = view.group_means(len(parts), seed=5)
    losses = [float(loss(model(x), y).detach()) for x, y in parts]
    order = [losses.index(pytest.approx(float(own), rel=1e-9)) for own in found.losses]
    assert sorted(order) == list(range(len(parts)))
    for i, own in zip(order, found.gradients, strict=True):
        dense = dense_curvature(model, supervised(loss), [parts[i]])
        torch.testing.assert_close(own, dense.gradient)


def test_the_groups_of_rows_are_pieces_of_the_sample():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    view = hessian.sample(50, seed=3, pieces=16)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:50]
    assert sorted(order.tolist()) == examples_of((x, y), 50, 3)
    dense_groups(view, model, F.cross_entropy, [(x[r], y[r]) for r in order.tensor_split(16)])
    found = view.group_means(16, seed=5)
    assert sorted(found.weights.tolist()) == [3.0] * 14 + [4.0] * 2
    mean = found.weights @ found.gradients / found.weights.sum()
    torch.testing.assert_close(mean, view.gradient())
    assert float(found.weights @ found.losses) / 50 == pytest.approx(view.loss())


def test_groups_weigh_what_their_losses_are_a_mean_over():
    model, x, y = problem()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0], dtype=torch.float64))
    view = so.HessianOperator(model, loss, (x, y)).sample(40, seed=0)
    found = view.group_means(8, seed=0)
    assert float(found.weights.sum()) == pytest.approx(
        float(loss.weight[y[examples_of((x, y), 40, 0)]].sum())
    )
    mean = found.weights @ found.gradients / found.weights.sum()
    torch.testing.assert_close(mean, view.gradient())


def test_each_group_of_a_sum_estimates_the_sum_of_all():
    model, x, y = problem()
    total = nn.CrossEntropyLoss(reduction="sum")
    view = so.HessianOperator(model, total, (x, y)).sample(40, seed=0)
    found = view.group_means(8, seed=0)
    mean = so.HessianOperator(model, F.cross_entropy, (x, y)).sample(40, seed=0)
    expected = mean.group_means(8, seed=0)
    torch.testing.assert_close(found.gradients, N * expected.gradients)
    torch.testing.assert_close(found.losses, N * expected.losses)
    torch.testing.assert_close(found.weights.sum().item(), view.examples[0] / N)


@pytest.mark.parametrize("groups", [2, 5, 8, 12])
def test_batches_are_dealt_to_groups_of_like_numbers(groups):
    model, x, y = problem(Coupled())
    data = in_batches(x, y, "list")
    view = so.HessianOperator(model, F.cross_entropy, data).sample(75, seed=0)
    found = view.group_means(groups, seed=1)
    counts = (found.weights / 10).tolist()
    assert len(counts) == min(groups, 8)
    assert sum(counts) == 8
    assert max(counts) - min(counts) <= 1
    mean = found.weights @ found.gradients / found.weights.sum()
    torch.testing.assert_close(mean, view.gradient())


def test_the_order_of_the_data_is_not_that_of_the_deal():
    """Every J-th batch of ordered data makes groups that are more alike than samples are."""
    deals = {tuple(dealt(12, 4, seed)) for seed in range(50)}
    assert len(deals) == 50
    assert all(sorted(deal) == sorted([0, 1, 2, 3] * 3) for deal in deals)
    together = sum(deal[0] == deal[4] for deal in deals) / 50
    assert 0.02 < together < 0.4  # 2/11; every fourth would always be


def test_gradients_are_counted_by_their_share():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    hessian.gradient()
    view = hessian.sample(30, seed=0)
    view.group_means(8, seed=0)
    view.gradient()
    assert hessian.stats.gradients == 3
    assert hessian.stats.full_gradients == 1 + 2 * 30 / N
    assert hessian.stats.examples == N


def test_the_residual_has_the_groups_of_the_hessian():
    model, x, y = problem()
    hessian = so.HessianOperator(model, F.cross_entropy, (x, y))
    gauss_newton = so.GaussNewtonOperator(model, F.cross_entropy, (x, y))
    residual = so.ResidualOperator(hessian, gauss_newton).sample(40, seed=2)
    found, own = residual.group_means(8, seed=0), hessian.sample(40, seed=2).group_means(8, seed=0)
    assert all(map(torch.equal, found, own))
    assert residual.stats.full_gradients == pytest.approx(40 / N)
