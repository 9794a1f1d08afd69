"""``FiniteDifferenceHessian`` against the dense Hessian, at the accuracy that it states."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from subspace_optim import ArgumentError, NonFiniteError
from subspace_optim.curvature import (
    CurvatureOperator,
    FiniteDifferenceHessian,
    HessianOperator,
)
from tests.dense import (
    LOSSES,
    Dense,
    Problem,
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    supervised,
)

SMOOTH = ["mlp", "tied", "attention"]  # the others have kinks


def operator_of(problem: Problem, **options: Any) -> FiniteDifferenceHessian:
    return FiniteDifferenceHessian(problem.model, problem.loss_fn, problem.batches, **options)


def directions(operator: CurvatureOperator) -> Tensor:
    """Some random vectors of unit length."""
    return F.normalize(probes(operator.size, operator.dtype))


def products(operator: CurvatureOperator) -> Tensor:
    return operator.matmat(directions(operator))


def errors(operator: FiniteDifferenceHessian, dense: Dense) -> Tensor:
    """The errors of products with unit vectors, relative to ‖H‖, and how asymmetric they are."""
    V, rows = directions(operator).double(), products(operator).double()
    scale = torch.linalg.matrix_norm(dense.hessian, 2)
    forms = V @ rows.T
    return torch.cat([(rows - V @ dense.hessian).norm(dim=1), (forms - forms.T).flatten()]) / scale


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 3.8e-11), (torch.float32, 2.5e-5)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", SMOOTH)
def test_it_is_the_dense_hessian_to_the_accuracy_that_it_states(model, loss, dtype, floor):
    """To a small multiple of it, and no step that is far from its own does better."""
    problem = make_problem(model, loss, dtype=dtype)
    operator = operator_of(problem)
    assert operator.accuracy == pytest.approx(floor, rel=0.02)
    dense = problem.dense()
    error = errors(operator, dense).max()
    assert error < 60 * floor
    for factor in (100.0**3, 100.0**-3):
        other = operator_of(problem, rounding=operator.rounding * factor)
        assert errors(other, dense).max() > error


@given(
    model=st.sampled_from(SMOOTH),
    loss=st.sampled_from(sorted(LOSSES)),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    budget=st.sampled_from([None, 0]),
)
def test_every_smooth_problem_has_its_dense_hessian(model, loss, sizes, seed, budget):
    problem = make_problem(model, loss, sizes, seed=seed)
    operator = operator_of(problem, memory_budget=budget)
    dense = problem.dense()
    scale = max(float(torch.linalg.matrix_norm(dense.hessian, 2)), 1e-2)
    error = (products(operator) - directions(operator) @ dense.hessian).norm(dim=1).max()
    assert error < 1000 * operator.accuracy * scale
    torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-12)
    assert operator.loss() == pytest.approx(dense.loss, rel=1e-12)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    return problem.model, problem.loss_fn, problem.batches


def test_a_quadratic_loss_has_its_hessian_whatever_the_step():
    """No third derivative: only rounding is left, which a larger step makes smaller."""
    problem = make_problem("mlp", "mse")
    model = nn.Linear(3, 2, bias=False).double()
    X = torch.cat([x for x, _ in problem.batches])
    expected = torch.kron(torch.eye(2, dtype=torch.float64), X.T @ X / len(X))
    operator = FiniteDifferenceHessian(model, half_squared_error, problem.batches, rounding=1.0)
    matrix = operator.matmat(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14)
    assert operator.accuracy == pytest.approx(3 ** (2 / 3) / 2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_step_grows_with_the_parameters(scale):
    """``L(θ) = f(θ/s)`` has the Hessian of f over s²: a step that is fixed could not tell it."""
    problem = make_problem("mlp")
    dense = problem.dense()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(problem.model)
            with torch.no_grad():
                for p in self.inner.parameters():
                    p.mul_(scale)

        def forward(self, x: Tensor) -> Tensor:
            state = {n: p / scale for n, p in self.inner.named_parameters()}
            return torch.func.functional_call(problem.model, state, (x,))

    operator = FiniteDifferenceHessian(Scaled(), problem.loss_fn, problem.batches)
    expected = Dense(dense.loss, dense.gradient / scale, dense.hessian / scale**2)
    assert errors(operator, expected).max() < 20 * operator.accuracy


def test_parameters_that_are_zero_have_a_step():
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    problem = Problem(model, nn.CrossEntropyLoss(), make_problem().batches)
    assert errors(operator_of(problem), problem.dense()).max() < 1e-9


def test_a_layer_that_starts_at_zero_does_not_shrink_the_step():
    problem = make_problem("mlp")
    nn.init.constant_(problem.model[4].weight, 1e-12)
    assert errors(operator_of(problem), problem.dense()).max() < 1e-9


def test_the_length_of_a_vector_is_of_no_account():
    problem = make_problem("mlp")
    operator = operator_of(problem)
    v = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = operator.matvec(v)
    for scale in (1e-12, 1e12):
        scaled = operator.matvec(scale * v) / scale
        assert (scaled - product).norm() < 1e-9 * product.norm()
    assert torch.equal(operator.matvec(0 * v), 0 * v)


class Rounding(torch.autograd.Function):
    """Rounds to bf16, forward and backward, as a kernel does that computes in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.bfloat16().float()


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(x)


