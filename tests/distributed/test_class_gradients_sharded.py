"""Class gradients of a sharded model are those of one process that has the minibatches whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from tests.dense import projector
from tests.distributed import class_gradients_sharded_worker as worker
from tests.distributed.sharding import made
from tests.processes import alike, once, together

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{}_ranks".format
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each rank has left what it has found; the processes run once for all tests."""
    size = request.param

    def work(at: Path) -> None:
        (at / "resumed").mkdir()
        together(worker.run, (size, str(at)), size)

    return once(tmp_path_factory, f"class_gradients_sharded-{size}", work)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Results:
    files = sorted(folder.glob("?.pt"))
    return [torch.load(file, weights_only=False) for file in files]


def close(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    near: float = 1e-12,
    *,
    spans: bool = False,
) -> None:
    """Compares vectors, or what they span, as of eigenvectors."""
    values = expected["eigenvalues"]
    torch.testing.assert_close(found["eigenvalues"], values, rtol=near, atol=near / 10)
    V, W = found["vectors"], expected["vectors"]
    if spans:
        V, W = projector(V), projector(W)
    torch.testing.assert_close(V, W, rtol=0, atol=near)


def test_averages_are_those_of_the_joint_minibatch(ranks):
    for name, found in alike(ranks, "layouts").items():
        model = made(worker.Parallel if "parallel" in name else worker.Net)
        options = worker.OPTIONS.get(name, {})
        expected = worker.averages(model, 0, 1, **options)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs, spans=name == "orthogonal")


def directions(gradients: Callable[[int], list[Tensor]]) -> Tensor:
    """``v_k`` for each class, of the sums of what each rank adds to the gradient of class k."""
    sums = torch.stack([torch.stack(gradients(k)).sum(0) for k in range(worker.C)])
    lengths = sums.norm(dim=1, keepdim=True)
    return sums / lengths.where(lengths > 0, 1.0)


def gradient(score: Tensor, model: nn.Module) -> Tensor:
    slopes = torch.autograd.grad(score, list(model.parameters()))
    return torch.cat([slope.reshape(-1) for slope in slopes])


def test_each_rank_has_its_own_dropout_masks_and_keeps_its_random_state(ranks):
    found = alike(ranks, "dropout")
    size, model = len(ranks), made(lambda: worker.Net(0.5))
    torch.manual_seed(5)  # as on the first rank
    seed = int(torch.randint(2**31, ()))

    def gradients(k: int) -> list[Tensor]:
        terms = []
        for rank in range(size):
            x, y = worker.shard(0, rank, size)
            torch.manual_seed(seed + k * size + rank)
            terms.append(gradient(model(x[y == k])[:, k].sum(), model))
        return terms

    torch.testing.assert_close(found["vectors"], directions(gradients), rtol=0, atol=1e-12)
    assert found["state"]


def test_batch_norm_has_the_statistics_of_each_rank(ranks):
    found = alike(ranks, "batch_norm")
    size, model = len(ranks), made(worker.Normed)

    def gradients(k: int) -> list[Tensor]:
        parts = [worker.normed(rank, size) for rank in range(size)]
        return [gradient(model(x)[y == k, k].sum(), model) for x, y in parts]

    torch.testing.assert_close(found["vectors"], directions(gradients), rtol=0, atol=1e-12)
    assert found["buffers"]


def test_low_precision_is_differentiated_through_float32_shards(ranks):
    found = alike(ranks, "low_precision")
    for name, model in {
        "policy": made(worker.Net, torch.float32).double(),
        "shards": made(worker.Net, torch.bfloat16).double(),
    }.items():
        x, y = worker.shard(0, 0, 1)
        subspace = so.ClassGradientSubspace(model, worker.C)
        inputs = torch.float32 if name == "policy" else torch.bfloat16
        subspace.observe(x.to(inputs).double(), y)
        expected = worker.readings(subspace)
        assert found[name]["vectors"].dtype == torch.float32
        close({n: t.double() for n, t in found[name].items()}, expected, 1e-5)


def test_trainings_are_those_of_one_process(ranks):
    for name, found in alike(ranks, "trainings").items():
        expected = worker.trained(name, made(worker.Net), 0, 1)
        assert found.keys() == expected.keys()
        for entry, value in expected.items():
            ours = torch.as_tensor(found[entry])
            torch.testing.assert_close(ours, torch.as_tensor(value), rtol=1e-10, atol=1e-10)


def test_a_training_is_bit_for_bit_the_same_when_it_is_observed(ranks):
    for results in ranks:
        without, observed = results["untouched"].values()
        assert all(map(torch.equal, without, observed))


ERRORS = {
    "class": ("ArgumentError", "a class in y is", 1),
    "kind of x": ("ArgumentError", "x is 'list', but must be a tensor", 1),
    "no examples": ("ArgumentError", "the shape of y is (0,)", 1),
    "indices": ("ArgumentError", "these are no inputs", 1),
    "not finite": ("NonFiniteError", "was not added to the averages", None),
    "parameters": ("ArgumentError", "must be ranks of equal parameters", None),
    "state": ("ArgumentError", "the loaded checksum is", 1),
    "argument": ("ArgumentError", "decay on the ranks of process_group is [0.5, 0.8", None),
    "group": ("ArgumentError", "process_group is 'a group of 1 ranks'", None),
    "other data": ("ArgumentError", "Give tensor-parallel ranks one minibatch", None),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_one_rank_is_an_error_of_all(ranks, case):
    if case == "other data" and len(ranks) > 2:
        return  # of two ranks that share their data
    own, message, culprit = ERRORS[case]
    for rank, results in enumerate(ranks):
        kind, text = results["errors"][case]
        assert kind == own if culprit in (None, rank) else kind in (own, "ValueError")
        assert message in text
        named = culprit is not None and rank != culprit
        assert (f"Rank {culprit} of process_group failed" in text) == named


def test_an_error_changes_nothing_and_observations_go_on(ranks):
    assert all(results["errors"]["unchanged"] == [True, True] for results in ranks)
    found = alike([results["errors"] for results in ranks], "next")
    subspace = so.ClassGradientSubspace(made(worker.Net), worker.C)
    for step in (0, 1):
        subspace.observe(*worker.shard(step, 0, 1))
    close(found, worker.readings(subspace))


def test_a_checkpoint_goes_on_as_if_nothing_had_been(ranks):
    found = alike(ranks, "checkpoints")
    assert found["observations"] == {"n": 3}
    for name, expected in found["next"].items():
        assert torch.equal(found["loaded"][name], expected)


def test_a_checkpoint_is_loaded_onto_another_number_of_ranks(folder, ranks):
    size = len(ranks) // 2
    together(worker.resume, (size, str(folder)), size)
    files = sorted(folder.glob("resumed ?.pt"))
    assert len(files) == size
    found = alike([torch.load(file, weights_only=False) for file in files], "resumed")
    expected = alike(ranks, "checkpoints")
    for name in ("saved", "next"):
        close(found[name], expected[name], spans=True)
