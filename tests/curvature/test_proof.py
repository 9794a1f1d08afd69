"""An operator proves itself: what each proof catches, that it raises no false alarm, its cost."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import subspace_optim as so
from subspace_optim import (
    EngineWarning,
    HessianOperator,
    InconsistentDerivativeError,
    NotOneFunctionError,
    SecondDerivativeError,
)
from subspace_optim.curvature import reachable, second_derivatives
from subspace_optim.curvature.surroundings import Surroundings
from tests.dense import LOSSES, MODELS, Apply, make_problem

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=GENERATOR).double()
Y = torch.arange(40) % 2
BATCHES = [(X[:16], Y[:16]), (X[16:], Y[16:])]


def network(act: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), act or nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def use(operator: Any) -> Tensor:
    return operator.matvec(torch.ones(operator.size, dtype=operator.dtype))


# --- one function ---------------------------------------------------------------------------------


class Hidden:
    """A generator where no walk through attributes leads."""

    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[], Tensor]) -> None:
        super().__init__()
        self.net, self.noise = network(), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + self.noise())


@pytest.mark.parametrize("read", ["loss", "gradient", "product"])
def test_randomness_that_cannot_be_reached_is_an_error(read):
    hidden = Hidden()
    model = Noisy(lambda: torch.rand((), generator=hidden.rng, dtype=torch.float64))
    operator = HessianOperator(model, F.cross_entropy, BATCHES)
    reads = {"loss": operator.loss, "gradient": operator.gradient, "product": lambda: use(operator)}
    for _ in range(2):
        with pytest.raises(NotOneFunctionError, match=r"two evaluations .* gave .* and .*random"):
            reads[read]()


def test_without_its_remedy_each_kind_of_hidden_state_is_caught(monkeypatch):
    """Nothing is found, seeded or put back: the proof by itself tells that there are two losses."""
    rng = torch.Generator().manual_seed(0)
    drawing = Noisy(lambda: torch.rand((), generator=rng, dtype=torch.float64))
    counting: list[int] = []

    def count() -> Tensor:
        counting.append(1)
        return torch.tensor(float(len(counting)), dtype=torch.float64)

    monkeypatch.setattr(Surroundings, "_enter_function", lambda self, function: iter(()))
    for model in (drawing, Noisy(count)):
        with pytest.raises(NotOneFunctionError, match="not one function"):
            HessianOperator(model, F.cross_entropy, BATCHES).gradient()


# --- the user's gradient --------------------------------------------------------------------------


class Listed(nn.Module):
    """Its penalty reads the weights from a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.decayed = [p for p in self.net.parameters() if p.dim() > 1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), sum(w.square().sum() for w in self.decayed)


def listed() -> tuple[nn.Module, Any]:
    return Listed(), lambda out, y: F.cross_entropy(out[0], y) + out[1]


def closed_over() -> tuple[nn.Module, Any]:
    net = network()
    first = net[0].weight
    return net, lambda out, y: F.cross_entropy(out, y) + first.pow(4).sum()


def attribute_of_another() -> tuple[nn.Module, Any]:
    net = network()

    class Penalty:
        def __init__(self) -> None:
            self.weight = net[2].weight

        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(out, y) + self.weight.pow(2).sum()

    return net, Penalty()


PAST_THE_MODULES = [listed, closed_over, attribute_of_another]


def by_hand(net: nn.Module, loss_fn: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and product at the user's own parameters, by torch alone."""
    params = list(net.parameters())
    loss = sum(len(x) / len(X) * loss_fn(net(x), y) for x, y in BATCHES)
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])
    product = torch.autograd.grad(flat @ v, params)
    return flat.detach(), torch.cat([p.flatten() for p in product])


@pytest.mark.parametrize("make", PAST_THE_MODULES)
def test_parameters_that_the_loss_reaches_past_the_modules_are_differentiated_in_place(make):
    net, loss_fn = make()
    operator = HessianOperator(net, loss_fn, BATCHES)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(1)).double()
    with pytest.warns(EngineWarning, match="not the one that loss.backward"):
        product = operator.matvec(v)
    gradient, expected = by_hand(net, loss_fn, v)
    torch.testing.assert_close(operator.gradient(), gradient)
    torch.testing.assert_close(product, expected)
    assert operator.stats.engine == "double_backward"


@pytest.mark.parametrize("make", PAST_THE_MODULES)
def test_without_another_engine_they_are_refused(make, monkeypatch):
    net, loss_fn = make()
    operator = HessianOperator(net, loss_fn, BATCHES, engine="func")
    monkeypatch.setattr(HessianOperator, "_prove", HessianOperator.__mro__[1]._prove)
    with pytest.raises(InconsistentDerivativeError, match=r"past the modules .* closure"):
        operator.gradient()


