"""Attention: fused where only the loss is asked for, composed where it is differentiated."""

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
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_optim as so
from tests.observe import Seen

FUSED, COMPOSED = "_scaled_dot_product_flash_attention_for_cpu", "_softmax"


def allowed() -> tuple[bool, bool, bool]:
    """Which kernels torch may choose from now: composed, flash, memory efficient."""
    return math_sdp_enabled(), flash_sdp_enabled(), mem_efficient_sdp_enabled()


class Kernels(TorchDispatchMode):
    """Notes which kernel attention came to, and which ones it could have."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").replace("_safe_softmax", COMPOSED)
        if name in (FUSED, COMPOSED):
            self.seen.append((name, allowed()))
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """One layer of attention, which tells what may be chosen when it is called."""

    def __init__(self, dropout: float, seen: Seen) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        self.dropout, self.seen = dropout, seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        self.seen.append(allowed())
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def layer(kind: Any = so.HessianOperator, dropout: float = 0.0) -> tuple[Any, Seen]:
    torch.manual_seed(0)
    seen = Seen()
    data = torch.randn(5, 3, 4).double(), torch.randint(2, (5,))
    model = Layer(dropout, seen).double()
    return kind(model, nn.CrossEntropyLoss(), data, verify=False), seen


USES = {
    "loss": lambda operator: operator.loss(),
    "gradient": lambda operator: operator.gradient(),
    "matvec": lambda operator: operator.matvec(torch.ones(operator.size).double()),
}
MATH = (True, False, False)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [so.HessianOperator, so.GaussNewtonOperator])
def test_it_is_composed_where_it_is_differentiated_and_nowhere_else(kind: Any, use: str) -> None:
    operator, seen = layer(kind)
    outside = allowed()
    assert outside != MATH
    USES[use](operator)
    assert set(seen) == {outside if use == "loss" else MATH}
    assert allowed() == outside


@pytest.mark.parametrize("use", USES)
def test_differences_of_gradients_leave_the_kernel_to_torch(use: str) -> None:
    operator, seen = layer(so.FiniteDifferenceHessian)
    USES[use](operator)
    assert set(seen) == {allowed()}


def test_the_loss_of_a_fused_kernel_is_that_of_the_composed_one() -> None:
    """Torch's own kernel for a CPU, as it is dispatched."""
    operator, _ = layer()
    seen = Seen()
    with Kernels(seen):
        fused = operator.loss()
    assert {name for name, _ in seen} == {FUSED}
    other, _ = layer()
    other.gradient()
    assert fused == pytest.approx(other.loss(), rel=1e-12)
    with sdpa_kernel(SDPBackend.MATH):
        assert layer()[0].loss() == pytest.approx(fused, rel=1e-12)


@pytest.mark.parametrize("by", ["position", "name"])
def test_weights_that_are_dropped_are_dropped_by_one_kernel(by: str) -> None:
    """Another one would draw another mask, and the loss would not be that of the gradient."""
    operator, called = layer(dropout=0.5)
    if by == "position":
        attend = F.scaled_dot_product_attention
        operator.model.forward = lambda x: _by_position(operator.model, x, attend)
    seen = Seen()
    with Kernels(seen):
        loss = operator.loss()
    assert {kernels for name, kernels in seen if name == COMPOSED} == {MATH}
    assert FUSED not in {name for name, _ in seen}
    assert by == "position" or MATH not in set(called)  # the rest of the model is as it was
    other, _ = layer(dropout=0.5)
    other.gradient()
    assert loss == pytest.approx(other.loss(), rel=1e-12)
    assert loss != pytest.approx(layer()[0].loss(), rel=1e-3)


def _by_position(model: Layer, x: Tensor, attend: Any) -> Tensor:
    q, k, v = model.qkv(x).view(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
    return model.head(attend(q, k, v, None, 0.5).transpose(1, 2).flatten(2).mean(dim=1))


@pytest.mark.parametrize("own", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_what_the_user_has_ruled_out_stays_ruled_out(own: SDPBackend) -> None:
    operator, seen = layer()
    with sdpa_kernel(own):
        outside = allowed()
        operator.loss()
        assert set(seen) == {outside}
        seen.clear()
        operator.gradient()
        assert set(seen) == {MATH}  # nothing else has a second derivative
        assert allowed() == outside
    seen.clear()
    differences, found = layer(so.FiniteDifferenceHessian)
    with sdpa_kernel(own):
        differences.loss()
        assert set(found) == {outside}
