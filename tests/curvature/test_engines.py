"""The two engines of ``HessianOperator``: one matrix, and what each can differentiate."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import subspace_optim as so
from subspace_optim import ArgumentError, EngineWarning, SecondDerivativeError
from subspace_optim.curvature import (
    CurvatureOperator,
    FiniteDifferenceHessian,
    HessianOperator,
)
from tests.dense import (
    LOSSES,
    MODELS,
    Apply,
    Dense,
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    supervised,
)
from tests.observe import Seen

ENGINES = ["double_backward", "func"]


def products(operator: CurvatureOperator) -> Tensor:
    """Those with some random vectors, which tell one matrix from another."""
    return operator.matmat(probes(operator.size, operator.dtype))


def matrix(operator: CurvatureOperator) -> Tensor:
    return operator.matmat(torch.eye(operator.size, dtype=operator.dtype))


def expected_of(dense: Dense) -> Tensor:
    return probes(len(dense.hessian)) @ dense.hessian


def check(operator: HessianOperator, dense: Dense) -> None:
    torch.testing.assert_close(products(operator), expected_of(dense), rtol=0, atol=1e-10)
    torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-11)
    assert operator.loss() == pytest.approx(dense.loss, rel=1e-12)


# --- functions that torch.func cannot transform, and one that has no second derivative ----------


class OldSine(torch.autograd.Function):
    """The sine as functions were written before `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * x.cos()


class OldSineOnce(OldSine):
    backward = staticmethod(once_differentiable(OldSine.backward))


class SineOnce(torch.autograd.Function):
    """A function that torch.func can transform, with a backward pass for one pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = staticmethod(once_differentiable(OldSine.backward))


def through_numpy(x: Tensor) -> Tensor:
    """Control flow that reads values out of torch."""
    return x.sin() if float(x.detach().numpy().sum()) > -1e9 else x


def keeping_its_gradient(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.retain_grad()
    return x.sin()


def in_place(x: Tensor) -> Tensor:
    return (x * 1).sin_()


def with_control_flow(x: Tensor) -> Tensor:
    return x.sin() if x.sum().item() > -1e9 else x


def twice_itself(x: Tensor) -> Tensor:
    """A gradient inside of the model: that of -cos."""
    with torch.enable_grad():
        inner = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(-inner.cos().sum(), inner, create_graph=True)[0]


SINES: dict[str, Callable[[Tensor], Tensor]] = {
    "old_function": OldSine.apply,
    "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
    "numpy": through_numpy,
    "retain_grad": keeping_its_gradient,
    "in_place": in_place,
    "control_flow": with_control_flow,
    "inner_gradient": twice_itself,
}
NOT_TRANSFORMED = {"old_function", "checkpoint", "numpy", "retain_grad"}


def sine_network(function: Callable[[Tensor], Tensor], dtype: Any = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Apply(function), nn.Linear(4, 2)).to(dtype)


BATCHES = make_problem(sizes=[5, 2, 3]).batches
LOSS = nn.CrossEntropyLoss()


@functools.cache
def dense_sine() -> Dense:
    return dense_curvature(sine_network(torch.sin), supervised(LOSS), BATCHES)


# --- both are the dense Hessian -----------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_func_has_the_dense_hessian(model, loss, budget):
    problem = make_problem(model, loss)
    operator = HessianOperator(
        problem.model, problem.loss_fn, problem.batches, engine="func", memory_budget=budget
    )
    check(operator, problem.dense())
    assert operator.stats.engine == "func"
    assert operator.stats.graphs_streamed == (0 if budget is None else 3)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", SINES)
def test_whatever_the_forward_pass_does_double_backward_has_the_dense_hessian(name, budget):
    net = sine_network(SINES[name])
    operator = HessianOperator(net, LOSS, BATCHES, memory_budget=budget, engine="double_backward")
    check(operator, dense_sine())
    assert operator.stats.engine == "double_backward"


@pytest.mark.parametrize("name", SINES)
def test_the_engine_that_proves_right_is_chosen_without_a_word(name):
    operator = HessianOperator(sine_network(SINES[name]), LOSS, BATCHES)
    check(operator, dense_sine())
    expected = "double_backward" if name in NOT_TRANSFORMED else "func"
    assert operator.stats.engine == expected


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("engine", ENGINES)
def test_recurrent_networks_have_the_slope_of_their_gradient(layer, engine):
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    data = torch.randn(5, 4, 3).double(), torch.randint(2, (5,))
    operator = HessianOperator(Recurrent().double(), LOSS, data, engine=engine)
    differences = FiniteDifferenceHessian(operator.model, LOSS, data)
    v = torch.randn(operator.size).double()
    product = operator.matvec(v)
    torch.testing.assert_close(product, differences.matvec(v), rtol=0, atol=1e-8)
    assert product.norm() > 0.1
    assert operator.stats.engine == engine


# --- the option is heard ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_that_is_chosen_evaluates_the_loss(engine):
    transformed = Seen()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        transformed.append(torch._C._functorch.is_gradtrackingtensor(output))
        return F.cross_entropy(output, target)

    model = MODELS["mlp"][0]().double()
    products(HessianOperator(model, loss_fn, BATCHES, engine=engine, verify=False))
    assert transformed == [engine == "func"] * 3


@pytest.mark.parametrize("engine", ["jvp", None, True])
def test_an_engine_that_there_is_not_is_named(engine):
    with pytest.raises(
        ArgumentError, match=rf"engine is {engine!r}, but must be 'auto', 'func' or 'double_"
    ):
        HessianOperator(MODELS["mlp"][0](), LOSS, BATCHES, engine=engine)


# --- what torch.func cannot transform -----------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", SINES)
def test_func_gives_way_with_one_warning_where_it_has_to(name, budget):
    operator = HessianOperator(
        sine_network(SINES[name]), LOSS, BATCHES, engine="func", memory_budget=budget
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(operator, dense_sine())
        with torch.no_grad():
            operator.model[0].weight.add_(1)
        products(operator)
    messages = [str(w.message) for w in caught if w.category is EngineWarning]
    assert len(messages) == len(caught) == (name in NOT_TRANSFORMED)
    assert operator.stats.engine == ("double_backward" if messages else "func")
    assert all("has been proved, and costs the same" in message for message in messages)


@pytest.mark.parametrize("engine", ENGINES)
def test_errors_of_the_model_are_no_errors_of_the_engine(engine):
    def fails(x: Tensor) -> Tensor:
        raise KeyError("the forward pass failed")

    operator = HessianOperator(sine_network(fails), LOSS, BATCHES, engine=engine)
    with pytest.raises(KeyError, match="the forward pass failed"):
        products(operator)
    assert operator.stats.engine == engine


# --- checkpointed parts run again in a backward pass --------------------------------------------


class Checkpointed(nn.Module):
    """An inner network that each backward pass runs again, dropout and all."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.first, self.runs = inner, True, Seen()

    def forward(self, x: Tensor) -> Tensor:
        def counted(x: Tensor) -> Tensor:
            self.runs.append(1)
            return self.inner(x)

        return checkpoint(counted, x, use_reentrant=False) if self.first else self.inner(x)


@pytest.mark.parametrize("budget", [None, 0])
def test_a_checkpointed_part_runs_again_at_the_point_of_the_graph(budget):
    """Low precision is float32 in the copies, which have to be in place when a part runs again."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2))
    model = Checkpointed(inner).to(torch.bfloat16)
    batches = [(x.float(), y) for x, y in BATCHES]
    plain = copy.deepcopy(model)
    plain.first = False
    expected = products(HessianOperator(plain, LOSS, batches))
    operator = HessianOperator(model, LOSS, batches, memory_budget=budget)
    operator.gradient()
    model.runs.clear()
    torch.testing.assert_close(products(operator), expected, rtol=0, atol=1e-6)
    assert len(model.runs) > 3


# --- parts without a second derivative ----------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("function", [SineOnce.apply, OldSineOnce.apply], ids=["new", "old"])
def test_functions_of_one_pass_are_refused_with_the_way_out(function, budget, engine):
    """Torch itself leaves their part of the Hessian out, without a word."""
    model = sine_network(function)
    operator = HessianOperator(model, LOSS, BATCHES, engine=engine, memory_budget=budget)
    with pytest.raises(SecondDerivativeError, match=r"SineOnce is once.*FiniteDifferenceHessian"):
        products(operator)
    dense = dense_sine()
    torch.testing.assert_close(operator.gradient(), dense.gradient, rtol=0, atol=1e-12)
    differences = FiniteDifferenceHessian(model, LOSS, BATCHES)
    torch.testing.assert_close(products(differences), expected_of(dense), rtol=0, atol=1e-7)


def test_a_function_of_one_pass_is_found_where_the_slopes_that_reach_it_are_constant():
    """Of a linear loss torch makes no error at all: nothing that reaches the function varies."""
    operator = HessianOperator(sine_network(SineOnce.apply)[:2], lambda out, y: out.sum(), BATCHES)
    with pytest.raises(SecondDerivativeError, match="FiniteDifferenceHessian"):
        products(operator)


class Bag(nn.Module):
    """A part of torch itself that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids)))


@pytest.mark.parametrize("engine", ENGINES)
def test_operations_without_a_second_derivative_are_named_with_the_way_out(engine):
    torch.manual_seed(0)
    data = torch.randint(7, (5, 3)), torch.randint(2, (5,))
    operator = HessianOperator(Bag().double(), LOSS, data, engine=engine)
    message = r"derivative for '_embedding_bag_backward' is not .*FiniteDifferenceHessian"
    with pytest.raises(SecondDerivativeError, match=message):
        products(operator)

    class Sum(nn.Module):
        """The same function, in parts that have one."""

        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight).sum(dim=1)

    written = nn.Sequential(Sum(operator.model.bag.weight), nn.Tanh(), operator.model.head)
    dense = dense_curvature(written, supervised(LOSS), [data])
    differences = FiniteDifferenceHessian(operator.model, LOSS, data)
    torch.testing.assert_close(products(differences), expected_of(dense), rtol=0, atol=1e-7)


def test_losses_and_parameters_without_a_path_have_zeros():
    """Of a loss that is constant, of one that is linear, and of a parameter that nothing reads."""
    problem = make_problem("mlp", "mse")
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(3).double()))
    zeros = torch.zeros(42, 42, dtype=torch.float64)

    def operator(loss_fn: Any, engine: str) -> HessianOperator:
        return HessianOperator(problem.model, loss_fn, problem.batches, engine=engine)

    for engine in ENGINES:
        detached = operator(lambda out, y: out.detach().square().mean(), engine)
        assert torch.equal(matrix(detached), zeros)
        assert torch.equal(detached.gradient(), zeros[0])
        unused = operator(half_squared_error, engine)
        assert torch.equal(matrix(unused)[:3], zeros[:3])
        assert matrix(unused)[3:, 3:].abs().max() > 0.1
        linear = HessianOperator(
            nn.Linear(3, 2).double(), lambda out, y: out.mean(), problem.batches, engine=engine
        )
        assert torch.equal(matrix(linear), zeros[:8, :8])
        assert linear.gradient().abs().max() > 0.01


def test_a_subspace_of_a_model_of_one_pass_comes_from_differences():
    """From end to end: the same subspace as that of a model with a second derivative."""
    exact = so.DominantSubspace(
        HessianOperator(sine_network(torch.sin), LOSS, BATCHES), k=2, tol=1e-6
    )
    operator = FiniteDifferenceHessian(sine_network(SineOnce.apply), LOSS, BATCHES)
    found = so.DominantSubspace(operator, k=2, tol=1e-6).refresh()
    expected = exact.refresh()
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=0)
    overlap = found.vectors @ expected.vectors.T
    assert torch.linalg.svdvals(overlap).min() > 1 - 1e-8


@pytest.mark.parametrize("what", ["matvec", "gradient", "class gradients"])
def test_reentrant_checkpoints_are_refused_where_derivatives_would_be_missing(what: str) -> None:
    """With inputs that require a gradient torch raises nothing, and leaves the part out."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return self.b(checkpoint(self.a, x, use_reentrant=True))

    model, x, y = Checkpointed(), torch.randn(6, 3), torch.arange(6) % 2
    operator = HessianOperator(model, F.cross_entropy, (x, y))
    actions: dict[str, Callable[[], Any]] = {
        "matvec": lambda: operator.matvec(torch.ones(operator.size)),
        "gradient": operator.gradient,
        "class gradients": lambda: so.ClassGradientSubspace(model, 2).observe(x, y),
    }
    with pytest.raises(SecondDerivativeError, match="use_reentrant=False"):
        actions[what]()
