"""Ranks that share the data are one process that has it all, to the last bit alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim.linalg.rows import largest_sine
from tests import clusters
from tests.dense import dense_curvature, make_problem, projector, supervised
from tests.distributed import worker
from tests.processes import alike, once, together

pytestmark = pytest.mark.distributed

Results = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, id="2_ranks"), pytest.param(4, id="4_ranks", marks=pytest.mark.slow)],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has found; the processes run once for all tests."""
    size = request.param
    folder = once(
        tmp_path_factory,
        f"data_parallel-{size}",
        lambda at: together(worker.run, (size, str(at)), size),
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def check(found: dict[str, Any], operator: Any, *, atol: float = 1e-12) -> None:
    """The readings of all ranks, against one process with all the data."""
    for name, expected in worker.readings(operator).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kind", worker.KINDS)
def test_products_gradient_and_loss_are_those_of_all_the_data(ranks, kind):
    """Also where one rank keeps its graphs and the others do not."""
    kept = [results["kept"][kind] for results in ranks]
    assert kept == [-(-len(worker.SIZES) // len(ranks)), *([0] * (len(ranks) - 1))]
    found = alike(ranks, "products")
    p = worker.problem()
    operator = worker.KINDS[kind](p.model, p.loss_fn, p.batches)
    atol = 1e-12 if kind == "exact" else 1e-8
    check(found[kind], operator, atol=atol)
    p.model[0].weight.data[0, 0] += 0.5
    check(found[f"{kind} moved"], operator, atol=atol)


def test_weights_are_those_of_the_batches(ranks):
    p = worker.problem()
    operator = so.HessianOperator.from_loss(p.model, worker.weighted_loss, p.batches)
    check(alike(ranks, "weights"), operator)


def test_ranks_that_take_batches_in_turn_have_the_masks_of_one_process(ranks):
    p = worker.problem()
    model = worker.dropping(p)
    check(alike(ranks, "dropout"), so.HessianOperator(model, p.loss_fn, p.batches, seed=3))
    other = so.HessianOperator(model, p.loss_fn, p.batches, seed=4)
    assert abs(other.loss() - ranks[0]["dropout"]["loss"]) > 1e-3


def test_the_subspace_is_that_of_all_the_data(ranks):
    found = alike(ranks, "subspace")
    values, vectors = torch.linalg.eigh(worker.problem().dense().hessian)
    largest = values.abs().max()
    assert (found["eigenvalues"] - values[-3:].flip(0)).abs().max() <= 1e-5 * largest
    expected = projector(vectors[:, -3:].T)
    assert (projector(found["vectors"]) - expected).abs().max() <= 1e-4


BY_DIFFERENCES = {"update_sharpness", "gradient_sharpness", "predicted_change"}
"""Of losses, which are rounded otherwise where they are summed otherwise."""


def test_the_stability_line_is_that_of_one_process(ranks):
    found = ranks[0]["stability"]
    p = worker.problem()
    expected = worker.stability_of(p, p.batches)
    assert list(found) == list(expected)
    for column, values in expected.items():
        for results in ranks:
            same = results["stability"][column]
            assert torch.equal(same.nan_to_num(-1), found[column].nan_to_num(-1)), column
        rtol = 1 / 16 if column in BY_DIFFERENCES else 1e-9
        torch.testing.assert_close(found[column], values, rtol=rtol, atol=1e-12, equal_nan=True)


def test_a_monitor_on_a_sample_tells_the_same_on_all_ranks(ranks):
    found = alike(ranks, "monitored")
    for form, (row, whole) in found.items():
        assert whole["examples"] == 4000
        # Whole batches, and 8 of them: that 4 are too few is seen by a pass over these.
        few = form == "few batches"
        assert row["examples"] == (1600 if few else 800)
        assert row["gradients"] == pytest.approx(0.2 + 0.4 if few else 0.2)
        for column in ("loss", "gradient_norm", "chi_gradient", "dom_lr", "bulk_lr"):
            error = row[f"{column}_error"]
            assert 0 < error < 0.3 * abs(whole[column])
            assert abs(row[column] - whole[column]) < 4 * error


def test_a_sampled_subspace_is_the_same_on_all_ranks_and_certified(ranks):
    found = alike(ranks, "sample")
    model, (x, y) = clusters.network(seed=3), clusters.clustered(4000, seed=3)
    for step, (vectors, stats) in enumerate(zip(found["vectors"], found["stats"], strict=True)):
        if step:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.03)
        dense = dense_curvature(model, supervised(clusters.one_hot_mse), [(x, y)])
        top = torch.linalg.eigh(dense.hessian).eigenvectors.T.flip(0)[:3].contiguous()
        estimate, sampling_error, examples, _ = stats
        assert largest_sine(vectors, top) <= estimate <= 0.15
        assert 0 < sampling_error < estimate
        assert 256 < examples < len(x)


def test_wrapped_models_train_as_in_one_process(ranks):
    found = alike(ranks, "training")
    p = make_problem("mlp", sizes=(4, 4, 4, 4))
    start = p.model[0].weight.detach().clone()
    operator = so.HessianOperator(p.model, p.loss_fn, p.batches)
    subspace = so.DominantSubspace(operator, k=2, refresh=1, tol=1e-6)
    optimizer = so.BulkSGD(p.model.parameters(), lr=0.1, subspace=subspace)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.loss_fn(p.model(x), y) for x, y in p.batches).div(4).backward()
        optimizer.step()
    assert (p.model[0].weight - start).abs().max() > 1e-3
    for name, q in p.model.named_parameters():
        torch.testing.assert_close(found[name], q.detach(), rtol=0, atol=1e-6)


def test_each_block_of_products_is_one_sum_whatever_a_rank_keeps(ranks):
    found = alike(ranks, "collectives")
    P = found["size"]
    # Loss, weight and examples, the gradient, the products; before each six numbers, of who failed.
    assert found["first product"] == [6, 3, 6, P, 6, P]
    assert found["block of products"] == [6, 5 * P]
    assert found["gradient and loss"] == []
    assert found["product outside of frozen"] == [6, 6, P]  # the parameters are compared first


def test_ranks_that_know_different_things_begin_anew_together(ranks):
    found = alike(ranks, "knowledge")
    p = worker.problem()
    check(found, so.HessianOperator(p.model, p.loss_fn, p.batches))
    assert found["pickled"][0][0] == "PicklingError"
    assert "Pickle the model, and make the operator anew on each rank" in found["pickled"][1]


ERRORS = {
    "not finite": ("NonFiniteError", "look for NaN", None),
    "forward": ("KeyError", "the forward pass failed", 1),
    "parameters": ("ArgumentError", "must be ranks of equal parameters", None),
    "data of a gradient": ("DataChangedError", "This pass over the data differs", 1),
    "data of a product": ("DataChangedError", "This pass over the data differs", 1),
    "no data": ("ValueError", "data is 'empty', but must be at least one batch", 1),
    "no data in the end": ("ValueError", "data is 'empty', but must be at least one batch", 1),
    "argument": ("ValueError", "memory_budget is -1, but must be a number of bytes", 1),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_one_rank_is_an_error_of_all(ranks, case):
    """Of one kind, with its cause; and the rank that it comes from is named to the others."""
    kind, message, culprit = ERRORS[case]
    for rank, results in enumerate(ranks):
        for classes, text in results["errors"][case]:
            assert kind in classes
            assert message in text
            named = culprit is not None and rank != culprit
            assert (f"Rank {culprit} of process_group failed" in text) == named


@pytest.mark.parametrize("case", ["not finite", "forward", "parameters", "data of a product"])
def test_an_operator_recovers_on_all_ranks(ranks, case):
    name = f"{case}, repaired"
    found = [{name: results["errors"][name]} for results in ranks]
    p = worker.problem()
    if case == "not finite":
        for x, _ in p.batches[: len(ranks)]:
            x[0, 0] = 0.5
    check(alike(found, name), so.HessianOperator(p.model, p.loss_fn, p.batches))


# --- without other processes --------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, "nccl", object()])
def test_a_group_that_is_none_is_named(group):
    with pytest.raises(so.ArgumentError, match=r"process_group is .* must be a group of this"):
        so.HessianOperator(
            nn.Linear(3, 2),
            nn.CrossEntropyLoss(),
            (torch.ones(4, 3), torch.ones(4).long()),
            process_group=group,
        )
