"""``stability()``: whether a training is at its edge, on any data, for any optimizer."""

from __future__ import annotations

from subspace_optim.diagnostics.measures.base import Measure
from subspace_optim.diagnostics.measures.critical_sharpness import CriticalSharpness
from subspace_optim.diagnostics.measures.directional_sharpness import DirectionalSharpness
from subspace_optim.diagnostics.measures.thresholds import Thresholds


def stability() -> list[Measure]:
    """Records what tells of the edge of stability at a small, known cost.

    The columns of ``directional_sharpness()``, ``critical_sharpness()`` and ``thresholds()``. They
    need no basis, so that the source may be an operator, also of the ``CurrentBatch``.

    It costs a gradient with its graph, two products, and about 4 forward passes, over the data of
    the operator.

    Returns:
        The measures.
    """
    return [DirectionalSharpness(gradient=True), CriticalSharpness(None), Thresholds()]
