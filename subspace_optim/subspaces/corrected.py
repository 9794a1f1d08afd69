"""``Corrected``: the matrix of a sample, made to agree with another one on a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.linalg.control_variate import ControlVariate


class Corrected(CurvatureOperator):
    """A sample's operator, with products that are corrected by a control variate.

    Args:
        sample: the operator of the sample.
        rows: ``(j, P)``, orthonormal.
        offset: ``(j, P)``, what its products with them have too much.
    """

    def __init__(self, sample: CurvatureOperator, rows: Tensor, offset: Tensor) -> None:
        self.sample_operator = sample
        self.parameters, self.stats = sample.parameters, sample.stats
        self._products = ControlVariate(sample.matmat, rows, offset)

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

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside."""
        with self.sample_operator.frozen():
            yield

    def release(self) -> None:
        """Frees what is kept for further products at the present parameters."""
        self.sample_operator.release()
