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

from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.subspaces import eigenpairs
from subspace_optim.subspaces.checkpoints import SavedState
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


def are_back(theta: Tensor, before: Tensor | None, earlier: Tensor | None) -> bool:
    """Whether parameters are much nearer to those of an earlier refresh than to those of a later.

    Args:
        theta: ``(P,)``, the parameters.
        before: those of the later refresh; ``None`` if there was none.
        earlier: those of the earlier one, likewise.
    """
    if before is None or earlier is None:
        return False
    way = torch.linalg.vector_norm(theta - before)
    return bool(torch.linalg.vector_norm(theta - earlier) < _NEAR * way)


def saved(aside: Aside | None, operator: CurvatureOperator, k: int) -> dict[str, Any]:
    """Returns copies of its tensors; zeros of the same shapes if there is none."""
    pairs = None if aside is None else aside.pairs
    anchor = None if aside is None else aside.staleness.anchor
    if anchor is None:
        anchor = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    return eigenpairs.saved(pairs, operator, k) | {"anchor": anchor.clone()}


def numbers(aside: Aside | None, k: int) -> dict[str, Any]:
    """Returns what is known of it; of none, the same entries."""
    staleness, unseen, probe_at = Staleness(k), Unseen(), (0.0, 0.0)
    if aside is not None:
        staleness, unseen, probe_at = aside.staleness, aside.unseen, aside.probe_at
    own = {"probe_at": list(probe_at), "unseen": unseen.numbers()}
    return own | staleness.numbers()


def loaded(state: SavedState, operator: CurvatureOperator, k: int) -> Aside | None:
    """Returns what was saved as ``"aside"`` and ``"aside_known"``, by ``saved`` and ``numbers``.

    ``ArgumentError`` if that cannot be.
    """
    tensors = state.inside("aside", {*eigenpairs.names_in_state(operator, k), "anchor"})
    known = state.inside("aside_known", numbers(None, k))
    pairs = eigenpairs.loaded(tensors, operator, k)
    anchor = tensors.tensor("anchor", (operator.size,), operator.dtype, operator.device)
    staleness, unseen = Staleness(k).loaded(known, anchor), Unseen.loaded(known)
    estimate, distance = known.numbers("probe_at", 2, minimum=0, infinite=True)
    if pairs is None:
        return None
    return Aside(pairs, staleness, unseen, (estimate, distance))
