"""How the costs grow: with parameters, examples and k, on MLPs on MNIST images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import subspace_optim as so
from benchmarks.data import load
from benchmarks.models import default_lr, drawn, mlp
from benchmarks.progress import doing
from benchmarks.speed.problems import Problem
from benchmarks.speed.products import gradient_seconds
from benchmarks.speed.timing import timed


def _mlp(width: int, examples: int, root: str | None, device: str) -> Problem:
    data = load("mnist-5k", root=root)
    chosen = torch.arange(examples) * len(data.x_train) // examples
    model = drawn(0, lambda: mlp(data.x_train.shape[1], 10, width=width)).to(device)
    x, y = data.x_train[chosen].to(device), data.y_train[chosen].to(device)
    return Problem(f"width {width}", model, x, y, 10, default_lr("mnist-5k", "mse"))


def _costs(problem: Problem, k: int) -> dict[str, Any]:
    """Seconds of a gradient, a product, a cold solve and an application, each the best of three."""
    with doing(f"P = {problem.size:,}, N = {len(problem.x)}, k = {k}"):
        return _measured(problem, k)


def _measured(problem: Problem, k: int) -> dict[str, Any]:
    hessian = problem.hessian()
    vector = torch.randn(problem.size, device=problem.x.device)
    hessian.matvec(vector)
    with hessian.frozen():
        product = min(timed(lambda: hessian.matvec(vector))[0] for _ in range(3))
    hessian.release()
    subspace = so.DominantSubspace(hessian, k)
    solve, basis = timed(subspace.refresh)
    return {
        "parameters": problem.size,
        "examples": len(problem.x),
        "k": k,
        "gradient": gradient_seconds(problem, 3),
        "product": product,
        "solve": solve,
        "solve_products": subspace.stats.products,
        "apply": min(timed(lambda: basis.project_out(vector, out=vector))[0] for _ in range(3)),
        "graph_bytes": hessian.stats.graph_bytes,
    }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of log cost over log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    return statistics.linear_regression(x, y).slope


def measure(root: str | None, device: str, *, quick: bool) -> dict[str, Any]:
    """Varies one size at a time, and extends the last row by the model beyond what is measured.

    Args:
        root: folder of the data sets.
        device: where to compute.
        quick: small sizes only.

    Returns:
        Rows of seconds for each varied size, the exponents of their growth, and the model.
    """
    widths = (50, 200) if quick else (50, 200, 700, 1500, 3000)
    counts = (100, 400) if quick else (500, 1000, 2500, 5000)
    ks = (2, 5) if quick else (2, 5, 10, 20, 40)
    k = 5 if quick else 10
    rows = {
        "parameters": [_costs(_mlp(width, 100, root, device), k) for width in widths],
        "examples": [_costs(_mlp(200, count, root, device), k) for count in counts],
        "k": [_costs(_mlp(200, counts[1], root, device), each) for each in ks],
    }
    what = ("gradient", "product", "solve", "apply")
    exponents = {
        size: {
            cost: exponent([row[size] for row in varied], [row[cost] for row in varied])
            for cost in what
        }
        for size, varied in rows.items()
    }
    largest = rows["parameters"][-1]
    # Gradients, products and projections of a dense model are all linear in P once P is large.
    modelled = [
        {"parameters": size, "examples": largest["examples"], "k": k}
        | {cost: largest[cost] * size / largest["parameters"] for cost in what}
        | {"solve_bytes": 4 * size * (2 * k + 12)}
        for size in (10**8, 10**9)
    ]
    return {"measured": rows, "exponents": exponents, "modelled": modelled}
