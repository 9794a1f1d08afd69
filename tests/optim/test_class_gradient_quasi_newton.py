"""`ClassGradientQuasiNewton` fed by `ClassGradientSubspace`, beside eqs. 8, 12 and 15 to 17."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jacrev

import subspace_optim as so
from tests.optim.naive import assert_near, flat, outputs

Observed = list[tuple[Tensor, Tensor]]


def observation(model: nn.Module, theta: Tensor, x: Tensor, y: Tensor, k: int) -> Any:
    """c_k and λ_k of one minibatch, from the Jacobian of every example; `None` without any."""
    mine = y == k
    if not mine.any():
        return None
    c = jacrev(lambda t: outputs(model, t, x)[:, k])(theta)[mine].mean(dim=0)
    p = outputs(model, theta, x).softmax(dim=1)[mine, k]
    return c, (p * (1 - p)).sum() / len(y) * (c @ c)


def averaged(history: list[Any], decay: float) -> tuple[Tensor, Tensor]:
    """Eqs. 16 and 17, as the sums that they are."""
    weights = torch.tensor([decay**i for i in reversed(range(len(history)))], dtype=torch.float64)
    weights /= weights.sum()
    c = sum(w * c for w, (c, _) in zip(weights, history, strict=True))
    square = sum(w * value**2 for w, (_, value) in zip(weights, history, strict=True))
    return torch.as_tensor(c), torch.as_tensor(square).sqrt()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 4),
    classes=st.integers(2, 4),
    lr=st.floats(1e-3, 0.1),
    newton_lr=st.floats(1e-3, 0.1),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    damping=st.sampled_from([0.0, 0.3]),
    decay=st.sampled_from([0.0, 0.5, 0.9]),
    steps=st.integers(4, 8),
)
def test_steps_equal_the_equations(
    seed: int,
    width: int,
    classes: int,
    lr: float,
    newton_lr: float,
    momentum: float,
    damping: float,
    decay: float,
    steps: int,
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, classes)).double()
    data = [(torch.randn(6, 3).double(), torch.randint(classes, (6,))) for _ in range(steps)]
    theta = flat(model.parameters())
    buffer, history, path = torch.zeros_like(theta), [[] for _ in range(classes)], []
    for x, y in data:
        slope = grad(lambda t, x=x, y=y: F.cross_entropy(outputs(model, t, x), y))(theta)
        buffer = momentum * buffer + slope
        step = -lr * buffer
        for k in range(classes):
            seen = observation(model, theta, x, y, k)
            history[k] += [] if seen is None else [seen]
            if history[k]:
                c, value = averaged(history[k], decay)
                v = c / c.norm()
                step = step - (newton_lr / (value + damping) - lr) * (v @ buffer) * v
        theta = theta + step
        path.append(theta)
    assume(all(float(point.norm()) < 50 for point in path))

    subspace = so.ClassGradientSubspace(model, classes, decay=decay)
    optimizer = so.ClassGradientQuasiNewton(
        model.parameters(),
        lr=lr,
        newton_lr=newton_lr,
        momentum=momentum,
        damping=damping,
        subspace=subspace,
    )
    for (x, y), expected in zip(data, path, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        subspace.observe(x, y)
        optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-8)
