"""``Proof``: an operator shows that it measures the user's own function before it is trusted.

At its first use, on some examples of the first batch:

- *one function*: two evaluations agree bit for bit;
- *the user's gradient*: it is the one that ``loss.backward()`` would put into ``.grad``;
- *its derivative*: a product along a random direction is the central difference of gradients, and
  two products are symmetric; in float64, where the model can be computed in it, since the step is
  then too short for kinks to be counted;
- *a mean*: the loss of two batches together, the first and the last of a pass, is the weighted
  mean of theirs, as a function of the model's outputs. Batches between are not looked at.

What a loss detaches, or computes under ``no_grad``, is constant to its derivatives, and is held
constant in the differences too.

A proof takes eight gradients of a few examples, and one more where products are compared in another
dtype than the model's. It is made once, and again where the structure of the model has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from subspace_optim._validation import (
    InconsistentDerivativeError,
    NotOneFunctionError,
    SecondDerivativeError,
)
from subspace_optim.curvature.averages import concatenated
from subspace_optim.curvature.evaluation import Point
from subspace_optim.curvature.objective import Supervised
from subspace_optim.curvature.report import Parts, Report
from subspace_optim.curvature.samples import rows_of, taken
from subspace_optim.curvature.stopped_gradients import copied
from subspace_optim.curvature.trial import TransformError, Trial

_EXAMPLES = 24
"""How many examples of the first batch the proof is made on, where the batch can be cut."""
_FEWER = 15
"""... and of the last one. The numbers differ, so that a sum can be told from a mean."""
_LINEAR = 1e-3
"""Relative difference allowed between the directions of a batch's gradient alone, and as a part of
the gradient of two batches together."""
_WEIGHED = 2e-2
"""Relative difference allowed between a batch's share of the loss of two, and what weights say."""
_FAILURES = (NotOneFunctionError, InconsistentDerivativeError, SecondDerivativeError)


