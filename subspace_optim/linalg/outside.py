r"""A look at what lies outside of a basis: is it the top one, or only an invariant subspace?

The residuals of a basis tell how far it is from *an* invariant subspace, and iterations that start
from it lead to that one. A direction of the bulk whose eigenvalue has risen above ``λ_k`` is in
neither: it takes a vector that the basis knows nothing of to see it. Here that is a random one,
and a few steps of Lanczos from it in the complement of the basis. How likely they are to have
missed a direction of a given eigenvalue follows from what they have seen (``start_vectors``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.krylov import Krylov
from subspace_optim.linalg.products import own_precision
from subspace_optim.linalg.rows import orthonormalise_

MISS_PROBABILITY = 0.01
"""How likely a look that is done is to have missed a direction above the basis."""
_BELOW = 0.01
"""How far below the spectrum the basis is sent, in units of its largest values."""


@dataclass(frozen=True)
class Outside:
    """What a look has seen.

    Attributes:
        guard: the largest pair outside of the basis: an eigenvalue from below, with its residual.
        missed: how likely a direction above the basis is to be there and to have been missed.
    """

    guard: EigenBasis
    missed: float


@own_precision
def look_outside(
    matmat: Callable[[Tensor], Tensor],
    basis: EigenBasis,
    guard: EigenBasis,
    *,
    lowest: float,
    seed: int,
    max_products: int = 12,
) -> Outside:
    r"""Looks for eigenvalues above ``λ_k`` outside of a basis, from a fresh random vector.

    Of ``(I − P) H (I − P)``: one product for the guard, and some along the random vector.

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, here for j up to 2.
        basis: k pairs whose rows nearly span an invariant subspace.
        guard: the largest pair outside, as far as it is known; of no rows if k = P.
        lowest: the smallest eigenvalue.
        seed: of the random vector.
        max_products: where to stop at the latest.

    Returns:
        The guard, improved, and the probability that a direction was missed. It ends once that is
        at most ``MISS_PROBABILITY``, or one was found: then the guard is above the basis.
    """
    if guard.k == 0:
        return Outside(guard, 0.0)
    last = float(basis.eigenvalues[-1])
    # Strictly below all that is outside, also where that is one eigenvalue.
    least = min(lowest, last, float(guard.eigenvalues[0])) - _BELOW * max(abs(last), abs(lowest))

    def outside(rows: Tensor) -> Tensor:
        # What rounding leaves inside of the basis is sent to the lower end, where nobody looks.
        within = basis.coefficients(rows)
        products = basis.project_out(matmat(rows - basis.combine(within)))
        return basis.add_to(products, within, alpha=least)

    krylov = Krylov(
        outside,
        guard.size,
        1,
        max_products=max_products,
        seed=seed,
        dtype=guard.dtype,
        device=guard.device,
        known=guard.vectors,
        inner=basis.inner,
    )
    missed, block = 1.0, krylov.pending
    while missed > MISS_PROBABILITY and not krylov.exhausted:
        pending = krylov.pending
        krylov.make_room(len(block))
        krylov.multiply(list(block) if krylov.pending is pending else krylov.pending[-1:])
        krylov.rayleigh_ritz()
        if krylov.values[0] >= last or krylov.complete:
            break
        problem, resolution = krylov.small_problem(), krylov.epsilon * krylov.scale
        missed = krylov.starts.overlooked(problem, last, resolution)
        # Next the row that a direction could hide behind best; after a restart the newest.
        hidden = np.abs(problem.transfer(last, resolution)).max(axis=0)
        block = [krylov.pending[hidden.argmax()]]
    if krylov.complete:
        missed = 0.0
    top, _ = krylov.pairs()
    row = basis.project_out(top.vectors)
    orthonormalise_(row, basis.inner)
    return Outside(EigenBasis(top.eigenvalues, row, top.residuals, basis.inner), missed)
