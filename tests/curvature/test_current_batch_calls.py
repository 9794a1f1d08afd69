"""Calls of the model as the current batch: which of them are those that a step trains on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import subspace_optim as so
from subspace_optim.curvature.forwards import Call
from tests.curvature.live_batches import assert_same, inputs, named, of_call, sgd


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_calls_of_a_training_are_its_data(sizes, seed):
    """Positional and named arguments, over two steps of accumulation."""
    model = named(seed)
    batch, optimizer = so.CurrentBatch.from_forward(model), sgd(model)
    operator = so.HessianOperator.from_loss(model, of_call, batch)
    for step in range(2):
        optimizer.zero_grad()
        calls = []
        for i, n in enumerate(sizes):
            x, rest = inputs(n, seed=seed + 10 * step + i)
            calls.append(Call((x,), rest))
            model(x, **rest).backward()
        assert_same(operator, so.HessianOperator.from_loss(model, of_call, calls))
        assert operator.stats.examples == sum(sizes)
        optimizer.step()


def test_nothing_is_copied():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    model(x, **rest)
    (call,) = batch.held()
    assert call.args[0] is x
    assert call.kwargs["scale"] is rest["scale"]


def test_the_graph_that_an_input_comes_from_is_not_held():
    model, before = named(), nn.Linear(3, 3).double()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    features = before(x)
    model(features, **rest).backward()
    (call,) = batch.held()
    assert call.args[0].data_ptr() == features.data_ptr()
    assert call.args[0].grad_fn is None
    assert features.grad_fn is not None


def test_evaluation_is_not_taken():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    with torch.no_grad():
        model(x, **rest)
    with torch.inference_mode():
        model(x, **rest)
    parameters = dict(model.named_parameters())
    vmap(lambda row: functional_call(model, parameters, (row[None],), rest))(x)
    assert batch.held() == []


def test_evaluation_with_gradients_is_replaced_by_the_next_call():
    """Of calls that no backward pass followed the last one counts, once a backward pass follows."""
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    calls = [inputs(3, seed=seed) for seed in range(5)]
    for index, (x, rest) in enumerate(calls):
        loss = model(x, **rest)
        if index in (0, 3):
            loss.backward()
    assert [id(call.args[0]) for call in batch.held()] == [id(calls[0][0]), id(calls[3][0])]
    loss.backward()
    taken = [calls[0][0], calls[3][0], calls[4][0]]
    assert [id(call.args[0]) for call in batch.held()] == list(map(id, taken))


@pytest.mark.parametrize("engine", ["func", "double_backward"])
def test_the_packages_own_evaluations_are_not_taken(engine):
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    operator = so.HessianOperator.from_loss(model, of_call, batch, engine=engine)
    x, rest = inputs(3, seed=0)
    model(x, **rest)
    number = batch.number
    operator.loss()
    operator.check()
    so.DominantSubspace(operator, k=1).update()
    assert batch.number == number
    assert batch.held()[0].args[0] is x


def test_parts_that_are_computed_again_are_not_taken():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    loss = checkpoint(lambda x: model(x, **rest), x, use_reentrant=False)
    number = batch.number
    loss.backward()
    assert batch.number == number == 1


def test_of_two_models_each_follows_its_own_steps():
    """As the optimizers of a GAN step: the other one's step ends nothing."""
    critic, maker = named(0), named(1)
    batch = so.CurrentBatch.from_forward(critic)
    (x, rest), (z, others) = inputs(3, seed=0), inputs(2, seed=1)
    critic(x, **rest).backward()
    sgd(maker).step()
    critic(z, **others).backward()
    assert [call.args[0] for call in batch.held()] == [x, z]
    sgd(critic).step()
    critic(x, **rest)
    assert [call.args[0] for call in batch.held()] == [x]


def test_parameters_that_are_replaced_are_followed():
    """By ``load_state_dict(assign=True)``, amid a training with accumulation."""
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    for seed in range(2):
        (x, rest), (z, others) = inputs(3, seed=seed), inputs(2, seed=seed + 2)
        model.zero_grad()
        model(x, **rest).backward()
        model(z, **others).backward()
        assert [call.args[0] for call in batch.held()] == [x, z]
        sgd(model).step()
        model.load_state_dict(named(5).state_dict(), assign=True)


def test_a_compiled_model_is_followed_by_its_wrapper():
    model = named()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = so.CurrentBatch.from_forward(compiled)
    operator = so.HessianOperator.from_loss(compiled, of_call, batch)
    optimizer = sgd(model)
    for seed in range(2):
        x, rest = inputs(3, seed=seed)
        optimizer.zero_grad()
        compiled(x, **rest).backward()
        assert [call.args[0] for call in batch.held()] == [x]
        assert_same(operator, so.HessianOperator.from_loss(model, of_call, [Call((x,), rest)]))
        optimizer.step()


def test_the_hook_of_what_is_compiled_later_is_no_part_of_it():
    model = named()
    batch = so.CurrentBatch.from_forward(model)
    x, rest = inputs(3, seed=0)
    expected = model(x, **rest)
    batch.clear()
    found = torch.compile(model, backend="eager", fullgraph=True)(x, **rest)
    assert torch.equal(found, expected)
