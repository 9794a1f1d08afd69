"""Does the cost of a basis grow with the data? One of a sample, and one of all of them."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.data import load
from benchmarks.losses import mse
from benchmarks.models import build, default_lr
from benchmarks.progress import counted, doing
from benchmarks.speed.coverage import train
from benchmarks.speed.runs import MAX_ANGLE
from benchmarks.speed.timing import processor_timed
from subspace_optim.linalg.rows import largest_sine

FLAT_FROM: Final = 2500
"""Examples from which on the cost is not to grow."""
BAR: Final = 1.5
"""The largest cost from there on, over the smallest."""


@dataclass(frozen=True)
class Growing:
    """A problem of as many examples as are asked for.

    Attributes:
        title: in words.
        sizes: the numbers of examples.
        make: the model, the loss, and the examples of such a number.
        k: dimension of the subspace.
        rounds: repetitions, each with another seed.
    """

    title: str
    sizes: tuple[int, ...]
    make: Callable[[int], tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, Tensor]]]
    k: int = 10
    rounds: int = 1


LINEAR_SPECTRUM: Final = (4.0, 2.0, 0.2)
"""Variances of rows: the largest and the smallest of the first k; of the j-th below, this / j."""


def linear(examples: int, *, k: int = 10, inputs: int = 200) -> tuple[Any, Any, Any]:
    """Least squares with normal rows of known variances: its Hessian is their covariance."""
    largest, smallest, below = LINEAR_SPECTRUM
    outliers = torch.linspace(largest, smallest, k)
    variances = torch.cat([outliers, below / torch.arange(1, inputs - k + 1)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator) * variances.sqrt()
    y = torch.randn(examples, 1, generator=generator)
    return nn.Linear(inputs, 1, bias=False), _half_square, (x, y)


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().mean()


def trained_mlp(
    root: str | None, steps: int, dataset: str = "mnist-5k"
) -> Callable[[int], tuple[Any, Any, Any]]:
    """Returns how the paper's MLP is made with so many MNIST images.

    It is trained once, on all of them: the parameters are the same, and only the data grow.

    Args:
        root: folder of the data sets.
        steps: of SGD.
        dataset: ``"mnist-5k"``, or ``"mnist"`` for more images.
    """
    data = load(dataset, root=root)
    model = build("mlp", data, num_outputs=data.num_classes, seed=0).eval()
    sgd = torch.optim.SGD(model.parameters(), lr=default_lr(dataset, "mse"))
    train(model, mse, data.x_train, data.y_train, sgd, range(steps), 0)

    def make(examples: int) -> tuple[Any, Any, Any]:
        # Sorted by class: the first ones would be zeros.
        chosen = torch.arange(examples) * len(data.x_train) // examples
        return copy.deepcopy(model), mse, (data.x_train[chosen], data.y_train[chosen])

    return make


def grow(problem: Growing) -> dict[str, Any]:
    """Measures what a certified basis costs at each size, with a sample and without.

    Args:
        problem: what is measured.

    Returns:
        A row for each size and way, and by how much the cost grows from ``FLAT_FROM`` on.
    """
    rows = []
    for examples in counted(problem.title, problem.sizes, unit="size"):
        model, loss, data = problem.make(examples)

        def gradient(model: Any = model, loss: Any = loss, data: Any = data) -> None:
            model.zero_grad()
            loss(model(data[0]), data[1]).backward()

        unit = min(processor_timed(gradient)[0] for _ in range(3))
        with doing(f"reference of {examples} examples"):
            hessian = so.HessianOperator(model, loss, data)
            exact = so.DominantSubspace(hessian, problem.k, tol=1e-4).refresh().vectors
        for sample in ("auto", None):
            found = [
                certified(model, loss, data, problem.k, sample, seed, exact)
                for seed in range(problem.rounds)
            ]
            median = {
                key: statistics.median(row[key] for row in found)
                for key in ("seconds", "example_products", "examples")
            }
            sizes = {"N": examples, "sample": sample, "gradient_seconds": unit}
            cost = {"gradients": median["seconds"] / unit, "rounds": found}
            worst: dict[str, Any] = {
                key: max(row[key] for row in found) for key in ("true_sine", "estimate")
            }
            rows.append(sizes | median | cost | worst)
    growth = {
        key: growth_of([(row["N"], row[key]) for row in rows if row["sample"] == "auto"])
        for key in ("seconds", "example_products")
    }
    met = {key: value is None or value <= BAR for key, value in growth.items()}
    return {"title": problem.title, "rows": rows, "growth": growth, "met": met}


def certified(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: tuple[Tensor, Tensor],
    k: int,
    sample: int | Literal["auto"] | None,
    seed: int,
    exact: Tensor,
) -> dict[str, Any]:
    """Finds a basis with a new operator, of which nothing is known.

    Args:
        model: at its present parameters.
        loss: its loss.
        data: all of them.
        k: dimension of the subspace.
        sample: as of ``DominantSubspace``.
        seed: of the draws.
        exact: the true basis.

    Returns:
        Processor seconds, products of one example each, and the angle: certified, and true.
    """
    hessian, total = so.HessianOperator(model, loss, data), len(data[0])
    subspace = so.DominantSubspace(hessian, k, max_angle=MAX_ANGLE, sample=sample, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a gap that is none: the table tells what it cost
        seconds, basis = processor_timed(subspace.update)
    stats = subspace.stats
    return {
        "seconds": seconds,
        "example_products": stats.full_products * total,
        "examples": stats.examples or total,
        "sampling_error": stats.sampling_error,
        "estimate": 1.0 if stats.estimate is None else stats.estimate,
        "true_sine": largest_sine(basis.vectors, exact),
    }


def growth_of(costs: Sequence[tuple[int, float]]) -> float | None:
    """Returns the largest cost over the smallest, of the sizes that are to cost the same."""
    large = [cost for examples, cost in costs if examples >= FLAT_FROM]
    return max(large) / min(large) if len(large) > 1 else None
