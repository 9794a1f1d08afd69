"""``TopPairs``: the top k eigenpairs of an operator, found by a solve, saved and loaded."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    InconsistentDerivativeError,
)
from subspace_optim.curvature.operator import CurvatureOperator, rounding_at
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import top_eigenpairs
from subspace_optim.linalg.refinement import staleness_of_rounding
from subspace_optim.linalg.rounded import RoundedBasis, stored
from subspace_optim.linalg.rows import check_orthonormal, orthonormalise_
from subspace_optim.subspaces.checkpoints import SavedState, saved_rows

_ASYMMETRIC = 1e-2
"""The asymmetry of products that rounding does not explain: at most 1e-5 in sound matrices."""
ROUNDED = torch.bfloat16
"""The dtype that vectors may be held in to save memory, where it is not their own.

Not float16: most entries of a vector of length 1 are below its normal numbers from P = 10⁹ on."""
_VECTORS = ("vectors", "guard_vectors")
_ROOM = 4
"""What a saved basis may be off by, in units of what a basis that is given may be."""


@dataclass(frozen=True)
class TopPairs:
    """The top k eigenpairs, and what was learned of the others; a value.

    Attributes:
        basis: the k pairs.
        guard: the pair that comes next; of no rows if k = P.
        lowest: the smallest eigenvalue.
        mean: the mean of all eigenvalues.
    """

    basis: EigenBasis
    guard: EigenBasis
    lowest: float
    mean: float

    @property
    def gap(self) -> float | None:
        """``λ_k − λ_{k+1}``; ``None`` for k = P."""
        if self.guard.k == 0:
            return None
        return float(self.basis.eigenvalues[-1] - self.guard.eigenvalues[0])

    @property
    def below(self) -> float:
        """``λ_{k+1}``; of nothing if k = P."""
        return float(self.guard.eigenvalues[0]) if self.guard.k else -math.inf

    @property
    def staleness_of_rounding(self) -> float:
        """The staleness that a probe sees though no parameter has moved, as vectors are rounded."""
        return staleness_of_rounding(self.basis, self.guard, mean=self.mean)

    @property
    def rows(self) -> Tensor:
        """``(k + 1, P)``: the eigenvectors, and that of the guard."""
        return torch.cat([self.basis.vectors, self.guard.vectors])

    def stored(self, dtype: torch.dtype | None) -> TopPairs:
        """Returns the same with vectors that are held in a dtype; ``None``: in their own."""
        basis, guard = stored(self.basis, dtype), stored(self.guard, dtype)
        return TopPairs(basis, guard, self.lowest, self.mean)


def solve(
    operator: CurvatureOperator, k: int, *, tol: float, seed: int, max_angle: float | None = None
) -> TopPairs:
    """Finds the top k eigenpairs at the present parameters, without a basis to start from.

    Args:
        operator: whose.
        k: how many.
        tol: relative residual, as of ``DominantSubspace``.
        seed: of the start vectors.
        max_angle: the sine to the true subspace to reach as well, where there is a gap.

    ``InconsistentDerivativeError`` for products of a matrix that is not symmetric.
    """
    solution = top_eigenpairs(
        operator.matmat,
        operator.size,
        k,
        tol=tol,
        max_angle=max_angle,
        seed=seed,
        dtype=operator.dtype,
        device=operator.device,
        accuracy=operator.accuracy,
        inner=operator.inner,
    )
    _check_symmetry(operator, solution.asymmetry)
    return TopPairs(solution.basis, solution.guard, solution.lowest, solution.mean)


def _check_symmetry(operator: CurvatureOperator, asymmetry: float) -> None:
    """Looks at what the products of a solve tell for nothing: whether the matrix is symmetric.

    Raises:
        InconsistentDerivativeError: it is not, by far more than its products are rounded.
    """
    exact = operator.accuracy <= torch.finfo(operator.dtype).eps
    if not exact or not asymmetry > _ASYMMETRIC:
        return
    loss = operator.loss()
    if asymmetry > rounding_at(loss, operator.dtype):
        message = (
            f"The matrix is not symmetric: ⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {asymmetry:.2g} of its "
            "products, so it is no Hessian. Some part of the model has a wrong second derivative, "
            "or a gradient that is not that of a function, such as gradient reversal. "
            "hessian.check() tells more; FiniteDifferenceHessian needs gradients only."
        )
        raise InconsistentDerivativeError(message)
    warnings.warn(
        f"At a loss of {loss:.2g} rounding makes the products asymmetric by {asymmetry:.2g}: the "
        "eigenpairs are no more accurate than that. model.double() has accurate ones.",
        ConvergenceWarning,
        stacklevel=2,
    )


# How they are held.


def check_basis_dtype(dtype: Any) -> torch.dtype | None:
    """Returns the argument ``basis_dtype``.

    Raises:
        ArgumentError: vectors cannot be held in it.
    """
    if dtype is not None and dtype is not ROUNDED:
        remedy = "None holds the vectors as they are computed, in float32 or float64."
        raise ArgumentError("basis_dtype", dtype, f"None or {ROUNDED}", remedy)
    return ROUNDED if dtype is ROUNDED else None


# In a state dict.


def names_in_state(operator: CurvatureOperator, k: int) -> set[str]:
    """Returns the names of the entries that ``saved`` makes."""
    return {*_shapes(operator, k), "solved", "guarded", "lowest", "mean", "rounded", "rounding"}


def _shapes(operator: CurvatureOperator, k: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that stand for k pairs and the guard, by their names."""
    here, guard = operator.parameters.size_here, min(1, operator.size - k)
    own = {"eigenvalues": (k,), "vectors": (k, here), "residuals": (k,)}
    next_ = {"eigenvalues": (guard,), "vectors": (guard, here), "residuals": (guard,)}
    return own | {f"guard_{name}": shape for name, shape in next_.items()}


