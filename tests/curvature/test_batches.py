"""Passes over the data: which data are refused, and which are seen to change between passes."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature import HessianOperator
from tests.dense import half_squared_error, make_problem

PROBLEM = make_problem("mlp", "mse", sizes=[7])
X, Y = PROBLEM.batches[0]


def operator_of(data: Any, **options: Any) -> HessianOperator:
    return HessianOperator(PROBLEM.model, PROBLEM.loss_fn, data, **options)


def ones(operator: HessianOperator) -> Tensor:
    return torch.ones(operator.size, dtype=operator.dtype)


class Items(Dataset):
    """The examples, each seen through ``change``."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.change = change

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.change(X[index]), Y[index]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(Items()[i] for i in range(len(X)))


class OwnShuffle(Sampler[int]):
    """Another order in each pass, which torch's own shuffling has no part in."""

    def __init__(self) -> None:
        self.orders = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.orders.permutation(len(X)).tolist())

    def __len__(self) -> int:
        return len(X)


# --- data that can be used ----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Items(), batch_size=3),
        lambda: DataLoader(Items(), batch_sampler=BatchSampler(range(len(X)), 3, False)),
        lambda: DataLoader(Stream(), batch_size=3),
    ],
    ids=["batches", "batch_sampler", "iterable_dataset"],
)
def test_a_loader_has_the_matrix_of_its_examples(make, budget):
    operator, dense = operator_of(make(), memory_budget=budget), PROBLEM.dense()
    rows = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    torch.testing.assert_close(rows, dense.hessian, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-12)


def test_a_pass_leaves_all_random_state_as_found():
    """The data set draws from every generator, without an effect on what it returns."""

    def draw(x: Tensor) -> Tensor:
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002 (the global state is what is tested)
        random.random()
        return x

    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(Items(draw), batch_size=3, generator=generator)
    operator = operator_of(loader, memory_budget=0)

    def state() -> list[Any]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        states = [torch.get_rng_state().tolist(), generator.get_state().tolist()]
        return [*states, (numpy_state[1].tolist(), numpy_state[2]), random.getstate()]

    before = state()
    list(loader)
    after = state()
    assert all(a != b for a, b in zip(before, after, strict=True))  # a plain pass moves them all
    for read in (operator.loss, operator.gradient, lambda: operator.matvec(ones(operator))):
        read()
        assert state() == after


@pytest.mark.parametrize("budget", [None, 0])
def test_dropout_masks_have_no_part_in_what_the_data_draw(budget):
    """A pass reads what a plain pass from the same random state does, whatever the model draws."""
    noisy = DataLoader(Items(lambda x: x + torch.rand(3)), batch_size=3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(1.0)).double()
    state = torch.get_rng_state()
    with torch.no_grad():
        plain = sum(float(half_squared_error(model(x), y)) * len(x) for x, y in noisy) / len(X)
    torch.set_rng_state(state)
    for seed in (0, 1):
        operator = HessianOperator(
            model, half_squared_error, noisy, memory_budget=budget, seed=seed
        )
        operator.matvec(ones(operator))
        assert operator.loss() == pytest.approx(plain, rel=1e-12)


def test_a_pass_that_fails_leaves_the_random_state_as_found():
    def fail(x: Tensor) -> Tensor:
        torch.rand(3)
        if torch.equal(x, X[5]):
            raise OSError("the disk is gone")
        return x

    operator = operator_of(DataLoader(Items(fail), batch_size=2))
    before = torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        operator.loss()
    assert torch.equal(torch.get_rng_state(), before)


def test_low_precision_inputs_of_a_float32_model_are_left_to_the_model():
    """They become float32 only where the parameters do."""
    seen = []

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x.to(self.weight.dtype))

    for dtype in (torch.float32, torch.bfloat16):
        data = (X.to(torch.bfloat16), Y.to(dtype))
        HessianOperator(Model(3, 2).to(dtype), half_squared_error, data).loss()
    assert seen == [torch.bfloat16, torch.float32]


# --- data that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [X, Y], r"data is 'a list of two tensors', but must be the tuple `\(x, y\)`"),
        (lambda: iter([(X, Y)]), "A generator is used up by its first pass"),
        (
            lambda: ((X, Y) for _ in range(2)),
            r"data is 'generator', but must be .* again and again",
        ),
        (list, r"data is 'empty', but must be at least one batch"),
        (tuple, r"data is 'empty', but must be at least one batch"),
        (
            lambda: DataLoader(Items(), shuffle=True),
            r"'a DataLoader that shuffles', .* with shuffle=False",
        ),
        (lambda: DataLoader(TensorDataset(X[:0], Y[:0])), "data is 'empty'"),
        (lambda: DataLoader(Items(), batch_size=9, drop_last=True), "data is 'empty'"),
    ],
    ids=["list", "iterator", "generator", "no_list", "no_tuple", "shuffles", "no_set", "dropped"],
)
def test_data_that_cannot_be_used_are_refused_at_once(make, message):
    with pytest.raises(ArgumentError, match=message):
        operator_of(make())


