"""Operators of samples: drawn, measured, and corrected to agree with another on a few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.linalg.control_variate import ControlVariate
from subspace_optim.linalg.sampling_error import Scatter


class Measured(NamedTuple):
    """The products of an operator with basis and guard, and how those of its batches scatter.

    Of all data there is nothing to estimate, and no scatter.
    """

    products: Tensor
    scatter: Scatter | None


ANCHOR_NUMBERS = ("noise", "sampling", "gap", "shrunk", "turned")
"""What of an anchor is a number, in a state dict."""


@dataclass(frozen=True)
class Anchor:
    """What is known since the latest pass over the reference.

    Attributes:
        rows: ``(k + 1, P)``, basis and guard there.
        offset: ``(k + 1, P)``, the small sample's products with these rows less the reference's.
        noise: the sine of the small sample's basis to the reference's, as expected there.
        sampling: the sine of the reference's basis to that of all data, likewise.
        gap: ``λ_k − λ_{k+1}`` there.
        shrunk: the gap at present over that, at most 1: what is expected grows as it shrinks.
        turned: the sine by which the basis has turned since.
        served: the refreshes since.
    """

    rows: Tensor
    offset: Tensor
    noise: float
    sampling: float
    gap: float
    shrunk: float = 1.0
    turned: float = 0.0
    served: int = 0

    @property
    def sampled(self) -> float:
        """The sine that is due to the sampling of the reference, at present."""
        return min(1.0, self.sampling / self.shrunk)

    @property
    def misjudged(self) -> float:
        """The sine by which the small sample has misjudged how far the basis has turned."""
        return self.noise * self.turned / self.shrunk


class Corrected(CurvatureOperator):
    """A sample's operator, with products that are corrected by a control variate.

    Who works with it freezes and releases that of the sample (``at_work``).

    Args:
        sample: the operator of the sample.
        rows: ``(j, P)``, orthonormal.
        offset: ``(j, P)``, its products with these rows less those that are right.
    """

    def __init__(self, sample: CurvatureOperator, rows: Tensor, offset: Tensor) -> None:
        self.sample_operator = sample
        self.parameters, self.stats = sample.parameters, sample.stats
        self._products = ControlVariate(sample.matmat, rows, offset, sample.inner)

    @property
    def ranks(self) -> Ranks:
        """Those of the sample's operator."""
        return self.sample_operator.ranks

    @property
    def accuracy(self) -> float:
        """That of the sample's operator."""
        return self.sample_operator.accuracy

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``."""
        return self._products(vectors)

    def gradient(self) -> Tensor:
        """Returns the gradient of the sample's mean loss, ``(P,)``."""
        return self.sample_operator.gradient()

    def loss(self) -> float:
        """Returns the sample's mean loss."""
        return self.sample_operator.loss()


class Samples:
    """The operators of samples of one seed, each drawn once.

    Args:
        operator: of all the data.
        seed: of the draws.
    """

    def __init__(self, operator: CurvatureOperator, seed: int) -> None:
        self._operator, self._seed = operator, seed
        self._drawn: dict[int, CurvatureOperator] = {}

    def of(self, examples: int) -> CurvatureOperator | None:
        """Returns the operator of a sample; ``None`` where the data cannot be divided."""
        if examples not in self._drawn:
            view = self._operator.sample(examples, seed=self._seed)
            if view is None:
                return None
            self._drawn[examples] = view
        return self._drawn[examples]

    def keep(self, *examples: int | None) -> None:
        """Forgets the samples of other sizes than these."""
        self._drawn = {n: view for n, view in self._drawn.items() if n in examples}


@contextmanager
def at_work(*operators: CurvatureOperator) -> Iterator[None]:
    """Looks at the parameters on entry only, and frees what the operators have kept."""
    with ExitStack() as stack:
        for operator in operators:
            stack.callback(operator.release)
            stack.enter_context(operator.frozen())
        yield


def examples_needed(error: float, target: float, drawn: int, total: int) -> int:
    """Returns how many examples have a sampling error of ``target``.

    Its square falls like ``1/n − 1/N``.

    Args:
        error: the sampling error of a sample.
        target: what it is to be.
        drawn: the size of that sample.
        total: N.
    """
    scaled = (1 / drawn - 1 / total) * (target / max(error, target / 4)) ** 2
    return math.ceil(1 / (1 / total + scaled))
