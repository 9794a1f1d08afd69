"""``FixedSubspace``: the span of given vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subspace_optim._display import Shown, numbers
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import unwrapped
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import check_orthonormal, is_finite, orthonormalise_


class FixedSubspace(Shown):
    """The span of given vectors, whatever the parameters are: a basis that never changes.

    For a basis of one's own: that of another network, of the start of training, of random
    directions. Vectors that are orthonormal up to rounding are made so to a few units in the last
    place, and pairs are put in descending order of their eigenvalues; the user's tensors are
    left as they are.

    Args:
        model: owns the parameters. ``DistributedDataParallel`` and ``torch.compile`` wrappers are
            taken off.
        vectors: ``(k, P)``, orthonormal rows, in the coordinates of ``params``; of a model that is
            sharded, on each rank those that lie there.
        eigenvalues: ``(k,)``, the curvatures along them (default: ones). Projections do not look
            at them; optimizers that divide by the curvature, as Newton's method does, need them.
        params: the parameters: tensors, a pattern of names, or a predicate of (name, tensor)
            (default: all that require a gradient).

    Attributes:
        parameters: the coordinates of the basis.
        basis: the basis; its residuals are 0.

    Raises:
        ArgumentError: an argument is of the wrong shape, not finite or not orthonormal.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Tensor,
        eigenvalues: Tensor | None = None,
        *,
        params: Params = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
        space = ParameterSpace(unwrapped(model), params)
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ArgumentError("vectors", kind, "a tensor of real numbers")
        shape, here = tuple(vectors.shape), space.size_here
        if vectors.dim() != 2 or shape[1] != here or not 1 <= shape[0] <= space.size:
            allowed = f"(k, {here}), one vector a row, k from 1 to {space.size}"
            raise ArgumentError("the shape of vectors", shape, allowed)
        if eigenvalues is None:
            eigenvalues = torch.ones(len(vectors))
        if not isinstance(eigenvalues, Tensor) or eigenvalues.is_complex():
            raise ArgumentError(
                "eigenvalues", type(eigenvalues).__name__, "a tensor of real numbers"
            )
        eigenvalues = eigenvalues.detach().to(space.device, space.dtype)
        if tuple(eigenvalues.shape) != shape[:1]:
            found, allowed = tuple(eigenvalues.shape), f"{shape[:1]}, one value a vector"
            raise ArgumentError("the shape of eigenvalues", found, allowed)
        eigenvalues, order = eigenvalues.sort(descending=True, stable=True)
        rows = vectors.detach().to(space.device, space.dtype)[order]  # a copy
        inner = space.inner
        finite = {"vectors": is_finite(rows, inner), "eigenvalues": is_finite(eigenvalues)}
        for name, sound in finite.items():
            if not sound:
                raise ArgumentError(name, "not finite", "finite", "Look for NaN in them.")
        accuracy = max(torch.finfo(t.dtype).eps for t in (vectors, rows))
        check_orthonormal("vectors", rows, accuracy, inner)
        orthonormalise_(rows, inner)
        self.parameters = space
        self.basis = EigenBasis(eigenvalues, rows, torch.zeros_like(eigenvalues), inner)

    def _facts(self) -> dict[str, str]:
        values = numbers(self.basis.eigenvalues)
        space = repr(self.parameters)
        return {"k": str(self.basis.k), "eigenvalues": values, "parameters": space}

    def update(self) -> EigenBasis:
        """Returns the basis, always the same."""
        return self.basis
