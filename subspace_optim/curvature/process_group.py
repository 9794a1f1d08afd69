"""Sums over the ranks of a process group, and one error on all of them where one fails.

Ranks that wait for each other have to do the same things in the same order. So whatever they do
together begins with a *meeting*, an all-reduce of a few numbers that tells whether a rank has
failed, and whether all are about to do the same. A rank that fails on its own goes to the next
meeting, and all ranks leave that one with its error.
"""

from __future__ import annotations

import builtins
import hashlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspace_optim import _validation
from subspace_optim._validation import ArgumentError, RanksWarning

_Error = TypeVar("_Error", bound=Exception)


class Ranks:
    """The ranks that an operator sums over: those of ``process_group``, or this process alone.

    Every method that communicates is called by all ranks in the same order; a rank that does
    something else is an error on all. With one process nothing is communicated, and
    ``torch.distributed`` need not have been initialised.

    Args:
        process_group: as given to the operator.

    Attributes:
        size: how many they are.
        rank: which of them this one is.
        data_size: how many have data of their own: of tensor-parallel ranks, one.
        data_rank: which of these this one is.
        together: whether their batches are evaluated together, as those of a sharded model are:
            what one of them finds of a batch is then of the batches of all.

    Raises:
        ArgumentError: it is no process group, or one that this process does not belong to.
    """

    _occasion: ClassVar[int] = 0  # counts meetings and their preparations: which error is of which

    def __init__(self, process_group: Any) -> None:
        known = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if process_group is not None and not known:
            remedy = "Pass e.g. torch.distributed.group.WORLD, after init_process_group."
            kind = type(process_group).__name__
            raise ArgumentError("process_group", kind, "a group of this process, or None", remedy)
        self.group = process_group
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.together, self.data_size, self.data_rank = False, self.size, self.rank
        # Made once: a rank that has run out of memory still has to say so.
        self._message = torch.zeros(0) if process_group is None else _message(process_group)
        self._on_cpu = self._message.numpy() if self._message.device.type == "cpu" else None

    @contextmanager
    def summed(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[Tensor]:
        """Yields zeros to add to; where the block ends, one all-reduce sums them over the ranks."""
        if self.group is None:
            yield torch.zeros(shape, dtype=dtype, device=device)
            return
        with self._before(f"the sum of a tensor of shape {tuple(shape)}"):
            total = torch.zeros(shape, dtype=dtype, device=device)
            yield total
        self._all_reduce(total)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` over the ranks in place."""
        if self.group is not None:
            self._meet(f"the sum of a tensor of shape {tuple(tensor.shape)}")
            self._all_reduce(tensor)
        return tensor

    @contextmanager
    def found(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Iterator[Tensor]:
        """Yields zeros to add to what each rank finds of its batches; then it is of all ranks."""
        if not self.together:
            with self.summed(shape, dtype, device) as total:
                yield total
            return
        with self.all_or_none():
            yield torch.zeros(shape, dtype=dtype, device=device)

    def of_all(self, found: Tensor) -> Tensor:
        """Returns what all ranks have found of their batches, from what this one has, in place."""
        return found if self.together else self.sum_(found)

    def of_all_data(self, own: Tensor) -> Tensor:
        """Returns the sum of what each rank with data of its own has: others have a copy of it."""
        total = self.sum_(own.clone()) * self.data_size
        return total / self.size if own.is_floating_point() else total // self.size

    def agree(self, values: Sequence[int], device: torch.device) -> list[bool]:
        """Returns for each 64-bit value whether it is the same on all ranks."""
        if self.group is None or self._meet("a comparison", values=values)[1]:
            return [True] * len(values)
        own = torch.tensor(values, dtype=torch.int64, device=device)
        extremes = torch.stack([own, ~own])  # ~x falls as x grows, also at the ends of the range
        self._all_reduce(extremes, dist.ReduceOp.MAX)
        largest, smallest = extremes[0], ~extremes[1]
        return [bool(same) for same in (largest == smallest).tolist()]

    def settled(self, changed: bool, values: Sequence[int]) -> bool:
        """Returns whether nothing has changed on any rank, and all have the same values."""
        if self.group is None:
            return not changed
        any_changed, alike = self._meet("a look", flag=changed, values=values)
        return alike and not any_changed

    def any(self, holds: Callable[[], bool | None]) -> bool | None:
        """Returns whether ``holds()`` on any rank. What fails on one raises on all.

        Where it returns ``None``, which it has to do on all ranks at once, nothing is communicated.
        """
        if self.group is None:
            return holds()
        found, error = None, None
        try:
            found = holds()
        except Exception as caught:  # noqa: BLE001 (raised below, on all ranks)
            error = caught
        if found is None and error is None:
            return None
        return self._meet("a decision", error, flag=bool(found))[0]

    def check_alike(self, remedy: str, **arguments: object) -> None:
        """Raises one ``ArgumentError`` on all ranks where they have different arguments.

        Args:
            remedy: the way out, for the message.
            **arguments: values that compare by what they are: numbers and strings.
        """
        if self.group is None or self._meet("a comparison", values=[_number(repr(arguments))])[1]:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, arguments, self.group)
        for name in arguments:
            values = [theirs[name] for theirs in found]
            if any(value != values[0] for value in values):
                label = f"{name} on the ranks of process_group"
                raise self.told(ArgumentError(label, values, "the same on all of them", remedy))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Raises on all ranks what fails inside on one of them."""
        if self.group is None:
            yield
        else:
            with self._before("the end of what all do or none does"):
                yield

    @contextmanager
    def _before(self, doing: str) -> Iterator[None]:
        """Runs what each rank does on its own, and then meets: after it, no rank has failed."""
        error = None
        Ranks._occasion += 1
        try:
            yield
        except Exception as caught:
            if getattr(caught, "told_on", None) == Ranks._occasion:
                raise  # it was raised on all ranks at their latest meeting
            error = caught
        self._meet(doing, error)

    def _meet(
        self,
        doing: str,
        error: Exception | None = None,
        *,
        flag: bool = False,
        values: Sequence[int] = (),
    ) -> tuple[bool, bool]:
        """Meets the other ranks; ``RuntimeError`` where they are about to do different things.

        Args:
            doing: what is done next.
            error: that this rank has failed with.
            flag: of this rank.
            values: of this rank.

        Returns:
            Whether any rank has the flag, and whether all have the same values.
        """
        Ranks._occasion += 1
        same = [_number(doing), _number(repr(list(values)))]
        own = [error is not None, flag, *same, *(~x for x in same)]
        if self._on_cpu is None:
            self._message.copy_(torch.tensor(own))
        else:
            self._on_cpu[:] = own  # by NumPy: torch may be what fails, for want of memory
        self._all_reduce(self._message, dist.ReduceOp.MAX)
        failed, flagged, *largest = self._message.tolist()
        if failed:
            self._raise_first(error)
        here, alike = (largest[i] == ~largest[i + 2] for i in range(2))
        if not here:
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, doing, self.group)
            places = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(found))
            message = (
                f"The ranks of process_group do different things, and would wait for each other "
                f"for ever ({places}). Call the same on all of them, in the same order."
            )
            raise self.told(RuntimeError(message))
        return bool(flagged), alike

    def _all_reduce(self, tensor: Tensor, operation: Any = None) -> None:
        operation = dist.ReduceOp.SUM if operation is None else operation
        try:
            dist.all_reduce(tensor, operation, self.group)
        except Exception as error:
            message = (
                f"The ranks have lost each other: one has ended, or did not come within the time "
                f"limit of the process group ({str(error).splitlines()[0]}). What went wrong is in "
                "the log of that rank."
            )
            raise self.told(RuntimeError(message)) from error  # no other rank can be told

    def _raise_first(self, error: Exception | None) -> None:
        """Raises, on every rank, the error of the lowest rank that has one.

        The kind is the same on all, because what is done about an error depends on its kind. That
        others have waited for a rank in vain is no error of their own.
        """
        own = None if error is None else (_plain_kind(error), _text(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, self.group)
        failed = [rank for rank, described in enumerate(found) if described]
        first = min(failed, key=lambda rank: _waited_in_vain(found[rank][1]))
        if error is not None and first == self.rank:
            raise self.told(error)
        kind, message = found[first]
        theirs = _kind(kind)(f"Rank {first} of process_group failed: {message}")
        raise self.told(theirs) from error

    @staticmethod
    def told(error: _Error) -> _Error:
        """Marks an error that is raised on all ranks: blocks around it need not meet for it again.

        The mark holds until the next meeting, since one rank may raise the same object later.
        """
        error.told_on = Ranks._occasion  # type: ignore[attr-defined]
        return error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies communicate in the same group

    def __reduce__(self) -> Any:
        if self.group is None:
            return Ranks, (None,)
        raise pickle.PicklingError(
            "An operator with a process_group cannot be pickled: a group is a connection of "
            "running processes. Pickle the model, and make the operator anew on each rank."
        )


def taking_part(given: Ranks, of_shards: Ranks) -> Ranks:
    """Returns the ranks that evaluate a model.

    Args:
        given: those of the argument ``process_group``.
        of_shards: those that hold a part of the model; none beside this one, if it is whole.

    Raises:
        ArgumentError: both are given, and differ.
    """
    if of_shards.group is None:
        return given
    if given.group is not None and given.size != of_shards.size:
        found = f"a group of {given.size} ranks"
        remedy = "Leave it out: a sharded model is evaluated on all ranks that hold a part."
        allowed = f"the {of_shards.size} ranks of the model, or None"
        raise ArgumentError("process_group", found, allowed, remedy)
    return of_shards


def warn_without_group(model: nn.Module, process_group: Any) -> None:
    """Warns where a model is trained on several ranks and each would measure its own data alone.

    Args:
        model: with its wrappers, as it was given to the operator.
        process_group: as given to the operator.
    """
    if process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return
    wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    ranks = max((dist.get_world_size(m.process_group) for m in wrappers), default=1)
    if ranks > 1:
        message = (
            f"The model is a DistributedDataParallel of {ranks} ranks, and process_group is None: "
            "each rank measures the data that it was given, and nothing else. Where these differ, "
            "so do the bases, and an optimizer that uses them trains the replicas apart. Pass "
            "process_group=torch.distributed.group.WORLD, or give every rank the same data."
        )
        warnings.warn(message, RanksWarning, stacklevel=2)


def _waited_in_vain(message: str) -> bool:
    """Whether an error is one of communication: gloo's, or NCCL's."""
    return re.search("gloo|NCCL|ProcessGroup", message) is not None


def _message(group: Any) -> Tensor:
    """Returns the tensor of a meeting, on a device that the group communicates from."""
    devices = {device.type for device in group._device_types}  # noqa: SLF001 (no public name)
    device = "cpu" if "cpu" in devices or not devices else devices.pop()
    return torch.zeros(6, dtype=torch.int64, device=device)


def _number(text: str) -> int:
    """Returns 64 bits of a hash that is the same on all machines."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 (of a faulty __str__: the error itself still counts)
        return f"{type(error).__name__}, which has no message"


def _plain_kind(error: Exception) -> str:
    """Returns the name of the class of ``error``, or of its nearest base that takes a message.

    Other ranks raise that one, since what is done about an error depends on its class.
    """
    return next(cls.__name__ for cls in type(error).__mro__ if _is_plain(cls))


def _is_plain(cls: type) -> bool:
    if _kind(cls.__name__) is not cls:
        return False
    try:
        cls("a message")
    except TypeError:
        return False
    return True


def _kind(name: str) -> Any:
    return getattr(_validation, name, None) or getattr(builtins, name, None)
