"""``stability()``: whether a training is at its edge, on any data, for any optimizer."""

from __future__ import annotations

from subspace_optim.diagnostics.measures.base import Measure
from subspace_optim.diagnostics.measures.critical_sharpness import CriticalSharpness
from subspace_optim.diagnostics.measures.directional_sharpness import DirectionalSharpness
from subspace_optim.diagnostics.measures.thresholds import Thresholds


def stability(*, gradient: bool = True) -> list[Measure]:
    """Records what tells of the edge of stability at a small, known cost.

    The columns of ``directional_sharpness(by="losses")``, ``critical_sharpness()`` and
    ``thresholds()``. They need no basis, so that the source may be an operator, also of the
    ``CurrentBatch``.

    It costs a gradient and mostly 7 forward passes over the data of the operator, about three steps
    of a training on these, and up to 13 passes while the rate changes much from row to row;
    without ``gradient`` two passes and the gradient less.

    Args:
        gradient: whether ``gradient_sharpness`` is recorded.

    Returns:
        The measures.
    """
    return [
        DirectionalSharpness(gradient, by="losses"),
        CriticalSharpness(None),
        Thresholds(),
    ]