def test_low_precision_kernels_are_told_of_by_their_rounding():
    """The step is then 9 times as long, (1e-4 / 1.2e-7)^{1/3}, and rounding counts a ninth."""
    problem = make_problem("mlp", dtype=torch.float32)
    model = nn.Sequential(*(part for layer in problem.model for part in (layer, Rounded())))

    def error(**options: Any) -> float:
        operator = FiniteDifferenceHessian(model, problem.loss_fn, problem.batches, **options)
        return float(errors(operator, problem.dense()).max())

    assert error() > 0.1
    assert error(rounding=1e-4) < error() / 3


# --- which function, and what is left alone -----------------------------------------------------


def test_kernels_stay_as_they_are_here_and_only_here():
    """Fused attention has a gradient, and no second derivative."""
    problem = make_problem("attention")
    seen = []

    class Watched(type(problem.model)):
        def forward(self, x: Tensor) -> Tensor:
            heads = self.qkv(x).view(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(*heads)
            seen.append(mixed.grad_fn.name())
            return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))

    problem.model.__class__ = Watched
    operator_of(problem).gradient()
    assert all("Fused" in name or "Flash" in name for name in seen)
    seen.clear()
    products(HessianOperator(*_arguments(problem)))
    assert not any("Fused" in name or "Flash" in name for name in seen)


def test_dropout_has_the_same_masks_ahead_and_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)).double()
    batches = make_problem(sizes=[5, 3]).batches
    for seed in (0, 1):
        exact = HessianOperator(model, nn.CrossEntropyLoss(), batches, seed=seed)
        expected = products(exact)
        for budget in (None, 0):
            operator = FiniteDifferenceHessian(
                model, nn.CrossEntropyLoss(), batches, seed=seed, memory_budget=budget
            )
            torch.testing.assert_close(products(operator), expected, rtol=0, atol=1e-9)


def test_modes_and_parameters_are_chosen_as_in_the_hessian():
    problem = make_problem("mlp")
    names = ["4.bias", "0.weight"]
    chosen = [problem.model.get_parameter(name) for name in names]
    assert errors(operator_of(problem, params=chosen), problem.dense(names)).max() < 1e-9
    model = nn.Sequential(problem.model, nn.Dropout(0.5))
    operator = FiniteDifferenceHessian(model, problem.loss_fn, problem.batches, mode="eval")
    assert errors(operator, problem.dense()).max() < 1e-9


def test_bf16_models_are_differentiated_through_float32_copies():
    problem = make_problem("mlp", dtype=torch.bfloat16)
    batches = [(x.float(), y) for x, y in problem.batches]
    high = Problem(copy.deepcopy(problem.model).float(), problem.loss_fn, batches)
    assert torch.equal(products(operator_of(problem)), products(operator_of(high)))


def test_from_loss_weights_each_batch_as_it_says():
    problem = make_problem("mlp")

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch[0]), batch[1]), int(10 * batch[1].sum()) + 1

    dense = dense_curvature(problem.model, loss, problem.batches)
    operator = FiniteDifferenceHessian.from_loss(problem.model, loss, problem.batches)
    assert errors(operator, dense).max() < 1e-9
    unweighted = dense_curvature(problem.model, supervised(problem.loss_fn), problem.batches)
    assert errors(operator, unweighted).max() > 1e-2


# --- what is kept, and what it costs ------------------------------------------------------------


class Loader:
    """Makes its batches anew in every pass, and counts the passes."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(x.clone(), y.clone()) for x, y in self.batches])


@pytest.mark.parametrize(("budget", "passes"), [(1 << 20, 1), (0, 3)])
def test_batches_are_read_once_or_once_for_each_block_of_products(budget, passes):
    problem = make_problem("mlp")
    loader = Loader(problem.batches)
    operator = FiniteDifferenceHessian(
        problem.model, problem.loss_fn, loader, memory_budget=budget, verify=False
    )
    eye = torch.eye(operator.size, dtype=torch.float64)
    operator.matmat(eye[:5])
    operator.matmat(eye[5:7])
    assert loader.passes == operator.stats.passes == passes
    stats = operator.stats
    assert (stats.engine, stats.products, stats.gradients) == ("finite_difference", 7, 15)
    assert (stats.graphs_kept, stats.graphs_streamed) == ((3, 0) if budget else (0, 3))
    sizes = sum(x.nbytes + y.nbytes for x, y in problem.batches)
    assert (stats.graph_bytes >= sizes) if budget else stats.graph_bytes == 0


def test_what_is_kept_is_freed_without_the_garbage_collector():
    problem = make_problem("mlp")
    operator = operator_of(problem)
    v = torch.ones(operator.size, dtype=torch.float64)
    operator.matvec(v)
    old = weakref.ref(operator._point)
    gc.disable()
    try:
        with torch.no_grad():
            problem.model[0].bias.add_(1)
        operator.matvec(v)
        assert old() is None
    finally:
        gc.enable()
    assert errors(operator, problem.dense()).max() < 1e-9


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [0, -1e-3, float("nan"), "bf16"])
def test_a_rounding_that_cannot_be_is_named(rounding):
    with pytest.raises(ArgumentError, match=r"rounding is .* must be a finite number above 0"):
        operator_of(make_problem(), rounding=rounding)


def test_a_loss_that_is_not_finite_is_refused():
    problem = make_problem()
    problem.model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="look for NaN"):
        products(operator_of(problem))
