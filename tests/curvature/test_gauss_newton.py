"""``GaussNewtonOperator`` against closed forms and the dense product of its three factors.

The oracle is ``Σ_b n_b J_bᵀ H_b J_b / N`` in float64, with the Jacobian of the outputs of a batch
by ``torch.func.jacrev`` and the Hessian of its mean loss by ``torch.func.hessian``.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import subspace_optim as so
from subspace_optim.curvature import GaussNewtonOperator
from tests.dense import (
    LOSSES,
    MODELS,
    Problem,
    double,
    half_squared_error,
    make_problem,
    probes,
    problems,
)
from tests.observe import Seen

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


# --- the oracle ---------------------------------------------------------------------------------


def dense_gauss_newton(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: list[Any],
    names: list[str] | None = None,
) -> Tensor:
    model = copy.deepcopy(model).double()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    chosen = [parameters[name] for name in (names or parameters)]
    theta = torch.cat([p.reshape(-1) for p in chosen])
    total, N = torch.zeros(len(theta), len(theta), dtype=torch.float64), 0
    for batch in batches:
        x, y = double(batch)

        def output(theta: Tensor, x: Tensor = x) -> Tensor:
            pieces = theta.split([p.numel() for p in chosen])
            values = [piece.view(p.shape) for piece, p in zip(pieces, chosen, strict=True)]
            return functional_call(model, dict(zip(names or parameters, values, strict=True)), (x,))

        with sdpa_kernel(SDPBackend.MATH):
            f = output(theta)
            J = jacrev(output)(theta).reshape(f.numel(), -1)
        H = hessian(loss_fn)(f, y).reshape(f.numel(), f.numel())
        total += len(y) * J.T @ H @ J
        N += len(y)
    return total / N


def of_problem(problem: Problem, names: list[str] | None = None) -> Tensor:
    return dense_gauss_newton(problem.model, problem.loss_fn, problem.batches, names)


def operator_of(problem: Problem, **options: Any) -> GaussNewtonOperator:
    return GaussNewtonOperator(problem.model, problem.loss_fn, problem.batches, **options)


def products(operator: GaussNewtonOperator) -> Tensor:
    """Those with some random vectors, which tell one matrix from another."""
    return operator.matmat(probes(operator.size, operator.dtype))


def check(operator: GaussNewtonOperator, expected: Tensor) -> None:
    P, dtype = len(expected), operator.dtype
    assert operator.size == P
    scale = max(float(expected.abs().max()), 1.0)
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype] * scale * P**0.5}
    V, rows = probes(P, dtype), products(operator)
    assert (rows.dtype, rows.shape) == (dtype, V.shape)
    torch.testing.assert_close(rows.double(), V.double() @ expected, **tolerance)
    torch.testing.assert_close(operator.matvec(V[0]), rows[0], **tolerance)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12], [5, 1, 4, 2]])
def test_linear_least_squares_has_the_matrix_of_the_textbook(sizes):
    """``I ⊗ XᵀX / N``: of a linear model it is the Hessian."""
    problem = make_problem("mlp", "mse", sizes)
    model = nn.Linear(3, 2, bias=False).double()
    X = torch.cat([x for x, _ in problem.batches])
    expected = torch.kron(torch.eye(2, dtype=torch.float64), X.T @ X / len(X))
    check(GaussNewtonOperator(model, half_squared_error, problem.batches), expected)


def test_softmax_regression_has_the_matrix_of_the_textbook():
    """``Σ_n (diag p_n − p_n p_nᵀ) ⊗ x_n x_nᵀ / N``."""
    problem = make_problem("mlp", "cross_entropy", [4, 3])
    model = nn.Linear(3, 2, bias=False).double()
    X = torch.cat([x for x, _ in problem.batches])
    p = torch.softmax(X @ model.weight.detach().T, dim=1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nab,ni,nj->aibj", blocks, X, X).reshape(6, 6) / 7
    check(GaussNewtonOperator(model, nn.CrossEntropyLoss(), problem.batches), expected)


# --- the dense matrix ---------------------------------------------------------------------------

BUDGETS = [None, 0, 6000]  # all kept, none, and some


@given(problem=problems(), budget=st.sampled_from(BUDGETS))
def test_it_is_the_dense_matrix_in_float64(problem, budget):
    check(operator_of(problem, memory_budget=budget), of_problem(problem))


@given(problem=problems(torch.float32), budget=st.sampled_from(BUDGETS))
def test_it_is_the_dense_matrix_in_float32(problem, budget):
    check(operator_of(problem, memory_budget=budget), of_problem(problem))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_loss_has_its_matrix(model, loss):
    problem = make_problem(model, loss, [3, 1, 4])
    expected = of_problem(problem)
    operator = operator_of(problem)
    check(operator, expected)
    matrix = operator.matmat(torch.eye(operator.size, dtype=operator.dtype))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-11)
    assert torch.linalg.eigvalsh(expected).min() >= -1e-12
    hessian_matrix = problem.dense().hessian
    assert (hessian_matrix - expected).abs().max() > 1e-3  # another matrix than the Hessian


@pytest.mark.parametrize("budget", [None, 0])
def test_loss_and_gradient_are_the_hessians(budget):
    """Whether they are asked for first, or come from the products' pass."""
    problem = make_problem("mlp")
    dense = problem.dense()
    for products_first in (True, False):
        operator = operator_of(problem, memory_budget=budget)
        if products_first:
            operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-12)
        assert operator.loss() == pytest.approx(dense.loss, rel=1e-12)


