"""``ResidualOperator`` against the dense Hessian less the dense product of the three factors."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import (
    ArgumentError,
    FiniteDifferenceHessian,
    GaussNewtonOperator,
    HessianOperator,
    ResidualOperator,
)
from tests.curvature.test_gauss_newton import of_problem
from tests.dense import Problem, half_squared_error, make_problem, probes, problems

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def parts(
    problem: Problem, **options: Any
) -> tuple[HessianOperator, GaussNewtonOperator, ResidualOperator]:
    arguments = problem.model, problem.loss_fn, problem.batches
    hessian = HessianOperator(*arguments, **options)
    gauss_newton = GaussNewtonOperator(*arguments, **options)
    return hessian, gauss_newton, ResidualOperator(hessian, gauss_newton)


def products(operator: so.CurvatureOperator) -> Tensor:
    """Those with some random vectors, which tell one matrix from another."""
    return operator.matmat(probes(operator.size, operator.dtype)).double()


def matrix(operator: so.CurvatureOperator) -> Tensor:
    return operator.matmat(torch.eye(operator.size, dtype=operator.dtype)).double()


def check(problem: Problem, **options: Any) -> None:
    hessian, gauss_newton, residual = parts(problem, **options)
    dense = problem.dense().hessian
    scale = max(float(dense.abs().max()), 1.0)
    tolerance = {"rtol": 0, "atol": TOLERANCE[residual.dtype] * scale * len(dense) ** 0.5}
    V, R = probes(len(dense), residual.dtype), products(residual)
    assert (residual.size, residual.dtype) == (len(dense), hessian.dtype)
    expected = V.double() @ (dense - of_problem(problem))
    torch.testing.assert_close(R, expected, **tolerance)
    torch.testing.assert_close(products(hessian), products(gauss_newton) + R, **tolerance)
    product = residual.matvec(V[0])
    assert (product.shape, product.dtype) == (V[0].shape, V.dtype)
    torch.testing.assert_close(product.double(), R[0], **tolerance)


@settings(max_examples=5)
@given(problem=problems(), budget=st.sampled_from([None, 0]))
def test_it_is_the_dense_difference_in_float64(problem, budget):
    check(problem, memory_budget=budget)


@settings(max_examples=3)
@given(problem=problems(torch.float32))
def test_it_is_the_dense_difference_in_float32(problem):
    check(problem)


def test_a_product_of_two_weights_has_the_residual_of_the_textbook():
    """``f = a b x``: ``R`` is the mean of ``(f − y) x`` times the matrix that swaps a and b."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.tensor([1.5, -0.5]).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.weights.prod() * x

    x, y = torch.tensor([[1.0], [2.0], [-1.0]]).double(), torch.tensor([[1.0], [0], [3]]).double()
    problem = Problem(Product(), half_squared_error, [(x[:1], y[:1]), (x[1:], y[1:])])
    _, gauss_newton, residual = parts(problem)
    slope = float(((-0.75 * x - y) * x).mean())
    expected = slope * torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    torch.testing.assert_close(matrix(residual), expected)
    swapped = torch.tensor([-0.5, 1.5]).double()  # the gradient of a b
    G = x.square().mean() * torch.outer(swapped, swapped)
    torch.testing.assert_close(matrix(gauss_newton), G)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_it_vanishes_where_the_model_is_linear(loss):
    problem = make_problem("mlp", loss)
    linear = Problem(nn.Linear(3, 2).double(), problem.loss_fn, problem.batches)
    hessian, _, residual = parts(linear)
    assert matrix(residual).abs().max() <= 1e-14
    assert matrix(hessian).abs().max() > 0.1


def test_it_vanishes_where_the_data_are_fitted_exactly():
    problem = make_problem("mlp", "mse")
    fitted = [(x, problem.model(x).detach()) for x, _ in problem.batches]
    hessian, _, residual = parts(Problem(problem.model, problem.loss_fn, fitted))
    assert matrix(residual).abs().max() <= 1e-14
    assert matrix(hessian).abs().max() > 0.1


