"""The current batch: each step's minibatch is what is measured, and nothing of it stays."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

import subspace_optim as so
from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.forwards import Call
from tests.dense import (
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    problems,
    projector,
    supervised,
)

KINDS = [so.HessianOperator, so.GaussNewtonOperator, so.FiniteDifferenceHessian]


def assert_same(operator: so.CurvatureOperator, other: so.CurvatureOperator) -> None:
    """The same loss, gradient and products, to the last bit: the same batches in one order."""
    v = probes(other.size, other.dtype)
    assert operator.loss() == other.loss()
    assert torch.equal(operator.gradient(), other.gradient())
    assert torch.equal(operator.matmat(v), other.matmat(v))
    assert operator.stats.examples == other.stats.examples


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


class Named(nn.Module):
    """Takes an input by position, another by name, and a flag; its loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, *, scale: Tensor, square: bool = False) -> Tensor:
        found = self.head(torch.tanh(self.body(x)) * scale)
        return found.square().mean() if square else found.mean()


def of_call(model: Callable[..., Tensor], call: Call) -> tuple[Tensor, int]:
    return call(model), len(call.args[0])


def named(seed: int = 0) -> Named:
    torch.manual_seed(seed)
    return Named().double()


def inputs(n: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    scale = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return x, {"scale": scale, "square": seed % 2 == 0}


# --- what is set --------------------------------------------------------------------------------


def end_step(operator: Any) -> None:
    """A step at the end of which the operator is told of it, as a monitor does."""
    optimizer = torch.optim.SGD(operator.parameters.tensors, lr=0.0)
    optimizer.register_step_post_hook(lambda *_: operator.step_ended())
    optimizer.step()


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


# --- calls of the model -------------------------------------------------------------------------


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


# --- nothing is held ----------------------------------------------------------------------------


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
