"""Passes over the data: which data are refused, and which are seen to change between passes."""

import copy
import gc
import itertools
import multiprocessing
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature import HessianOperator, batches
from subspace_optim.curvature.batches import Batches
from tests.dense import half_squared_error, make_problem
from tests.observe import Seen

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


@pytest.mark.parametrize("verify", [True, False])
def test_a_loss_that_fails_leaves_the_random_state_as_found_while_its_error_is_held(verify):
    """The traceback of an error holds whatever was reading the data."""

    def fail(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("the loss failed")

    loader = DataLoader(Items(lambda x: x + 0 * torch.rand(3)), batch_size=2)
    operator = HessianOperator(PROBLEM.model, fail, loader, verify=verify)
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="the loss failed") as held:
        operator.loss()
    assert torch.equal(torch.get_rng_state(), before)
    assert held.value


def test_low_precision_inputs_of_a_float32_model_are_left_to_the_model():
    """They become float32 only where the parameters do."""
    seen = Seen()

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x.to(self.weight.dtype))

    for dtype in (torch.float32, torch.bfloat16):
        data = (X.to(torch.bfloat16), Y.to(dtype))
        HessianOperator(Model(3, 2).to(dtype), half_squared_error, data, verify=False).loss()
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
        (
            lambda: DataLoader(
                Items(), batch_sampler=BatchSampler(RandomSampler(Items()), 3, False)
            ),
            r"'a DataLoader that shuffles', .* with shuffle=False",
        ),
        (
            lambda: DataLoader(Items(), sampler=WeightedRandomSampler([1.0] * len(X), len(X))),
            r"WeightedRandomSampler, which draws other .* `list\(loader\)`",
        ),
        (
            lambda: DataLoader(Items(), sampler=SubsetRandomSampler([0, 1, 2])),
            r"SubsetRandomSampler, which shuffles', .* `torch.utils.data.Subset\(dataset",
        ),
        (lambda: DataLoader(TensorDataset(X[:0], Y[:0])), "data is 'empty'"),
        (lambda: DataLoader(Items(), batch_size=9, drop_last=True), "data is 'empty'"),
    ],
    ids=[
        "list",
        "iterator",
        "generator",
        "no_list",
        "no_tuple",
        "shuffles",
        "within",
        "weighted",
        "subset",
        "no_set",
        "dropped",
    ],
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
    operator = operator_of(Growing(), verify=False)
    operator.loss()
    with pytest.raises(DataChangedError, match=r"2 batches instead of 1, 0 of them changed\."):
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


@dataclass
class Sample:
    x: Tensor
    note: str = ""


class Fields:
    """Holds its tensor in a dict, as graphs do."""

    def __init__(self, x: Tensor) -> None:
        self.store = {"x": x}


@pytest.mark.parametrize(
    "form",
    [
        Sample,
        Fields,
        lambda x: [Sample(x), Sample(x)],
        lambda x: {"inputs": {"x": x}},
        lambda x: pack_sequence(list(x.flip(0).split(2))),
        lambda x: x.to_sparse(),
        lambda x: (x[:0], x.numpy()),
        lambda x: Sample(x[:0], note=str(x)),
    ],
    ids=["object", "graph", "list", "mapping", "packed", "sparse", "array", "text"],
)
def test_augmentation_is_seen_in_batches_of_all_forms(form):
    """Batches are pairs, or what the user's own loss of a batch takes."""

    class Augmented:
        def __init__(self, noise: float) -> None:
            self.noise, self.draws = noise, torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Any]:
            yield form(X + self.noise * torch.rand(X.shape, generator=self.draws).double())

    still, noisy = Batches(Augmented(0.0), pairs=False), Batches(Augmented(0.1), pairs=False)
    for _ in range(3):
        assert passed(still) == 1
    assert passed(noisy) == 1
    with pytest.raises(DataChangedError, match="differs from the first"):
        passed(noisy)


def passed(data: Batches, **options: Any) -> int:
    return sum(1 for _ in data.read(torch.device("cpu"), **options))


# --- one loader for training and for the operator -----------------------------------------------


