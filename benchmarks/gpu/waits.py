"""How often a product, a solve and a kept basis wait for the host, by torch's own debug mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

import subspace_optim as so
from benchmarks.gpu.sections import NEEDS_CUDA
from benchmarks.speed.problems import Problem
from subspace_optim.linalg import top_eigenpairs


def waits(function: Callable[[], object], device: torch.device) -> int | str:
    """Returns how often a call waits for a GPU; without one it is called all the same."""
    if device.type != "cuda":
        function()
        return NEEDS_CUDA
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(problem: Problem, k: int, rows: dict[str, Any]) -> None:
    """Counts, where it can be counted.

    Args:
        problem: at its present parameters.
        k: dimension of the subspace.
        rows: ``"product"``, with its graph there; ``"solve"``, which may wait once a restart; and
            ``"update"`` of a basis that is kept, at new parameters.
    """
    device, hessian = problem.x.device, problem.hessian()
    vector = torch.ones(problem.size, device=device)
    with hessian.frozen():
        hessian.matvec(vector)  # the graph is built, and the operator proved
        rows["product"] = {"waits": waits(lambda: hessian.matvec(vector), device)}
        found: list[Any] = []

        def solve() -> None:
            size, dtype = problem.size, hessian.dtype
            found.append(top_eigenpairs(hessian.matmat, size, k, dtype=dtype, device=device))

        counted = waits(solve, device)
        rows["solve"] = {
            "waits": counted,
            "ritz_steps": found[0].ritz_steps,
            "products": found[0].products,
        }
    hessian.release()
    subspace = so.DominantSubspace(hessian, k, max_angle=0.5)
    subspace.update()
    theta, before = problem.theta(), subspace.stats.products
    problem.set_theta(theta * (1 + 1e-6))
    counted = waits(subspace.update, device)
    rows["update"] = {"waits": counted, "products": subspace.stats.products - before}
    problem.set_theta(theta)
