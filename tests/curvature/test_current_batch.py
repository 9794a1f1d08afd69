"""The current batch: each step's minibatch is what is measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import subspace_optim as so
from subspace_optim._validation import ArgumentError, DataChangedError
from tests.curvature.live_batches import KINDS, assert_same, end_step, inputs, named, of_call, sgd
from tests.dense import (
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    problems,
    projector,
    supervised,
)

# --- what is set --------------------------------------------------------------------------------


@given(problem=problems())
def test_each_batch_has_the_matrix_of_that_batch(problem):
    batch = so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    for x, y in problem.batches:
        batch.set(x, y)
        dense = dense_curvature(problem.model, supervised(problem.loss_fn), [(x, y)])
        v = probes(operator.size)
        assert operator.loss() == pytest.approx(dense.loss, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-11)
        torch.testing.assert_close(operator.matmat(v), v @ dense.hessian, rtol=0, atol=1e-10)
        assert operator.stats.examples == len(y)


@given(problem=problems())
def test_micro_batches_of_a_step_are_its_data_together(problem):
    """Two steps of accumulation: the second one's data are its own micro-batches alone."""
    batch, optimizer = so.CurrentBatch(), sgd(problem.model)
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    for _ in range(2):
        optimizer.zero_grad()
        for x, y in problem.batches:
            batch.add(x, y)
            problem.loss_fn(problem.model(x), y).backward()
        dense = problem.dense()
        v = probes(operator.size)
        torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-11)
        torch.testing.assert_close(operator.matmat(v), v @ dense.hessian, rtol=0, atol=1e-10)
        assert operator.stats.examples == sum(len(y) for _, y in problem.batches)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_takes_one(kind):
    problem, batch = make_problem(sizes=[5, 3]), so.CurrentBatch()
    operator = kind(problem.model, problem.loss_fn, batch)
    for x, y in problem.batches:
        batch.set(x, y)
        assert_same(operator, kind(problem.model, problem.loss_fn, (x, y)))


def test_the_residual_takes_one():
    problem, batch = make_problem(sizes=[5, 3]), so.CurrentBatch()

    def residual(data: Any) -> so.ResidualOperator:
        return so.ResidualOperator(
            *(kind(problem.model, problem.loss_fn, data) for kind in KINDS[:2])
        )

    operator = residual(batch)
    for x, y in problem.batches:
        batch.set(x, y)
        assert_same(operator, residual((x, y)))
    end_step(operator)
    assert batch.held() == []


def test_a_mapping_is_one_batch_of_a_loss_of_ones_own():
    problem = make_problem(sizes=[5, 3])

    def batch_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return problem.loss_fn(model(batch["x"]), batch["y"]), len(batch["y"])

    batch = so.CurrentBatch()
    operator = so.HessianOperator.from_loss(problem.model, batch_loss, batch)
    for x, y in problem.batches:
        batch.set({"x": x, "y": y})
        assert_same(operator, so.HessianOperator(problem.model, problem.loss_fn, (x, y)))


def test_a_step_ends_with_an_optimizer_that_holds_a_parameter_of_the_model():
    problem, other = make_problem(sizes=[3, 2, 4]), make_problem(seed=1)
    first, second, third = problem.batches
    batch = so.CurrentBatch()
    so.HessianOperator(problem.model, problem.loss_fn, batch)
    parameters = list(problem.model.parameters())
    halves = [torch.optim.SGD(parameters[:2], 0.1), torch.optim.AdamW(parameters[2:], 0.1)]
    batch.add(*first)
    sgd(other.model).step()
    batch.add(*second)
    assert batch.held() == [first, second]
    for optimizer in halves:  # as Muon and AdamW step in turn
        optimizer.step()
        assert batch.held() == [first, second]
    batch.add(*third)
    assert batch.held() == [third]


