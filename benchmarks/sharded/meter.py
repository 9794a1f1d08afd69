"""``Meter``: counts what ranks send each other, compute, and hold, operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

KINDS: Final = {
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "scatter",
    "c10d::allreduce_": "sum",
    "_c10d_functional::all_gather_into_tensor": "gather",
    "_c10d_functional::reduce_scatter_tensor": "scatter",
    "_c10d_functional::all_reduce": "sum",
}
"""Collectives by torch's names, and what is told of each. Any other one is told by its own name."""
_NOT_COLLECTIVE: Final = {"_c10d_functional::wait_tensor"}
_NOTICED: Final = 1.001  # a peak is looked for where it would be higher by that: it takes a while
_UNWRITTEN: Final = ("aten::empty", "aten::new_empty")  # beginnings of names: they fill nothing


@dataclass
class Counts:
    """What was counted.

    Attributes:
        collectives: in order: the kind, and the bytes of the larger of what goes in and what comes
            out on a rank: of all that is gathered, of all that is summed and scattered.
        work: floating-point operations and bytes read and written, of each operation that is no
            view; how many had both.
        peak: most bytes that were held at once, of what was allocated inside.
        left: bytes of these that are held at the end; of pieces that were counted one by one.
        reads: times that the host has waited for a number from the device.
    """

    collectives: list[tuple[str, int]] = field(default_factory=list)
    work: Counter[tuple[int, int]] = field(default_factory=Counter)
    peak: int = 0
    left: int = 0
    reads: int = 0

    def number(self, kind: str) -> int:
        """Returns how many collectives of a kind there were."""
        return sum(1 for each, _ in self.collectives if each == kind)

    def payload(self, kind: str) -> int:
        """Returns the bytes of all collectives of a kind."""
        return sum(size for each, size in self.collectives if each == kind)

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products."""
        return sum(flops * times for (flops, _), times in self.work.items())

    @property
    def touched(self) -> int:
        """Bytes that operations have read and written."""
        return sum(size * times for (_, size), times in self.work.items())

    @property
    def operations(self) -> int:
        """Operations that are no views."""
        return sum(self.work.values())

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.collectives + other.collectives,
            self.work + other.work,
            max(self.peak, other.peak),
            max(self.left, other.left),
            self.reads + other.reads,
        )


class Meter(TorchDispatchMode):
    """Counts inside. What was allocated before, as parameters were, is not in ``peak``.

    Operations of ``DTensor`` are seen as those of their local tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = 0  # at most: what has been freed since is taken off when it matters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        for t in given:
            self._note(t, inside=False)
        result = self.run(func, args, kwargs)
        found = list(_tensors(result))
        for t in found:
            self._note(t, inside=True)
        self._count(func, args, kwargs, given, result, found)
        if self._held > _NOTICED * self.counts.peak:
            self.counts.peak = max(self.counts.peak, self.alive())
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operation."""
        return func(*args, **kwargs)

    def alive(self) -> int:
        """Returns the bytes that were allocated inside and are still held."""
        self._storages = {c: v for c, v in self._storages.items() if not v[0].expired()}
        self._held = sum(size for _, size in self._storages.values())
        return self._held

    def take(self) -> Counts:
        """Returns what was counted, and begins anew, with what is held at present."""
        found, self.counts = self.counts, Counts(peak=self.alive())
        return found

    def _note(self, tensor: Tensor, *, inside: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        # While a weak reference is held, no new storage gets its address.
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._storages:
            size = storage.nbytes() if inside else 0
            self._storages[reference.cdata] = reference, size
            self._held += size

    def _count(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any, found: Any
    ) -> None:
        name = func._schema.name  # noqa: SLF001 (there is no public way to ask)
        if name.startswith(("c10d::", "_c10d_functional::")):
            if name not in _NOT_COLLECTIVE:
                size = max((t.nbytes for t in given), default=0)
                size = max([size, *(t.nbytes for t in found)])
                self.counts.collectives.append((KINDS.get(name, name), size))
        elif not func.is_view and not name.startswith(_UNWRITTEN):
            flops = 0
            if func.overloadpacket in flop_registry:
                flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            own = {id(t): t.nbytes for t in (*given, *found)}
            self.counts.work[flops, sum(own.values())] += 1


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yields the tensors of arguments or results of an operation: in lists and dicts, if any."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