def test_params_are_the_coordinates():
    problem = make_problem("mlp")
    names = ["4.bias", "0.weight"]
    chosen = [problem.model.get_parameter(name) for name in names]
    check(operator_of(problem, params=chosen), of_problem(problem, names))


def test_bf16_models_are_differentiated_through_float32_copies():
    problem = make_problem("mlp", dtype=torch.bfloat16)
    check(operator_of(problem), of_problem(problem))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_couples_the_outputs_of_a_batch(mode):
    problem = make_problem("mlp", "cross_entropy", [5, 3])
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model(torch.randn(9, 3).double() * 3)
    buffers = [b.clone() for b in model.buffers()]

    class Written(nn.Module):
        """The formula, with batch statistics or running ones."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = model[1].weight, model[1].bias

        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
            if mode == "eval":
                mean, variance = buffers[:2]
            return (x - mean) / (variance + model[1].eps).sqrt() * self.weight + self.bias

    expected = dense_gauss_newton(
        nn.Sequential(model[0], Written(), *model[2:]), problem.loss_fn, problem.batches
    )
    check(GaussNewtonOperator(model, problem.loss_fn, problem.batches, mode=mode), expected)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)


@pytest.mark.parametrize("budget", [None, 0])
def test_parameters_that_changed_have_a_new_matrix(budget):
    problem = make_problem("mlp")
    operator = operator_of(problem, memory_budget=budget)
    check(operator, of_problem(problem))
    problem.model[0].weight.data[0, 0] += 0.5
    check(operator, of_problem(problem))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_differentiates_where_gradients_are_switched_off(context):
    problem = make_problem("mlp")
    with context():
        found = products(operator_of(problem)).clone()
    expected = of_problem(problem)
    torch.testing.assert_close(found, probes(len(expected)) @ expected, rtol=0, atol=1e-10)
    assert all(p.grad is None for p in problem.model.parameters())


# --- kept and streamed --------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, Seen()

    @property
    def calls(self) -> int:
        return len(self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.inner(x)


@pytest.mark.parametrize(("budget", "calls"), [(1 << 30, 0), (0, 3)])
def test_what_products_need_is_built_once(budget, calls):
    """For all products at the same parameters, or for each block where the budget is too small."""
    problem = make_problem("mlp", sizes=(3, 1, 4))
    model = Counted(problem.model)
    operator = GaussNewtonOperator(model, problem.loss_fn, problem.batches, memory_budget=budget)
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    for j in (1, 5):
        before = model.calls
        operator.matmat(torch.ones(j, operator.size, dtype=torch.float64))
        assert model.calls == before + calls
    kept = 0 if calls else 3
    assert (operator.stats.graphs_kept, operator.stats.graphs_streamed) == (kept, 3 - kept)
    assert (operator.stats.graph_bytes > 0) == bool(kept)
    assert (operator.stats.products, operator.stats.gradients) == (7, 1)


# --- outputs and losses -------------------------------------------------------------------------


class Pair(NamedTuple):
    mean: Tensor
    width: Tensor


class Heads(nn.Module):
    """Two outputs in some structure, and with them what no loss looks at."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.structure = nn.Linear(3, 4), structure
        self.mean, self.width = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.structure(self.mean(h), F.softplus(self.width(h)))


def likelihood(mean: Tensor, width: Tensor, y: Tensor) -> Tensor:
    """Of a Gaussian: its Hessian mixes the two outputs."""
    return ((mean - y).square() / width + width.log()).mean()


