"""Attention takes its composed form where it is differentiated twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import (
    flash_sdp_enabled,
    math_sdp_enabled,
    mem_efficient_sdp_enabled,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import subspace_optim as so
from tests.observe import Seen


def allowed() -> tuple[bool, bool, bool]:
    """Which kernels torch may choose from now: composed, flash, memory efficient."""
    return math_sdp_enabled(), flash_sdp_enabled(), mem_efficient_sdp_enabled()


class Layer(nn.Module):
    """One layer of attention, which tells what may be chosen when it is called."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        self.seen.append(allowed())
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def layer(kind: Any = so.HessianOperator) -> tuple[Any, Seen]:
    torch.manual_seed(0)
    seen = Seen()
    data = torch.randn(5, 3, 4).double(), torch.randint(2, (5,))
    model = Layer(seen).double()
    return kind(model, nn.CrossEntropyLoss(), data, verify=False), seen


USES = {
    "loss": lambda operator: operator.loss(),
    "gradient": lambda operator: operator.gradient(),
    "matvec": lambda operator: operator.matvec(torch.ones(operator.size).double()),
}
MATH = (True, False, False)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [so.HessianOperator, so.GaussNewtonOperator])
def test_it_is_composed_inside_and_nowhere_else(kind: Any, use: str) -> None:
    operator, seen = layer(kind)
    outside = allowed()
    assert outside != MATH
    USES[use](operator)
    assert set(seen) == {MATH}
    assert allowed() == outside


@pytest.mark.parametrize("use", USES)
def test_differences_of_gradients_leave_the_kernel_to_torch(use: str) -> None:
    operator, seen = layer(so.FiniteDifferenceHessian)
    USES[use](operator)
    assert set(seen) == {allowed()}


@pytest.mark.parametrize("own", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_what_the_user_has_ruled_out_stays_ruled_out(own: SDPBackend) -> None:
    operator, seen = layer()
    with sdpa_kernel(own):
        outside = allowed()
        operator.gradient()
        assert set(seen) == {MATH}  # nothing else has a second derivative
        assert allowed() == outside
    seen.clear()
    differences, found = layer(so.FiniteDifferenceHessian)
    with sdpa_kernel(own):
        differences.loss()
        assert set(found) == {outside}
