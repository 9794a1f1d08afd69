r"""Sharpness in the norm of the optimizer: λ_1 is the one for gradient descent alone.

A step of steepest descent in a norm, ``−η ‖g‖_* d`` with ``d = argmax{⟨g, d⟩ : ‖d‖ ≤ 1}``, changes
a quadratic by

.. math:: -\eta \|g\|_*^2 + \tfrac{1}{2} \eta^2 \|g\|_*^2\; d^\top H d
          \;\le\; -\eta \|g\|_*^2 \left( 1 - \tfrac{1}{2} \eta S \right), \qquad
          S = \max_{\|d\| \le 1} d^\top H d

so that the loss falls while S is below 2/η, whatever the norm. Sign descent, Lion and Muon step by
``−η d``, whatever the length of the gradient: their rate is ``η/‖g‖_*``, and what S is to be held
against is ``2 ‖g‖_* / η`` (``dual_norm``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_optim._progress import Progress, ProgressOption
from subspace_optim._validation import (
    ArgumentError,
    NonFiniteError,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.spectrum import multiplying, solve
from subspace_optim.diagnostics.unit_balls import (
    Norm,
    UnitBall,
    ball_of_norm,
    ball_of_optimizer,
)
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import is_finite

_Product = Callable[[Tensor], Tensor]


def norm_sharpness(
    operator: CurvatureOperator,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    norm: Norm | None = None,
    basis: EigenBasis | None = None,
    starts: int = 4,
    steps: int = 50,
    tol: float = 1e-3,
    seed: int = 0,
    progress: ProgressOption = False,
) -> float:
    r"""Returns the largest curvature in the unit ball of a norm: a lower bound of it.

    .. math:: S = \max \left\{ d^\top H d : \|d\| \le 1 \right\}

    ==============  ===============================================  ===========================
    norm            of                                               the ball
    ==============  ===============================================  ===========================
    ``euclidean``   SGD, with any momentum                           ``Σ d_i² ≤ 1``: S is λ_1
    ``sign``        sign descent, Lion; Adam without its averages    ``|d_i| ≤ 1`` for each i
    ``spectral``    Muon                                             every matrix has a spectral
                                                                     norm of at most 1
    ==============  ===============================================  ===========================

    Parameters of several norms have the largest of them. An optimizer tells its norm; where it has
    several rates, or scales its updates as Muon does, the balls of the parameters are as large as
    their steps are, relative to the largest rate of all: S is then to be held against 2/η of that.
    Momentum and averages do not count: S is that of the optimizer without them.

    But for the Euclidean norm, where the eigensolver finds λ_1, this is a hard problem (for signs
    that of the largest cut of a graph), and **what is returned is the largest curvature that was
    found**: S is that or more. It never falls from one step of the search to the next. A step goes
    from d towards ``argmax{⟨Hd, v⟩ : ‖v‖ ≤ 1}``, a conditional gradient: the signs of Hd, or the
    polar factors of its matrices; and as far as the curvature grows, which is all of the way where
    it is positive along it (then this is a power iteration). Where it has been c below 0 along a
    step, the next goes towards the point of the ball that is nearest to ``d + Hd/c``: the maximum
    need then not be at a corner. It is at least the curvature along the optimizer's own direction,
    from which the first search starts.

    It costs a gradient, and one product for each start and step, at most ``starts · (steps + 1)``
    and mostly a quarter of that; for spectral norms also a singular value decomposition of each
    matrix. Memory: eight vectors of P for each start. The Euclidean norm costs a solve. Of a
    sharded model each matrix is gathered for its decomposition, one at a time, which all ranks
    compute; random directions are others on other numbers of ranks. Arguments out of range, an
    optimizer whose norm is not known, and both an optimizer and a norm, or none, raise
    ``ArgumentError``.

    Args:
        operator: the Hessian.
        optimizer: whose norm it is, or several that together hold the parameters. Parameters that
            none of them moves do not count.
        norm: instead of an optimizer; a name, or a mapping of patterns of parameter names to
            names, such as ``{"*.weight": "spectral", "*": "sign"}``: the first that fits counts.
            A vector is a matrix of one column, and a kernel one with a row for each of its outputs.
        basis: eigenvectors to start from, besides, where they are there already.
        starts: searches, the first from the gradient and the others from random directions.
        steps: of each search, at most.
        tol: a search ends where a step gains less than this, relative to what was found.
        seed: of the random directions.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The largest curvature that was found, 0 or above.

    Raises:
        NonFiniteError: the gradient is NaN or infinite; so is a product.

    Reference:
        Islamov, Crawshaw, Cohen & Gower 2026, *Non-Euclidean gradient descent operates at the edge
        of stability* (arXiv 2603.05002): *generalized sharpness*.
    """
    check_integer("starts", starts, minimum=1)
    check_integer("steps", steps, minimum=1)
    check_number("tol", tol)
    check_integer("seed", seed, minimum=0)
    ball = unit_ball(operator, optimizer, norm)
    R = ball.radius()

    def product(rows: Tensor) -> Tensor:
        return operator.matmat(rows * R).mul_(R)

    with multiplying(operator, progress):
        if set(ball.norms) == {"euclidean"}:
            largest = solve(operator, product, 1, tol=tol, seed=seed).eigenvalues[0]
            return max(0.0, float(largest))
        operator.linearize()
        inner = operator.inner
        generator = torch.Generator(operator.device).manual_seed(inner.seed(seed))
        random = torch.randn(
            starts - 1,
            operator.parameters.size_here,
            generator=generator,
            dtype=operator.dtype,
            device=operator.device,
        )
        known = [] if basis is None else [basis.vectors.to(random)]
        directions = torch.cat([operator.gradient()[None] * R, *known, random])
        if not is_finite(directions, inner):
            raise NonFiniteError(_NOT_FINITE.format("The gradient"))
        with Progress("norm sharpness", "steps at most", steps) as searching:
            best = _search(product, ball, ball.best(directions), steps, tol, searching.tick)
        along = torch.dot(best.double(), product(best[None])[0].double())
        return max(0.0, float(inner.sum(along)))


def dual_norm(
    operator: CurvatureOperator,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    norm: Norm | None = None,
    gradient: Tensor | None = None,
) -> float:
    r"""Returns the length of the gradient in the dual of an optimizer's norm.

    .. math:: \|g\|_* = \max \left\{ \langle g, d \rangle : \|d\| \le 1 \right\}

    The Euclidean length, the sum of the absolute entries (``sign``), or the sum of the singular
    values of all matrices (``spectral``). For optimizers whose steps are as long as their rate,
    ``norm_sharpness`` is to be held against ``2 ‖g‖_* / η``. Arguments that ``norm_sharpness``
    would refuse raise ``ArgumentError``. It costs a gradient, where none is given.

    Args:
        operator: the Hessian.
        optimizer: as there.
        norm: as there.
        gradient: g, ``(P,)`` (default: of the operator's loss).

    Returns:
        The length.
    """
    ball = unit_ball(operator, optimizer, norm)
    g = (operator.gradient() if gradient is None else gradient.to(operator.dtype)) * ball.radius()
    return float(operator.inner.sum(torch.dot(g.double(), ball.best(g[None])[0].double())))


def _search(
    product: _Product,
    ball: UnitBall,
    start: Tensor,
    steps: int,
    tol: float,
    tick: Callable[[int], object],
) -> Tensor:
    """Returns the best of the points that are reached from rows of the ball, ``(P,)``.

    Raises:
        NonFiniteError: a product is NaN or infinite.
    """
    inner = ball.space.inner
    d, product_of_d = start, product(start)
    values = inner.sum(_dots(d, product_of_d))
    c = torch.zeros_like(values)  # how negative the curvature was along the steps of each row
    going = torch.arange(len(d), device=d.device)
    for number in range(steps):
        tick(number)
        if not bool(values.isfinite().all()):
            raise NonFiniteError(_NOT_FINITE.format("A product with the matrix"))
        if len(going) == 0:
            break
        point, slope = d[going], product_of_d[going]
        flat = (c[going] == 0)[:, None]
        scale = c[going].where(c[going] > 0, 1.0)[:, None].to(d)
        target = ball.best(slope) if flat.any() else slope
        if not flat.all():
            target = torch.where(flat, target, ball.nearest(point + slope / scale))
        step = target - point
        product_of_step = product(step)
        pairs = (slope, step), (step, product_of_step), (step, step)
        rise, bend, lengths = inner.sum(torch.stack([_dots(*pair) for pair in pairs]))
        rise = rise.clamp(min=0.0)
        # The value along the step is v + 2 t rise + t² bend, for t up to 1.
        t = torch.where(bend < 0, (rise / -bend).clamp(max=1.0), 1.0)
        gain = 2 * t * rise + t.square() * bend
        d[going] = point.addcmul_(step, t[:, None].to(d))
        product_of_d[going] = slope.addcmul_(product_of_step, t[:, None].to(d))
        values[going] += gain
        c[going] = torch.maximum(c[going], -bend / lengths.where(lengths > 0, 1.0))
        going = going[gain > tol * values[going].abs()]
    return d[values.argmax()]


def _dots(first: Tensor, second: Tensor) -> Tensor:
    """Returns what the coordinates here add to the inner product of each pair, in float64."""
    return (first * second).sum(dim=1, dtype=torch.float64)


def unit_ball(
    operator: CurvatureOperator,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    norm: Norm | None,
) -> UnitBall:
    """Returns the unit ball of one or the other.

    Raises:
        ArgumentError: both are given, or none.
    """
    if (optimizer is None) == (norm is None):
        found = "None, as optimizer is" if norm is None else f"{norm!r}, beside an optimizer"
        raise ArgumentError("norm", found, "given instead of an optimizer")
    if norm is not None:
        return ball_of_norm(norm, operator.parameters)
    assert optimizer is not None  # noqa: S101 (one of them is given)
    return ball_of_optimizer(optimizer, operator.parameters)


_NOT_FINITE = (
    "{} is not finite. Lower the learning rate, or look for NaN in the parameters and the data."
)
