r"""``Aside``: a basis that was put aside, for parameters that come back to where it was made.

At its edge of stability gradient descent jumps to and fro: ``θ_t`` is far from ``θ_{t−1}`` and near
``θ_{t−2}``, and so are its top eigenvectors (MLP on MNIST: sines of 0.045 and of 0.0014). A second
basis then serves every other step for as long as each would serve alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.rows import square
from subspace_optim.subspaces import eigenpairs
from subspace_optim.subspaces.checkpoints import SavedState, saved_rows
from subspace_optim.subspaces.eigenpairs import TopPairs
from subspace_optim.subspaces.staleness import Staleness
from subspace_optim.subspaces.unseen import Unseen

_NEAR = 0.5
"""Parameters are back if they are nearer than this times the way that they have come."""


@dataclass(frozen=True)
class Aside:
    """A basis, and what is known of it; a value.

    Attributes:
        pairs: its eigenpairs.
        staleness: since it was made.
        unseen: since somebody looked outside of it.
        probe_at: the estimate and the drift from which on it is probed.
    """

    pairs: TopPairs
    staleness: Staleness
    unseen: Unseen
    probe_at: tuple[float, float]

    def taught_by(self, other: Staleness) -> Aside:
        """Returns the same, with what was learned meanwhile of how fast a basis becomes stale."""
        own = self.staleness
        rates = replace(own.rates, observed=other.rates.observed)
        own = replace(own, rates=rates, effective_rank=other.effective_rank, ratios=other.ratios)
        return replace(self, staleness=own)

    def stored(self, dtype: torch.dtype | None) -> Aside:
        """Returns the same with vectors that are held in a dtype, as ``TopPairs.stored``."""
        pairs = self.pairs.stored(dtype)
        turned = pairs.basis.rounding - self.pairs.basis.rounding
        staleness = self.staleness
        if turned:
            staleness = staleness.rounded(turned, pairs.staleness_of_rounding)
        return replace(self, pairs=pairs, staleness=staleness)


def are_back(
    theta: Tensor, before: Tensor | None, earlier: Tensor | None, inner: InnerProduct = WHOLE
) -> bool:
    """Whether parameters are much nearer to those of an earlier refresh than to those of a later.

    Args:
        theta: ``(P,)``, the parameters.
        before: those of the later refresh; ``None`` if there was none.
        earlier: those of the earlier one, likewise.
        inner: completes sums over coordinates.
    """
    if before is None or earlier is None:
        return False
    way, distance = inner.sums(square(theta - before), square(theta - earlier))
    return bool(distance < _NEAR**2 * way)


# In a state dict: what is known of a basis, whether it is in use or was put aside.


def known(staleness: Staleness, unseen: Unseen, probe_at: tuple[float, float]) -> dict[str, Any]:
    """Returns it as plain numbers."""
    return {"probe_at": list(probe_at), "unseen": unseen.numbers()} | staleness.numbers()


def loaded_known(
    state: SavedState, anchor: Tensor, k: int
) -> tuple[Staleness, Unseen, tuple[float, float]]:
    """Returns what ``known`` was given; ``ArgumentError`` where it cannot be."""
    estimate, distance = state.numbers("probe_at", 2, minimum=0, infinite=True)
    return Staleness(k).loaded(state, anchor), Unseen.loaded(state), (estimate, distance)


def copied(anchor: Tensor | None, operator: CurvatureOperator) -> Any:
    """Returns a copy of its own, which a checkpoint may be loaded into; zeros of nothing."""
    space = operator.parameters
    if anchor is None:
        none = torch.zeros(space.size_here, dtype=operator.dtype, device=operator.device)
        return saved_rows(space, none)
    return saved_rows(space, anchor.clone())


def saved(
    aside: Aside | None, operator: CurvatureOperator, k: int, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Returns copies of its tensors; zeros of the same shapes if there is none."""
    pairs = None if aside is None else aside.pairs
    anchor = None if aside is None else aside.staleness.anchor
    return eigenpairs.saved(pairs, operator, k, dtype) | {"anchor": copied(anchor, operator)}


def numbers(aside: Aside | None, k: int) -> dict[str, Any]:
    """Returns what is known of it; of none, the same entries."""
    if aside is None:
        return known(Staleness(k), Unseen(), (0.0, 0.0))
    return known(aside.staleness, aside.unseen, aside.probe_at)


def loaded(state: SavedState, operator: CurvatureOperator, k: int) -> Aside | None:
    """Returns what was saved as ``"aside"`` and ``"aside_known"``, by ``saved`` and ``numbers``.

    ``ArgumentError`` if that cannot be.
    """
    tensors = state.inside("aside", {*eigenpairs.names_in_state(operator, k), "anchor"})
    pairs = eigenpairs.loaded(tensors, operator, k)
    anchor = tensors.rows("anchor", (), operator.parameters)
    found = loaded_known(state.inside("aside_known", numbers(None, k)), anchor, k)
    return None if pairs is None else Aside(pairs, *found)
