"""Sums over the ranks of a process group, and one error on all of them where one fails."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from subspace_optim import _validation
from subspace_optim._validation import ArgumentError


class Ranks:
    """The ranks that an operator sums over: those of ``process_group``, or this process alone.

    Every method that communicates is called by all ranks in the same order. With one process
    nothing is communicated, and ``torch.distributed`` need not have been initialised.

    Args:
        process_group: as given to the operator.

    Attributes:
        size: how many they are.
        rank: which of them this one is.

    Raises:
        ArgumentError: it is no process group, or one that this process does not belong to.
    """

    def __init__(self, process_group: Any) -> None:
        known = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if process_group is not None and not known:
            remedy = "Pass e.g. torch.distributed.group.WORLD, after init_process_group."
            kind = type(process_group).__name__
            raise ArgumentError("process_group", kind, "a group of this process, or None", remedy)
        self.group = process_group
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)

    def total(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        add_to: Callable[[Tensor], None],
    ) -> Tensor:
        """Returns the sum over ranks of what ``add_to`` adds to zeros; one all-reduce.

        The sum carries the number of ranks that failed in one element more, so that an error of
        one is an error of all, and none waits for a rank that has left.
        """
        if self.group is None:
            total = torch.zeros(shape, dtype=dtype, device=device)
            add_to(total)
            return total
        packed = torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype, device=device)
        error = None
        try:
            add_to(packed[:-1].view(shape))
        except Exception as caught:  # noqa: BLE001 (raised below, on all ranks)
            error = caught
            packed.zero_()[-1] = 1
        dist.all_reduce(packed, group=self.group)
        if packed[-1] > 0:
            self._raise_first(error)
        return packed[:-1].view(shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` over the ranks in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def agree(self, values: Sequence[int], device: torch.device) -> list[bool]:
        """Returns for each 64-bit value whether it is the same on all ranks; one all-reduce."""
        if self.group is None:
            return [True] * len(values)
        own = torch.tensor(values, dtype=torch.int64, device=device)
        extremes = torch.stack([own, ~own])  # ~x falls as x grows, also at the ends of the range
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self.group)
        largest, smallest = extremes[0], ~extremes[1]
        return [bool(same) for same in (largest == smallest).tolist()]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What fails inside on one rank raises on all."""
        if self.group is None:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 (raised below, on all ranks)
            error = caught
        self._raise_first(error)

    def _raise_first(self, error: Exception | None) -> None:
        """Raises, on every rank, the error of the lowest rank that has one.

        The kind is the same on all, because what is done about an error depends on its kind.
        """
        own = None if error is None else (_plain_kind(error), str(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, self.group)
        first = next((rank for rank, described in enumerate(found) if described), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        kind, message = found[first]
        raise _kind(kind)(f"Rank {first} of process_group failed: {message}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy on every rank goes on in the same group

    def __reduce__(self) -> Any:
        if self.group is None:
            return Ranks, (None,)
        raise pickle.PicklingError(
            "An operator with a process_group cannot be pickled: a group is a connection of "
            "running processes. Pickle the model, and make the operator anew on each rank."
        )


def _plain_kind(error: Exception) -> str:
    """Returns the name of the first class of ``error`` that one message makes."""
    names = (cls.__name__ for cls in type(error).__mro__ if cls is not ArgumentError)
    return next(name for name in names if _kind(name) is not None)


def _kind(name: str) -> Any:
    return getattr(_validation, name, None) or getattr(builtins, name, None)