def test_loss_and_gradient_are_the_hessians():
    problem = make_problem()
    dense = problem.dense()
    for products_first in (True, False):
        residual = parts(problem)[2]
        if products_first:
            products(residual)
        torch.testing.assert_close(residual.gradient(), dense.gradient, rtol=0, atol=1e-12)
        assert residual.loss() == pytest.approx(dense.loss, rel=1e-12)


def test_a_hessian_of_finite_differences_will_do():
    problem = make_problem()
    arguments = problem.model, problem.loss_fn, problem.batches
    hessian, gauss_newton = FiniteDifferenceHessian(*arguments), GaussNewtonOperator(*arguments)
    residual = ResidualOperator(hessian, gauss_newton)
    assert residual.accuracy == hessian.accuracy > gauss_newton.accuracy
    expected = probes(residual.size) @ (problem.dense().hessian - of_problem(problem))
    assert (products(residual) - expected).abs().max() <= 1e-7


def test_its_top_eigenpairs_are_found_by_a_subspace():
    problem = make_problem()
    residual = parts(problem)[2]
    basis = so.DominantSubspace(residual, k=3, tol=1e-8, refresh=1).update()
    values = torch.linalg.eigvalsh(problem.dense().hessian - of_problem(problem)).flip(0)
    torch.testing.assert_close(basis.eigenvalues, values[:3], rtol=1e-6, atol=1e-8)


# --- whose parameters, and whose loss -------------------------------------------------------------


def test_both_are_of_the_same_parameters_in_the_same_order():
    problem = make_problem()
    arguments = problem.loss_fn, problem.batches
    hessian = HessianOperator(problem.model, *arguments)
    twin = GaussNewtonOperator(copy.deepcopy(problem.model), *arguments)
    allowed = "those of the model that the Hessian is of, and not of a copy"
    with pytest.raises(ArgumentError, match=f"^parameters of gauss_newton is .*{allowed}"):
        ResidualOperator(hessian, twin)
    chosen = [problem.model.get_parameter(name) for name in ("4.bias", "0.weight")]
    for params in (chosen, list(problem.model.parameters())[::-1]):
        other = GaussNewtonOperator(problem.model, *arguments, params=params)
        with pytest.raises(ArgumentError, match=r"the Hessian's parameters, in its order: \['0\.w"):
            ResidualOperator(hessian, other)
    names = ["4.bias", "0.weight"]
    expected = problem.dense(names).hessian - of_problem(problem, names)
    assert (matrix(parts(problem, params=chosen)[2]) - expected).abs().max() <= 1e-11


def test_what_is_no_hessian_or_no_gauss_newton_matrix_is_refused():
    hessian, gauss_newton, _ = parts(make_problem())
    with pytest.raises(ArgumentError, match=r"^hessian is 'Tensor', but must be a CurvatureOp"):
        ResidualOperator(torch.eye(3), gauss_newton)
    for wrong in (hessian, None):
        with pytest.raises(ArgumentError, match=r"^gauss_newton is '\w+', .*\(hessian, gauss_newt"):
            ResidualOperator(gauss_newton, wrong)


@pytest.mark.parametrize("other", ["data", "loss", "mode"])
def test_a_difference_between_matrices_of_two_losses_is_refused(other):
    problem = make_problem(sizes=(8, 6))
    model = nn.Sequential(problem.model[0], nn.Dropout(0.5), *problem.model[1:])
    loss_fn, batches, options = problem.loss_fn, problem.batches, {}
    if other == "data":
        batches = batches[:1]
    elif other == "loss":
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    else:
        options = {"mode": "eval"}
    hessian = HessianOperator(model, problem.loss_fn, problem.batches)
    residual = ResidualOperator(hessian, GaussNewtonOperator(model, loss_fn, batches, **options))
    v = torch.ones(residual.size, dtype=torch.float64)
    for _ in range(2):  # a refusal is no permission
        with pytest.raises(ArgumentError, match=r"^the loss of gauss_newton is .*the Hessian's, 0"):
            residual.matvec(v)


