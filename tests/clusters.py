"""Classes that lie apart: their networks have as many outliers in the spectrum, and a gap below."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def clustered(
    count: int,
    *,
    inputs: int = 6,
    classes: int = 3,
    seed: int = 0,
    spread: float = 0.3,
    sort: bool = False,
) -> tuple[Tensor, Tensor]:
    """Examples about the mean of their class, in no order; or sorted by class, as files may be."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) * classes // count
    if not sort:
        y = torch.randint(classes, (count,), generator=generator)
    means = 2 * torch.randn(classes, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return means[y] + spread * noise, y


def network(
    *layers: nn.Module, inputs: int = 6, hidden: int = 8, classes: int = 3, seed: int = 0
) -> nn.Module:
    """A small network of tanh in float64, with further layers before that."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
    return nn.Sequential(first, *layers, nn.Tanh(), last).double()


def one_hot_mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of the scores, summed over the classes."""
    return (output - F.one_hot(target, output.shape[1])).square().sum(1).mean() / 2
