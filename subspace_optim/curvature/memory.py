"""How much memory is free, and how much a computation holds on to."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASSUMED_MEMORY = 1 << 32


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes that were allocated inside and are still held, on any device.

    What was allocated before, such as parameters, is not counted, and neither are views of it, as
    a transpose returns.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), inside=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, inside=True)
        return result

    def _see(self, values: Any, *, inside: bool) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                # While a weak reference is held, no new storage gets its address.
                reference = StorageWeakRef(storage)
                size = storage.nbytes() if inside else 0
                self._storages.setdefault(reference.cdata, (reference, size))

    def alive(self) -> int:
        """Returns the bytes that are held at present."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def free_memory(device: torch.device) -> float:
    """Returns the bytes that are free on the device; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_ASSUMED_MEMORY]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = [1024 * int(lines["MemAvailable"].split()[0])]
    with suppress(OSError, ValueError):  # a container's limit, where there is one
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(free))


def may_be_kept(device: torch.device, processes: int) -> float:
    """Returns the bytes that each of several processes may keep: a quarter of what is free."""
    sharing = 1 if device.type == "cuda" else processes  # one machine's memory
    return free_memory(device) / (4 * sharing)


def size_gathered(model: nn.Module) -> int:
    """Returns the bytes of all parameters, as a model that is sharded computes with them."""
    return sum(p.numel() * max(4, p.element_size()) for p in model.parameters())