def test_low_precision_parameters_past_the_modules_are_refused():
    """They would have to be float32 copies, and what a list holds cannot be replaced."""
    net, _ = listed()
    net = net.to(torch.bfloat16)
    data = [(x.bfloat16(), y) for x, y in BATCHES]
    heavy = lambda out, y: F.cross_entropy(out[0], y) + 10 * out[1]  # noqa: E731
    with pytest.raises(InconsistentDerivativeError, match="low precision"):
        use(HessianOperator(net, heavy, data))


def test_weights_in_the_cache_of_parametrize_are_computed_anew():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))).double()
    expected = use(HessianOperator(net, F.cross_entropy, BATCHES))
    with parametrize.cached():
        F.cross_entropy(net(X), Y).backward()
        torch.testing.assert_close(use(HessianOperator(net, F.cross_entropy, BATCHES)), expected)
        assert parametrize._cache_enabled
    assert not parametrize._cache_enabled


# --- second derivatives ---------------------------------------------------------------------------


class Cubic(torch.autograd.Function):
    """``x³`` with its backward pass from numbers on `ctx`: the second derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 3 * ctx.x**2


class Reversed(torch.autograd.Function):
    """Gradient reversal: the gradient that it gives is that of no function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return -slope


def clipped(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return x.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [Cubic.apply, Reversed.apply, clipped])
def test_second_derivatives_that_are_wrong_are_refused(function, dtype):
    net = network(Apply(function), dtype)
    data = [(x.to(dtype), y) for x, y in BATCHES]
    for options in ({}, {"engine": "double_backward"}):
        operator = HessianOperator(net, F.cross_entropy, data, **options)
        operator.gradient()
        with pytest.raises(InconsistentDerivativeError, match="second derivative of the loss is"):
            use(operator)
        assert not operator.check().passed
    assert torch.isfinite(use(HessianOperator(net, F.cross_entropy, data, verify=False))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_torch_has_wrong_is_caught_where_it_is_not_written_out(dtype, monkeypatch):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), *network()[1:])
    net, data = net.to(dtype), [(x.to(dtype), y) for x, y in BATCHES]
    use(HessianOperator(net, F.cross_entropy, data))
    monkeypatch.setattr(second_derivatives, "_PARTS", {})
    with pytest.raises(InconsistentDerivativeError, match="second derivative"):
        use(HessianOperator(net, F.cross_entropy, data))


