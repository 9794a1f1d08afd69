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
    ``CurrentBatch``. Curvature is taken by products where losses do not tell it: of an operator
    that is no Hessian, and of parameters in bf16 or fp16, where points of a line are rounded.

    It costs a gradient and mostly 8 to 13 forward passes over the data of the operator: 4 for the
    curvatures, 1 for the step itself, and up to 8 for the critical multiple; and up to 8 more in
    the first row. Without ``gradient`` it is two passes and the gradient less.

    Args:
        gradient: whether ``gradient_sharpness`` is recorded.

    Returns:
        The measures.
    """
    return [
        DirectionalSharpness(gradient, by=None),
        CriticalSharpness(None),
        Thresholds(),
    ]
