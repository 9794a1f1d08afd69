"""The central flow against flows that are known in closed form, and against gradient descent."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

import subspace_optim as so
from subspace_optim import ArgumentError, NonFiniteError
from subspace_optim.curvature import OperatorStats
from subspace_optim.diagnostics import CentralFlow, central_flow
from subspace_optim.diagnostics.central_flow import third_derivatives
from tests.dense import DTYPES, make_problem, symmetric

numbers = st.floats(-1, 1, allow_subnormal=False)


class Point(nn.Module):
    """A point of the plane, say, on which a function is minimised."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())


class Function(so.CurvatureOperator):
    """The Hessian of a function at the point that a module holds, by two backward passes."""

    def __init__(self, function, start):
        self.function = function
        self.parameters = so.ParameterSpace(Point(torch.as_tensor(start, dtype=torch.float64)))
        self.stats = OperatorStats()

    @property
    def theta(self):
        return self.parameters.tensors[0].detach().clone()

    def matmat(self, vectors):
        theta = self.theta.requires_grad_()
        (gradient,) = torch.autograd.grad(self.function(theta), theta, create_graph=True)
        rows = [torch.autograd.grad(gradient, theta, v, retain_graph=True)[0] for v in vectors]
        return torch.stack(rows)

    def gradient(self):
        theta = self.theta.requires_grad_()
        return torch.autograd.grad(self.function(theta), theta)[0]

    def loss(self):
        return self.function(self.theta).item()


# --- closed forms -------------------------------------------------------------------------------


