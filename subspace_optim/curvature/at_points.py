"""``AtPoints``: what an operator knows of the loss at a parameter state, and when that is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.contexts import Mode, full_precision, in_mode
from subspace_optim.curvature.dependencies import Dependencies
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.dtensors import is_sharded
from subspace_optim.curvature.evaluation import Point
from subspace_optim.curvature.operator import CurvatureOperator, OperatorStats, State
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.passes import Differentiate, Passes
from subspace_optim.curvature.proof import Proof
from subspace_optim.curvature.report import Products
from subspace_optim.curvature.surroundings import ALONE, Surroundings


class AtPoints(CurvatureOperator):
    """An operator that keeps what it has found at the present parameters, and nothing else.

    A parameter state is a ``Point``. It is over once anything has changed that the loss depends
    on, which is looked at whenever the operator is asked, but for the inside of ``frozen()``.

    Subclasses set what is declared here, and compute.
    """

    model: nn.Module
    parameters: ParameterSpace
    stats: OperatorStats
    _dependencies: Dependencies
    _dtypes: list[torch.dtype]
    _fused_kernels: ClassVar[bool] = False  # whether fused attention may stay fused
    _mode: Mode | None
    _passes: Passes
    _products: ClassVar[Products] = "derivative"
    _proof: Proof
    _point: Point | None = None
    _frozen_by: int | None = None  # the thread that has promised

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
        point = self._point
        theta, known = self._replicated(), 0 if point is None else point.known()
        changed = point is None or point.key != key
        if not self.ranks.settled(changed, [theta, known]):
            if point is not None and self.parameters.ranks.any(lambda: changed):
                self._forget()  # first: its graphs are gone before others are built
            self._agree(theta)
        if self._point is None:
            self._point = self._point_of(surroundings, key)
        return self._point

    def _point_of(self, surroundings: Surroundings, key: object = None) -> Point:
        return Point(
            self.parameters.tensors,
            surroundings,
            in_place=self.stats.engine != "func",
            written=self._proof.written,
            layout=self.parameters.layout,
            keep_gathered=self._passes.keeps_gathered(),
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

    def _replicated(self) -> int:
        """Returns a digest of the parameters that all ranks have to have the same of.

        Of a sharded model, what all ranks have: the rest is of each its own.
        """
        if self.ranks.group is None:
            return 0
        return int(digest(p for p in self.model.parameters() if not is_sharded(p)))

    def _agree(self, theta: int) -> None:
        """Checks that all ranks have the same parameters, and know the same of them.

        Parameters that differ are an ``ArgumentError`` on all ranks. Where knowledge differs, it
        is dropped on all, or some would compute what others only look up.

        Args:
            theta: a digest of the parameters.
        """
        if self.ranks.group is None:
            return
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
