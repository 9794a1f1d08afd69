"""What operators of a mean loss over data share: passes, parameter states, and kept batches."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from subspace_optim._progress import Progress
from subspace_optim._validation import ArgumentError, DataChangedError, NonFiniteError
from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.contexts import Mode, full_precision, in_mode
from subspace_optim.curvature.dependencies import Dependencies
from subspace_optim.curvature.evaluation import (
    Derivatives,
    Point,
    loss_alone,
    loss_and_gradient,
)
from subspace_optim.curvature.memory import AllocationMeter, free_memory
from subspace_optim.curvature.objective import (
    BatchLoss,
    BatchLossFunction,
    Supervised,
    check_batch_loss,
    unwrapped,
)
from subspace_optim.curvature.operator import CurvatureOperator, OperatorStats, State
from subspace_optim.curvature.parameters import ParameterSpace, Params, digest, weighted
from subspace_optim.curvature.process_group import Ranks, warn_without_group
from subspace_optim.curvature.proof import Proof, see
from subspace_optim.curvature.report import Parts, Products, Report
from subspace_optim.curvature.surroundings import ALONE, Surroundings

Differentiate = Callable[[BatchLoss, Point], Derivatives]


class MeanLossOperator(CurvatureOperator):
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

    _fused_kernels: ClassVar[bool] = False  # whether fused attention may stay fused
    _products: ClassVar[Products] = "derivative"

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
            self._batch_loss = batch_loss
            self._batches = Batches(data, pairs=isinstance(batch_loss, Supervised))
            warn_without_group(model, process_group)
        self.stats = OperatorStats()
        self._dtypes = [p.dtype for p in self.parameters.tensors]
        self._mode, self._memory_budget, self._seed = mode, memory_budget, seed
        parts = Parts(
            self.model,
            batch_loss,
            self.parameters,
            self.stats,
            seed,
            self._batches,
            self._linearize,
            self._products,
        )
        self._proof = Proof(parts, demanded=verify)
        self._dependencies = Dependencies(self.parameters, batch_loss, self._batches, self._proof)
        self._point: Point | None = None
        self._frozen_by: int | None = None  # the thread that has promised

    @property
    def ranks(self) -> Ranks:
        """The ranks of ``process_group``, or this process alone."""
        return self._ranks

    @abstractmethod
    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        """Returns loss, gradient and product of one batch at ``point``."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (j, P)``, a new ``(j, P)``.

        Raises:
            ArgumentError: the shape is another.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            shape = tuple(vectors.shape)
            raise ArgumentError("the shape of vectors", shape, f"(j, {self.size}), one a row")
        with self._fixed(products=True) as point:
            if point.kept is None:
                self._pass(point, self._linearize, keep=True)
            kept = point.kept or {}
            vectors = vectors.to(self.device, self.dtype).contiguous()
            with self.ranks.summed(vectors.shape, self.dtype, self.device) as products:
                if kept:  # at the point, since checkpointed parts run the model again
                    with point.at(self._seed, forward=False):
                        for derivatives in kept.values():
                            self._multiply(derivatives, vectors, products)
                if point.streamed:
                    for _, batch_loss, _ in self._losses(point, skip=kept):
                        with point.at(batch_loss.seed):
                            derivatives = self._linearize(batch_loss, point)
                            self._multiply(derivatives, vectors, products)
                            del derivatives  # before the next graph is built
            self.stats.products += len(vectors)
            return products.div_(point.weight)

    def _multiply(self, derivatives: Derivatives, vectors: Tensor, products: Tensor) -> None:
        """Adds one batch's weighted products with the rows of ``vectors`` to ``products``."""
        space = self.parameters
        for v, product in zip(vectors, products, strict=True):
            space.add_(product, derivatives.product(space.unflatten(v)), derivatives.weight)

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

    def state(self) -> State:
        """Returns numbers that differ where anything does that the matrix depends on.

        That is all that the operator can see: parameters, buffers, plain tensors and numbers of
        the model, of the loss and of what else they reach, but for those that an evaluation itself
        changes; the mode of every module; and whether stored data were written.
        """
        with self._entered():
            return self._dependencies.state(self._dependencies.look())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: they are looked at on entry only."""
        with self._fixed():
            yield

    def release(self) -> None:
        """Frees what is kept. Loss and gradient of these parameters stay known."""
        if self._point is not None:
            self._point.kept = None

    # --- parameter states -----------------------------------------------------------------------

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Enters full precision, outside autocast, and the mode of this operator; one at a time."""
        precision = full_precision(self.device, fused=self._fused_kernels)
        with ALONE, precision, in_mode(self.model, self._mode):
            yield

    @contextmanager
    def _fixed(self, *, products: bool = False) -> Iterator[Point]:
        """Enters the present parameter state; inside of another entry, the same one."""
        if self._frozen_by == get_ident() and self._point is not None:
            yield self._proven(self._point, products=products)
            return
        with self._entered():
            outer, self._frozen_by = self._frozen_by, get_ident()
            try:
                yield self._proven(self._move_to_current(), products=products)
            finally:
                self._frozen_by = outer

    def _move_to_current(self) -> Point:
        """Returns the present parameter state; what is known of another one is dropped."""
        surroundings = self._dependencies.look()
        key = self._dependencies.key(surroundings)
        dtypes = [p.dtype for p in self.parameters.tensors]
        if self._dtypes != dtypes:  # the data may have been converted with the model
            self._batches.forget()
            self._dtypes = dtypes
        if self._point is not None and self._point.key != key:
            self._forget()  # first: its graphs are gone before others are built
        self._agree()
        if self._point is None:
            self._point = self._point_of(surroundings, key)
        return self._point

    def _point_of(self, surroundings: Surroundings, key: object = None) -> Point:
        return Point(
            self.parameters.tensors,
            surroundings,
            in_place=self.stats.engine != "func",
            written=self._proof.written,
            key=key,
        )

    def _proven(self, point: Point, *, products: bool) -> Point:
        """Proves the operator where that is due.

        Returns:
            The point; another one, if the proof has changed the engine.
        """
        if not self._proof.is_due("products" if products else "function"):
            return point
        with self.ranks.all_or_none():
            proved = self._prove(point, products=products)
        # Noted on all ranks or on none, since what is due next has to be the same on all.
        if not self.ranks.any(lambda: not self._proof.sure):
            for what in ("function", "products") if products else ("function",):
                self._proof.done(what)
        if proved is not point:
            self._forget()
            self._point = proved
        return proved

    def _prove(self, point: Point, *, products: bool) -> Point:
        """Returns the point at which the proof succeeded."""
        self._proof.run(point, products=products)
        return point

    def _agree(self) -> None:
        """Checks that all ranks have the same parameters, and know the same of them.

        Parameters that differ are an ``ArgumentError`` on all ranks. Where knowledge differs, it
        is dropped on all, or some would compute what others only look up.
        """
        if self.ranks.group is None:
            return
        theta = int(digest(self.model.parameters()))
        known = 0 if self._point is None else self._point.known()
        same_theta, same_knowledge = self.ranks.agree([theta, known], self.device)
        if not same_theta:
            remedy = "Broadcast them from one rank, as DistributedDataParallel does."
            found, allowed = "ranks whose parameters differ", "ranks of equal parameters"
            raise self.ranks.told(ArgumentError("process_group", found, allowed, remedy))
        if not same_knowledge:
            self._forget()

    def _forget(self) -> None:
        self.release()  # what is kept may refer to the point, and a cycle is freed late
        self._point = None

    # --- passes over the data -------------------------------------------------------------------

    def _losses(
        self, point: Point, skip: Collection[int] = ()
    ) -> Iterator[tuple[int, BatchLoss, int]]:
        """Yields the index of each batch of a pass, its loss, and its bytes."""
        self.stats.passes += 1
        progress = Progress("pass over the data")
        for index, batch, nbytes in self._batches.read(self.device, upcast=point.upcast):
            progress.tick(lambda index=index: f"batch {index}")  # type: ignore[misc]
            if index not in skip:
                # Batches that the ranks take in turn have the masks that one process gives them.
                seed = self._seed + index * self.ranks.size + self.ranks.rank
                yield index, BatchLoss(self.model, self._batch_loss, batch, seed), nbytes

    def _pass(self, point: Point, differentiate: Differentiate, *, keep: bool = False) -> None:
        """One pass over the data: loss, gradient, and what of it is kept for products.

        Args:
            point: where; loss, gradient and what is kept are added to it.
            differentiate: how; ``loss_alone`` for no gradient.
            keep: keeps what products need, as long as it fits the budget.

        Raises:
            ArgumentError: the data have no examples.
            NonFiniteError: the loss or a weight is not finite.
            DataChangedError: the loss is another than in an earlier pass at this state.
        """
        budget: float | None = self._memory_budget
        if budget is None:
            sharing = 1 if self.device.type == "cuda" else self.ranks.size  # one machine's memory
            budget = free_memory(self.device) / (4 * sharing) if keep else 0.0
        kept: dict[int, Derivatives] = {}
        used = count = 0
        size = 0 if differentiate is loss_alone else self.size
        gradient = torch.zeros(size, dtype=self.dtype, device=self.device)
        proves_mean = self._proof.is_due("mean")
        pieces: list[Any] = []
        with self.ranks.summed((2,), torch.float64, self.device) as sums:
            for index, batch_loss, nbytes in self._losses(point):
                watching = nullcontext() if count else self._proof.watching(point)
                count += 1
                if proves_mean:
                    pieces = see(batch_loss.batch, pieces)
                metering = AllocationMeter() if keep else nullcontext()
                with metering as meter, point.at(batch_loss.seed), watching:
                    found = differentiate(batch_loss, point)
                weight = found.weight
                sums.add_(torch.stack([weighted(found.loss.double(), weight), weight]))
                if size:
                    self.parameters.add_(gradient, found.gradient, weight)
                    found.gradient = ()  # it has been added up, and is held no longer
                if meter is not None and used + (held := meter.alive() + nbytes) <= budget:
                    used += held
                    kept[index] = found
                del found, batch_loss  # before the graph of the next one is built
            if pieces:
                self._proof.mean(point, pieces)
        total, N = sums.tolist()
        if N == 0:
            raise ArgumentError("data", "of no examples", "at least one example of weight above 0")
        if getattr(self._batch_loss, "summed", False):
            N = 1.0  # of all data together: the matrix is that of the sum
        loss = total / N if N > 0 else math.nan
        if not math.isfinite(loss):
            message = (
                f"The mean loss over the data is {loss} (weight {N:g}), so it has no "
                "curvature. Lower the learning rate, or look for NaN in parameters and data."
            )
            self._batches.forget()  # they may be mended
            raise NonFiniteError(message)
        try:
            point.check_loss(loss)
        except DataChangedError:
            self._forget()
            raise
        self._proof.done("mean")
        point.loss, point.weight = loss, N
        if size:
            self.stats.gradients += 1
            point.gradient = self.ranks.sum_(gradient).div_(N)
        if keep:
            point.kept, point.streamed = kept, count - len(kept)
            self.stats.graphs_kept, self.stats.graphs_streamed = len(kept), point.streamed
            self.stats.graph_bytes = used

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied, and a copy has parameters of its own.
        return self.__dict__ | {"_point": None, "_frozen_by": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        operator = type(self).__new__(type(self))
        memo[id(self)] = operator
        memo[id(self._batches)] = self._batches  # data are read only: the copies share them
        operator.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return operator