class NoBatches:
    def __iter__(self) -> Iterator[Any]:
        return iter([])


def test_data_that_turn_out_to_be_empty_are_refused():
    operator = operator_of(NoBatches())
    with pytest.raises(ArgumentError, match="data is 'empty', but must be at least one batch"):
        operator.loss()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"a batch of data is 'Tensor', but must be a pair .* HessianOperator.from_loss"),
        ((X, Y, Y), r"a batch of data is 'tuple', but must be a pair"),
        ({"x": X, "y": Y}, r"a batch of data is 'dict', but must be a pair"),
        ((3, 4), r"a batch of data is 'of no tensor', but must be of at least one example"),
    ],
    ids=["a_tensor", "three", "a_mapping", "no_tensor"],
)
def test_batches_that_are_no_pairs_are_refused(batch, message):
    with pytest.raises(ArgumentError, match=message):
        operator_of([batch]).loss()


# --- data that change between passes ------------------------------------------------------------


def _augmented() -> DataLoader:
    return DataLoader(Items(lambda x: x + 0.1 * torch.rand(3, generator=NOISE)), batch_size=3)


def _augmented_by_numpy() -> DataLoader:
    noise = np.random.default_rng(0)
    return DataLoader(Items(lambda x: x * noise.choice([-1.0, 1.0])), batch_size=3)


def _shuffled_by_its_sampler() -> DataLoader:
    return DataLoader(Items(), batch_size=3, sampler=OwnShuffle())


def _shuffled_and_dropped() -> DataLoader:
    return DataLoader(Items(), batch_size=5, sampler=OwnShuffle(), drop_last=True)


class Growing:
    """Holds one batch more in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter([(X, Y)] * self.passes)


NOISE = torch.Generator()
CHANGING = [_augmented, _augmented_by_numpy, _shuffled_by_its_sampler, _shuffled_and_dropped]


@pytest.mark.parametrize("make", [*CHANGING, Growing])
def test_data_that_change_between_passes_are_an_error(make):
    operator = operator_of(make())
    operator.loss()
    with pytest.raises(DataChangedError, match="This pass over the data differs from the first"):
        operator.gradient()


@pytest.mark.parametrize("make", [*CHANGING, Growing])
def test_data_that_change_while_graphs_stream_are_an_error(make):
    operator = operator_of(make(), memory_budget=0)
    with pytest.raises(DataChangedError, match="differs from the first"):
        operator.matvec(ones(operator))


def test_the_message_counts_what_changed():
    operator = operator_of(Growing())
    operator.loss()
    with pytest.raises(DataChangedError, match=r"2 batches instead of 1, 0 of them changed\."):
        operator.gradient()


def test_shuffling_inside_a_batch_sampler_is_seen_once_the_random_state_moved():
    """The order follows from torch's random state, which each pass leaves as found."""
    sampler = BatchSampler(RandomSampler(Items()), 3, drop_last=False)
    operator = operator_of(DataLoader(Items(), batch_sampler=sampler))
    operator.loss()
    torch.rand(1)
    with pytest.raises(DataChangedError, match="differs from the first"):
        operator.gradient()


def test_targets_that_change_are_seen_too():
    class Relabelled(Items):
        labels = np.random.default_rng(0)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return X[index], Y[index].roll(int(self.labels.integers(2)))

    operator = operator_of(DataLoader(Relabelled(), batch_size=3))
    operator.loss()
    with pytest.raises(DataChangedError, match="differs from the first"):
        operator.gradient()


def test_batches_of_a_tokenizer_that_change_are_seen():
    """Hugging Face's ``BatchEncoding`` is a ``UserDict``."""
    from collections import UserDict

    class Encodings:
        noise = torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Any]:
            return iter([UserDict(x=torch.rand(4, 3, generator=self.noise).double())])

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return model(batch["x"]).square().mean(), len(batch["x"])

    operator = HessianOperator.from_loss(PROBLEM.model, batch_loss, Encodings())
    operator.loss()
    with pytest.raises(DataChangedError, match="differs from the first"):
        operator.gradient()
