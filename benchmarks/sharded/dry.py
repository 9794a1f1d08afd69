"""Ranks that are not there: the package's own code on tensors without memory.

One process is rank 0 of a world of any size, whose collectives are torch's fake ones; parameters,
vectors and data are on the device ``meta``, which knows shapes and nothing else. So a model of any
size takes no memory, and each operation and each collective is the one that a real rank would
do. What is read from the device is made up, as ``_made_up`` says, but for what a ``Replay`` knows.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools import fake_collectives  # noqa: F401 (of tensors without memory)
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.sharded.meter import Meter
from subspace_optim.curvature import at_points, contexts, parameters
from subspace_optim.linalg import krylov, rows

_aten = torch.ops.aten


class Dry(Meter):
    """Counts what happens to tensors of no memory.

    Args:
        replayed: the small matrices that an eigensolve reads, in order.
    """

    def __init__(self, replayed: Sequence[np.ndarray[Any, Any]] = ()) -> None:
        super().__init__()
        self.replayed = list(replayed)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operation; a number that is read from the device is made up."""
        if func is _aten._local_scalar_dense.default and args[0].is_meta:  # noqa: SLF001
            self.counts.reads += 1
            return _made_up(args[0])
        if func is _aten._to_copy.default and args[0].is_meta and _to_host(kwargs):  # noqa: SLF001
            self.counts.reads += 1
            return self._read(args[0], kwargs.get("dtype") or args[0].dtype)
        if func is _aten.randn.generator:  # which the device lacks
            return _aten.randn.default(*args, **{k: kwargs[k] for k in kwargs if k != "generator"})
        return super().run(func, args, kwargs)

    def _read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.replayed and tensor.shape == self.replayed[0].shape:
            return torch.from_numpy(self.replayed.pop(0).copy()).to(dtype)
        return torch.ones(tensor.shape, dtype=dtype)


def _to_host(kwargs: dict[str, Any]) -> bool:
    return torch.device(kwargs.get("device") or "meta").type == "cpu"


def _made_up(tensor: Tensor) -> bool | int | float:
    """Returns a number that lets a computation go on: nothing breaks down, no state differs."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 0


class Recorder(Meter):
    """Keeps what an eigensolve reads: the small square matrices that it copies in float64.

    Args:
        rows: of the matrices.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.seen: list[np.ndarray[Any, Any]] = []
        self._shape = (rows, rows)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operation."""
        result = super().run(func, args, kwargs)
        read = func is _aten._to_copy.default and kwargs.get("dtype") == torch.float64  # noqa: SLF001
        if read and args[0].shape == self._shape:
            self.seen.append(result.numpy().copy())
        return result


class _OnHost:
    """Torch, but for generators, which are the host's whatever device was asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def Generator(device: Any) -> torch.Generator:  # noqa: N802 (torch's own name)
        """Returns a generator."""
        del device
        return torch.Generator()


@contextmanager
def dry_run(ranks: int, replayed: Sequence[np.ndarray[Any, Any]] = ()) -> Iterator[Dry]:
    """Lets this process be rank 0 of ``ranks`` that are not there, and counts what it does.

    Args:
        ranks: of the world, which is that of a model sharded over one dimension.
        replayed: the matrices that eigensolves read, in order.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    full_precision = contexts.full_precision
    on_host = torch.device("cpu")
    replaced: list[tuple[Any, str, Any]] = [
        (dist, "all_gather_object", _all_gather_object),
        # Of tensors of no memory: their device has no autocast, no mesh, no generator, no address.
        (at_points, "full_precision", lambda _, **options: full_precision(on_host, **options)),
        (parameters, "check_placements", lambda *_: None),
        (krylov, "torch", _OnHost()),
        # Fewer and longer blocks of columns, still small beside the vectors: it is one call each.
        (rows, "_COLUMNS", 1 << 22),
        (krylov.KrylovRows, "share_memory_with", lambda *_: False),
    ]
    gc.freeze()  # what was there before is not looked at each time that something is counted
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own names of collectives
            of_steps = "subspace_optim.optim._base.outside_autocast"
            stack.enter_context(mock.patch(of_steps, return_value=nullcontext()))
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield stack.enter_context(Dry(replayed))
    finally:
        gc.unfreeze()
        dist.destroy_process_group()


def _all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
    """What all ranks tell each other when a layout is made, which shard each has; or the same."""
    for rank in range(dist.get_world_size(group)):
        of_shards = isinstance(own, list)
        found[rank] = [tuple(rank for _ in place) for place in own] if of_shards else own
