"""A sharded model has the curvature of the same model in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from subspace_optim.linalg.rows import largest_sine
from tests.distributed import sharded_worker as worker
from tests.distributed import sharding
from tests.distributed.sharding import batches, made
from tests.processes import alike, once, together

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, False), id="some_on_2_ranks"),
        pytest.param((2, True), id="2_ranks", marks=pytest.mark.slow),
        pytest.param((4, True), id="4_ranks", marks=pytest.mark.slow),
    ],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has found; the processes run once for all tests."""
    size, full = request.param
    folder = once(
        tmp_path_factory,
        f"sharded-{size}-{full}",
        lambda at: together(worker.run, (size, str(at), full), size),
    )
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def dense_hessian(model: nn.Module, data: list[Any] | None = None) -> Tensor:
    """All rows of it."""
    parameters, data = list(model.parameters()), data or batches()
    with sdpa_kernel(SDPBackend.MATH):
        total = sum(len(y) for _, y in data)
        loss = sum(F.cross_entropy(model(x), y) * (len(y) / total) for x, y in data)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in slopes])
    every = torch.eye(len(gradient), dtype=gradient.dtype)
    found = torch.autograd.grad(gradient, parameters, every, is_grads_batched=True)
    return torch.cat([rows.reshape(len(gradient), -1) for rows in found], dim=1)


def check(found: dict[str, Any], model: nn.Module, *, size: float = 1e-12) -> None:
    """The readings of all ranks, against those of the whole model."""
    for name, expected in worker.by_double_backward(model, batches()).items():
        error = (torch.as_tensor(found[name], dtype=torch.float64) - expected).abs().max()
        assert error <= size * expected.abs().max(), (name, float(error))


@pytest.mark.parametrize("name", sharding.MODELS)
@pytest.mark.parametrize("how", ["", " streamed"])
def test_loss_gradient_and_products_are_those_of_the_whole_model(ranks, name, how):
    check(alike(ranks, "operators")[name + how], made(sharding.MODELS[name]))


def test_the_gauss_newton_matrix_and_differences_are_those_of_the_whole_model(ranks):
    found = alike(ranks, "operators")
    model = made(sharding.Net)
    check(found["mlp differences"], model, size=1e-9)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    x = torch.cat([x for x, _ in batches()])

    def outputs(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(parameters.values()))
    J = torch.cat([j.reshape(len(x), 3, -1) for j in jacobians], dim=2)
    p = model(x).softmax(1).detach()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    G = torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(x)
    expected = worker.directions(len(G)) @ G
    torch.testing.assert_close(found["mlp gauss-newton"]["products"], expected, rtol=0, atol=1e-12)


def test_every_layout_is_that_of_the_whole_model(ranks):
    found = alike(ranks, "layouts")
    frozen = made(sharding.Net)
    frozen.head.requires_grad_(False)
    for name, readings in found.items():
        case = name.removesuffix(" streamed")
        parallel = case in ("tensor parallel", "2 x 2")
        whole = made(sharding.Parallel) if parallel else made(sharding.Net)
        if case == "bf16":  # from the float32 shards, and not from what they are rounded to
            check(readings, made(sharding.Net, torch.float32).double(), size=1e-6)
        else:
            check(readings, frozen if case == "a frozen layer" else whole)


def test_a_training_is_bit_for_bit_the_same_with_an_operator_or_a_monitor(ranks):
    for results in ranks:
        without, *beside = results["untouched"].values()
        assert len(beside) == 2
        for training in beside:
            assert all(map(torch.equal, without, training))


def test_the_subspace_is_that_of_the_whole_model(ranks):
    for name, found in alike(ranks, "solves").items():  # so each rank has taken as many products
        hessian = dense_hessian(made(sharding.MODELS[name]))
        values, vectors = torch.linalg.eigh(hessian)
        top = values.flip(0)[:3]
        assert (found["eigenvalues"] - top).abs().max() <= 1e-10 * top.max()
        assert largest_sine(vectors.T.flip(0)[:3].contiguous(), found["vectors"]) <= 1e-6


