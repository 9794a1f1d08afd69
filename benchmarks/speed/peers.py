"""The solvers: ours and the peers', each with its best sensible options.

Where a solver can be told how many steps to take, it takes the fewest that reach the residual:
they are found once, before anything is timed, and none of the others is told of them.
"""

# Each peer is imported where it is used: ours can be measured without them.
# ruff: noqa: PLC0415

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.speed.problems import Problem, twice_differentiable
from benchmarks.speed.recipe import flat, recipe
from benchmarks.speed.reference import Check, Residuals
from benchmarks.speed.timing import now

OURS: Final = "subspace_optim"
EIGENTHINGS: Final = "hessian-eigenthings"
CURVLINOPS: Final = "curvlinops + eigsh"
PYHESSIAN: Final = "pyhessian"
RECIPE: Final = "edge-of-stability recipe"


@dataclass(frozen=True)
class Answer:
    """Eigenvalues ``(k,)``, vectors ``(k, P)`` and, where it is known, the products taken."""

    eigenvalues: Tensor
    vectors: Tensor
    products: int | None = None


@dataclass(frozen=True)
class Solver:
    """A way to the top k eigenpairs.

    Attributes:
        solve: from a problem, k and a setting.
        settings: to try, the cheapest first; from a problem, k and the residual to reach. ``None``
            where there is nothing to set.
        gradients: what a solve costs on the MLP, to tell what would take too long elsewhere.
        package: what has to be installed.
        meaning: of the setting, in words.
    """

    solve: Callable[[Problem, int, Any], Answer]
    settings: Callable[[Problem, int, float], Iterator[Any]] | None
    gradients: int
    package: str | None = None
    meaning: str = ""


def _lanczos_steps(problem: Problem, k: int, residual: float) -> Iterator[int]:
    """Yields numbers of Lanczos steps, from the first that by its own account is enough.

    The leading blocks of one tridiagonal matrix tell the residuals of all shorter runs.
    """
    from hessian_eigenthings import LambdaOperator, lanczos_tridiagonal

    hessian, longest = problem.hessian(), min(3 * k + 10, problem.size)
    operator = LambdaOperator(hessian.matvec, hessian.size, hessian.device, hessian.dtype)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(hessian.size, generator=generator).to(hessian.device)
    with hessian.frozen():
        run = lanczos_tridiagonal(operator, start, longest)
    diagonal, beside = run.alphas.double().cpu(), [*run.betas.tolist(), run.last_beta]
    for steps in range(k + 1, run.iterations + 1):
        offsets = torch.tensor(beside[: steps - 1], dtype=torch.float64)
        block = diagonal[:steps].diag() + offsets.diag(1) + offsets.diag(-1)
        values, rotation = torch.linalg.eigh(block)
        reached = beside[steps - 1] * rotation[-1, -k:].abs().max() / values[-1]
        if reached <= residual:
            yield steps
    yield from range(longest + 1, 4 * longest, k)


def _sweep_lengths(problem: Problem, k: int, residual: float) -> Iterator[int]:
    """Yields lengths of ARPACK's first sweep, from a little less than Lanczos needed elsewhere."""
    first = next(_lanczos_steps(problem, k, residual))
    yield from range(max(k + 2, first - 2), 4 * first)


def _ours(problem: Problem, k: int, _: None) -> Answer:
    subspace = so.DominantSubspace(problem.hessian(), k)
    basis = subspace.refresh()
    return Answer(basis.eigenvalues, basis.vectors, subspace.stats.products)


def _eigenthings(problem: Problem, k: int, steps: int) -> Answer:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(
        problem.model, [(problem.x, problem.y)], supervised_loss(problem.loss)
    )
    found = lanczos(operator, k=k, max_iter=steps, reorthogonalize=True, which="LA", seed=0)
    return Answer(found.eigenvalues, found.eigenvectors, found.iterations)


class _Criterion(nn.Module):
    """The loss as the module that curvlinops asks for."""

    reduction = "mean"

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        return self.loss(output, labels)


