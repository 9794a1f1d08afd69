"""The contract between curvature and everything that uses it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from subspace_optim._display import Shown, number
from subspace_optim._inner_product import InnerProduct
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.curvature.samples import PIECES
from subspace_optim.curvature.surroundings import ALONE

COSTS: Final = ("products", "full_products", "gradients", "full_gradients")
"""The counts of ``OperatorStats`` that tell what work was done."""


@dataclass
class OperatorStats:
    """What an operator has cost so far, and how it works at present.

    Attributes:
        products: products with a vector, over all of the data or a sample.
        full_products: the same, each counted as the share of the data that it was over.
        gradients: gradients over all of the data or a sample; those that a kept graph begins
            with, and the two of a finite difference, included.
        full_gradients: the same, each counted as the share of the data that it was over.
        full_forwards: losses alone, each counted as the share of the data that it was over.
        examples: of all data, as the latest pass over them has counted; 0 before there was one.
        weight: of all data, what that pass has divided the losses by; 0 before there was one.
        passes: readings of the data.
        graphs_kept: batches whose gradient graph is held, or was when it was last needed; for
            finite differences, batches that are held.
        graphs_streamed: batches whose graph is built anew for each block of products.
        graph_bytes: memory of the kept graphs, and of the batches that they hold.
        verification: gradients and products of a few examples, for proofs (``verify``).
        engine: how products are computed at present.
    """

    products: int = 0
    full_products: float = 0.0
    gradients: int = 0
    full_gradients: float = 0.0
    full_forwards: float = 0.0
    examples: int = 0
    weight: float = 0.0
    passes: int = 0
    graphs_kept: int = 0
    graphs_streamed: int = 0
    graph_bytes: int = 0
    verification: int = 0
    engine: str = ""


class GroupMeans(NamedTuple):
    """Loss and gradient of groups that the batches of a sample were dealt to at random.

    Attributes:
        weights: ``(J,)``, what each group's mean is over, in float64.
        losses: ``(J,)``, the mean loss of each, in float64.
        gradients: ``(J, P)``, its gradient.
    """

    weights: Tensor
    losses: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Minibatches:
    """Views of an operator, each over one minibatch of its data.

    Attributes:
        count: how many there are; ``None`` where they are drawn without an end.
        views: in a random order. Each has loss, gradient and products of its batch at the present
            parameters, as a training on that batch would have them; what it keeps for products
            is freed when the next one is asked for.
    """

    count: int | None
    views: Iterator[CurvatureOperator]


def released(views: Iterator[CurvatureOperator]) -> Iterator[CurvatureOperator]:
    """Yields views, and frees what each keeps when the next one is asked for."""
    for view in views:
        yield view
        view.release()


class State(NamedTuple):
    """What a matrix depends on at present, as numbers that tell one state from another.

    Attributes:
        parameters: of those that it is differentiated by.
        elsewhere: of all other tensors: frozen parameters, buffers, parameters of the loss.
        modes: of what does not change gradually: modes of modules, and data written in place.
    """

    parameters: int
    elsewhere: int = 0
    modes: int = 0


class CurvatureOperator(Shown, ABC):
    """A symmetric P×P matrix at the current parameters of a model, known by its products.

    Between two changes of the parameters it is one fixed matrix, and using it leaves buffers,
    gradients, random state and train/eval mode as they were.

    Attributes:
        parameters: the coordinates of its vectors.
        stats: what it has cost.
    """

    parameters: ParameterSpace
    stats: OperatorStats

    def _facts(self) -> dict[str, str]:
        space = getattr(self, "parameters", None)
        return {} if space is None else {"P": number(space.size)}

    @property
    def size(self) -> int:
        """P."""
        return self.parameters.size

    @property
    def inner(self) -> InnerProduct:
        """How sums over the coordinates of its vectors are completed."""
        return self.parameters.inner

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its vectors: float64 for float64 models, else float32."""
        return self.parameters.dtype

    @property
    def ranks(self) -> Ranks:
        """The ranks that its products are summed over: this process alone, or a group's."""
        return Ranks(None)

    @property
    def accuracy(self) -> float:
        """Relative error of a product that is to be expected: the dtype's machine epsilon."""
        return torch.finfo(self.dtype).eps

    @property
    def device(self) -> torch.device:
        """Where the parameters and all its vectors live."""
        return self.parameters.device

    def matvec(self, v: Tensor) -> Tensor:
        """Returns the product with ``v: (P,)``, a new ``(P,)``."""
        return self.matmat(v[None])[0]

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``."""

    @property
    def is_hessian(self) -> bool:
        """Whether the matrix is the Hessian of ``loss()``, which differences of that then tell."""
        return True

    @property
    def of_current_batch(self) -> bool:
        """Whether the data are a ``CurrentBatch``."""
        return False

    @property
    def examples(self) -> tuple[int, int] | None:
        """Of a sample, how many examples it holds, and how many there are; ``None`` of all data."""
        return None

    def sample(
        self,
        examples: int,  # noqa: ARG002
        *,
        seed: int,  # noqa: ARG002
        pieces: int = PIECES,  # noqa: ARG002
    ) -> CurvatureOperator | None:
        """Returns the matrix of a sample of the data; ``None`` where they cannot be divided.

        It is an estimate of this one. Samples of one seed hold one another; ``stats`` are shared.

        Args:
            examples: how many, at least; they are drawn without replacement.
            seed: of the draw.
            pieces: to tell how they scatter, the examples of a single batch are dealt to so many.
        """
        return None

    def group_means(self, groups: int, *, seed: int) -> GroupMeans | None:  # noqa: ARG002
        """Returns loss and gradient of groups of a sample's batches, by one pass over it.

        The groups scatter as samples of their size do, which tells how exact their mean is.
        ``None`` from an operator that cannot tell.

        Args:
            groups: how many, at most: there are no more than batches, or pieces of a batch.
            seed: of the deal.
        """
        return None

    def minibatches(
        self,
        batch_size: int | None = None,  # noqa: ARG002
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> Minibatches | None:
        """Returns the matrices of minibatches; ``None`` from an operator that has none.

        Args:
            batch_size: examples of each, of a rank, drawn without replacement from all
                (default: the batches are those of the data).
            seed: of their order, and of the draws.
        """
        return None

    def batch_matmat(self, vectors: Tensor, see: Callable[[Tensor], object]) -> Tensor:
        """Returns the products as ``matmat`` does, and shows what each batch adds to them.

        Args:
            vectors: ``(j, P)``.
            see: is called with ``n_b A_b v / N``, ``(j, P)``, of each batch of this rank; it may
                not keep it.
        """
        products = self.matmat(vectors)
        see(products)
        return products

    def linearize(self) -> None:
        """Prepares products, where these begin with a gradient: that one is then known.

        Gradient and products together cost one gradient less than a gradient alone and then
        products.
        """

    @abstractmethod
    def gradient(self) -> Tensor:
        """Returns the gradient of the mean loss over all of the data, ``(P,)``."""

    @abstractmethod
    def loss(self) -> float:
        """Returns the mean loss over all of the data."""

    def state(self) -> State:
        """Returns numbers that differ where anything does that the matrix depends on."""
        return State(self.parameters.digest())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: they are looked at on entry only.

        What all products need is then done once, and no product synchronises the host.
        """
        yield

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[None]:
        """Loss, gradient and products inside are those at other parameters.

        The user's own come back bit for bit. What is else there stays as it is: buffers, modes, and
        the data.

        Args:
            theta: ``(P,)``.

        A ``theta`` of another shape raises ``ArgumentError``.
        """
        with ALONE, self.parameters.holding(theta):
            self.release()
            try:
                yield
            finally:
                self.release()

    def release(self) -> None:
        """Frees what is kept for further products at the present parameters."""

    def step_begins(self) -> None:
        """Is told that a training step begins: a ``CurrentBatch`` is needed until it has ended."""

    def step_ended(self, *, taken: bool = True) -> None:
        """Is told that it has ended: drops a ``CurrentBatch``, and what is of it.

        Args:
            taken: whether the step has been taken; if not, its batch is still needed.
        """


def rounding_at(loss: float, dtype: torch.dtype) -> float:
    """Returns a bound of the relative rounding error of the derivatives of a loss.

    A cross-entropy that is small because examples are fitted is a difference of numbers of order
    one, and so are its derivatives: a loss of 1e-8 has no correct digit in float32.
    """
    return 4 * torch.finfo(dtype).eps / abs(loss) if loss else math.inf
