"""Nothing of a batch stays: what is held until when, and what copies take along."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from tests.curvature.live_batches import end_step, inputs, named, of_call
from tests.dense import make_problem


def alive(references: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("budget", [None, 0])
def test_nothing_is_held_after_a_step(budget):
    """Neither the batch nor kept graphs, which hold its inputs."""
    problem, batch = make_problem(sizes=[4]), so.CurrentBatch()
    model = problem.model
    operator = so.HessianOperator(model, problem.loss_fn, batch, memory_budget=budget)
    for _ in range(2):
        x, y = (t.clone() for t in problem.batches[0])
        references = [weakref.ref(x), weakref.ref(y)]
        batch.set(x, y)
        del x, y
        operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
        operator.gradient()
        assert alive(references) == 2
        end_step(operator)
        assert alive(references) == 0


def test_nothing_of_a_call_is_held_after_a_step():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    operator = so.HessianOperator.from_loss(model, of_call, batch)
    x, rest = inputs(3, seed=0)
    references = [weakref.ref(x), weakref.ref(rest["scale"])]
    model(x, **rest).backward()
    operator.matvec(torch.ones(operator.size, dtype=operator.dtype))
    del x, rest
    assert alive(references) == 2
    end_step(operator)
    assert alive(references) == 0


def test_what_is_replaced_is_not_held():
    problem, batch = make_problem(sizes=[4, 3]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, problem.loss_fn, batch)
    subspace = so.DominantSubspace(operator, k=1)
    x, y = (t.clone() for t in problem.batches[0])
    references = [weakref.ref(x), weakref.ref(y)]
    batch.set(x, y)
    del x, y
    subspace.update()
    operator.loss()
    batch.set(*problem.batches[1])
    assert alive(references) == 0


def test_the_step_of_data_that_stay_ends_without_an_effect():
    problem = make_problem(sizes=[4])
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    operator.loss()
    passes = operator.stats.passes
    operator.step_ended()
    operator.loss()
    assert operator.stats.passes == passes


def test_hooks_go_with_the_batch():
    gc.collect()  # what other tests have left
    before, model = len(_global_optimizer_post_hooks), named()
    batch = so.CurrentBatch.from_forward(model)
    assert (len(_global_optimizer_post_hooks), len(model._forward_pre_hooks)) == (before + 1, 1)
    del batch
    gc.collect()
    assert (len(_global_optimizer_post_hooks), len(model._forward_pre_hooks)) == (before, 0)


def test_the_batch_does_not_hold_the_model():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert batch.held() == []


def test_removed_hooks_take_nothing():
    gc.collect()  # what other tests have left
    before, model = len(_global_optimizer_post_hooks), named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    model(x, **rest)
    batch.remove()
    model(x, **rest)
    assert batch.held() == []
    assert (len(_global_optimizer_post_hooks), len(model._forward_pre_hooks)) == (before, 0)


def _pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_of_the_model_is_not_followed(copied):
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    model(x, **rest)
    number = batch.number
    twin = copied(model)
    assert torch.equal(twin(x, **rest), model(x, **rest))
    assert batch.number == number + 1  # by the model alone
    own = so.CurrentBatch.from_forward(twin)
    twin(x, **rest)
    assert own.held()[0].args[0] is x


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
def test_copies_hold_nothing_and_work(copied):
    problem, batch = make_problem(), so.CurrentBatch()
    batch.set(*problem.batches[0])
    twin = copied(batch)
    assert twin.held() == []
    twin.set(*problem.batches[1])
    assert batch.held() == problem.batches[:1]


def test_a_copied_operator_shares_the_batch_and_a_pickled_one_has_its_own():
    problem, batch = make_problem(sizes=[4]), so.CurrentBatch()
    operator = so.HessianOperator(problem.model, nn.CrossEntropyLoss(), batch)
    batch.set(*problem.batches[0])
    assert copy.deepcopy(operator).loss() == operator.loss()
    with pytest.raises(ArgumentError, match="the CurrentBatch is 'empty'"):
        pickle.loads(pickle.dumps(operator)).loss()


def test_two_monitors_see_one_batch_and_it_is_dropped_after_both():
    problem, batch = make_problem(sizes=[6, 6, 6]), so.CurrentBatch()
    hessians = [so.HessianOperator(problem.model, problem.loss_fn, batch) for _ in range(2)]
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    monitors = [
        so.Monitor(optimizer, hessians[0]),
        so.Monitor(optimizer, so.DominantSubspace(hessians[1], 2)),
    ]
    for x, y in problem.batches:
        batch.set(x, y)
        optimizer.zero_grad()
        loss = problem.loss_fn(problem.model(x), y)
        loss.backward()
        optimizer.step()
        assert batch.held() == []
        assert monitors[1].history["loss"][-1] == pytest.approx(loss.item())
        assert math.isfinite(monitors[0].history["update_sharpness"][-1])


def test_optimizers_that_step_in_turn_see_one_batch():
    problem, batch = make_problem(sizes=[6, 6]), so.CurrentBatch()
    hessian = so.HessianOperator(problem.model, problem.loss_fn, batch)
    first, *rest = problem.model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.Adam(rest, lr=0.01)]
    monitor = so.Monitor(optimizers, hessian)
    for x, y in problem.batches:
        batch.set(x, y)
        problem.model.zero_grad()
        problem.loss_fn(problem.model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert batch.held() == []
        assert math.isfinite(monitor.history["actual_change"][-1])
    assert len(monitor.history["step"]) == 2