def test_a_basis_in_bfloat16_is_that_of_the_whole_model_but_for_the_sine_that_is_told(ranks):
    found = alike(ranks, "held")
    assert set(found["dtypes"]) == {"torch.bfloat16"}
    _, vectors = torch.linalg.eigh(dense_hessian(made(worker.Small)))
    top, rows = vectors.T.flip(0)[:3].contiguous(), found["vectors"]
    sine = largest_sine(top, rows)
    assert 1e-3 < sine <= (1 + 1e-6) * found["estimate"] <= 1.01 * sine
    expected = found["gradient"] - found["gradient"] @ rows.T @ rows
    torch.testing.assert_close(found["bulk"], expected, rtol=0, atol=1e-14)
    assert found["same"]
    assert found["updated"]


def test_trainings_are_those_of_one_process(ranks):
    for name, ours in alike(ranks, "trainings").items():
        expected = worker.trained(name, made(worker.Small), *joint(len(ranks)))
        # What a refinement leaves depends on the guard, which each number of ranks draws otherwise.
        same_training(ours, expected, near=1e-6 if name == "auto" else 1e-10)


def test_trainings_on_other_meshes_are_those_of_one_process(ranks):
    counts = {"tensor parallel": 1, "2 x 2": 2, "hybrid": 4}
    for name, ours in alike(ranks, "parallel_trainings").items():
        way, _, optimizer = name.rpartition(" ")
        model = made(worker.Small if way == "hybrid" else sharding.Parallel)
        same_training(ours, worker.trained(optimizer, model, *joint(counts[way])), near=1e-10)


def joint(count: int) -> tuple[list[Any], list[float]]:
    """What one process trains on: each batch is one of every part of the ranks."""
    groups = range(0, len(batches()) - count + 1, count)
    data = [
        tuple(torch.cat(parts) for parts in zip(*batches()[first : first + count], strict=True))
        for first in groups
    ]
    return data, [1.0] * len(data)


def same_training(ours: dict[str, Any], expected: dict[str, Any], near: float) -> None:
    assert (ours["theta"] - expected["theta"]).abs().max() <= near
    assert ours["refreshes"] == expected["refreshes"]
    for column, values in expected["rows"].items():
        assert ours["rows"][column] == pytest.approx(values, rel=1e3 * near, abs=near), column


def test_models_of_any_sizes_are_as_by_double_backward(ranks):
    found = alike(ranks, "drawn")
    assert len(found["errors"]) >= 3 * 8
    assert max(found["errors"]) <= 1e-12


def test_samples_are_those_of_one_process(ranks):
    found, size = alike(ranks, "samples"), len(ranks)
    data = [
        tuple(map(torch.cat, zip(*worker.many()[first : first + size], strict=True)))
        for first in range(0, len(worker.many()), size)
    ]
    total = sum(len(y) for _, y in data)
    sample = worker.operator_of("exact", made(worker.Small), data).sample(60, seed=3)
    examples, readings = found["batches"]
    assert examples == sample.examples == (examples[0], total)
    assert 60 <= examples[0] < total
    same_readings(readings, worker.readings(sample))
    truth = worker.readings(worker.operator_of("exact", made(worker.Small), data))
    assert found["rows"][0] == (80, total)
    assert not torch.allclose(found["rows"][1]["gradient"], truth["gradient"])
    assert found["all rows"][0] == (total, total)
    same_readings(found["all rows"][1], truth)
    assert found["uncut"] is None
    assert found["other counts"] is None


def same_readings(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-12)


def test_a_basis_that_is_found_on_samples_is_near_that_of_all_data(ranks):
    found, data = alike(ranks, "samples"), worker.many()
    vectors = torch.linalg.eigh(dense_hessian(made(worker.Small), data))[1]
    for name in ("of batches", "of rows"):
        own = found[name]
        assert own["examples"] < sum(len(y) for _, y in data)
        assert largest_sine(vectors.T[-1:].contiguous(), own["vectors"]) <= 0.5


def test_a_gradient_that_is_not_finite_on_one_rank_stops_sam_on_all(ranks):
    found = alike(ranks, "not_finite")
    assert torch.equal(found["not finite"], found["before"])
    assert not torch.equal(found["finite"], found["before"])


def test_what_is_easily_forgotten(ranks):
    found = alike(ranks, "corners")
    replaced = made(worker.Small)
    with torch.no_grad():
        for p in replaced.parameters():
            p.mul_(1.5)
    check(found["parameters that were replaced"], replaced)
    assert found["passed"]
    assert "'DTensor', but must be not sharded" in found["sharded since"]
    for name, theta in found["trained"].items():
        expected = worker.with_a_whole_head(name, made(worker.Small), batches(), 0, 1)
        assert (theta - expected).abs().max() <= 1e-10, name
