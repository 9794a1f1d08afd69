"""``ClassAverages``: the moving averages of class gradients, eqs. 16 and 17."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import norm
from subspace_optim.subspaces.checkpoints import SavedState, checksum, saved_rows

_SAFE = 1e-12
"""Norms of which the squares are far from the ends of float32."""


@dataclass(frozen=True)
class ClassAverages:
    r"""What is known of the classes; an observation makes another one, and changes none.

    .. math::
        c_k = \frac{1 - \gamma}{1 - \gamma^t} \sum_{i=1}^t \gamma^{t-i} c_k^{B_i}, \qquad
        \lambda_k^2 = \frac{1 - \gamma}{1 - \gamma^t} \sum_{i=1}^t \gamma^{t-i}
        (\lambda_k^{B_i})^2

    (`class_gradient_2020`, eqs. 16 and 17), over the t minibatches in which class k occurred.

    Attributes:
        vectors: ``(C, P)``, ``v_k = c_k / |c_k|``, zero where ``c_k`` is. Of a sharded model, the
            coordinates that lie on this rank.
        norms: ``(C,)``, ``|c_k|``, float64.
        squares: ``(C,)``, ``λ_k²``, float64: it has twice the exponents of ``λ_k``.
        updates: ``(C,)``, t of each class.
        inner: completes sums over coordinates.
    """

    vectors: Tensor
    norms: Tensor
    squares: Tensor
    updates: Tensor
    inner: InnerProduct = WHOLE

    def curvature(self) -> LowRankCurvature:
        """Returns eq. 11; λ = 1 for a class that was never seen."""
        values = torch.where(self.updates > 0, self.squares.sqrt(), 1.0)
        return LowRankCurvature(values.to(self.vectors.dtype), self.vectors, self.inner)


def averaged(
    old: ClassAverages | None,
    gradients: Tensor,
    spreads: Tensor,
    counts: Tensor,
    *,
    decay: float,
    inner: InnerProduct = WHOLE,
) -> ClassAverages:
    """Returns the averages with a minibatch more, in the memory of its gradients.

    The share of a class's t-th minibatch is ``(1 − γ) / (1 − γᵗ)``, and the old average keeps the
    rest: the sums of eqs. 16 and 17, normalised at every step.

    Args:
        old: the averages so far; ``None`` before the first minibatch.
        gradients: ``(C, P)``, ``Σ ∇z_k`` over the examples of class k; overwritten.
        spreads: ``(C,)``, ``Σ p_k (1 − p_k)`` over them.
        counts: ``(C,)``, how many they are.
        decay: γ.
        inner: completes sums over coordinates.

    Raises:
        NonFiniteError: something is not finite.
    """
    counts, spreads = counts.double(), spreads.double()
    seen, scale = counts > 0, 1 / counts.clamp(min=1)
    values = spreads / counts.sum() * (_row_norms(gradients, inner) * scale).square()
    if not bool(values.isfinite().all()):
        message = (
            "A logit or a gradient of a class is not finite; the minibatch was not added to "
            "the averages. Lower the learning rate, or look for NaN in parameters and data."
        )
        raise NonFiniteError(message)
    updates = seen.long() if old is None else old.updates.to(seen.device) + seen
    rate = torch.where(seen, (1 - decay) / (1 - decay ** updates.double()), 0.0)
    gradients.mul_((rate * scale).to(gradients.dtype)[:, None])
    squares = rate * values.square()
    known = torch.zeros_like(scale)
    if old is not None:
        known = old.norms.to(rate.device)
        # What is absent keeps its unit vector, with no rounding.
        share = torch.where(seen, (1 - rate) * known, 1.0).to(gradients.dtype)
        gradients.addcmul_(old.vectors.to(gradients), share[:, None])
        squares += (1 - rate) * old.squares.to(rate.device)
    norms = _row_norms(gradients, inner)
    smallest = torch.finfo(gradients.dtype).tiny
    inverse = torch.where(norms > smallest, 1 / norms, 0.0)
    inverse = torch.where(seen, inverse, 1.0).to(gradients.dtype)
    gradients.mul_(inverse[:, None])
    return ClassAverages(gradients, torch.where(seen, norms, known), squares, updates, inner)


# In a state dict.

_OF_CLASSES = {"norms": torch.float64, "squares": torch.float64, "updates": torch.int64}
ENTRIES = ("vectors", *_OF_CLASSES)
"""The names of the averages."""


def saved(averages: ClassAverages | None, classes: int, space: ParameterSpace) -> dict[str, Any]:
    """Returns copies of the averages; zeros of the same shapes where there are none."""
    shape = (classes, space.size_here)
    rows = torch.zeros(shape, dtype=space.dtype, device=space.device)
    if averages is not None:
        rows.copy_(averages.vectors)
    entries: dict[str, Any] = {"observed": averages is not None}
    entries["vectors"] = saved_rows(space, rows)
    for name, dtype in _OF_CLASSES.items():
        entries[name] = (
            torch.zeros(classes, dtype=dtype, device=space.device)
            if averages is None
            else getattr(averages, name).clone()
        )
    return entries | {"checksum": checksum(entries)}


def loaded(state: SavedState, classes: int, space: ParameterSpace) -> ClassAverages:
    """Returns the averages of a saved state."""
    remedy = "The state is of another model or num_classes."
    vectors = state.rows("vectors", (classes,), space, remedy=remedy)
    others = {
        name: state.tensor(name, (classes,), dtype, space.device, minimum=0, remedy=remedy)
        for name, dtype in _OF_CLASSES.items()
    }
    return ClassAverages(vectors, **others, inner=space.inner)


def check_averages(averages: ClassAverages, observations: int, saved: torch.dtype) -> None:
    """Checks what all averages have in common.

    Raises:
        ArgumentError: a vector is neither of norm 1 nor 0, or a class was seen more often than
            there were minibatches, or has averages and was never seen.
    """
    vectors, updates, inner = averages.vectors, averages.updates, averages.inner
    most = int(updates.max())
    if most > observations:
        allowed = f"at most the minibatches observed, {observations}"
        raise ArgumentError("the largest of the loaded updates", most, allowed)
    norms, size = _row_norms(vectors, inner), inner.size(vectors.shape[1])
    accuracy = max(torch.finfo(dtype).eps for dtype in (saved, vectors.dtype))
    off = ((norms - 1).abs() > min(0.01, 8 * size**0.5 * accuracy)) & (norms != 0)
    for k in off.nonzero().flatten().tolist():
        raise ArgumentError(f"the norm of the loaded vectors[{k}]", float(norms[k]), "1, or 0")
    strange = (updates == 0) & ((norms > 0) | (averages.norms > 0) | (averages.squares > 0))
    for k in strange.nonzero().flatten().tolist():
        allowed = "at least 1, as it has averages"
        raise ArgumentError(f"the loaded updates[{k}]", 0, allowed)


def _row_norms(rows: Tensor, inner: InnerProduct) -> Tensor:
    """Returns the norms of the rows, float64: squares of small numbers do not vanish."""
    norms = inner.sum(torch.linalg.vector_norm(rows, dim=1).double().square()).sqrt()
    for i, length in enumerate(norms.tolist()):
        if not _SAFE < length < 1 / _SAFE:
            norms[i] = norm(rows[i], inner)
    return norms
