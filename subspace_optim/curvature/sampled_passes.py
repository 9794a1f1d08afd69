"""Passes over a sample of the data, drawn by all ranks that evaluate theirs together."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.evaluation import Point, loss_and_gradient
from subspace_optim.curvature.objective import BatchLoss, Supervised
from subspace_optim.curvature.passes import Passes
from subspace_optim.curvature.samples import can_be_cut, drawn, has_few_rows, size_of


def sampled(
    passes: Passes, point: Point, examples: int, seed: int, pieces: int
) -> list[Passes] | None:
    """Returns passes over a sample, and over the same in pieces that tell how it scatters.

    They are the same passes where the pieces are the user's own batches. ``None`` where the
    data are one batch that cannot be cut. Of a sharded model the batches are those of all
    ranks together, and ``None`` is returned too where these have different numbers of them.

    Args:
        passes: over all of the data.
        point: where it is seen whether one can.
        examples: how many, at least, of all ranks together.
        seed: of the draw.
        pieces: that the rows of a single batch are dealt to.
    """
    parts, space, ranks = passes.parts, passes.parts.space, passes.ranks

    def batches() -> Iterator[Any]:
        return (batch for _, batch, _ in passes.read(point))

    def count(number: int) -> int:
        return int(ranks.of_all_data(torch.tensor([number], device=space.device)))

    with ranks.all_or_none():
        sizes = [size_of(batch) for batch in batches()]
    total = count(sum(sizes))
    own_seed = seed * ranks.data_size + ranks.data_rank
    if ranks.together:
        if passes.counts(len(sizes)).unique().numel() > 1:
            return None
        if len(sizes) > 1:  # the same batches on all ranks
            own_seed = seed
            own = torch.tensor(sizes, dtype=torch.float64, device=space.device)
            sizes = ranks.of_all_data(own).tolist()
    with ranks.all_or_none():
        cut = functools.partial(_may_be_cut, passes, point)
        found = drawn(batches, sizes, examples / total, own_seed, cut, pieces)
    if ranks.any(lambda: found is None):
        return None
    assert found is not None  # noqa: S101 (on no rank)
    counts = count(sum(map(size_of, found.batches))), total
    pairs = isinstance(parts.batch_loss, Supervised)
    each = [found.batches] if found.pieces is found.batches else list(found)
    return [
        replace(passes, parts=replace(parts, batches=Batches(own, pairs=pairs)), examples=counts)
        for own in each
    ]


def _may_be_cut(passes: Passes, point: Point, batch: Any) -> bool:
    """Whether rows of a batch may be taken: on all ranks whose batches are evaluated together.

    Args:
        passes: over all of the data.
        point: where the loss of the batch is compared with those of its parts.
        batch: of the data.
    """
    parts, space = passes.parts, passes.parts.space
    if space.ranks.any(lambda: has_few_rows(batch)):
        return False

    def differentiate(batch: Any) -> tuple[Tensor, Tensor]:
        loss = BatchLoss(parts.model, parts.batch_loss, batch, parts.seed, space.layout)
        with point.at(parts.seed):
            found = loss_and_gradient(loss, point)
        gradient = torch.zeros(space.size_here, dtype=space.dtype, device=space.device)
        space.add_(gradient, found.gradient, torch.ones_like(found.weight))
        return found.weight, gradient

    return can_be_cut(
        batch, differentiate, lambda v: math.sqrt(space.inner.sum(v.double().square().sum()))
    )
