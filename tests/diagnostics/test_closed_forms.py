"""What a monitor records, where all of it is known: toy models of the papers, simple optimizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import wrightomega
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.diagnostics import (
    eigenvector_fractions,
    expected_overlap,
    gradient_fraction,
    hessian_gradient_overlap,
    subspace_overlap,
)
from tests.dense import make_problem
from tests.optim.naive import projector


class Formula(nn.Module):
    """A loss of the parameters and of what the data select."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def subspace_of(model: Formula, loss, examples: int, k: int) -> so.DominantSubspace:
    """``loss(theta, index)`` for each example."""

    def batch_loss(model: Formula, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        losses = [loss(model.theta, int(i)) for i in batch["index"]]
        return torch.stack(losses).mean(), len(losses)

    # (The index as a tensor that each pass reads anew.)
    data = {"index": torch.arange(examples)}
    operator = so.HessianOperator.from_loss(model, batch_loss, data, verify=False)
    return so.DominantSubspace(operator, k, refresh=1, tol=1e-12)


# The toy quadratic of song_2024, A.2: L = (1000 x² + y²) / 2, ℓ_1,2 = L ± 100 x y.


def toy(theta: Tensor, index: int) -> Tensor:
    x, y = theta
    return (1000 * x**2 + y**2) / 2 + (100 if index == 0 else -100) * x * y


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_toy_quadratic(stochastic: bool) -> None:
    model = Formula([1.0, 1.0])
    subspace = subspace_of(model, toy, 2, 1)
    eta = 1e-4
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    monitor = so.Monitor(optimizer, subspace)
    chosen = np.random.default_rng(0).integers(2, size=40)
    x, y, expected = 1.0, 1.0, []
    for t in range(40):
        optimizer.zero_grad()
        indices = [int(chosen[t])] if stochastic else [0, 1]
        (sum(toy(model.theta, i) for i in indices) / len(indices)).backward()
        optimizer.step()
        side = (100 if chosen[t] == 0 else -100) if stochastic else 0
        length = math.hypot(1000 * x, y)
        expected.append(
            {
                "loss": (1000 * x**2 + y**2) / 2,
                "gradient_norm": length,
                "sharpness": 1000.0,
                "gap": 999.0,
                "chi_gradient": abs(1000 * x) / length,
                "dom_lr": eta * (1 + side * y / (1000 * x)),
                "bulk_lr": eta * (1 + side * x / y),
                "distance": math.hypot(x - 1, y - 1),
            }
        )
        x, y = x - eta * (1000 * x + side * y), y - eta * (y + side * x)
    if not stochastic:
        assert (x, y) == pytest.approx(((1 - 1000 * eta) ** 40, (1 - eta) ** 40))
    for t, row in enumerate(expected):
        for column, value in row.items():
            assert monitor.history[column][t] == pytest.approx(value, rel=1e-9), (column, t)
    # Noise alone keeps the gradient in the dominant subspace (Phenomena 1 and 3).
    assert (monitor.history["chi_gradient"][-1] > 0.9) == stochastic or not stochastic


# The solvable model of gur_ari_2018: softmax regression on two orthogonal examples.


SIDES = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()  # of the two rows of weights


def test_the_softmax_model_of_two_samples() -> None:
    """Exact flow u + e^u = ηt + c in each direction, exact gradient and Hessian at that u; and the
    late-time forms (eqs. 7-9, 17-19, as corrected) at O(1/t)."""
    dim, eta = 5, 0.05
    means = torch.linalg.qr(
        torch.randn(dim, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q.T
    model = nn.Linear(dim, 2, bias=False).double()
    torch.manual_seed(1)
    nn.init.normal_(model.weight, std=0.5)
    labels = torch.arange(2)
    loss_fn = nn.CrossEntropyLoss()
    operator = so.HessianOperator(model, loss_fn, (means, labels))
    subspace = so.DominantSubspace(operator, 2, refresh=1, tol=1e-10)

    def margins() -> Tensor:
        """u_i, by which the logit of its own class leads for sample i."""
        logits = (model.weight @ means.T).detach()
        return torch.stack([logits[0, 0] - logits[1, 0], logits[1, 1] - logits[0, 1]])

    start = margins()
    constants = start + start.exp()

    def flow(time: float) -> Tensor:
        """Wright's omega solves ω + log ω = z, so that its logarithm solves u + e^u = z."""
        return torch.from_numpy(wrightomega((time + constants).numpy())).log()

    spans = torch.stack([torch.cat([m, -m]) for m in means]) / math.sqrt(2)

    def check() -> None:
        """Gradient, Hessian and what is made of them, at the present margins."""
        u = margins()
        slopes = torch.sigmoid(-u) / 2
        upper = -slopes[0] * means[0] + slopes[1] * means[1]
        gradient = torch.cat([upper, -upper])
        torch.testing.assert_close(operator.gradient(), gradient)
        curvatures = torch.sigmoid(u) * torch.sigmoid(-u)
        basis = subspace.update()
        torch.testing.assert_close(basis.eigenvalues, curvatures.sort(descending=True).values)
        assert float(subspace_overlap(basis, spans)) == pytest.approx(1.0, abs=1e-9)
        assert float(gradient_fraction(gradient, basis)) == pytest.approx(1.0, abs=1e-9)
        along = (spans @ gradient).square()
        torch.testing.assert_close(
            eigenvector_fractions(gradient, basis),
            along[curvatures.argsort(descending=True)] / gradient.square().sum(),
        )
        product = operator.matvec(gradient)
        overlap = (along @ curvatures) / (along.sum() * (along @ curvatures**2)).sqrt()
        assert float(hessian_gradient_overlap(gradient, product)) == pytest.approx(float(overlap))

    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    for _ in range(100):
        optimizer.zero_grad()
        loss_fn(model(means), labels).backward()
        optimizer.step()
    np.testing.assert_allclose(margins(), flow(100 * eta), atol=eta)  # up to its step
    check()
    # From here along the flow itself, which moves the weights in the plane of the examples.
    time = 1000.0
    ahead = (flow(time) - margins()) / 2
    with torch.no_grad():
        model.weight += torch.stack([means.T @ (ahead * sign) for sign in SIDES])
    torch.testing.assert_close(margins(), flow(time))
    check()
    # A quarter of eq. 8's.
    late = torch.cat([means[1] - means[0], means[0] - means[1]]) / (2 * time)
    assert float((operator.gradient() - late).norm() / late.norm()) < 10 / time * math.log(time)
    basis = subspace.update()
    torch.testing.assert_close(
        basis.eigenvalues * time, torch.ones(2).double(), rtol=0, atol=10 / time * math.log(time)
    )
    assert float(expected_overlap(basis.eigenvalues)) == pytest.approx(1.0, abs=1e-4)


# Effective rates of optimizers that can be worked out.


def test_gradient_descent_has_its_rate_in_both() -> None:
    problem = make_problem("mlp", "cross_entropy")
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.03)
    monitor = so.Monitor(optimizer, so.DominantSubspace(operator, 2, refresh=1))
    for _ in range(5):
        for p, slope in zip(
            problem.model.parameters(),
            operator.parameters.unflatten(operator.gradient()),
            strict=True,
        ):
            p.grad = slope.clone()
        optimizer.step()
    for column in ("dom_lr", "bulk_lr"):
        assert monitor.history[column] == pytest.approx([0.03] * 5)


def test_momentum_reaches_its_rate_over_one_minus_momentum_in_flat_directions() -> None:
    r"""On ``λx²/2 + c·y`` the bulk is flat, its gradient c constant, and after t steps the buffer
    is :math:`\sum_{s \le t} \mu^s c`: the Bulk-LR is :math:`\eta (1 - \mu^{t+1}) / (1 - \mu)`."""
    model = Formula([0.3, 1.0, -2.0])

    def loss(theta: Tensor, _: int) -> Tensor:
        return 5 * theta[0] ** 2 + theta[1] - 2 * theta[2]

    subspace = subspace_of(model, loss, 1, 1)
    eta, mu = 0.01, 0.8
    optimizer = torch.optim.SGD(model.parameters(), lr=eta, momentum=mu)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model.theta, 0).backward()
        optimizer.step()
    expected = [eta * (1 - mu ** (t + 1)) / (1 - mu) for t in range(60)]
    assert monitor.history["bulk_lr"] == pytest.approx(expected)
    assert monitor.history["bulk_lr"][0] == pytest.approx(eta)
    assert monitor.history["bulk_lr"][-1] == pytest.approx(eta / (1 - mu), rel=1e-5)


def test_adam_s_rates_are_those_of_its_recursion_by_hand() -> None:
    problem = make_problem("mlp", "mse")
    x = torch.cat([batch[0] for batch in problem.batches])
    y = torch.cat([batch[1] for batch in problem.batches])
    model, loss_fn = problem.model, problem.loss_fn
    hessian = so.HessianOperator(model, loss_fn, (x, y), verify=False)
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-12)
    lr, (b1, b2), eps = 0.02, (0.9, 0.999), 1e-8
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    monitor = so.Monitor(optimizer, subspace)
    m = v = np.zeros(subspace.operator.size)
    for t in range(1, 11):
        dense = problem.dense()
        g, P = dense.gradient.numpy(), projector(dense.hessian, 2).numpy()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = -lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        dominant, bulk = P @ g, g - P @ g
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        history = {column: values[-1] for column, values in monitor.history.items()}
        assert history["dom_lr"] == pytest.approx(-(update @ dominant) / (dominant @ dominant))
        assert history["bulk_lr"] == pytest.approx(-(update @ bulk) / (bulk @ bulk))
        assert history["update_norm"] == pytest.approx(np.linalg.norm(update))
        assert history["adam_threshold"] == pytest.approx(38 / lr)