STRUCTURES = {
    "tuple": (lambda m, w: (m, w), lambda f, y: likelihood(*f, y)),
    "list": (lambda m, w: [m, None, w], lambda f, y: likelihood(f[0], f[2], y)),
    "dict": (
        lambda m, w: {"m": m, "w": w, "n": 3, "index": torch.arange(2)},
        lambda f, y: likelihood(f["m"], f["w"], y),
    ),
    "named": (Pair, lambda f, y: likelihood(f.mean, f.width, y)),
    "unused": (lambda m, w: (m, w, m * w), lambda f, y: likelihood(f[0], f[1], y)),
}


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("case", STRUCTURES)
def test_outputs_may_be_tensors_in_a_structure(case, budget):
    structure, loss_fn = STRUCTURES[case]
    problem = make_problem("mlp", "mse", [4, 2])
    torch.manual_seed(0)
    flat = Heads(lambda m, w: torch.cat([m, w], dim=1)).double()
    model = Heads(structure).double()
    model.load_state_dict(flat.state_dict())
    expected = dense_gauss_newton(
        flat, lambda f, y: likelihood(f[:, :2], f[:, 2:], y), problem.batches
    )
    check(GaussNewtonOperator(model, loss_fn, problem.batches, memory_budget=budget), expected)


class Hidden:
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Hidden, "what the model's output holds is 'Hidden'.*Wrap the model"),
        (lambda m, w: (m, Hidden(w)), "is 'Hidden', but must be real tensors"),
        (lambda m, w: (m, w.to(torch.complex128)), r"is torch\.complex128"),
    ],
)
def test_outputs_that_may_hide_a_tensor_are_refused(structure, message):
    problem = make_problem("mlp", "mse", [4])

    def loss_fn(f: Any, y: Tensor) -> Tensor:
        return f.tensors[0].mean() if isinstance(f, Hidden) else f[0].mean()

    operator = GaussNewtonOperator(Heads(structure).double(), loss_fn, problem.batches)
    with pytest.raises(so.ArgumentError, match=message):
        operator.matvec(torch.ones(operator.size))


@pytest.mark.parametrize(
    "loss_fn",
    [lambda f, y: f.mean(), lambda f, y: (f - y).abs().mean(), lambda f, y: f.detach().mean()],
    ids=["linear", "absolute", "constant"],
)
def test_a_loss_without_curvature_has_the_zero_matrix(loss_fn):
    problem = make_problem("mlp", "mse", [4, 2])
    operator = GaussNewtonOperator(problem.model, loss_fn, problem.batches)
    check(operator, torch.zeros(operator.size, operator.size, dtype=torch.float64))
    hessian_operator = so.HessianOperator(problem.model, loss_fn, problem.batches)
    torch.testing.assert_close(operator.gradient(), hessian_operator.gradient())


def test_a_model_that_does_not_move_its_output_has_the_zero_matrix():
    problem = make_problem("mlp", "mse", [4])
    model = nn.Sequential(problem.model, nn.Linear(2, 2).double())
    model[1].weight.data.zero_()
    check(
        GaussNewtonOperator(model, problem.loss_fn, problem.batches, params=[model[0][0].weight]),
        torch.zeros(12, 12, dtype=torch.float64),
    )


def test_a_penalty_on_the_parameters_is_refused():
    problem = make_problem("mlp", "mse", [4])
    weight = problem.model[0]

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        return half_squared_error(f, y) + weight.weight.square().sum()

    operator = GaussNewtonOperator(problem.model, penalised, problem.batches)
    with pytest.raises(so.ArgumentError, match=r"loss_fn is 'a function of the parameters'"):
        operator.matvec(torch.ones(operator.size))


def test_a_part_without_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope * 2

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    problem = make_problem("mlp", "mse", [4])
    model = nn.Sequential(problem.model, Part())
    for operator in (
        GaussNewtonOperator(model, problem.loss_fn, problem.batches),
        GaussNewtonOperator(
            problem.model, lambda f, y: half_squared_error(Once.apply(f), y), problem.batches
        ),
    ):
        with pytest.raises(so.SecondDerivativeError, match="Once is once_differentiable"):
            operator.matvec(torch.ones(operator.size))


def test_arguments_that_cannot_be_used_are_named():
    problem = make_problem("mlp")
    with pytest.raises(so.ArgumentError, match="loss_fn is None, but must be callable"):
        GaussNewtonOperator(problem.model, None, problem.batches)
    with pytest.raises(so.ArgumentError, match="mode is 'test'"):
        operator_of(problem, mode="test")


def test_a_copy_is_bound_to_the_copied_model():
    problem = make_problem("mlp")
    operator = operator_of(problem)
    before = products(operator)
    other_model, other = copy.deepcopy((problem.model, operator))
    other_model[0].weight.data[0, 0] += 0.5
    check(other, dense_gauss_newton(other_model, problem.loss_fn, problem.batches))
    assert torch.equal(products(operator), before)


def test_a_subspace_is_that_of_the_dense_matrix():
    problem = make_problem("mlp")
    basis = so.DominantSubspace(operator_of(problem), k=2, refresh=1, tol=1e-8).update()
    values = torch.linalg.eigvalsh(of_problem(problem)).flip(0)
    torch.testing.assert_close(basis.eigenvalues, values[:2], rtol=1e-7, atol=1e-9)
