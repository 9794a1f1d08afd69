"""What operators of a mean loss over data share: passes, samples, and kept batches."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from subspace_optim._progress import Progress
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.at_points import AtPoints
from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.contexts import Mode
from subspace_optim.curvature.dependencies import Dependencies
from subspace_optim.curvature.evaluation import (
    Derivatives,
    Point,
    loss_alone,
    loss_and_gradient,
)
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import (
    BatchLoss,
    BatchLossFunction,
    Supervised,
    check_batch_loss,
    unwrapped,
)
from subspace_optim.curvature.operator import (
    GroupMeans,
    Minibatches,
    OperatorStats,
    released,
)
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.passes import Passes
from subspace_optim.curvature.process_group import (
    Ranks,
    taking_part,
    warn_without_group,
)
from subspace_optim.curvature.proof import Proof
from subspace_optim.curvature.report import Parts, Report
from subspace_optim.curvature.sampled_passes import sampled
from subspace_optim.curvature.samples import PIECES


class MeanLossOperator(AtPoints):
    r"""A curvature matrix of the mean loss over ``data``, summed up from those of its batches.

    .. math::
        A v = \frac{1}{N} \sum_b n_b A_b v, \qquad
        L(\theta) = \frac{1}{N} \sum_b n_b \, \ell(f_\theta(x_b), y_b), \quad N = \sum_b n_b

    Subclasses say what one batch's matrix is (``_linearize``). What they need for its products
    is kept for all batches that fit ``memory_budget``, and made anew for each block of products
    for the others.

    Args:
        batch_loss: ``batch_loss(model, batch) -> (mean loss, weight)``: a ``Supervised`` loss of
            (output, target), or the user's own.
        model, data, params, mode, memory_budget, seed, process_group, verify: as those of
            ``HessianOperator``.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLossFunction,
        data: Any,
        *,
        params: Params = None,
        mode: Mode | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
        process_group: Any = None,
        verify: bool = True,
    ) -> None:
        self._ranks = Ranks(process_group)
        with self.ranks.all_or_none():
            check_batch_loss(batch_loss)
            if not isinstance(model, nn.Module):
                raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
            if mode not in (None, "train", "eval"):
                raise ArgumentError("mode", mode, "'train', 'eval' or None")
            if memory_budget is not None and not (
                isinstance(memory_budget, int | float) and memory_budget >= 0
            ):
                raise ArgumentError("memory_budget", memory_budget, "a number of bytes, or None")
            if not isinstance(verify, bool):
                raise ArgumentError("verify", verify, "True or False")
            self.model = unwrapped(model)
            self.parameters = ParameterSpace(self.model, params)
            self._ranks = taking_part(self._ranks, self.parameters.ranks)
            batches = Batches(data, pairs=isinstance(batch_loss, Supervised))
            warn_without_group(model, process_group)
            if batches.current is not None:
                batches.current.follow(self.model)
        self.stats = OperatorStats()
        self._dtypes = [p.dtype for p in self.parameters.tensors]
        self._mode, self._seed = mode, seed
        parts = Parts(
            self.model,
            batch_loss,
            self.parameters,
            self.stats,
            seed,
            batches,
            self._linearize,
            self._products,
        )
        self._proof = Proof(parts, demanded=verify)
        self._passes = Passes(parts, self._ranks, self._proof, memory_budget)
        self._dependencies = Dependencies(self.parameters, batch_loss, batches, self._proof)
        self._in_pieces: Self | None = None  # a sample in more batches
        self._point = self._frozen_by = None

    def _facts(self) -> dict[str, str]:
        stats, of = self.stats, self.examples
        own = "train" if self.model.training else "eval"
        read = f"{stats.examples:,}" if stats.examples else "not read yet"
        read += " of the CurrentBatch" if self.of_current_batch else ""
        return super()._facts() | {
            "N": read if of is None else f"{of[0]:,} of {of[1]:,}",
            "mean over": self._passes.parts.mean_over,
            "engine": stats.engine or "not used yet",
            "mode": self._mode or f"{own}, as the model",
            "params": self.parameters.summary,
        }

    @property
    def ranks(self) -> Ranks:
        """The ranks of ``process_group``, or this process alone."""
        return self._ranks

    @abstractmethod
    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        """Returns loss, gradient and product of one batch at ``point``."""

    @property
    def examples(self) -> tuple[int, int] | None:
        """Of a sample, how many examples it holds, and how many there are; ``None`` of all data."""
        return self._passes.examples

    def sample(self, examples: int, *, seed: int, pieces: int = PIECES) -> Self | None:
        """Returns the matrix of a sample; ``None`` where the data are a batch that cannot be cut.

        Whole batches, or rows where the data are one batch. It trusts what was proved of all data.
        Of a ``CurrentBatch`` there is none: a sample would stay, and the batch does not.
        """
        if self._passes.parts.batches.current is not None:
            return None
        with self._fixed(products=True) as point:
            passes = sampled(self._passes, point, examples, seed, pieces)
        if passes is None:
            return None
        whole, *others = (self._over(of) for of in passes)
        vars(whole)["_in_pieces"] = others[0] if others else None
        return whole

    def group_means(self, groups: int, *, seed: int) -> GroupMeans:
        """Returns loss and gradient of groups of the batches, or of the pieces of a single one."""
        if self._in_pieces is not None:
            return self._in_pieces.group_means(groups, seed=seed)
        with self._fixed() as point:
            return self._passes.group_means(point, groups, seed)

    def minibatches(self, batch_size: int | None = None, *, seed: int = 0) -> Minibatches:
        """Returns the matrices of minibatches. They trust what was proved of all data."""
        with self._fixed(products=True) as point:
            count, passes = self._passes.minibatches(point, batch_size, seed)
        return Minibatches(count, released(map(self._over, passes)))

    def _over(self, passes: Passes) -> Self:
        """Returns the same matrix over other data."""
        parts = passes.parts
        seen = Dependencies(parts.space, parts.batch_loss, parts.batches, self._proof)
        view = copy.copy(self)
        unknown = dict.fromkeys(("_point", "_frozen_by", "_in_pieces"))
        vars(view).update(unknown, _passes=passes, _dependencies=seen)
        return view

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``."""
        return self._matmat(vectors)

    def batch_matmat(self, vectors: Tensor, see: Callable[[Tensor], object]) -> Tensor:
        """Returns the products as ``matmat`` does, and shows what each batch adds to them."""
        if self._in_pieces is None:
            return self._matmat(vectors, see)
        try:
            return self._in_pieces.batch_matmat(vectors, see)
        finally:
            self._in_pieces.release()

    def _matmat(self, vectors: Tensor, see: Callable[[Tensor], object] | None = None) -> Tensor:
        """Does what ``batch_matmat`` does, with these batches.

        Raises:
            ArgumentError: the shape is another.
        """
        here = self.parameters.size_here
        if vectors.dim() != 2 or vectors.shape[1] != here:
            shape = tuple(vectors.shape)
            raise ArgumentError("the shape of vectors", shape, f"(j, {here}), one a row")
        with self._fixed(products=True) as point:
            self.linearize()
            kept = point.kept or {}
            vectors = vectors.to(self.device, self.dtype).contiguous()
            progress = Progress(f"{len(vectors)} products", "of a batch each")
            taken = 0
            with self.ranks.found(vectors.shape, self.dtype, self.device) as products:

                def multiply(derivatives: Derivatives) -> None:
                    nonlocal taken
                    derivatives.gradient = ()  # which was new, and is not needed
                    into = products if see is None else torch.zeros_like(vectors)
                    for _ in self._multiply(derivatives, vectors, into):
                        taken += 1
                        progress.tick(taken)
                    if see is not None:
                        products.add_(into)
                        see(into.div_(point.weight))

                if kept:  # at the point, since checkpointed parts run the model again
                    with point.at(self._seed, forward=False):
                        for derivatives in kept.values():
                            multiply(derivatives)
                if point.streamed:
                    for _, batch_loss, _ in self._passes.losses(point, skip=kept):
                        with point.at(batch_loss.seed):
                            multiply(self._linearize(batch_loss, point))
            self._count(len(vectors))
            return products.div_(point.weight)

    def linearize(self) -> None:
        """Keeps what products need. The gradient that it begins with is then known."""
        with self._fixed(products=True) as point:
            if point.kept is None:
                self._pass(point, self._linearize, keep=True)

    def _multiply(
        self, derivatives: Derivatives, vectors: Tensor, products: Tensor
    ) -> Iterator[None]:
        """Adds a batch's weighted products with the rows of ``vectors``, and yields after each."""
        space = self.parameters
        for v, product in zip(vectors, products, strict=True):
            space.add_(product, derivatives.product(space.unflatten(v)), derivatives.weight)
            yield

    def _count(self, products: int) -> None:
        """Adds to the products that were taken."""
        self.stats.products += products
        self.stats.full_products += products * self._passes.share

    def gradient(self) -> Tensor:
        """Returns ``∇L(θ)``, ``(P,)``. It is computed once for each parameter state."""
        with self._fixed() as point:
            if point.gradient is None:
                self._pass(point, loss_and_gradient)
            assert point.gradient is not None  # noqa: S101 (the pass has found it)
            return point.gradient.clone()

    def loss(self) -> float:
        """Returns ``L(θ)``, from the gradient's pass where there was one."""
        with self._fixed() as point:
            if point.loss is None:
                self._pass(point, loss_alone)
            assert point.loss is not None  # noqa: S101 (the pass has found it)
            return point.loss

    def check(self) -> Report:
        """Proves the operator at the present parameters, and tells what came out.

        Returns:
            What was compared and how far it was off, with a verdict. Nothing is raised for one
            that fails.
        """
        with self._entered():
            return self._proof.report(self._point_of(self._dependencies.look()))

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied, and a copy has parameters of its own.
        return self.__dict__ | {"_point": None, "_frozen_by": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        operator = type(self).__new__(type(self))
        memo[id(self)] = operator
        batches = self._passes.parts.batches
        memo[id(batches)] = batches  # data are read only: the copies share them
        operator.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return operator
