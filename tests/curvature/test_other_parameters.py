"""``operator.at(theta)``: what an operator measures at parameters that the model does not hold."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import subspace_optim as so
from tests.dense import (
    MODELS,
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    problems,
    supervised,
)

OPERATORS = [so.HessianOperator, so.GaussNewtonOperator, so.FiniteDifferenceHessian]


def moved(model: nn.Module, theta: torch.Tensor) -> nn.Module:
    """Returns a copy of the model at other parameters."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, model.parameters())
    return model


@given(problem=problems(), seed=st.integers(0, 2**31))
def test_it_measures_there_what_a_moved_copy_measures_in_its_place(problem, seed):
    own = nn.utils.parameters_to_vector(problem.model.parameters()).detach()
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed), dtype=own.dtype)
    theta = own + 0.1 * noise
    there = moved(problem.model, theta)
    dense = dense_curvature(there, supervised(problem.loss_fn), problem.batches)
    hessian = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    before = hessian.loss(), hessian.gradient()
    V = probes(len(own), own.dtype)
    scale = max(float(dense.hessian.abs().max()), 1.0)
    with hessian.at(theta):
        assert hessian.loss() == pytest.approx(dense.loss, rel=1e-12)
        torch.testing.assert_close(hessian.gradient(), dense.gradient, rtol=0, atol=1e-11 * scale)
        products = hessian.matmat(V)
    torch.testing.assert_close(products, V @ dense.hessian, rtol=0, atol=1e-10 * scale)
    assert hessian.loss() == before[0]
    assert torch.equal(hessian.gradient(), before[1])


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("engine", ["func", "double_backward"])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_come_back_bit_for_bit_in_their_own_memory(kind, engine, name):
    problem = make_problem(name, "mse", [6, 3])
    options = {"engine": engine} if kind is so.HessianOperator else {}
    operator = kind(problem.model, half_squared_error, problem.batches, **options)
    parameters = list(problem.model.parameters())
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in parameters]
    theta = torch.zeros(operator.size, dtype=operator.dtype)

    def measure_and_fail() -> None:
        with operator.at(theta):
            operator.loss(), operator.gradient()
            operator.matmat(probes(operator.size, operator.dtype))
            raise KeyError

    with pytest.raises(KeyError):
        measure_and_fail()
    for p, (place, version, value) in zip(parameters, before, strict=True):
        assert (p.data_ptr(), p._version) == (place, version)
        assert torch.equal(p, value)


def test_inside_of_itself_and_back():
    problem = make_problem("mlp", "mse", [8])
    operator = so.HessianOperator(problem.model, half_squared_error, problem.batches)
    own = operator.parameters.flatten(operator.parameters.tensors)
    losses = {
        c: so.HessianOperator(
            moved(problem.model, c * own), half_squared_error, problem.batches
        ).loss()
        for c in (1.0, 0.5, 2.0)
    }
    assert operator.loss() == losses[1.0]
    with operator.at(0.5 * own):
        assert operator.loss() == losses[0.5]
        with operator.at(2.0 * own):
            assert operator.loss() == losses[2.0]
        assert operator.loss() == losses[0.5]
    assert operator.loss() == losses[1.0]


@pytest.mark.parametrize("write", ["in place", "to data"])
def test_graphs_from_before_a_step_are_not_used_after_it(write):
    """Going back to ``θ_t`` after the step: graphs of the old memory hold the values of the new."""
    problem = make_problem("mlp", "mse", [8])
    operator = so.HessianOperator(problem.model, half_squared_error, problem.batches)
    theta = operator.parameters.flatten(operator.parameters.tensors)
    V = probes(operator.size, operator.dtype)
    loss, gradient, products = operator.loss(), operator.gradient(), operator.matmat(V)
    for p in problem.model.parameters():
        (p.data if write == "to data" else p.detach()).add_(0.3)
    passes = operator.stats.passes
    with operator.at(theta):
        assert operator.loss() == loss
        assert torch.equal(operator.gradient(), gradient)
        assert operator.stats.passes == passes  # both are still known
        assert torch.equal(operator.matmat(V), products)
    assert operator.loss() != loss


def test_low_precision_parameters_are_held_in_their_own_dtype():
    model = nn.Linear(4, 3).bfloat16()
    x, y = torch.randn(10, 4), torch.randn(10, 3)
    operator = so.HessianOperator(model, nn.MSELoss(), (x, y))
    theta = operator.parameters.flatten(operator.parameters.tensors)
    loss = operator.loss()
    with operator.at(2 * theta):
        assert model.weight.dtype == torch.bfloat16
        doubled = operator.loss()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert doubled == so.HessianOperator(twin, nn.MSELoss(), (x, y)).loss() != loss


def test_another_shape_is_an_error():
    operator = so.HessianOperator(
        nn.Linear(4, 3), nn.MSELoss(), (torch.ones(2, 4), torch.ones(2, 3))
    )
    with pytest.raises(
        so.ArgumentError, match=r"the shape of theta is \(4,\), but must be \(15,\)"
    ):
        operator.at(torch.zeros(4)).__enter__()


def test_the_difference_of_two_is_taken_there_too():
    problem = make_problem("mlp", "mse", [8])
    hessian = so.HessianOperator(problem.model, half_squared_error, problem.batches)
    gauss_newton = so.GaussNewtonOperator(problem.model, half_squared_error, problem.batches)
    residual = so.ResidualOperator(hessian, gauss_newton)
    theta = 0.7 * hessian.parameters.flatten(hessian.parameters.tensors)
    V = probes(hessian.size, hessian.dtype)
    with hessian.at(theta):
        expected = hessian.matmat(V)
    with gauss_newton.at(theta):
        expected -= gauss_newton.matmat(V)
    before = residual.matmat(V)
    with residual.at(theta):
        torch.testing.assert_close(residual.matmat(V), expected)
    assert torch.equal(residual.matmat(V), before)
