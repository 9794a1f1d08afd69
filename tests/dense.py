"""Dense oracles, and the random problems that they are asked about.

Nothing here uses the package: the oracle is ``torch.func.hessian`` of the mean loss as a function
of one flat vector, in float64, and what it is a mean over is written out.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# --- the oracle ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Loss, gradient ``(P,)`` and Hessian ``(P, P)`` of a mean loss, in float64."""

    loss: float
    gradient: Tensor
    hessian: Tensor


def double(batch: Any) -> Any:
    """Returns a batch (tuple or mapping) with its floating-point tensors in float64."""
    if isinstance(batch, dict):
        return {key: double(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(double(value) for value in batch)
    return batch.double() if batch.is_floating_point() else batch


def dense_curvature(
    model: nn.Module,
    batch_loss: Callable[[Any, Any], tuple[Tensor, Any]],
    batches: Sequence[Any],
    names: Sequence[str] | None = None,
) -> Dense:
    """Differentiates ``Σ_b w_b ℓ_b(θ) / Σ_b w_b`` at the model's parameters, or those named."""
    model = copy.deepcopy(model).double()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    chosen = [parameters[name] for name in (names or parameters)]
    theta = torch.cat([p.reshape(-1) for p in chosen])

    def mean_loss(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in chosen])
        values = [piece.view(p.shape) for piece, p in zip(pieces, chosen, strict=True)]
        state = dict(zip(names or parameters, values, strict=True))

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, state, args, kwargs)

        losses, weights = zip(*(batch_loss(call, double(b)) for b in batches), strict=True)
        total = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        return total / sum(weights)

    with sdpa_kernel(SDPBackend.MATH):
        return Dense(float(mean_loss(theta)), grad(mean_loss)(theta), hessian(mean_loss)(theta))


def supervised(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The weight of a pair (x, y) is its number of examples."""
    return lambda model, batch: (loss_fn(model(batch[0]), batch[1]), len(batch[1]))


def probes(size: int, dtype: torch.dtype = torch.float64, count: int = 4) -> Tensor:
    """Returns random vectors ``(count, size)``, the same ones for the same size.

    Two matrices that differ in any entry have different products with a random vector (with
    probability one). So a few products compare an operator with its dense matrix, where all of
    its rows would take ``size`` of them.
    """
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, size, dtype=torch.float64, generator=generator).to(dtype)


def projector(vectors: Tensor) -> Tensor:
    """``Vᵀ V``, for orthonormal rows."""
    return vectors.T @ vectors


# --- models, losses, batches --------------------------------------------------------------------


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The papers' MSE: half the sum over classes, mean over examples."""
    return (output - target).square().sum() / (2 * len(output))


class TiedMLP(nn.Module):
    """Two layers with one weight, and its transpose as a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(h @ self.first.weight)


class Attention(nn.Module):
    """One attention layer of two heads, mean pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(dim=1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))


def _cnn() -> nn.Module:
    convolution = nn.Conv2d(1, 2, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (3,)),
    "cnn": (_cnn, (1, 4, 4)),
    "tied": (TiedMLP, (3,)),
    "attention": (Attention, (3, 4)),
}
LOSSES = {"mse": half_squared_error, "cross_entropy": nn.CrossEntropyLoss()}


@dataclass(frozen=True)
class Problem:
    """A model of two outputs, its loss, and batches ``(x, y)`` of unequal sizes."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]]

    def dense(self, names: Sequence[str] | None = None) -> Dense:
        return dense_curvature(self.model, supervised(self.loss_fn), self.batches, names)


def make_problem(
    model: str = "mlp",
    loss: str = "cross_entropy",
    sizes: Sequence[int] = (3, 1, 4),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    build, shape = MODELS[model]
    built = build().to(dtype)
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(0.7 * randn(*p.shape))
    batches = []
    for n in sizes:
        labels = torch.randint(2, (n,), generator=generator)
        y = labels if loss == "cross_entropy" else F.one_hot(labels, 2).to(dtype)
        batches.append((randn(n, *shape), y))
    return Problem(built, LOSSES[loss], batches)


def problems(dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Problem]:
    """Draws a model, a loss, and one to five unequal batches."""
    return st.builds(
        make_problem,
        model=st.sampled_from(sorted(MODELS)),
        loss=st.sampled_from(sorted(LOSSES)),
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
        dtype=st.just(dtype),
        seed=st.integers(0, 2**16),
    )


# --- symmetric matrices of prescribed spectrum --------------------------------------------------


def symmetric(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A random symmetric matrix, in float64, with this spectrum."""
    size = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    matrix = (q * spectrum.double()) @ q.T
    return (matrix + matrix.T) / 2


def spectra(max_size: int = 20) -> st.SearchStrategy[Tensor]:
    """Draws spectra: free ones, and ones of few values, which repeat."""
    values = st.floats(-10, 10, allow_subnormal=False)
    few = st.sampled_from([-4.0, -1.0, 0.0, 1.0, 2.5])
    size = {"min_size": 1, "max_size": max_size}
    lists = st.lists(values, **size) | st.lists(few, **size)
    return lists.map(lambda values: torch.tensor(values, dtype=torch.float64))


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