def test_before_there_is_an_operator_any_optimizer_ends_a_step():
    problem, batch = make_problem(), so.CurrentBatch()
    batch.add(*problem.batches[0])
    sgd(problem.model).step()
    batch.add(*problem.batches[1])
    assert batch.held() == problem.batches[1:2]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_was_skipped_leaves_nothing(set_to_none):
    """As a GradScaler skips it: gradients are cleared, and no optimizer has stepped."""
    problem = make_problem(sizes=[3, 2, 4, 1])
    batch, optimizer = so.CurrentBatch(), sgd(problem.model)
    so.HessianOperator(problem.model, problem.loss_fn, batch)
    for p in problem.model.parameters():
        p.grad = torch.zeros_like(p)
    for step in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for x, y in problem.batches[2 * step :][:2]:
            batch.add(x, y)
            problem.loss_fn(problem.model(x), y).backward()
        assert batch.held() == problem.batches[2 * step :][:2]


def test_a_grad_scaler_that_skips_leaves_nothing():
    model = named()
    batch, optimizer = so.CurrentBatch.from_forward(model), sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        (x, rest), factor = inputs(3, seed=step), torch.inf if step == 0 else 1.0
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(model(x, **rest) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert moved == (step > 0)  # the first step was skipped
        assert [call.args[0] for call in batch.held()] == [x]


def test_micro_batches_of_one_backward_pass_are_all_held():
    """Losses that are summed before one backward pass, with gradients of zeros or none."""
    for zeros in (False, True):
        problem, batch = make_problem(sizes=[3, 2, 4]), so.CurrentBatch()
        so.HessianOperator(problem.model, problem.loss_fn, batch)
        for p in problem.model.parameters():
            p.grad = torch.zeros_like(p) if zeros else None
        for x, y in problem.batches:
            batch.add(x, y)
        assert batch.held() == problem.batches


# --- what is refused ----------------------------------------------------------------------------


def test_without_a_batch_there_is_one_clear_error():
    problem, batch = make_problem(), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    subspace = so.DominantSubspace(operator, k=2)
    for use in (operator.loss, operator.gradient, subspace.update):
        with pytest.raises(ArgumentError, match=r"the CurrentBatch is 'empty'.*batch\.set\(x, y\)"):
            use()
    batch.set(*problem.batches[0])
    loss = operator.loss()
    batch.clear()
    with pytest.raises(ArgumentError, match="the CurrentBatch is 'empty'"):
        operator.loss()
    batch.set(*problem.batches[0])
    assert operator.loss() == loss
    assert operator.stats.engine == "func"


def test_no_call_was_taken():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    operator = so.HessianOperator.from_loss(model, of_call, batch)
    with pytest.raises(ArgumentError, match="Call the model with gradients enabled"):
        operator.loss()


def test_what_is_no_batch_is_refused():
    batch = so.CurrentBatch()
    for change in (batch.set, batch.add):
        with pytest.raises(ArgumentError, match="batch is 'empty'"):
            change()
        with pytest.raises(ArgumentError, match="batch is 'generator'"):
            change(x for x in [1])
    assert batch.held() == []
    with pytest.raises(ArgumentError, match="model is 'int'"):
        so.CurrentBatch.from_forward(3)
    problem = make_problem()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    batch.set({"x": 1})
    with pytest.raises(ArgumentError, match="a pair"):
        operator.loss()


def test_calls_have_no_targets():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    for kind in KINDS:
        with pytest.raises(ArgumentError, match="from_loss"):
            kind(model, half_squared_error, batch)


def test_a_model_that_is_compiled_in_place_has_no_hooks():
    model = named()
    model.compile()
    with pytest.raises(ArgumentError, match=r"compiled in place.*batch\.set"):
        so.CurrentBatch.from_forward(model)


def test_writing_to_a_batch_is_an_error_until_it_is_set_again():
    problem, batch = make_problem(sizes=[4]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    x, y = problem.batches[0]
    batch.set(x, y)
    operator.loss()
    x.mul_(1.0)  # written, and the same
    operator.loss()
    x.mul_(2.0)
    with pytest.raises(DataChangedError, match="Set the batch again"):
        operator.loss()
    batch.set(x, y)
    assert_same(operator, so.HessianOperator(problem.model, problem.loss_fn, (x, y)))


# --- states -------------------------------------------------------------------------------------


def test_a_new_batch_is_another_state_also_in_the_same_memory():
    """A caching allocator gives the next batch the address of the last one."""
    problem, batch = make_problem(sizes=[4]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    x, y = problem.batches[0]
    states, losses, dense = set(), [], []
    for factor in (1.0, 2.0, 3.0):
        x.data.mul_(factor)  # no version counter sees it
        batch.set(x, y)
        states.add(operator.state())
        losses.append(operator.loss())
        dense.append(dense_curvature(problem.model, supervised(problem.loss_fn), [(x, y)]).loss)
        assert operator.state() in states
    assert len(states) == 3
    assert losses == pytest.approx(dense, rel=1e-12)


def test_it_is_proved_once():
    problem, batch = make_problem(sizes=[4, 4, 4]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    counts = []
    for x, y in problem.batches:
        batch.set(x, y)
        operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
        counts.append(operator.stats.verification)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_a_sample_is_not_taken_of_it():
    problem, batch = make_problem(sizes=[64]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    batch.set(*problem.batches[0])
    assert operator.sample(8, seed=0) is None


def test_a_subspace_is_that_of_the_batch_at_hand():
    problem, batch = make_problem(sizes=[6, 5, 7]), so.CurrentBatch()
    subspace = so.DominantSubspace(
        so.HessianOperator(problem.model, problem.loss_fn, batch), k=2, tol=1e-8
    )
    for x, y in problem.batches:
        batch.set(x, y)
        dense = dense_curvature(problem.model, supervised(problem.loss_fn), [(x, y)])
        top = torch.linalg.eigh(dense.hessian).eigenvectors[:, -2:].T
        found = subspace.update()
        assert subspace.update() is found  # once for each state
        torch.testing.assert_close(projector(found.vectors), projector(top), rtol=0, atol=1e-6)


@pytest.mark.parametrize("refresh", [1, "auto"])
def test_bulk_sgd_trains_on_live_minibatches(refresh):
    """Each update is that of the batch's own gradient, less its part along the batch's basis."""
    problem, batch = make_problem(sizes=[6, 5, 7, 4]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    subspace = so.DominantSubspace(operator, k=2, refresh=refresh, tol=1e-8)
    optimizer = so.BulkSGD(problem.model.parameters(), lr=0.05, subspace=subspace)
    space = operator.parameters
    for x, y in problem.batches:
        batch.set(x, y)
        dense = dense_curvature(problem.model, supervised(problem.loss_fn), [(x, y)])
        top = torch.linalg.eigh(dense.hessian).eigenvectors[:, -2:].T
        before = space.flatten(space.tensors)
        optimizer.zero_grad()
        problem.loss_fn(problem.model(x), y).backward()
        optimizer.step()
        bulk = dense.gradient - projector(top) @ dense.gradient
        moved = space.flatten(space.tensors) - before
        torch.testing.assert_close(moved, -0.05 * bulk, rtol=0, atol=1e-6)


def test_a_monitor_records_the_batch_at_hand():
    problem, batch = make_problem(sizes=[6, 5, 7]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    optimizer = sgd(problem.model)
    monitor = so.Monitor(optimizer, so.DominantSubspace(operator, k=2))
    losses = []
    for x, y in problem.batches:
        batch.set(x, y)
        optimizer.zero_grad()
        loss = problem.loss_fn(problem.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert monitor.history["loss"] == pytest.approx(losses, rel=1e-12)
    assert monitor.history["examples"] == [6, 5, 7]
