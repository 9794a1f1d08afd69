"""What stands out of a spectrum: outliers, by three methods, and eigenvalues that must be 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_integer, check_number

_ROUNDING = 1e-6
"""Below this, relative to the largest, an eigenvalue from float32 products may be rounding."""
_LARGE = 0.1
"""Eigenvalues above this, relative to the largest, decide how far a scree plot is looked at."""


def trivial_eigenvalues(num_parameters: int, num_examples: int, num_outputs: int) -> int:
    r"""Returns how many eigenvalues of a Gauss-Newton matrix are zero at least.

    .. math:: \max(0,\; P - N C)

    ``G = Jᵀ A J / N`` with the Jacobian ``J`` of all N·C outputs: its rank is at most that of
    ``J``, N·C. (For softmax cross-entropy ``A`` has N zero eigenvalues of its own: the logits of an
    example may all be shifted; P − N(C − 1) are then zero.)

    Args:
        num_parameters: P.
        num_examples: N.
        num_outputs: C, numbers that the model puts out for an example.

    Returns:
        The number.

    Reference:
        `sagun_2017`, section 2.1, for one output.
    """
    check_integer("num_parameters", num_parameters, minimum=1)
    check_integer("num_examples", num_examples, minimum=1)
    check_integer("num_outputs", num_outputs, minimum=1)
    return max(0, num_parameters - num_examples * num_outputs)


@dataclass(frozen=True)
class OutlierCount:
    """How many eigenvalues stand out of the bulk.

    Attributes:
        count: that many.
        cutoff: they are those above it; ``λ_1`` where none is.
    """

    count: int
    cutoff: float


def count_outliers(
    eigenvalues: Tensor,
    method: Literal["gap", "ratio", "elbow"] = "gap",
    *,
    floor: float = _ROUNDING,
) -> OutlierCount:
    r"""Returns how many of the largest eigenvalues stand out, and where the bulk begins.

    With ``μ_i = max(λ_i, floor · max|λ|)``, descending, the count is

    .. math::
        \text{gap:} \;\; \arg\max_i \; \mu_i - \mu_{i+1}, \qquad
        \text{ratio:} \;\; \arg\max_i \; \mu_i / \mu_{i+1}, \qquad
        \text{elbow:} \;\; \arg\max_i \; c_{i+1} - \mu_{i+1}

    where ``c`` is the chord from the first to the last point of the scree plot: the elbow is the
    point that is farthest below it, and the first of the bulk. The plot ends at the 2n + 1st point,
    n of which are above ``μ_1 / 10``, so that it makes no difference how much of the bulk follows.
    As many eigenvalues of the bulk as there are outliers should be given.

    Negative eigenvalues and those below the floor all have the same ``μ``: they are bulk, and
    nothing sets them apart. The first of equal maxima counts. Without any (no eigenvalue is
    positive, all are equal up to ``floor``, there is only one, or no point is below the chord) the
    count is 0.

    Which method counts what one looks for depends on the spectrum: the gap is most often after
    ``λ_1`` where the outliers differ, and the ratio is large between numbers that are next to
    nothing, where a floor of 1e-2 keeps it out.

    Args:
        eigenvalues: ``(n,)``, at least one, in any order: the whole spectrum, or its top.
        method: ``"gap"``, ``"ratio"`` or ``"elbow"``.
        floor: relative to the largest ``|λ|`` (default: what may be rounding of float32 products).

    Returns:
        Count and cutoff: the middle between the last outlier and the first of the bulk, for the
        ratio their geometric mean.

    Raises:
        ArgumentError: there are no eigenvalues, one is not finite, or the method is another.

    Reference:
        `sagun_2017`, appendix A and Table 1. Its heuristic elbow is not defined there.
    """
    if eigenvalues.dim() != 1 or not len(eigenvalues):
        raise ArgumentError("the shape of eigenvalues", tuple(eigenvalues.shape), "(n,), n above 0")
    if not eigenvalues.isfinite().all():
        raise ArgumentError("eigenvalues", eigenvalues.tolist(), "finite")
    check_number("floor", floor, exclusive=True)
    values = eigenvalues.detach().to("cpu", torch.float64).sort(descending=True).values
    scale = float(values.abs().max()) or 1.0
    heights = (values / scale).clamp(min=floor)
    if method == "elbow":
        heights = heights[: 2 * int((heights > _LARGE * heights[0]).sum()) + 1]
    above, below = heights[:-1], heights[1:]
    middle = (above + below) / 2
    if method == "gap":
        excess = above - below
    elif method == "ratio":
        excess, middle = above / below - 1, torch.sqrt(above * below)
    elif method == "elbow":
        along = torch.linspace(0, 1, len(heights), dtype=torch.float64)
        excess = torch.lerp(heights[0], heights[-1], along[1:]) - below
    else:
        raise ArgumentError("method", method, "'gap', 'ratio' or 'elbow'")
    if not len(excess) or excess.max() <= floor:
        return OutlierCount(0, float(values[0]))
    last = int(excess.argmax())
    return OutlierCount(last + 1, scale * float(middle[last]))
