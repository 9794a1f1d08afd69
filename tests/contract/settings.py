"""What the optimizers under contract run on: small models whose Hessian is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subspace_optim as so
from subspace_optim.curvature import CurvatureOperator
from tests.optim.naive import DenseOperator, Quartic, flat, landscape

K = 2  # the dimension of the subspaces


@dataclass(frozen=True)
class Setting:
    """A model, its loss, and the exact Hessian as a function of the flat float64 parameters."""

    model: nn.Module
    loss: Callable[[], Tensor]
    hessian: Callable[[Tensor], Tensor]
    operator: CurvatureOperator
    batch: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def theta(self) -> Tensor:
        return flat(self.trained)


def quartic(dtype: torch.dtype = torch.float64) -> Setting:
    """Closed forms; one of its three parameters is 0-d."""
    model = Quartic(dtype=dtype)
    return Setting(model, model, model.hessian, DenseOperator(model))


_LAST: dict[str, tuple[Tensor, Tensor]] = {}


def remembered(name: str, hessian: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same matrix at the same point: twins ask for it one after the other."""

    def of(theta: Tensor) -> Tensor:
        if name not in _LAST or not torch.equal(_LAST[name][0], theta):
            _LAST[name] = theta.clone(), hessian(theta)
        return _LAST[name][1]

    return of


class Odd(nn.Module):
    """Tied, non-contiguous and 0-d parameters, of which nothing is in the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        draw = torch.randn(3, 2, generator=random, dtype=torch.float64)
        self.encoder = nn.Parameter(draw.t())  # (2, 3) with strides (1, 2)
        self.decoder = self.encoder
        self.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64)[::2])
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(x @ self.encoder.T) @ self.decoder + self.bias


def odd() -> Setting:
    model = Odd()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hessian = remembered("odd", landscape(model, F.mse_loss, x, x).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, x), verify=False)
    return Setting(model, lambda: F.mse_loss(model(x), x), hessian, operator)


def data(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random))
    x, y = torch.randn(8, 3, generator=random), torch.randn(8, 2, generator=random)
    return model, x.to(dtype), y.to(dtype)


def network(dtype: torch.dtype = torch.float64) -> Setting:
    model, x, y = data(dtype)
    hessian = remembered(f"network {dtype}", landscape(model, F.mse_loss, x, y).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, y), verify=False)
    return Setting(model, lambda: F.mse_loss(model(x), y), hessian, operator)


def frozen() -> Setting:
    """The network whose first layer is frozen: its Hessian is that of the last, written out."""
    model, x, y = data()
    model[0].requires_grad_(False)
    with torch.no_grad():
        hidden = model[1](model[0](x))
    hessian = remembered("frozen", landscape(model[2], F.mse_loss, hidden, y).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, y), verify=False)
    return Setting(model, lambda: F.mse_loss(model(x), y), hessian, operator)


def classified(dtype: torch.dtype = torch.float64) -> Setting:
    """A network of two classes, and the minibatch that a class-gradient subspace observes."""
    model, x, _ = data(dtype)
    y = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    hessian = remembered(f"classified {dtype}", landscape(model, F.cross_entropy, x, y).hessian)
    operator = so.HessianOperator(model, F.cross_entropy, (x, y), verify=False)
    return Setting(model, lambda: F.cross_entropy(model(x), y), hessian, operator, (x, y))


def class_terms(setting: Setting) -> tuple[Tensor, Tensor]:
    """λ_k^B and c_k^B of `class_gradient_2020` (eqs. 8, 12): one example after the other."""
    assert setting.batch is not None
    x, y = setting.batch
    squares, vectors = [], []
    for k in range(2):
        slopes, spread = [], 0.0
        for one_x in x[y == k]:
            logits = setting.model(one_x[None])[0]
            slopes.append(flat(torch.autograd.grad(logits[k], setting.trained, retain_graph=True)))
            probability = float(logits.detach().double().softmax(0)[k])
            spread += probability * (1 - probability)
        vectors.append(torch.stack(slopes).mean(0))
        squares.append(spread / len(x) * vectors[-1].square().sum())
    return torch.stack(squares), torch.stack(vectors)