def loader_with_workers(**options: Any) -> DataLoader:
    return DataLoader(Items(), batch_size=3, num_workers=1, persistent_workers=True, **options)


def test_passes_in_the_middle_of_an_epoch_leave_the_epoch_as_it_is():
    """Persistent workers serve one iterator, which a second reader would set back to its start."""
    loader, dense = loader_with_workers(), PROBLEM.dense()
    next(iter(loader))  # it has its iterator before there is an operator
    operator, seen = operator_of(loader, memory_budget=0), []
    for _ in range(2):
        for x, _ in loader:
            seen.append(len(x))
            assert torch.allclose(operator.gradient(), dense.gradient, rtol=0, atol=1e-12)
            operator.matvec(ones(operator))
    assert seen == [3, 3, 1] * 2


@pytest.mark.slow
def test_workers_of_an_operator_end_with_it():
    def workers() -> set[Any]:
        return set(multiprocessing.active_children()) - before

    before = set(multiprocessing.active_children())
    operator = operator_of(loader_with_workers(), verify=False)
    operator.loss()
    assert len(workers()) == 1
    del operator
    gc.collect()
    assert not workers()


@pytest.mark.slow
def test_a_program_ends_with_an_operator_whose_workers_wait():
    program = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from subspace_optim import HessianOperator