@given(spectrum=st.lists(st.floats(-0.5, 1.9), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_below_the_edge_it_is_the_gradient_flow(spectrum, seed):
    """Of a quadratic Euler's steps are known, and ``exp(−ηHt) w`` is where they tend to."""
    lr, steps = 0.7, 3
    H = symmetric(torch.tensor(spectrum) / lr, seed)
    start = torch.randn(len(H), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact = torch.linalg.matrix_exp(-lr * steps * H) @ start
    errors = []
    for substeps in (4, 8):
        operator = Function(lambda w: w @ H @ w / 2, start)
        flow = central_flow(operator, lr, steps=steps, substeps=substeps)
        euler = torch.linalg.matrix_power(torch.eye(len(H)) - lr / substeps * H, steps * substeps)
        torch.testing.assert_close(flow.parameters, euler @ start, rtol=0, atol=1e-12)
        assert not flow.variances.any()
        assert torch.equal(flow.predicted_loss, flow.loss)
        assert flow.sharpness[0].item() == pytest.approx(max(spectrum) / lr, abs=2e-2 / lr)
        errors.append(float((flow.parameters - exact).norm()))
    assert errors[1] <= 0.7 * errors[0] + 1e-9


def circle(b):
    """``½(y² + z²)x² − b y``: a sharpness of y² + z² at x = 0, so that the edge is a circle."""

    def function(theta):
        x, y, z = theta
        return (y**2 + z**2) * x**2 / 2 - b * y

    return function


def test_at_the_edge_it_slides_along_it():
    """On the circle R² = 2/η the angle obeys R φ' = −ηb sin φ, and the variance is b cos φ / R."""
    lr, b, angle, steps = 0.5, 0.3, 1.4, 8
    radius = math.sqrt(2 / lr)
    start = [0.0, radius * math.cos(angle), radius * math.sin(angle)]
    times = torch.arange(steps + 1).double()
    angles = 2 * torch.atan(math.tan(angle / 2) * torch.exp(-lr * b * times / radius))
    errors = []
    for substeps in (4, 8):
        flow = central_flow(Function(circle(b), start), lr, steps=steps, substeps=substeps)
        end = radius * torch.stack([0 * angles[-1], angles[-1].cos(), angles[-1].sin()])
        errors.append(float((flow.parameters - end).norm()))
        variances = b * angles.cos() / radius
        close = {"rtol": 0.3 / substeps, "atol": 0.0}
        torch.testing.assert_close(flow.variances[:, 0], variances, **close)
        torch.testing.assert_close(flow.loss, -b * radius * angles.cos(), **close)
        torch.testing.assert_close(flow.predicted_loss - flow.loss, variances / lr, **close)
        squared = b**2 + 4 * variances / lr**2
        torch.testing.assert_close(flow.predicted_squared_gradient_norm, squared, **close)
        torch.testing.assert_close(flow.squared_gradient_norm, torch.full_like(times, b**2))
        torch.testing.assert_close(flow.sharpness, torch.full_like(times, 2 / lr), **close)
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 1e-2


def test_it_meets_the_edge_and_leaves_it():
    """Where the loss leads away from the edge, as on the other half of the circle, Σ is zero."""
    lr, b = 0.5, 0.3
    radius = math.sqrt(2 / lr)
    before = central_flow(Function(circle(b), [0.0, 0.9 * radius, 0.0]), lr, steps=8)
    y = 0.9 * radius + lr * b * torch.arange(9).double()
    met = y > radius
    assert met.tolist() == [False] * 2 + [True] * 7
    torch.testing.assert_close(before.sharpness, y.clamp(max=radius) ** 2, rtol=1e-3, atol=0)
    assert torch.equal(before.variances[:, 0] > 0, met)
    torch.testing.assert_close(
        before.variances[met, 0], torch.full((7,), b / radius).double(), rtol=0.1, atol=0
    )
    leaving = central_flow(Function(circle(b), [0.0, -radius, 0.0]), lr, steps=8)
    assert not leaving.variances.any()
    y = -radius + lr * b * torch.arange(9).double()
    # An eigenvalue is as exact as the square of what its eigenvector may be off by (tol).
    torch.testing.assert_close(leaving.sharpness, y**2, rtol=1e-4, atol=0)
    assert leaving.parameters[1].item() == pytest.approx(float(y[-1]), rel=1e-12)


@settings(max_examples=8)
@given(entries=st.tuples(numbers, numbers, numbers))
def test_two_equal_eigenvalues_at_the_edge(entries):
    r"""``½ xᵀM(y)x − ⟨G, M(y)⟩`` with a linear, isometric M: the gradient of M's entries is −G.

    The oscillation takes off what of G is positive, ``X = 2 G₊``, and ``M = 2/η + ηt G₋`` falls by
    the rest: in one direction the edge is left where the other one stays there. Where an eigenvalue
    of G is 0 both X and the slack vanish, and a product of 1e-9 leaves √1e-9 to either.
    """
    lr, steps = 0.4, 3
    a, b, c = entries
    G = torch.tensor([[a, c], [c, b]], dtype=torch.float64)

    def M(y):
        return torch.stack([y[0], y[2] / 2**0.5, y[2] / 2**0.5, y[1]]).view(2, 2)

    def function(theta):
        return theta[:2] @ M(theta[2:]) @ theta[:2] / 2 - (G * M(theta[2:])).sum()

    flow = central_flow(Function(function, [0, 0, 2 / lr, 2 / lr, 0]), lr, steps=steps)
    values, vectors = torch.linalg.eigh(G)
    falling = (vectors * values.clamp(max=0)) @ vectors.T
    expected = 2 / lr * torch.eye(2) + lr * steps * falling
    torch.testing.assert_close(M(flow.parameters[2:]), expected, rtol=0, atol=1e-4)
    positive = 2 * values.clamp(min=0).flip(0)
    torch.testing.assert_close(flow.variances[0, :2], positive, rtol=0, atol=1e-4)
    mean = flow.loss[0] + positive.sum() / lr
    torch.testing.assert_close(flow.predicted_loss[0], mean, rtol=0, atol=2e-4 / lr)


# --- third derivatives --------------------------------------------------------------------------


def dense_third_derivatives(problem, vectors):
    """``∇(v_iᵀ H v_j)``, i ≤ j, by torch.func in float64."""
    model = problem.model
    theta = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat):
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        state = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        total = sum(
            len(y) * problem.loss_fn(functional_call(model, state, (x.double(),)), y)
            for x, y in problem.batches
        )
        return total / sum(len(y) for _, y in problem.batches)

    rows = vectors.double()
    pairs = [(i, j) for i in range(len(rows)) for j in range(i, len(rows))]

    def curvature(flat, i, j):
        return rows[i] @ hessian(loss)(flat) @ rows[j]

    return torch.stack([grad(curvature)(theta, i, j) for i, j in pairs])


@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-8), ("float32", 3e-3)])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_third_derivatives_against_dense_ones(dtype, error, loss):
    problem = make_problem("mlp", loss, dtype=DTYPES[dtype])
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    vectors = so.DominantSubspace(operator, 3, refresh=1).update().vectors
    theta = operator.parameters.flatten(operator.parameters.tensors)
    before = operator.stats.products
    found = third_derivatives(operator, theta, vectors)
    assert operator.stats.products - before == 3 * 4
    expected = dense_third_derivatives(problem, vectors)
    assert found.shape == expected.shape == (6, operator.size)
    assert (found - expected).norm() <= error * expected.norm()


# --- gradient descent at its edge -----------------------------------------------------------------


def test_gradient_descent_oscillates_about_it_as_predicted():
    """Begun at the predicted distance from the flow, it swings by ±√σ² from one side to the other.

    Without the oscillation, as the gradient flow, y would rise by ηb a step and leave the edge.
    """
    lr, b, angle, steps = 0.5, 0.05, 0.8, 40
    radius = math.sqrt(2 / lr)
    start = [0.0, radius * math.cos(angle), radius * math.sin(angle)]
    flow = central_flow(Function(circle(b), start), lr, steps=steps, substeps=2)
    theta = torch.tensor([math.sqrt(b * math.cos(angle) / radius), *start[1:]]).double()
    losses, points = [], []
    for _ in range(steps + 1):
        losses.append(float(circle(b)(theta)))
        points.append(theta)
        theta = theta - lr * grad(circle(b))(theta)
    points = torch.stack(points)
    assert (points[1:, 0] * points[:-1, 0] < 0).all()
    moved = float((points[-1, 1:] - points[0, 1:]).norm())
    assert moved > 0.3
    assert float((points[-1, 1:] - flow.parameters[1:]).norm()) < 0.05 * moved
    oscillation = torch.tensor(losses) - (-b * points[:, 1])
    predicted = flow.predicted_loss - flow.loss
    assert float((oscillation.mean() / predicted.mean() - 1).abs()) < 0.05
    assert float((points[:, 0].square().mean() / flow.variances[:, 0].mean() - 1).abs()) < 0.05


