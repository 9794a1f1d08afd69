r"""Sharded parameters, gathered while their module runs, in operations that differentiate twice.

A loss of the shards ``s_1 … s_R`` of a parameter, of which each rank evaluates a part, has

.. math:: W = (s_1, …, s_R), \qquad
          \frac{\partial L}{\partial s_r} = \Big( \sum_q \frac{\partial L_q}{\partial W} \Big)_r

Gathering and this, summing and scattering, are each other's transpose, and so each other's
derivative. What ``fully_shard`` does instead has no derivative that autograd knows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.dtensors import local
from subspace_optim.curvature.fully_sharded import FSDPGroup, FSDPParameter
from subspace_optim.curvature.sharding import Layout, all_gather, reduce_scatter


class Gather(torch.autograd.Function):
    """The whole parameters of a group, from the shards of all ranks."""

    @staticmethod
    def forward(ctx: Any, group: FSDPGroup, *shards: Tensor) -> tuple[Tensor, ...]:
        """Gathers."""
        ctx.group = group
        return gathered(group, shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Sums and scatters."""
        return None, *_Scatter.apply(ctx.group, *gradients)  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """The shards of this rank, of the sums over the ranks of what each has for the whole."""

    @staticmethod
    def forward(ctx: Any, group: FSDPGroup, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return scattered(group, wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *Gather.apply(ctx.group, *gradients)  # type: ignore[no-untyped-call]


class Copy(torch.autograd.Function):
    """A parameter that each rank has all of, and uses for its own data."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> Tensor:
        """Does nothing."""
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Sums over the ranks."""
        return None, _Sum.apply(ctx.group, gradient)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """The sum over ranks, which each of them has, and which counts once."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, Copy.apply(ctx.group, gradient)  # type: ignore[no-untyped-call]


class _Joint(torch.autograd.Function):
    """The mean of the ranks' losses, of which this rank's has a share."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor, mean: Tensor) -> Tensor:
        ctx.share = share.to(loss.dtype)
        return mean.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.share, None, None


def joint(layout: Layout, loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of the losses of all ranks' batches, and its weight: the same on all.

    Args:
        layout: of the model.
        loss: of this rank's batch.
        weight: what it is a mean over.

    Raises:
        ArgumentError: the loss of a rank is a mean over nothing.
    """
    if layout.data is None:
        return loss, weight
    # The gradient of 0/0 is NaN, and so would be its sum over ranks.
    value = loss.detach().double()
    empty = (weight == 0) & ~value.isfinite()
    own = torch.where(weight == 0, 0.0, value * weight)
    sums = torch.stack([own, weight.double(), empty.double()])
    dist.all_reduce(sums, group=layout.data)
    of_all, total, undefined = sums
    if undefined > 0:
        remedy = "Leave such batches out, or let their loss be a number, such as 0."
        found = "NaN, of a batch of weight 0"
        raise ArgumentError("the loss of a rank", found, "a number", remedy)
    share, mean = (torch.where(total > 0, x / total, 0.0) for x in (weight, of_all))
    return _Joint.apply(loss, share, mean), total.to(weight)  # type: ignore[no-untyped-call]


# --- the two collectives -------------------------------------------------------------------------


def _sizes(group: FSDPGroup) -> tuple[int, list[torch.Size]]:
    """Returns R, and of each parameter the shape of a shard, padded to the largest."""
    ranks = dist.get_world_size(group.shards)
    return ranks, [_padded(p, ranks) for p in group.parameters]


def _padded(p: FSDPParameter, ranks: int) -> torch.Size:
    shape = list(p.shape)
    shape[p.dim] = -(-shape[p.dim] // ranks)
    return torch.Size(shape)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def gathered(group: FSDPGroup, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the whole parameters, by one all-gather."""
    ranks, shapes = _sizes(group)
    lengths = [shape.numel() for shape in shapes]
    own = shards[0].new_zeros(sum(lengths), dtype=_widest(shards))
    for room, shard in zip(own.split(lengths), shards, strict=True):
        room[: shard.numel()] = shard.reshape(-1)
    every = own.new_empty(ranks, len(own))
    all_gather(every.view(-1), own, group.shards)
    return tuple(
        torch.cat([each.view(shape) for each in part], p.dim)
        .narrow(p.dim, 0, p.shape[p.dim])
        .to(shard.dtype)
        for part, shape, p, shard in zip(
            every.split(lengths, 1), shapes, group.parameters, shards, strict=True
        )
    )


def scattered(group: FSDPGroup, wholes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the shards of the sums over ranks, by one reduce-scatter."""
    ranks, shapes = _sizes(group)
    lengths = [shape.numel() for shape in shapes]
    every = wholes[0].new_zeros(ranks, sum(lengths), dtype=_widest(wholes))
    parts = zip(every.split(lengths, 1), shapes, wholes, group.parameters, strict=True)
    for rooms, shape, whole, p in parts:
        for room, piece in zip(rooms, whole.split(max(1, shape[p.dim]), p.dim), strict=False):
            room[: piece.numel()] = piece.reshape(-1)
    own = every.new_empty(sum(lengths))
    reduce_scatter(own, every.view(-1), group.shards)
    if group.replicas is not None:
        dist.all_reduce(own, group=group.replicas)
    return tuple(
        room[: local(p.sharded).numel()].view(local(p.sharded).shape).to(whole.dtype)
        for room, p, whole in zip(own.split(lengths), group.parameters, wholes, strict=True)
    )
