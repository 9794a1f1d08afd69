"""Solves that start in low precision, and end with a certificate in full precision.

The pairs of a matrix whose products are cheap and rounded are refined by products in float32, one
step of subspace iteration each, until residuals that were measured in float32 are small enough.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.clock import seconds_of
from benchmarks.gpu.graphs import GradientGraph
from benchmarks.gpu.sections import NEEDS_CUDA
from benchmarks.speed.problems import Problem
from benchmarks.speed.timing import now
from subspace_optim.linalg import EigenBasis, top_eigenpairs
from subspace_optim.linalg.refinement import refine
from subspace_optim.linalg.rows import largest_sine

RESIDUAL: Final = 1e-3
_MOST_REFINEMENTS: Final = 4
_ROUNDED: Final = {"bf16": 2.0**-8, "tf32": 2.0**-11, "fp32": 2.0**-24}
"""Relative error of a product."""


class Certified(NamedTuple):
    """Pairs with residuals that were measured in full precision, relative to the largest pair."""

    basis: EigenBasis
    residual: float
    products: int


def measure(problem: Problem, k: int, rows: dict[str, Any]) -> None:
    """Solves from the start in each precision, with a certificate in float32.

    Args:
        problem: at its present parameters.
        k: how many pairs.
        rows: for each precision: seconds of one of its products, products of both kinds, seconds
            in all, the residual that was measured, and the sine to the basis of the first row.
    """
    device = problem.x.device
    full = GradientGraph(problem)
    vector = torch.ones(problem.size, device=device)
    first: EigenBasis | None = None
    for name, accuracy in reversed(_ROUNDED.items()):
        if name == "tf32" and device.type != "cuda":
            rows[name] = NEEDS_CUDA
            continue
        begin = now()
        with _precision(name):
            low = _rounded(problem, name, full)
            product = seconds_of(lambda low=low: low.product(vector.to(low.dtype)), device)  # type: ignore[misc]
            begin = now()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a residual that rounding does not allow
                solution = top_eigenpairs(
                    low.matmat,
                    problem.size,
                    k,
                    tol=RESIDUAL if name == "fp32" else max(10 * RESIDUAL, 2 * accuracy),
                    device=device,
                    accuracy=0.0 if name == "fp32" else accuracy,
                )
        found = certified(full.matmat, solution, RESIDUAL)
        seconds = now() - begin
        first = found.basis if first is None else first
        rows[name] = {
            "product_seconds": product,
            "products": solution.products,
            "full_products": found.products,
            "seconds": seconds,
            "residual": found.residual,
            "reached": found.residual <= RESIDUAL,
            "sine": largest_sine(found.basis.vectors, first.vectors),
            "largest_eigenvalue": float(found.basis.eigenvalues[0]),
        }


def certified(matmat: Callable[[Tensor], Tensor], solution: Any, residual: float) -> Certified:
    """Refines pairs until their residuals, measured with ``matmat``, are small enough.

    Args:
        matmat: the products that count.
        solution: of a solve with others.
        residual: to reach, relative to the largest eigenvalue.

    Returns:
        The pairs, the residual, and how many products that took: k for each measure, and k + 1
        for each refinement.
    """
    basis, guard, products = solution.basis, solution.guard, 0
    reached = float("inf")
    for turn in range(_MOST_REFINEMENTS + 1):
        images = matmat(basis.vectors)
        products += basis.k
        values = torch.linalg.vecdot(images, basis.vectors)
        lengths = torch.linalg.vector_norm(images - values[:, None] * basis.vectors, dim=1)
        basis = EigenBasis(values, basis.vectors, lengths)
        reached = float(lengths.max() / values.abs().max())
        if reached <= residual or turn == _MOST_REFINEMENTS or not guard.k:
            break
        refined = refine(matmat, basis, guard, lowest=solution.lowest, mean=solution.mean)
        basis, guard = refined.basis, refined.guard
        products += basis.k + guard.k
    return Certified(basis, reached, products)


def _rounded(problem: Problem, name: str, full: GradientGraph) -> GradientGraph:
    """The gradient graph in that precision."""
    if name == "fp32":
        return full
    model = problem.model
    return GradientGraph(problem, copy.deepcopy(model).bfloat16() if name == "bf16" else model)


def _precision(name: str) -> AbstractContextManager[None]:
    return _tf32() if name == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    """Matrix products and convolutions of float32 in TF32, inside."""
    backends: Any = torch.backends  # its annotations lack the settings by operation
    settings = [backends.cuda.matmul, backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