def test_the_losses_are_compared_once(monkeypatch):
    """An operator of one's own may have to compute its loss anew."""
    hessian, _, residual = parts(make_problem())
    v, calls, loss = torch.ones(residual.size, dtype=torch.float64), [], hessian.loss
    monkeypatch.setattr(hessian, "loss", lambda: calls.append(1) or loss())
    for _ in range(3):
        residual.matvec(v)
    assert len(calls) == 1


@pytest.mark.parametrize("far", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_loss_in_other_batches_is_the_same(dtype, far):
    """Up to rounding, of a large loss too."""
    problem = make_problem("mlp", "mse", sizes=(40, 30, 20), dtype=dtype)
    batches = [(x, far * y) for x, y in problem.batches]
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    hessian = HessianOperator(problem.model, problem.loss_fn, (x, y))
    gauss_newton = GaussNewtonOperator(problem.model, problem.loss_fn, batches)
    residual = products(ResidualOperator(hessian, gauss_newton))
    problem = Problem(problem.model, problem.loss_fn, batches)
    V = probes(residual.shape[1], dtype).double()
    expected = V @ (problem.dense().hessian - of_problem(problem))
    scale = max(1.0, float(expected.abs().max()))
    assert (residual - expected).abs().max() <= TOLERANCE[dtype] * scale


# --- frozen, release, stats -----------------------------------------------------------------------


def test_frozen_freezes_both():
    """No copy is held: parameters that change inside, against the promise, are an error."""
    problem = make_problem()
    _, _, residual = parts(problem)
    before = products(residual)
    with residual.frozen():
        assert torch.equal(products(residual), before)
        with torch.no_grad():
            for p in problem.model.parameters():
                p.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            products(residual)
    after = products(residual)
    expected = problem.dense().hessian - of_problem(problem)
    torch.testing.assert_close(after, probes(len(expected)) @ expected)
    assert (after - before).abs().max() > 1e-3


def test_release_frees_what_both_keep():
    hessian, gauss_newton, residual = parts(make_problem())
    products(residual)
    assert hessian._point.kept
    assert gauss_newton._point.kept
    residual.release()
    assert hessian._point.kept is None
    assert gauss_newton._point.kept is None


@pytest.mark.parametrize(("budget", "passes"), [(None, 1), (0, 2)])
def test_stats_tell_what_was_spent_in_its_name_alone(budget, passes):
    hessian, gauss_newton, residual = parts(make_problem(), memory_budget=budget)
    v = torch.ones(4, residual.size, dtype=torch.float64)
    residual.matmat(v)
    first = copy.copy(residual.stats)
    assert (first.products, first.gradients, first.passes) == (8, 2, 2 * passes)
    assert first.graphs_kept + first.graphs_streamed == 6
    assert first.graphs_kept == (6 if budget is None else 0)
    assert first.graph_bytes == hessian.stats.graph_bytes + gauss_newton.stats.graph_bytes
    assert first.engine == "func - double_backward"
    hessian.matmat(v)
    gauss_newton.matmat(v)
    assert residual.stats == first
    residual.matvec(v[0])
    residual.gradient()
    residual.loss()
    assert (residual.stats.products, residual.stats.gradients) == (10, 2)
    assert hessian.stats.products == gauss_newton.stats.products == 9
    fresh = parts(make_problem())[2]
    fresh.loss()
    fresh.gradient()
    assert (fresh.stats.products, fresh.stats.gradients, fresh.stats.passes) == (0, 1, 2)


def test_a_copy_goes_with_the_copied_model():
    problem = make_problem()
    _, _, residual = parts(problem)
    model, twin = copy.deepcopy((problem.model, residual))
    with torch.no_grad():
        for p in problem.model.parameters():
            p.zero_()
    moved = Problem(model, problem.loss_fn, problem.batches)
    expected = probes(residual.size) @ (moved.dense().hessian - of_problem(moved))
    assert (products(twin) - expected).abs().max() <= 1e-10
    assert (products(residual) - expected).abs().max() > 1e-3
