"""How often a cold solve on a GPU waits for the host."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.speed.problems import Problem
from subspace_optim.linalg import top_eigenpairs


def measure(problem: Problem, k: int) -> dict[str, Any]:
    """Counts the synchronisations of a cold solve, by torch's own debug mode.

    Args:
        problem: on a GPU.
        k: how many pairs.

    Returns:
        How many there were, beside Rayleigh-Ritz steps and products.
    """
    hessian = problem.hessian()
    with hessian.frozen(), warnings.catch_warnings(record=True) as caught:
        hessian.matvec(torch.ones(problem.size, device=problem.x.device))  # the graph is built
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solution = top_eigenpairs(
                hessian.matmat, problem.size, k, dtype=hessian.dtype, device=hessian.device
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "synchronisations": sum("synchroniz" in str(warning.message) for warning in caught),
        "ritz_steps": solution.ritz_steps,
        "products": solution.products,
    }