class Proof:
    """Proves an operator, and keeps account of what has been proved.

    Args:
        parts: of the operator.
        demanded: whether it has to be proved before it is used.

    Attributes:
        written: tensors, beside buffers, that an evaluation was seen to write to.
        moved_names: names of attributes that an evaluation was seen to change.
        sure: whether the latest run proved all that it was asked for.
    """

    def __init__(self, parts: Parts, *, demanded: bool) -> None:
        self._parts, self._demanded = parts, demanded
        self._proved: dict[str, int] = {}  # the structure of the model when that was proved
        self.written: list[Tensor] = []
        self.moved_names: set[Any] = set()
        self.sure = False

    def is_due(self, what: str) -> bool:
        """Whether the ``"function"``, its ``"products"`` or the ``"mean"`` are to be proved."""
        return self._demanded and self._proved.get(what) != self._structure()

    def done(self, what: str) -> None:
        """Notes that something is proved, for as long as the model has its present structure."""
        self._proved[what] = self._structure()

    def _structure(self) -> int:
        model = self._parts.model
        return hash(
            tuple((type(m), tuple(m._parameters), tuple(m._buffers)) for m in model.modules())  # noqa: SLF001
        )

    @contextmanager
    def watching(self, point: Point) -> Iterator[None]:
        """Learns what an evaluation inside writes to, if that is not known yet."""
        stage = hash((self._structure(), point.surroundings.modes()))
        if self._proved.get("writes") == stage:
            yield
            return
        with point.learning_writes():
            yield
        self._proved["writes"] = stage

    def run(self, point: Point, *, products: bool) -> None:
        """Proves that the operator is one function at ``point``, and its products if asked.

        Raises:
            TransformError: the forward pass writes to parameters, inside of a transform.
        """
        report = Report(self._parts.stats.engine)
        self.sure = False
        try:
            trial = self._trial(point, report)
            if trial is None:
                return  # no batch has a finite loss: the pass raises its own error for that
            own = {id(p) for p in point.own}
            if not point.in_place and report.engine == "func" and own & set(map(id, self.written)):
                raise TransformError("The forward pass writes to parameters.")
            trial.gradient()
            if products:
                trial.products()
            self.sure = True
        finally:
            self._parts.stats.verification += report.gradients

    def report(self, point: Point) -> Report:
        """Proves everything, and collects what fails instead of raising it."""
        report = Report(self._parts.stats.engine)
        pieces: list[Any] = []
        for batch in self._read(point):
            pieces = see(batch, pieces)
        try:
            trial = self._trial(point, report)
            proofs: list[Callable[[], None]] = [partial(self.mean, point, pieces, report)]
            if trial is not None:
                proofs = [trial.gradient, trial.products, *proofs]
            for prove in proofs:
                try:
                    prove()
                except _FAILURES as error:
                    report.failed.append(str(error))
        except NotOneFunctionError as error:
            report.failed.append(str(error))
        self._parts.stats.verification += report.gradients
        return report

    def _read(self, point: Point) -> Generator[Any]:
        parts = self._parts
        for _, batch, _ in parts.batches.read(parts.space.device, upcast=point.upcast):
            yield batch

    def _trial(self, point: Point, report: Report) -> Trial | None:
        """Returns the trial on the first batch with a finite loss, or on a part of that batch."""
        ranks = self._parts.space.ranks
        with closing(self._read(point)) as batches:
            while True:
                whole = next(batches, None)
                if ranks.any(lambda whole=whole: whole is None):  # type: ignore[misc]
                    return None
                part = head(whole, _EXAMPLES)
                cut = not ranks.any(lambda part=part: part is None)  # type: ignore[misc]
                for batch in [part, whole] if cut else [whole]:
                    trial = Trial(self._parts, point, batch, report)
                    try:
                        usable = trial.one_function(self.watching(point))
                    except Exception as error:
                        if batch is whole or isinstance(error, NotOneFunctionError):
                            raise
                        continue  # a batch that cannot be cut
                    self.moved_names |= point.surroundings.moved_names
                    if usable:
                        return trial

    # --- what the mean is over ------------------------------------------------------------------

    def mean(self, point: Point, pieces: list[Any], report: Report | None = None) -> None:
        """Proves that the loss of two batches together is the weighted mean of theirs.

        If it is, its gradient by the outputs of one batch is a multiple of that of the batch's
        own loss, and the factor is the batch's share of the weights. A loss that couples examples,
        such as a contrastive one, gives no multiple; it is a function of whole batches, and nothing
        is proved of it. Weights from ``from_loss`` are the user's own, and are not looked at.

        Args:
            point: where.
            pieces: a part of the first batch, and one of the last.
            report: what is found is added to it.

        Raises:
            NotOneFunctionError: the shares are others than the weights say.
        """
        report = report or Report(self._parts.stats.engine)
        supervised = self._parts.batch_loss
        lacks = self._parts.space.ranks.any(lambda: len(pieces) < 2)
        if lacks or not isinstance(supervised, Supervised):
            return
        try:
            shares = self._shares(supervised, pieces, point)
        except Exception:  # noqa: BLE001 (outputs or losses that do not go together)
            return
        if shares is None:
            return
        found, claimed = shares
        report.mean_error = max(abs(f / c - 1) for f, c in zip(found, claimed, strict=True))
        if report.mean_error <= _WEIGHED:
            return
        message = (
            "The loss is not the mean that it is taken for: of the loss of two batches together "
            f"the one is {found[0]:.3g} and the other {found[1]:.3g}, where their examples say "
            f"{claimed[0]:.3g} and {claimed[1]:.3g}. Other batches of the same data would have "
            "another matrix. Give the weight yourself: "
            "HessianOperator.from_loss(model, batch_loss, data), where "
            "batch_loss(model, batch) returns (mean loss, weight), the weight being what the mean "
            "is over (examples, tokens that count, elements)."
        )
        raise NotOneFunctionError(message)

    def _shares(
        self, supervised: Supervised, pieces: list[Any], point: Point
    ) -> tuple[list[float], list[float]] | None:
        """Returns the shares of two batches in the loss of both, and those that weights claim."""
        model, seed = self._parts.model, self._parts.seed
        outputs = []
        for x, y in pieces:
            with point.at(seed):
                outputs.append((tree_map(_as_leaf, model(x)), y))
        both = concatenated(*outputs)
        if both is None:
            return None
        with point.at(seed):
            alone = [supervised(_itself, batch) for batch in outputs]
            together, _ = supervised(_itself, both)
        leaves = [
            [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            for out, _ in outputs
        ]
        weights = [float(weight) for _, weight in alone]
        total = 1.0 if supervised.summed else sum(weights)
        found, claimed = [], []
        for (loss, _), weight, of in zip(alone, weights, leaves, strict=True):
            gradient = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, of)])
            part = torch.autograd.grad(together, of, retain_graph=True)
            joint = torch.cat([g.flatten().double() for g in part])
            share = float(joint @ gradient / (gradient @ gradient))
            if not float((joint - share * gradient).norm()) <= _LINEAR * float(joint.norm()):
                return None
            found.append(share)
            claimed.append(weight / total)
        return found, claimed


def head(batch: Any, examples: int) -> Any:
    """Returns the first examples of a batch that has more, ``None`` of one that cannot be cut."""
    return taken(batch, slice(examples)) if rows_of(batch) > examples else None


def see(batch: Any, pieces: list[Any]) -> list[Any]:
    """Takes a batch in: returns a part of the first batch of a pass, and one of the latest."""
    part = head(batch, _FEWER if pieces else _EXAMPLES)
    return [*pieces[:1], batch if part is None else tree_map(copied, part)]


def _as_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().requires_grad_()
    return leaf


def _itself(output: Any) -> Any:
    return output
