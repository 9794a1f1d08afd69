"""Which coordinates of ``θ`` lie on which rank, where a model is sharded.

Each rank has a *local* tensor of every parameter: its shard, or all of it. Several ranks may have
the same one, over a replicated dimension of a mesh, or where the parameter is no ``DTensor``. They
are *replicas*, and each owns a piece of it: every coordinate of ``θ`` belongs to one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspace_optim._inner_product import InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.dtensors import is_sharded
from subspace_optim.curvature.fully_sharded import FSDPGroup, divided, fsdp_groups, reshard_all
from subspace_optim.curvature.process_group import Ranks


def all_gather(every: Tensor, own: Tensor, group: Any) -> None:
    """Gathers what each rank has, in the order of the ranks: of torch 2.13 under its new name."""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(every, own, group)


def reduce_scatter(own: Tensor, every: Tensor, group: Any) -> None:
    """Sums over the ranks, of which each gets its part: of torch 2.13 under its new name."""
    found = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    found(own, every, group=group)


class Layout:
    """Which coordinates lie on which rank.

    Args:
        model: sharded.
        tensors: the parameters that are the coordinates.

    Attributes:
        ranks: that hold a part of the model.
        sums: the process group of sums over coordinates.
        data_ranks: those with data of their own.
        data: the process group of those with data of their own; ``None``: this rank alone.
        replicas: for each parameter the ranks, in order, that have the same local tensor.

    Raises:
        ArgumentError: a parameter is sharded in a way that cannot be followed.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Any]) -> None:
        self._model, self._divided = model, divided(model)
        meshes = {tuple(sorted(group.mesh)) for group in self.groups}
        if len(meshes) > 1:
            allowed = "one of all that fully_shard has divided"
            raise ArgumentError("the data-parallel mesh", sorted(meshes), allowed)
        own = dist.get_rank()
        data = next(iter(meshes), (own,))
        everyone, held = {own, *data}, list[Any](model.parameters())
        for t in held:
            if is_sharded(t):
                everyone |= set(t.device_mesh.mesh.flatten().tolist())
        ranks = tuple(sorted(everyone))
        like = _a_group_of(held)
        self.ranks = Ranks(_group(ranks, like, "meetings"))
        self.sums = _group(ranks, like, "sums")
        self.ranks.together = True
        self.ranks.data_size, self.ranks.data_rank = len(data), data.index(own)
        self.data_ranks = data
        self.data = _group(data, like, "losses") if len(data) > 1 else None
        found: list[Any] = [None] * len(ranks)
        dist.all_gather_object(found, [_shard_of(t) for t in tensors], self.ranks.group)
        self.replicas = [
            tuple(rank for rank, theirs in zip(ranks, found, strict=True) if theirs[i] == of)
            for i, of in enumerate(found[ranks.index(own)])
        ]

    @property
    def groups(self) -> list[FSDPGroup]:
        """What ``fully_shard`` gathers together, at present."""
        return fsdp_groups(self._model)

    def reshard(self) -> None:
        """Lets all modules hold shards."""
        reshard_all(self._divided)

    def owned(self, index: int, elements: int) -> slice | None:
        """Returns which elements of a parameter's local tensor belong to this rank.

        Args:
            index: of the parameter.
            elements: of its local tensor.

        Returns:
            ``None`` for all of them.
        """
        replicas = self.replicas[index]
        if len(replicas) == 1:
            return None
        piece = -(-elements // len(replicas))
        start = min(elements, piece * replicas.index(dist.get_rank()))
        return slice(start, min(elements, start + piece))

    def gather(self, pieces: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Returns local tensors of which each rank has its piece: an all-gather for each set.

        Args:
            pieces: as ``owned`` says, one a parameter.
            shapes: of the local tensors.
        """
        result = list(pieces)
        for ranks in sorted(set(self.replicas)):
            those = [i for i, r in enumerate(self.replicas) if r == ranks and len(ranks) > 1]
            if not those:
                continue
            lengths = [-(-shapes[i].numel() // len(ranks)) for i in those]
            own = pieces[those[0]].new_zeros(sum(lengths))
            for room, i in zip(own.split(lengths), those, strict=True):
                room[: pieces[i].numel()] = pieces[i].reshape(-1)
            every = own.new_empty(len(ranks), len(own))
            all_gather(every.view(-1), own, _group(ranks, self.ranks.group, "replicas"))
            for whole, i in zip(every.split(lengths, dim=1), those, strict=True):
                result[i] = whole.reshape(-1)[: shapes[i].numel()].view(shapes[i])
        return result


class ShardedInnerProduct(InnerProduct):
    """Of vectors that are sharded as the parameters are: sums are all-reduced.

    Args:
        layout: of the coordinates.
        size: P, how many there are.
        here: how many lie on this rank.
        device: that holds them.
    """

    def __init__(self, layout: Layout, size: int, here: int, device: torch.device) -> None:
        ranks, self._group = layout.ranks, layout.sums
        self._ranks, self._size, self._here = ranks, size, here
        every = torch.zeros(ranks.size, dtype=torch.int64, device=device)
        every[ranks.rank] = here
        dist.all_reduce(every, group=self._group)
        self._before = int(every[: ranks.rank].sum())

    def sum(self, partial: Tensor) -> Tensor:
        """Returns sums over all coordinates, of those over the coordinates that lie here."""
        partial = partial.contiguous()
        dist.all_reduce(partial, group=self._group)
        return partial

    def size(self, here: int) -> int:  # noqa: ARG002
        """Returns P."""
        return self._size

    def here(self, size: int) -> int:  # noqa: ARG002
        """Returns how many coordinates lie here."""
        return self._here

    def before(self, size: int) -> int:  # noqa: ARG002
        """Returns how many coordinates lie on ranks before this one."""
        return self._before

    def seed(self, seed: int) -> int:
        """Returns another seed on each rank."""
        return seed * self._ranks.size + self._ranks.rank


def _shard_of(tensor: Any) -> tuple[int, ...]:
    """Returns what tells one shard of a parameter from another: its place in each division."""
    if not is_sharded(tensor):
        return ()
    place = tensor.device_mesh.get_coordinate() or ()
    divided = zip(place, tensor.placements, strict=True)
    return tuple(i for i, placement in divided if not placement.is_replicate())


def _a_group_of(tensors: Iterable[Any]) -> Any:
    """Returns a process group that the model itself uses."""
    mesh = next(t.device_mesh for t in tensors if is_sharded(t))
    return mesh.get_group(0)


_GROUPS: dict[Any, Any] = {}


def _group(ranks: tuple[int, ...], like: Any, use: str) -> Any:
    """Returns a process group of these ranks that is used for one thing.

    A rank that has failed says so in one, while the others wait for it in another, or in one of the
    model's own: two different collectives in one group would be taken for each other.

    Args:
        ranks: in ascending order.
        like: has the time limit that it gets.
        use: names it.
    """
    world = dist.group.WORLD
    key = id(world), ranks, use
    if key not in _GROUPS:
        limit = None
        with suppress(Exception):
            device = next(iter(like._device_types))  # noqa: SLF001
            limit = like._get_backend(device).options._timeout  # noqa: SLF001
            limit *= 1 if use != "meetings" else 2  # those who have waited in vain come to it
        group = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        _GROUPS[key] = world, group  # alive, so that no other world gets its id
    return _GROUPS[key][1]
