"""Minibatches of an operator: which examples they hold, and whose matrix they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from tests.dense import Problem, dense_curvature, probes, problems, supervised

N = 23


class Numbers(nn.Module):
    """A parameter for each example: the gradient of its square is 2/B at those of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x.long()]


def numbers(data: Any, *args: Any, count: int, **options: Any) -> list[list[int]]:
    """The numbers of the examples of the first minibatches of data of this form."""
    operator = so.HessianOperator(Numbers(), lambda out, _: out.square().mean(), data)
    views = operator.minibatches(*args, **options).views
    found = []
    for _, view in zip(range(count), views, strict=False):
        gradient = view.gradient()
        rows = gradient.nonzero().flatten()
        torch.testing.assert_close(gradient[rows], torch.full((len(rows),), 2 / len(rows)).double())
        found.append(rows.tolist())
    return found


def forms() -> dict[str, Any]:
    x = torch.arange(N)
    return {
        "one batch": (x, x),
        "list": list(zip(x.split(5), x.split(5), strict=True)),
        "loader": DataLoader(TensorDataset(x, x), batch_size=4),
    }


@pytest.mark.parametrize("form", ["one batch", "list", "loader"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_drawn_rows_are_each_there_once_before_any_is_there_again(form: str, size: int) -> None:
    each = N // size
    found = numbers(forms()[form], size, seed=1, count=2 * each)
    assert [len(batch) for batch in found] == [size] * (2 * each)
    for epoch in (found[:each], found[each:]):
        assert len({row for batch in epoch for row in batch}) == size * each  # without replacement
    assert found[:each] != found[each:]


@pytest.mark.parametrize("form", ["list", "loader"])
def test_without_a_size_they_are_the_batches_of_the_data_in_another_order(form: str) -> None:
    data = forms()[form]
    own = [y.tolist() for _, y in data]
    orders = [numbers(data, seed=seed, count=99) for seed in range(6)]
    for found in orders:
        assert sorted(found) == own
    assert len({tuple(map(tuple, found)) for found in orders}) > 1
    assert orders[0] == numbers(data, seed=0, count=99)


def test_the_draw_does_not_depend_on_how_the_data_are_stored() -> None:
    first, *others = (numbers(data, 4, seed=3, count=20) for data in forms().values())
    assert all(other == first for other in others)
    assert first != numbers(forms()["list"], 4, seed=4, count=20)


def test_the_batch_of_all_rows_comes_once() -> None:
    assert numbers(forms()["list"], N, count=5) == [list(range(N))]


def test_how_many_there_are() -> None:
    def count(data: Any, *args: Any) -> int | None:
        loss = lambda out, _: out.square().mean()  # noqa: E731
        return so.HessianOperator(Numbers(), loss, data).minibatches(*args).count

    data = forms()
    assert [count(data[form]) for form in data] == [1, 5, 6]
    assert count(data["list"], 5) is None
    assert count(data["list"], N) == 1


@given(problems())
def test_loss_gradient_and_products_are_those_of_the_batch_alone(problem: Problem) -> None:
    """Against the dense Hessian of each batch; and their weighted mean is the operator's own."""
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    before = operator.gradient()
    vectors = probes(operator.size)
    dense = [
        dense_curvature(problem.model, supervised(problem.loss_fn), [batch])
        for batch in problem.batches
    ]
    left = list(range(len(dense)))
    for view in operator.minibatches(seed=2).views:
        view.linearize()
        gradient, loss = view.gradient(), view.loss()
        index = min(left, key=lambda i: float((dense[i].gradient - gradient).norm()))
        left.remove(index)
        torch.testing.assert_close(gradient, dense[index].gradient)
        torch.testing.assert_close(view.matmat(vectors), vectors @ dense[index].hessian)
        assert loss == pytest.approx(dense[index].loss)
    assert left == []
    assert torch.equal(operator.gradient(), before)


def test_each_costs_a_gradient_and_a_product_of_its_examples_and_no_proof() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(60, 3), torch.randint(2, (60,))
    operator = so.HessianOperator(model, F.cross_entropy, (x, y))
    batches = operator.minibatches(6, seed=0)
    proved = operator.stats.verification
    gradients, products = operator.stats.full_gradients, operator.stats.full_products
    kept = []
    for _, view in zip(range(10), batches.views, strict=False):
        view.linearize()
        view.matvec(view.gradient())
        kept.append(view)
    assert operator.stats.verification == proved
    assert operator.stats.full_gradients - gradients == pytest.approx(1.0)
    assert operator.stats.full_products - products == pytest.approx(1.0)
    # The graph of each is gone when the next one is there.
    assert [view._point.kept for view in kept[:-1]] == [None] * 9
    assert operator.sample(40, seed=0) is not None


def test_a_sum_is_that_of_the_batch() -> None:
    """As a training on batches of a loss with reduction='sum' has it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(10, 3).double(), torch.randn(10, 2).double()
    operator = so.HessianOperator(model, nn.MSELoss(reduction="sum"), [(x[:4], y[:4]), (x, y)])
    losses = sorted(view.loss() for view in operator.minibatches().views)
    own = [float((model(a) - b).detach().square().sum()) for a, b in ((x[:4], y[:4]), (x, y))]
    assert losses == pytest.approx(sorted(own))


def test_masks_are_those_of_the_operator_for_its_own_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    data = [(torch.randn(4, 3).double(), torch.randint(2, (4,))) for _ in range(5)]
    operator = so.HessianOperator(model, F.cross_entropy, data)
    mean = sum(view.gradient() for view in operator.minibatches(seed=1).views) / 5
    torch.testing.assert_close(mean, operator.gradient())
    same = so.HessianOperator(model, F.cross_entropy, data[:1] * 5)
    losses = {round(view.loss(), 9) for view in same.minibatches().views}
    assert len(losses) == 5  # each batch has masks of its own


def test_dictionaries_are_cut_and_joined() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    data = [{"x": torch.randn(n, 3).double(), "scale": 2.0} for n in (3, 5)]

    def loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        return batch["scale"] * model(batch["x"]).square().mean(), len(batch["x"])

    operator = so.HessianOperator.from_loss(model, loss, data)
    (whole,) = operator.minibatches(8).views
    assert whole.loss() == pytest.approx(operator.loss())
    torch.testing.assert_close(whole.gradient(), operator.gradient())


def test_minibatches_of_a_sample_are_of_its_examples() -> None:
    x = torch.arange(N)
    data = list(zip(x.split(2), x.split(2), strict=True))
    operator = so.HessianOperator(Numbers(), lambda out, _: out.square().mean(), data)
    sample = operator.sample(8, seed=0)
    drawn = set(sample.gradient().nonzero().flatten().tolist())
    found: set[int] = set()
    before = operator.stats.full_gradients
    for view in sample.minibatches().views:
        found |= set(view.gradient().nonzero().flatten().tolist())
    assert found == drawn
    assert operator.stats.full_gradients - before == pytest.approx(len(drawn) / N)


def test_refusals() -> None:
    x = torch.randn(6, 3)
    operator = so.HessianOperator(nn.Linear(3, 2), F.cross_entropy, (x, torch.randint(2, (6,))))
    for size in (0, 7, 2.5):
        with pytest.raises(ArgumentError, match="batch_size"):
            operator.minibatches(size)
    model = nn.Linear(3, 1)
    uneven = [{"x": torch.randn(4, 3), "y": torch.zeros(5)}]
    batch_loss = lambda model, batch: (model(batch["x"]).square().mean(), 4)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"cannot be cut.*Leave batch_size out"):
        so.HessianOperator.from_loss(model, batch_loss, uneven).minibatches(2)


def test_batches_that_cannot_be_joined() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x.mean(1, keepdim=True)

    data = [(torch.randn(4, length), torch.randn(4, 1)) for length in (3, 5)]
    operator = so.HessianOperator(Mean(), F.mse_loss, data)
    with pytest.raises(ArgumentError, match=r"cannot be joined.*Leave batch_size out"):
        next(operator.minibatches(6).views)