def _curvlinops(problem: Problem, k: int, steps: int) -> Answer:
    """A first sweep of ``steps`` products ends it, for the tolerance asks for no more."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = HessianLinearOperator(
        problem.model,
        _Criterion(problem.loss),
        list(problem.model.parameters()),
        [(problem.x, problem.y)],
        check_deterministic=False,  # it would cost two gradients and two products
        num_data=len(problem.x),
    ).to_scipy(np.float32)
    products = 0

    def product(v: Any) -> Any:
        nonlocal products
        products += 1
        return operator.matvec(v)

    values, vectors = eigsh(
        LinearOperator(operator.shape, matvec=product, dtype=np.float32),
        k,
        which="LA",
        ncv=steps,
        tol=1.0,
        v0=np.random.default_rng(0).standard_normal(problem.size).astype(np.float32),
    )
    order = values.argsort()[::-1]
    found = torch.from_numpy(values[order].copy()), torch.from_numpy(vectors.T[order].copy())
    return Answer(*found, products)


def _pyhessian_settings(_problem: Problem, _k: int, _residual: float) -> Iterator[Any]:
    yield from ((100, 1e-3), (100, 1e-5))  # its default, and one that asks for more


def _pyhessian(problem: Problem, k: int, setting: tuple[int, float]) -> Answer:
    from pyhessian import hessian

    iterations, tol = setting
    torch.manual_seed(0)
    problem.model.zero_grad()
    data = (problem.x, problem.y)
    with warnings.catch_warnings():
        # Gradients that hold their own graph: they are dropped below.
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
        operator = hessian(problem.model, problem.loss, data=data, cuda=problem.x.is_cuda)
    values, vectors = operator.eigenvalues(maxIter=iterations, tol=tol, top_n=k)
    problem.model.zero_grad()
    rows = torch.stack([flat(v) for v in vectors])
    return Answer(torch.tensor(values), rows.detach())


def _recipe(problem: Problem, k: int, _: None) -> Answer:
    return Answer(*recipe(problem, k))


def _recipe_in_single_precision(problem: Problem, k: int, _: None) -> Answer:
    return Answer(*recipe(problem, k, single=True))


SOLVERS: Final[dict[str, Solver]] = {
    OURS: Solver(_ours, None, 60),
    EIGENTHINGS: Solver(_eigenthings, _lanczos_steps, 70, EIGENTHINGS, "Lanczos steps"),
    CURVLINOPS: Solver(
        _curvlinops, _sweep_lengths, 130, "curvlinops-for-pytorch", "ncv of one sweep"
    ),
    RECIPE: Solver(_recipe, None, 200),
    f"{RECIPE}, single precision": Solver(_recipe_in_single_precision, None, 150),
    PYHESSIAN: Solver(
        _pyhessian, _pyhessian_settings, 300, PYHESSIAN, "(iterations, tol) of each pair"
    ),
}


def solve(name: str, problem: Problem, k: int, setting: Any) -> Answer:
    """Returns the answer of one solver at the problem's present parameters."""
    with twice_differentiable():
        return SOLVERS[name].solve(problem, k, setting)


def tune(
    name: str, problem: Problem, k: int, reference: Residuals, residual: float, limit: float
) -> tuple[Any, Check | None]:
    """Finds the cheapest setting that reaches a residual.

    Args:
        name: a key of ``SOLVERS``.
        problem: at its present parameters.
        k: how many pairs.
        reference: to check the answers.
        residual: to reach.
        limit: seconds, after which no further setting is tried.

    Returns:
        The setting, or the first of all where none did, and what it reached; ``None`` and ``None``
        where there is nothing to set.
    """
    settings = SOLVERS[name].settings
    if settings is None:
        return None, None
    tried: list[tuple[Any, Check]] = []
    start = now()
    for setting in settings(problem, k, residual):
        answer = solve(name, problem, k, setting)
        tried.append((setting, reference.check(answer.eigenvalues, answer.vectors)))
        if tried[-1][1].residual <= residual:
            return tried[-1]
        if now() - start > limit:
            break
    return tried[0]