if __name__ == "__main__":
    data = TensorDataset(torch.ones(4, 2), torch.zeros(4, 1))
    loader = DataLoader(data, num_workers=1, persistent_workers=True)
    operator = HessianOperator(torch.nn.Linear(2, 1), torch.nn.MSELoss(), loader)
    print(operator.loss() >= 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_an_operator_with_workers_can_be_copied(copied):
    data = TensorDataset(X, Y)
    operator = operator_of(DataLoader(data, num_workers=1, persistent_workers=True))
    loss = operator.loss()
    assert copied(operator).loss() == loss
    assert operator.loss() == loss


def test_the_loader_is_left_as_it_was():
    sampler = DistributedSampler(Items(), num_replicas=2, rank=0)
    loader = DataLoader(Items(), batch_size=3, sampler=sampler)
    before = dict(vars(loader)), dict(vars(sampler))
    operator_of(loader).gradient()
    assert (dict(vars(loader)), dict(vars(sampler))) == before


@pytest.mark.parametrize("wrap", [False, True])
def test_the_epoch_that_training_sets_has_no_part_in_the_operators_passes(wrap):
    sampler = DistributedSampler(Items(), num_replicas=2, rank=0)
    loader = DataLoader(Items(), batch_size=3, sampler=sampler)
    if wrap:
        batches_of = BatchSampler(sampler, 3, False)
        loader = DataLoader(Items(), batch_sampler=batches_of)
    operator, orders = operator_of(loader, memory_budget=0), set()
    loss = operator.loss()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.add(str([x.tolist() for x, _ in loader]))
        operator.matvec(ones(operator))
    assert len(orders) > 1  # training has other examples in each epoch
    assert operator.loss() == loss


# --- data without an end ------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            torch.rand(1)
            index = int(torch.randint(len(X), (), generator=generator))
            yield X[index], Y[index]


class Repeated:
    """So many batches, and no length."""

    def __init__(self, times: float) -> None:
        self.times = times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat((X, Y), self.times)


@pytest.mark.parametrize(
    "data",
    [DataLoader(Endless(), batch_size=2), Endless(), Repeated(batches.UNSIZED_LIMIT + 1)],
    ids=["loader", "data_set", "own"],
)
@pytest.mark.slow
def test_data_without_an_end_are_refused_before_much_is_computed(data, monkeypatch):
    monkeypatch.setattr(Repeated, "__iter__", lambda self: itertools.cycle([(X, Y)]))
    calls = []
    model = nn.Linear(3, 2).double()
    model.register_forward_hook(lambda *_: calls.append(1))
    operator = HessianOperator(model, half_squared_error, data)
    before = torch.get_rng_state()
    message = (
        r"without a length', but must be at an end after 4096 batches\. .*islice\(loader, 100\)"
    )
    with pytest.raises(ArgumentError, match=message):
        operator.loss()
    assert torch.equal(torch.get_rng_state(), before)
    assert len(calls) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("times", [63, 64, 65, 100])
def test_data_without_a_length_may_have_as_many_batches_as_the_limit(times, monkeypatch):
    monkeypatch.setattr(batches, "UNSIZED_LIMIT", 99)
    data = Batches(Repeated(times), pairs=True)
    if times < 100:
        assert passed(data) == passed(data) == times
    else:
        with pytest.raises(ArgumentError, match="at an end after 99 batches"):
            passed(data)


def test_counting_the_batches_has_no_part_in_what_the_pass_draws():
    class Drawn:
        def __iter__(self) -> Iterator[Tensor]:
            return (torch.rand(2) for _ in range(70))

    state = torch.get_rng_state()
    plain = torch.stack(list(Drawn()))
    torch.set_rng_state(state)
    read = [batch for _, batch, _ in Batches(Drawn(), pairs=False).read(torch.device("cpu"))]
    assert torch.equal(torch.stack(read), plain)


def test_data_with_a_length_have_no_limit(monkeypatch):
    monkeypatch.setattr(batches, "UNSIZED_LIMIT", 99)
    examples = TensorDataset(torch.zeros(200, 1), torch.zeros(200))
    assert passed(Batches(DataLoader(examples), pairs=True)) == 200


def test_a_persistent_stream_is_counted_beside_the_pass():
    class Long(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.arange(150.0)[:, None])

    loader = DataLoader(Long(), batch_size=2, num_workers=1, persistent_workers=True)
    data = Batches(loader, pairs=False)
    read = [batch for _, batch, _ in data.read(torch.device("cpu"))]
    assert torch.equal(torch.cat(read)[:, 0], torch.arange(150.0))
    assert passed(data) == 75


# --- data that are written in place -------------------------------------------------------------


def stores(x: Tensor, y: Tensor) -> dict[str, Any]:
    half = TensorDataset(x[:3], y[:3])
    return {
        "pair": (x, y),
        "list": [(x[:3], y[:3]), (x[3:], y[3:])],
        "nested": [((x[:3], Sample(x[3:])), y)],
        "sparse": [(x.to_sparse(), y)],
        "loader": DataLoader(TensorDataset(x, y), batch_size=3),
        "subset": DataLoader(ConcatDataset([Subset(half, [0, 1, 2]), half])),
    }


@pytest.mark.parametrize("form", stores(X, Y))
def test_writing_data_in_place_is_seen_without_a_pass_and_is_an_error_at_the_next(form):
    x, y = X.clone(), Y.clone()
    data = Batches(stores(x, y)[form], pairs=True)
    passed(data)
    before = data.fingerprint()
    assert passed(data) > 0
    assert data.fingerprint() == before
    written = x if form != "sparse" else data.data[0][0]
    written.mul_(2)
    assert data.fingerprint() != before
    with pytest.raises(DataChangedError, match="of them changed"):
        passed(data)


def test_the_message_tells_of_the_writing_before_anything_is_read():
    x, y = X.clone(), Y.clone()
    operator = operator_of([(x[:2], y[:2]), (x[2:], y[2:])], memory_budget=0)
    operator.gradient()
    x[0] += 1
    with pytest.raises(DataChangedError, match=r"1 of them changed.* written in place.*new oper"):
        operator.matvec(ones(operator))


@pytest.mark.parametrize(
    "write",
    [lambda x: x.copy_(x.clone()), lambda x: x.neg_().neg_()],
    ids=["overwritten", "there_and_back"],
)
def test_writing_what_was_there_is_no_change(write):
    x, y = X.clone(), Y.clone()
    data = Batches((x, y), pairs=True)
    passed(data)
    write(x)
    assert passed(data) == passed(data) == 1


def test_stored_data_are_looked_at_once_and_again_only_where_they_were_written(monkeypatch):
    looks = []
    digest = batches.digest
    monkeypatch.setattr(batches, "digest", lambda tensors: looks.append(1) or digest(tensors))
    x = X.clone()
    data = Batches([(x, Y), (X, Y)], pairs=True)
    for expected in (2, 2, 2):
        passed(data)
        assert len(looks) == expected
    x.copy_(X)
    for expected in (4, 4, 4):
        passed(data)
        assert len(looks) == expected


def test_batches_that_take_the_place_of_others_are_seen():
    listed = [(X, Y), (X[:2], Y[:2])]
    data = Batches(listed, pairs=True)
    passed(data)
    before = data.fingerprint()
    listed[1] = (X[2:4], Y[2:4])
    assert data.fingerprint() != before
    with pytest.raises(DataChangedError, match="2 batches instead of 2, 1 of them changed"):
        passed(data)


def test_memory_that_takes_the_place_of_other_memory_is_seen():
    """``x.data = other`` leaves the version counter."""
    x = X.clone()
    data = Batches((x, Y), pairs=True)
    passed(data)
    x.data = X + 1
    with pytest.raises(DataChangedError, match="written in place"):
        passed(data)


def test_a_pass_that_was_not_finished_is_no_reference():
    x = X.clone()
    data = Batches([(x, Y), (x, Y)], pairs=True)
    next(data.read(torch.device("cpu")))
    x.add_(1)
    assert passed(data) == 2


def test_data_that_were_mended_are_read_as_new_ones_if_what_was_known_is_forgotten():
    x = X.clone()
    x[0, 0] = torch.nan
    data = Batches((x, Y), pairs=True)
    passed(data)
    x[0, 0] = 1
    data.forget()
    assert passed(data) == passed(data) == 1


def test_a_copy_of_data_is_known_as_the_same_data():
    data = Batches([(X, Y)], pairs=True)
    passed(data)
    copied = pickle.loads(pickle.dumps(data))
    assert passed(copied) == 1
    copied.data[0][0].add_(1)
    with pytest.raises(DataChangedError, match="written in place"):
        passed(copied)


def test_tensors_made_in_inference_mode_have_no_version_and_can_be_used():
    with torch.inference_mode():
        x = X.clone()
    data = Batches((x, Y), pairs=True)
    assert passed(data) == passed(data) == 1


# --- dtypes -------------------------------------------------------------------------------------


def test_all_floating_point_inputs_take_a_dtype_that_is_asked_for():
    batch = (Sample(X.bfloat16()), {"y": Y.float(), "n": torch.arange(3), "z": X.cfloat()})
    ((_, (sample, rest), _),) = Batches(batch, pairs=True).read(
        torch.device("cpu"), dtype=torch.float64
    )
    assert sample.x.dtype == rest["y"].dtype == torch.float64
    assert (rest["n"].dtype, rest["z"].dtype) == (torch.int64, torch.complex128)
    assert batch[0].x.dtype == torch.bfloat16  # the user's own


def test_low_precision_inputs_inside_of_objects_become_float32():
    packed = pack_sequence([X.half()])
    ((_, (sample, other), nbytes),) = Batches((Sample(X.half()), packed), pairs=True).read(
        torch.device("cpu"), upcast=True
    )
    assert sample.x.dtype == other.data.dtype == torch.float32
    assert nbytes == 2 * 4 * X.numel()


# --- what is one batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        ((X, Y), True),
        ((pack_sequence([X]), Y), True),
        (({"x": X}, Y), True),
        (((X, X), Y), True),
        ((Sample(X), Y), True),
        (([X[0], X[1], X[2]], [{"boxes": X}] * 3), True),
        ({"x": X}, False),
        (Sample(X), False),
        (pack_sequence([X]), False),
        (X, False),
    ],
)
def test_one_batch_is_read_as_one(data, pairs):
    ((_, batch, _),) = Batches(data, pairs=pairs).read(torch.device("cpu"))
    assert batch is data or isinstance(data, tuple)


@pytest.mark.parametrize("data", [[(X, Y), (X, Y)], ((X, Y), (X, Y)), [(Sample(X), Y)] * 2])
def test_batches_are_read_as_several(data):
    assert passed(Batches(data, pairs=True)) == 2


def test_a_pair_of_pairs_is_two_batches_and_in_a_list_it_is_one():
    pair = (X, X), (Y, Y)
    assert passed(Batches(pair, pairs=True)) == 2
    ((_, batch, _),) = Batches([pair], pairs=True).read(torch.device("cpu"))
    assert batch is pair
