"""Passes over the data of an operator: all of them, or a sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspace_optim._progress import Progress
from subspace_optim._validation import ArgumentError, NonFiniteError, check_integer
from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.evaluation import (
    Derivatives,
    Point,
    loss_alone,
    loss_and_gradient,
)
from subspace_optim.curvature.memory import AllocationMeter, may_be_kept, size_gathered
from subspace_optim.curvature.minibatches import drawn_batches, own_batches, rows_of_all
from subspace_optim.curvature.objective import BatchLoss, Supervised
from subspace_optim.curvature.operator import GroupMeans
from subspace_optim.curvature.parameters import weighted
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.curvature.proof import Proof, see
from subspace_optim.curvature.report import Parts
from subspace_optim.curvature.samples import dealt, size_of

Differentiate = Callable[[BatchLoss, Point], Derivatives]


@dataclass(frozen=True)
class Passes:
    """Reads the data batch by batch, and adds up what they are differentiated to.

    Attributes:
        parts: of the operator.
        ranks: that are summed over.
        proof: of the operator.
        memory_budget: bytes for what is kept; ``None``: a quarter of what is free.
        examples: of a sample, how many it holds, and how many there are; ``None`` of all data.
        minibatch: the sample is a batch to train on. Its loss is its own where all data have a
            sum, and there is no mean of several to be proved.
    """

    parts: Parts
    ranks: Ranks
    proof: Proof
    memory_budget: int | None = None
    examples: tuple[int, int] | None = None
    minibatch: bool = False

    def keeps_gathered(self) -> bool:
        """Whether the parameters of a sharded model may stay gathered for backward passes."""
        if self.parts.space.layout is None:
            return False
        allowed, needed = self._budget(), size_gathered(self.parts.model)
        return not self.ranks.any(lambda: needed > allowed)

    def _budget(self) -> float:
        """Returns the bytes that may be kept."""
        if self.memory_budget is not None:
            return self.memory_budget
        return may_be_kept(self.parts.space.device, self.ranks.size)

    @property
    def share(self) -> float:
        """The share of all data that these are."""
        return 1.0 if self.examples is None else self.examples[0] / self.examples[1]

    def losses(
        self, point: Point, skip: Collection[int] = ()
    ) -> Iterator[tuple[int, BatchLoss, int]]:
        """Yields the index of each batch of a pass, its loss, and its bytes."""
        parts, layout = self.parts, self.parts.space.layout
        parts.stats.passes += 1
        progress = Progress("pass over the data", "batches")
        for index, batch, nbytes, idle in self._together(self.read(point)):
            progress.tick(index)
            if index not in skip:
                # Batches that the ranks take in turn have the masks that one process gives them.
                seed = parts.seed + index * self.ranks.data_size + self.ranks.data_rank
                loss = BatchLoss(parts.model, parts.batch_loss, batch, seed, layout, idle)
                yield index, loss, nbytes

    def _together(
        self, batches: Iterator[tuple[int, Any, int]]
    ) -> Iterator[tuple[int, Any, int, bool]]:
        """Yields batches, and whether each stands in for one that this rank does not have.

        Where the ranks evaluate their batches together, each has to have as many: one that has no
        more takes its first one again, which counts nothing. Where one has none at all, all ranks
        raise an ``ArgumentError``.
        """
        if not self.ranks.together:
            for here in batches:
                yield *here, False
            return
        first = found = None

        def has_one() -> bool:
            nonlocal first, found
            found = next(batches, None)
            first = first or found
            if first is None:
                raise ArgumentError("data", "of no batch", "at least one batch on every rank")
            return found is not None

        for index in itertools.count():
            if not self.ranks.any(has_one):
                return
            assert first is not None  # noqa: S101 (or has_one() has raised)
            yield index, *(found or first)[1:], found is None

    def read(self, point: Point) -> Iterator[tuple[int, Any, int]]:
        """Yields the index of each batch on this rank, the batch, and its bytes."""
        return self.parts.batches.read(self.parts.space.device, upcast=point.upcast)

    def run(self, point: Point, differentiate: Differentiate, *, keep: bool = False) -> None:
        """One pass over the data: loss, gradient, and what of it is kept for products.

        Other data or another loss than in an earlier pass raise ``DataChangedError``, data without
        examples ``ArgumentError``, and a loss or weight that is not finite ``NonFiniteError``.

        Args:
            point: where; loss, gradient and what is kept are added to it.
            differentiate: how; ``loss_alone`` for no gradient.
            keep: keeps what products need, as long as it fits the budget.
        """
        space, stats, device = self.parts.space, self.parts.stats, self.parts.space.device
        budget = self._budget() if keep else 0.0
        kept: dict[int, Derivatives] = {}
        used = count = 0
        examples = 0.0
        # A rank may hold no coordinate, and takes part all the same.
        differentiates = differentiate is not loss_alone
        size = space.size_here if differentiates else 0
        gradient = torch.zeros(size, dtype=space.dtype, device=device)
        mean = "mean" if self.examples is None else "mean of a sample"
        proves_mean = not self.minibatch and self.proof.is_due(mean)
        pieces: list[Any] = []
        with self.ranks.found((3,), torch.float64, device) as sums:
            for index, batch_loss, nbytes in self.losses(point):
                watching = nullcontext() if count else self.proof.watching(point)
                count += 1
                if proves_mean and not batch_loss.idle:
                    pieces = see(batch_loss.batch, pieces)
                metering = AllocationMeter() if keep else nullcontext()
                with metering as meter, point.at(batch_loss.seed), watching:
                    found = differentiate(batch_loss, point)
                weight = found.weight
                own = torch.stack([weighted(found.loss.double(), weight), weight])
                sums[:2].add_(own)
                examples += 0.0 if batch_loss.idle else _examples(batch_loss.batch)
                if differentiates:
                    space.add_(gradient, found.gradient, weight)
                    found.gradient = ()  # it has been added up, and is held no longer
                if meter is not None:
                    held = meter.alive() + nbytes
                    if self._fits(used + held, budget):
                        used += held
                        kept[index] = found
                del found, batch_loss  # before the graph of the next one is built
            sums[2] = examples
            if proves_mean:
                self.proof.mean(point, pieces)
        if self.ranks.together:
            sums[2] = self.ranks.of_all_data(sums[2])
        total, N, examples = sums.tolist()
        if self.examples is None and math.isfinite(examples):
            stats.examples = int(examples)
        # Of all data together, if the matrix is that of the sum.
        of_sum = self._summed and not self.minibatch
        N = self._checked_weight(total, N, self.share if of_sum else N)
        if self.examples is None:
            stats.weight = N
        loss = total / N
        point.check_loss(loss)
        if not self.minibatch:
            self.proof.done(mean)
        point.loss, point.weight = loss, N
        if differentiates:
            stats.gradients += 1
            stats.full_gradients += self.share
            point.gradient = self.ranks.of_all(gradient).div_(N)
        else:
            stats.full_forwards += self.share
        if keep:
            point.kept, point.streamed = kept, count - len(kept)
            stats.graphs_kept, stats.graphs_streamed = len(kept), point.streamed
            stats.graph_bytes = used

    def _fits(self, used: int, budget: float) -> bool:
        """Whether what is kept fits the budget, on all ranks that keep the same batches."""
        if not self.ranks.together:
            return used <= budget
        return not self.ranks.any(lambda: used > budget)

    def counts(self, count: int) -> Tensor:
        """Returns a count of each rank with data of its own."""
        counts = torch.zeros(self.ranks.data_size, device=self.parts.space.device)
        counts[self.ranks.data_rank] = count
        return self.ranks.of_all_data(counts)

    @property
    def _summed(self) -> bool:
        """Whether the loss is a sum over examples."""
        return bool(getattr(self.parts.batch_loss, "summed", False))

    def _checked_weight(self, total: float, found: float, N: float) -> float:
        """Returns what the loss is a mean over.

        Args:
            total: the sum of the losses.
            found: of the weights.
            N: what the sum is to be divided by.

        Raises:
            ArgumentError: the data have no examples.
            NonFiniteError: the loss or a weight is not finite.
        """
        if found == 0:
            raise ArgumentError("data", "of no examples", "at least one example of weight above 0")
        loss = total / N if N > 0 else math.nan
        if not math.isfinite(loss):
            message = (
                f"The mean loss over the data is {loss} (weight {N:g}), so it has no "
                "curvature. Lower the learning rate, or look for NaN in parameters and data."
            )
            self.parts.batches.forget()  # they may be mended
            raise NonFiniteError(message)
        return N

    def group_means(self, point: Point, groups: int, seed: int) -> GroupMeans:
        """One pass over the data: loss and gradient of groups of batches, dealt at random.

        A group has batches of each rank that has enough of them.

        Args:
            point: where.
            groups: at most.
            seed: of the deal.
        """
        space, ranks, device = self.parts.space, self.ranks, self.parts.space.device
        with ranks.all_or_none():
            count = sum(1 for _ in self.read(point))
            gradients = torch.zeros(groups, space.size_here, dtype=space.dtype, device=device)
        own_seed, first = seed * ranks.data_size + ranks.data_rank, ranks.data_rank * count
        if ranks.together:  # batch by batch, and so group by group
            count = int(self.counts(count).max())
            own_seed, first = seed, 0
        group_of = dealt(count, groups, own_seed, first=first)
        with ranks.found((groups, 3), torch.float64, device) as sums:
            for index, batch_loss, _ in self.losses(point):
                with point.at(batch_loss.seed):
                    found = loss_and_gradient(batch_loss, point)
                group, weight = group_of[index], found.weight.double()
                own = 0.0 if batch_loss.idle else size_of(batch_loss.batch)
                size = torch.full_like(weight, own)
                sums[group] += torch.stack([weighted(found.loss.double(), weight), weight, size])
                space.add_(gradients[group], found.gradient, found.weight)
        ranks.of_all(gradients)
        if ranks.together:
            sums[:, 2] = self.ranks.of_all_data(sums[:, 2])
        totals, weights, sizes = sums.T
        if self._summed:  # the loss of all data, as each group would have it alone
            weights = sizes * (self.share / sizes.sum())
        self._checked_weight(float(totals.sum()), float(weights.sum()), float(weights.sum()))
        self.parts.stats.gradients += 1
        self.parts.stats.full_gradients += self.share
        filled = weights > 0
        if not filled.all():
            weights, totals, gradients = weights[filled], totals[filled], gradients[filled]
        gradients.div_(weights[:, None].to(gradients.dtype))
        return GroupMeans(weights, totals / weights, gradients)

    def minibatches(
        self, point: Point, batch_size: int | None, seed: int
    ) -> tuple[int | None, Iterator[Passes]]:
        """Returns how many minibatches there are, ``None`` for no end, and passes over each.

        Where there are ranks a minibatch is one of each, as in a data-parallel training.

        Args:
            point: where.
            batch_size: rows of each on this rank (default: the batches are those of the data).
            seed: of their order, and of the draws.
        """
        ranks = self.ranks
        own_seed = seed * ranks.data_size + ranks.data_rank

        def read() -> Iterator[Any]:
            return (batch for _, batch, _ in self.read(point))

        with ranks.all_or_none():
            if batch_size is None:
                sizes = [size_of(batch) for batch in read()]
            else:
                check_integer("batch_size", batch_size, minimum=1)
                sizes = rows_of_all(read(), batch_size)
        total, count = sum(sizes), len(sizes)
        if batch_size is None:
            least: int | None = int(self.counts(count).min())
            batches = own_batches(read, count, own_seed)
        else:
            # The one batch of all rows is the same at every draw.
            least = None if ranks.any(lambda: batch_size < total) else 1
            batches = drawn_batches(read, sizes, batch_size, own_seed)
        return least, self._over_each(itertools.islice(batches, least), round(total / self.share))

    def _over_each(self, batches: Iterator[tuple[int, Any]], total: int) -> Iterator[Passes]:
        """Yields passes over each batch; what fails on one rank raises on all."""
        while True:
            with self.ranks.all_or_none():
                found = next(batches, None)
            if found is None:
                return
            yield self._minibatch(*found, total)

    def _minibatch(self, number: int, batch: Any, total: int) -> Passes:
        """Returns passes over one batch, with the masks that it has among all of them."""
        parts = self.parts
        pairs = isinstance(parts.batch_loss, Supervised)
        seed = parts.seed + number * self.ranks.data_size
        own = replace(parts, batches=Batches([batch], pairs=pairs), seed=seed)
        return replace(self, parts=own, examples=(size_of(batch), total), minibatch=True)


def _examples(batch: Any) -> float:
    """Returns the number of examples of a batch; NaN where that cannot be told."""
    with suppress(ArgumentError):
        return size_of(batch)
    return math.nan