def weight_norm_by_hand(v: Tensor, g: Tensor) -> Tensor:
    return torch.stack([g[i] * v[i] / v[i].square().sum().sqrt() for i in range(len(v))])


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_has_the_products_of_its_formula(old):
    torch.manual_seed(0)
    layer = nn.Linear(3, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old form is deprecated, and in use
        wrapped = (nn.utils if old else nn.utils.parametrizations).weight_norm(layer)
    net = nn.Sequential(wrapped, nn.Tanh(), nn.Linear(5, 2).double())
    params = dict(net.named_parameters())
    g, v = (p for name, p in params.items() if name.startswith("0.") and "bias" not in name)
    g, v = (g, v) if g.numel() == 5 else (v, g)
    operator = HessianOperator(net, F.cross_entropy, BATCHES)
    direction = torch.randn(operator.size, generator=torch.Generator().manual_seed(2)).double()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ weight_norm_by_hand(v, g).T + params["0.bias"])
        return F.cross_entropy(net[2](hidden), y)

    leaves = operator.parameters.tensors
    total = sum(len(x) / len(X) * loss(x, y) for x, y in BATCHES)
    slopes = torch.autograd.grad(total, leaves, create_graph=True)
    flat = torch.cat([s.flatten() for s in slopes])
    expected = torch.autograd.grad(flat @ direction, leaves)
    expected = torch.cat([e.flatten() for e in expected])
    torch.testing.assert_close(operator.matvec(direction), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_activations_have_the_products_of_their_formulas(inplace):
    class Formula(nn.Module):
        def __init__(self, gate: bool) -> None:
            super().__init__()
            self.gate = gate

        def forward(self, z: Tensor) -> Tensor:
            s = torch.minimum(torch.relu(z + 3), torch.tensor(6.0).to(z)) / 6
            return s if self.gate else z * s

    def made(first: nn.Module, second: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(3, 5), first, nn.Linear(5, 5), second, nn.Linear(5, 2)
        return nn.Sequential(*layers).double()

    torch_s = made(nn.Hardswish(inplace), nn.Hardsigmoid(inplace))
    ours = made(Formula(gate=False), Formula(gate=True))
    operators = [HessianOperator(m, F.cross_entropy, BATCHES) for m in (torch_s, ours)]
    torch.testing.assert_close(*[use(operator) for operator in operators])


def test_a_second_derivative_that_is_not_finite_is_no_matter_of_the_learning_rate():
    def distance(out: Tensor, y: Tensor) -> Tensor:
        return (out - out[[0, *range(len(out) - 1)]]).norm(dim=1).mean()  # 0 for the first row

    operator = HessianOperator(network(), distance, (X, Y))
    assert operator.gradient().isfinite().all()
    with pytest.raises(SecondDerivativeError, match=r"no finite second .*FiniteDifferenceHessian"):
        use(operator)


# --- no false alarm -------------------------------------------------------------------------------


class Detached(nn.Module):
    """Parts of the loss are constants by the user's will: a target, a weight, a statistic."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = network(), kind

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.kind == "detach":
            return out * out.detach().sigmoid()
        if self.kind == "data":
            return out + (out - out.data.round())
        with torch.no_grad():
            scale = out.std() + self.net[0].weight.norm()
        return out / scale


@pytest.mark.parametrize("kind", ["detach", "data", "no_grad"])
def test_what_the_loss_holds_constant_is_constant_in_the_proof_too(kind):
    """The oracle is torch's double backward, which holds it constant as well."""
    net = Detached(kind)
    operator = HessianOperator(net, F.cross_entropy, BATCHES)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(operator.matvec(v), by_hand(net, F.cross_entropy, v)[1])
    assert operator.check().passed


ACTIVATIONS = {
    "relu": nn.ReLU, "leaky": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh, "silu": nn.SiLU, "softplus": nn.Softplus,
}  # fmt: skip
BLANK = torch.zeros(12, 3)
"""Inputs of zeros: with biases of zero every unit lies exactly at its kink."""


@pytest.mark.slow
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    width=st.integers(2, 40),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    loss=st.sampled_from(["cross_entropy", "mse", "l1"]),
    blank=st.booleans(),
    norm=st.booleans(),
    fitted=st.booleans(),
)
def test_it_raises_no_false_alarm(seed, act, width, scale, dtype, loss, blank, norm, fitted):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(3, width), *([nn.BatchNorm1d(width)] if norm else []), ACTIVATIONS[act]()]
    net = nn.Sequential(*layers, nn.Linear(width, width), ACTIVATIONS[act](), nn.Linear(width, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale if p.dim() > 1 else 0.0 if blank and not norm else 1.0)
    net = net.to(dtype)
    x = torch.randn(60, 3, generator=generator)
    x[:12] = BLANK if blank else x[:12]
    x, y = x.to(dtype), torch.randint(2, (60,), generator=generator)
    if fitted:  # and where weights are large, to a loss that rounding leaves nothing of
        with torch.no_grad():
            y = net(x).argmax(1) if loss == "cross_entropy" else net(x).sum(1)
    losses = {
        "cross_entropy": F.cross_entropy,
        "mse": lambda out, y: F.mse_loss(out.sum(1), y.to(out)),
        "l1": lambda out, y: F.l1_loss(out.sum(1), y.to(out)),
    }
    operator = HessianOperator(net, losses[loss], [(x[:40], y[:40]), (x[40:], y[40:])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(operator)
    assert operator.check().passed, operator.check()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_of_other_kinds_pass(model, loss, dtype):
    problem = make_problem(model, loss, dtype=dtype)
    report = HessianOperator(problem.model, problem.loss_fn, problem.batches).check()
    assert report.passed, report


# --- what the mean is over ------------------------------------------------------------------------


def ignoring(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over the examples of class 0, written out, so that nothing tells of it."""
    return -out.log_softmax(1)[y == 0, 0].mean()


def test_a_loss_that_is_a_mean_over_something_else_is_refused():
    """By its gradient two batches together are another combination of them than examples say."""
    y = Y.clone()
    y[:12] = 1
    data = [(X[:16], y[:16]), (X[16:], y[16:])]
    with pytest.raises(NotOneFunctionError, match=r"not the mean .*from_loss\(model, batch_loss"):
        HessianOperator(network(), ignoring, data).gradient()
    weighted = HessianOperator.from_loss(
        network(), lambda m, b: (ignoring(m(b[0]), b[1]), (b[1] != 1).sum()), data
    )
    net = network()
    whole = torch.autograd.grad(ignoring(net(X), y), list(net.parameters()))
    torch.testing.assert_close(weighted.gradient(), torch.cat([g.flatten() for g in whole]))


def test_a_sum_that_cannot_be_told_is_refused():
    with pytest.raises(NotOneFunctionError, match="the one is 1 and the other 1, where"):
        HessianOperator(network(), lambda out, y: out.square().sum(), BATCHES).gradient()


def test_losses_that_couple_the_examples_of_a_batch_are_taken_batch_by_batch():
    def contrast(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))

    operator = HessianOperator(network(), contrast, BATCHES)
    net = network()
    means = [torch.autograd.grad(contrast(net(x), y), list(net.parameters())) for x, y in BATCHES]
    flat = [torch.cat([g.flatten() for g in slopes]) for slopes in means]
    torch.testing.assert_close(operator.gradient(), 0.4 * flat[0] + 0.6 * flat[1])


# --- its cost, and when it is made ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_takes_at_most_eight_gradients_once(dtype):
    net = network(dtype=dtype)
    data = X.to(dtype), Y
    operator = HessianOperator(net, F.cross_entropy, data)
    use(operator)
    assert 0 < operator.stats.verification <= 9  # nine with the loss that is evaluated again
    before = operator.stats.verification
    use(operator)
    with torch.no_grad():
        net[0].weight.add_(1)
    use(operator)
    assert operator.stats.verification == before
    assert operator.stats.gradients == 2  # its own are counted apart


def test_the_gradient_alone_is_proved_without_products():
    operator = HessianOperator(network(), F.cross_entropy, (X, Y))
    operator.gradient()
    first = operator.stats.verification
    use(operator)
    assert 0 < first < operator.stats.verification


def test_a_change_of_structure_is_proved_anew():
    net = network()
    operator = HessianOperator(net, F.cross_entropy, (X, Y))
    use(operator)
    before = operator.stats.verification
    net[1] = Apply(Cubic.apply)
    with pytest.raises(InconsistentDerivativeError, match="second derivative"):
        use(operator)
    assert operator.stats.verification > before


def test_unverified_operators_differentiate_in_place_and_spend_nothing():
    net, loss_fn = closed_over()
    operator = HessianOperator(net, loss_fn, BATCHES, verify=False)
    v = torch.ones(operator.size).double()
    torch.testing.assert_close(operator.matvec(v), by_hand(net, loss_fn, v)[1])
    assert operator.stats.engine == "double_backward"
    assert operator.stats.verification == 0


def test_the_report_tells_what_was_looked_at():
    report = HessianOperator(network(), F.cross_entropy, BATCHES).check()
    assert report.passed
    assert report.loss_gap == 0
    assert report.gradient_error < 1e-12
    assert 0 <= report.product_error < 1e-5
    assert report.asymmetry < 1e-10
    assert report.mean_error < 1e-12
    text = str(report)
    assert "passed" in text
    assert "engine func" in text
    differences = so.FiniteDifferenceHessian(network(), F.cross_entropy, BATCHES).check()
    assert differences.passed
    assert "not looked at" in str(differences)


def test_the_walk_ends():
    """What is far away, and large, is not looked through."""
    net = network()
    net.chain = chain = []
    for _ in range(3000):
        chain.append(deeper := [])
        chain = deeper
    net.data = list(range(200_000))
    found = Surroundings(net, F.cross_entropy, torch.device("cpu"))
    assert len(found._sequences) <= reachable._MOST
    assert not any(s is net.data for s in found._sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_that_torch_func_draws_in_another_order_are_no_alarm(dtype):
    """Dropout of a transposed tensor: inside of a transform another layout is filled."""
    torch.manual_seed(0)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(3, 6), nn.Dropout(0.4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(torch.tanh(self.a(x)).T).T)

    net = Transposed().to(dtype)
    operator = HessianOperator(net, F.cross_entropy, [(x.to(dtype), y) for x, y in BATCHES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product = use(operator)
        other = HessianOperator(
            net,
            F.cross_entropy,
            [(x.to(dtype), y) for x, y in BATCHES],
            engine="double_backward",
        )
        torch.testing.assert_close(product, use(other))
    assert operator.loss() == pytest.approx(other.loss())


def test_a_checkpointed_part_that_is_written_out_is_so_when_it_runs_again():
    class Checkpointed(nn.Module):
        def __init__(self, *, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.part = nn.Sequential(nn.Linear(3, 5), nn.Hardswish())
            self.head, self.checkpointed = nn.Linear(5, 2), checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if self.checkpointed:
                return self.head(checkpoint(self.part, x, use_reentrant=False))
            return self.head(self.part(x))

    products = [
        use(HessianOperator(Checkpointed(checkpointed=c).double(), F.cross_entropy, BATCHES))
        for c in (False, True)
    ]
    torch.testing.assert_close(*products)


def test_a_number_that_the_loss_reads_is_part_of_the_state():
    class Annealed(nn.Module):
        beta = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.beta = 1.0
            self.weights = torch.ones(2).double()

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return self.beta * F.cross_entropy(out, y, weight=self.weights)

    loss, net = Annealed(), network()
    operator = HessianOperator(net, loss, (X, Y))
    first = operator.gradient()
    loss.beta = 10.0
    torch.testing.assert_close(operator.gradient(), 10 * first)
    loss.beta = 1.0
    loss.weights.mul_(torch.tensor([3.0, 1.0]).double())
    expected = torch.autograd.grad(loss(net(X), Y), list(net.parameters()))
    torch.testing.assert_close(operator.gradient(), torch.cat([g.flatten() for g in expected]))