# --- what is left as it was, and what is refused ------------------------------------------------


def at_the_edge(dtype=torch.float64):
    """A network, and the rate at which its sharpness is just below the edge."""
    problem = make_problem("mlp", "mse", dtype=dtype)
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    sharpness = float(so.DominantSubspace(operator, 1, refresh=1).update().eigenvalues[0])
    return problem, operator, 1.99 / sharpness


@pytest.mark.parametrize("kind", [so.HessianOperator, so.FiniteDifferenceHessian])
def test_the_model_is_left_as_it_was(kind):
    problem, _, lr = at_the_edge()
    operator = kind(problem.model, problem.loss_fn, problem.batches)
    before = [p.detach().clone() for p in problem.model.parameters()]
    memory = [p.data_ptr() for p in problem.model.parameters()]
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    state = torch.get_rng_state()
    flow = central_flow(operator, lr, steps=1, substeps=2)
    assert isinstance(flow, CentralFlow)
    for p, value, place in zip(problem.model.parameters(), before, memory, strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == place
        assert (p.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(flow.parameters, torch.cat([v.flatten() for v in before]))


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    problem, operator, lr = at_the_edge()
    before = [p.detach().clone() for p in problem.model.parameters()]
    products, calls = operator.matmat, []

    def failing(vectors):
        calls.append(len(vectors))
        if len(calls) > 8:
            raise ZeroDivisionError
        return products(vectors)

    monkeypatch.setattr(operator, "matmat", failing)
    with pytest.raises(ZeroDivisionError):
        central_flow(operator, lr, steps=50)
    assert all(map(torch.equal, problem.model.parameters(), before))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, "^lr is 0.0, but must be a finite number above 0"),
        ({"lr": math.nan}, "^lr is nan"),
        ({"steps": 0}, "^steps is 0, but must be an integer of at least 1"),
        ({"substeps": 1}, "^substeps is 1, but must be an integer of at least 2"),
        ({"margin": 0.6}, "^margin is 0.6, but must be .* above 0 and at most 0.5"),
        ({"max_critical": 0}, "^max_critical is 0"),
        ({"tol": 0.0}, "^tol is 0.0"),
    ],
)
def test_bad_arguments(options, match):
    operator = Function(lambda w: w @ w / 2, [1.0])
    with pytest.raises(ArgumentError, match=match):
        central_flow(operator, **{"lr": 0.1} | options)


def test_a_rate_at_which_gradient_descent_diverges_is_refused():
    """Of a quadratic no third derivative holds the sharpness."""
    operator = Function(lambda w: 3 * w @ w / 2, [1.0, 0.0])
    with pytest.raises(ArgumentError, match=r"^lr is 0\.7, .*The sharpness is 3, 2/lr is 2\.857"):
        central_flow(operator, 0.7)


def test_more_eigenvalues_at_the_edge_than_are_allowed():
    operator = Function(lambda w: w @ w / 2, [1.0] * 9)
    with pytest.raises(ArgumentError, match=r"^lr is 1\.99.*at most 3 eigenvalues.*max_critical"):
        central_flow(operator, 1.99, max_critical=3)


def test_a_loss_that_is_not_finite():
    operator = Function(lambda w: w.sum() * math.inf, [1.0])
    operator.matmat = lambda vectors: 0 * vectors
    with pytest.raises(NonFiniteError, match="The loss is inf"):
        central_flow(operator, 0.1)


def test_low_precision_is_refused():
    model = nn.Linear(2, 1).bfloat16()
    operator = so.HessianOperator(model, nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 1)))
    with pytest.raises(ArgumentError, match=r"bfloat16, but must be float32 or float64.*float\(\)"):
        central_flow(operator, 0.1)


def test_options_reach_what_they_are_for():
    def cost(**options):
        _, operator, lr = at_the_edge()
        before = operator.stats.products
        flow = central_flow(operator, 0.97 * lr, steps=1, substeps=2, **options)
        return operator.stats.products - before, flow

    (usual, flow), (wide, _), (exact, _) = cost(), cost(margin=0.1), cost(tol=1e-9)
    assert not flow.variances.any()
    assert wide > usual  # what is within 10 % of the edge has third derivatives
    assert exact > usual  # one step of refinement is not enough


def test_the_seed_is_that_of_the_first_vectors(monkeypatch):
    module, seeds = sys.modules[third_derivatives.__module__], []
    solve = module.solve

    def noted(operator, k, *, seed, **options):
        seeds.append(seed)
        return solve(operator, k, seed=seed, **options)

    monkeypatch.setattr(module, "solve", noted)
    for seed in (0, 5):
        central_flow(Function(lambda w: w @ w / 2, [1.0] * 3), 0.1, steps=1, seed=seed)
    assert seeds == [0, 5]
