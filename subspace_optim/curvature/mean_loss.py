"""What operators of a mean loss over data share: passes, parameter states, and kept batches."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from subspace_optim._progress import Progress
from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.contexts import Mode, full_precision, in_mode
from subspace_optim.curvature.dependencies import Dependencies
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.evaluation import (
    Derivatives,
    Point,
    loss_alone,
    loss_and_gradient,
)
from subspace_optim.curvature.objective import (
    BatchLoss,
    BatchLossFunction,
    Supervised,
    check_batch_loss,
    unwrapped,
)
from subspace_optim.curvature.operator import (
    CurvatureOperator,
    GroupMeans,
    Minibatches,
    OperatorStats,
    State,
    released,
)
from subspace_optim.curvature.parameters import ParameterSpace, Params
from subspace_optim.curvature.passes import Differentiate, Passes
from subspace_optim.curvature.process_group import Ranks, warn_without_group
from subspace_optim.curvature.proof import Proof
from subspace_optim.curvature.report import Parts, Products, Report
from subspace_optim.curvature.samples import PIECES
from subspace_optim.curvature.surroundings import ALONE, Surroundings


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
        self._point: Point | None = None
        self._frozen_by: int | None = None  # the thread that has promised

    def _facts(self) -> dict[str, str]:
        stats, of = self.stats, self.examples
        own = "train" if self.model.training else "eval"
        read = f"{stats.examples:,}" if stats.examples else "not read yet"
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
            passes = self._passes.sample(point, examples, seed, pieces)
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
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            shape = tuple(vectors.shape)
            raise ArgumentError("the shape of vectors", shape, f"(j, {self.size}), one a row")
        with self._fixed(products=True) as point:
            self.linearize()
            kept = point.kept or {}
            vectors = vectors.to(self.device, self.dtype).contiguous()
            progress = Progress(f"{len(vectors)} products", "of a batch each")
            taken = 0
            with self.ranks.summed(vectors.shape, self.dtype, self.device) as products:

                def multiply(derivatives: Derivatives) -> None:
                    nonlocal taken
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

    def state(self) -> State:
        """Returns numbers that differ where anything does that the matrix depends on.

        That is all that the operator can see: parameters, buffers, plain tensors and numbers of
        the model, of the loss and of what else they reach, but for those that an evaluation itself
        changes; the mode of every module; and whether stored data were written.
        """
        own_mode = nullcontext() if self._mode is None else in_mode(self.model, self._mode)
        with ALONE, own_mode:  # nothing is evaluated, so that no more has to be set
            return self._dependencies.state(self._dependencies.look())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promises that the parameters do not change inside: they are looked at on entry only."""
        with self._fixed():
            yield

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[None]:
        """Loss, gradient and products inside are those at other parameters, ``theta: (P,)``.

        Where these are the ones that it was last asked at, loss and gradient are still known.
        """
        with self._entered(), self.parameters.holding(theta):
            outer, frozen_by = self._point, self._frozen_by
            if outer is not None and frozen_by == get_ident():  # only parameters differ from it
                self._point = self._point_of(outer.surroundings)
            else:
                surroundings = self._dependencies.look()
                key = self._dependencies.key(surroundings)
                self._point = self._point_of(surroundings, key)
                known = outer is not None and outer.key == key
                if outer is not None and not self.ranks.any(lambda: not known):
                    self._point.take(outer)
            self._frozen_by = get_ident()
            try:
                yield
            finally:
                self._forget()  # its graphs hold the memory of theta
                self._point, self._frozen_by = outer, frozen_by

    def release(self) -> None:
        """Frees what is kept. Loss and gradient of these parameters stay known."""
        if self._point is not None:
            self._point.kept = None

    @property
    def of_current_batch(self) -> bool:
        """Whether the data are a ``CurrentBatch``."""
        return self._passes.parts.batches.current is not None

    def step_begins(self) -> None:
        """Is told that a training step begins: a ``CurrentBatch`` is needed until it has ended."""
        current = self._passes.parts.batches.current
        if current is not None:
            current.hold()

    def step_ended(self, *, taken: bool = True) -> None:
        """Is told that it has ended: drops a ``CurrentBatch``, and what is of it."""
        current = self._passes.parts.batches.current
        if current is not None:
            self._forget()
            current.let_go(drop=taken)

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
            self._passes.parts.batches.forget()
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

    def _pass(self, point: Point, differentiate: Differentiate, *, keep: bool = False) -> None:
        """Passes over the data.

        Raises:
            DataChangedError: they have changed; what was known is dropped.
        """
        try:
            self._passes.run(point, differentiate, keep=keep)
        except DataChangedError:
            self._forget()
            raise

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