def saved(
    pairs: TopPairs | None, operator: CurvatureOperator, k: int, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Returns copies of the pairs; zeros of the same shapes where there are none.

    Args:
        pairs: to be saved.
        operator: whose they are.
        k: how many.
        dtype: that vectors are held in, and saved; ``None``: that of the operator.
    """
    own = dict.fromkeys(_shapes(operator, k), operator.dtype)
    own |= dict.fromkeys(_VECTORS, dtype or operator.dtype)
    entries: dict[str, Any] = {
        "solved": pairs is not None,
        "guarded": pairs is not None and pairs.guard.k > 0,
        "lowest": 0.0 if pairs is None else pairs.lowest,
        "mean": 0.0 if pairs is None else pairs.mean,
        "rounded": dtype is not None,
        "rounding": 0.0 if pairs is None else pairs.basis.rounding,
        **{
            name: torch.zeros(shape, dtype=own[name], device=operator.device)
            for name, shape in _shapes(operator, k).items()
        },
    }
    for prefix, each in () if pairs is None else (("", pairs.basis), ("guard_", pairs.guard)):
        if each.k:
            rows = each.rows if isinstance(each, RoundedBasis) else each.vectors
            entries[f"{prefix}vectors"] = rows.detach().clone()
            for name in ("eigenvalues", "residuals"):
                entries[f"{prefix}{name}"] = getattr(each, name).detach().clone()
    for name in _VECTORS:
        entries[name] = saved_rows(operator.parameters, entries[name])
    return entries


def loaded(state: SavedState, operator: CurvatureOperator, k: int) -> TopPairs | None:
    """Returns the pairs that were saved, in the operator's dtype and on its device.

    Vectors that were held in fewer bits are so here: ``TopPairs.stored`` makes what is wanted.
    """
    lowest, mean = state.number("lowest"), state.number("mean")
    solved, guarded = state.flag("solved"), state.flag("guarded")
    basis = _loaded_pairs(state, "", operator, k, known=solved)
    guard = _loaded_pairs(state, "guard_", operator, k, known=guarded)
    return TopPairs(basis, guard, lowest, mean) if solved else None


def _loaded_pairs(
    state: SavedState, prefix: str, operator: CurvatureOperator, k: int, *, known: bool
) -> EigenBasis:
    """Returns the pairs under names with this prefix; none if they are not known.

    Raises:
        ArgumentError: they cannot be pairs, are not orthonormal or not in order.
    """
    shapes, remedy = _shapes(operator, k), "The state is of another model or k."
    values, residuals = (
        state.tensor(
            f"{prefix}{name}",
            shapes[f"{prefix}{name}"],
            operator.dtype,
            operator.device,
            minimum=0 if name == "residuals" else None,
            remedy=remedy,
        )
        for name in ("eigenvalues", "residuals")
    )
    lead = shapes[f"{prefix}vectors"][:1]
    vectors = state.rows(f"{prefix}vectors", lead, operator.parameters, remedy=remedy)
    inner = operator.inner
    if not known:
        return EigenBasis(values[:0], vectors[:0], residuals[:0], inner)
    rounding = 0.0 if prefix else state.number("rounding", minimum=0, maximum=1)
    in_order = values.tolist()
    if in_order != sorted(in_order, reverse=True):
        raise ArgumentError(state.label(f"{prefix}eigenvalues"), in_order, "in descending order")
    dtype, held = state.dtype(f"{prefix}vectors"), state.flag("rounded")
    if dtype == ROUNDED and not held:
        remedy = "Load it into a subspace with basis_dtype=None, or by torch.load."
        allowed = "in the dtype that it was saved in, of more bits"
        raise ArgumentError(state.label(f"{prefix}vectors"), dtype, allowed, remedy)
    dtype = ROUNDED if held else dtype
    accuracy = max(torch.finfo(d).eps for d in (dtype, vectors.dtype))
    check_orthonormal(state.label(f"{prefix}vectors"), vectors, _ROOM * accuracy, inner)
    if held:
        return RoundedBasis(values, vectors.to(dtype), residuals, inner, rounding)
    if vectors.dtype != dtype:
        orthonormalise_(vectors, inner)
    return EigenBasis(values, vectors, residuals, inner, rounding)
