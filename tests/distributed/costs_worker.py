"""What a sharded model costs a rank: bytes at their peak, shapes, and collectives."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from tests.distributed.sharding import batches, fsdp, made, own
from tests.processes import joined

LAYERS, WIDTH, K = 8, 32, 2


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [7, *[WIDTH] * LAYERS]
        self.blocks = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Ledger(TorchDispatchMode):
    """The peak of the bytes that were allocated inside, the shapes, and the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.shapes = set[torch.Size]()
        self.collectives = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func.__name__.split(".")[0]] += 1
        self._see((args, kwargs), allocated=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, allocated=True)
        self._alive = {place: it for place, it in self._alive.items() if not it[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    def _see(self, values: Any, *, allocated: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                reference, size = StorageWeakRef(storage), storage.nbytes() if allocated else 0
                self._alive.setdefault(reference.cdata, (reference, size))
                if allocated:
                    self.shapes.add(tensor.shape)


def jobs(model: nn.Module, data: Any, budget: int | None) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each is run once before."""
    operator = so.HessianOperator(model, F.cross_entropy, data, memory_budget=budget, verify=False)
    v = torch.ones(3, operator.parameters.size_here, dtype=operator.dtype)
    subspace = so.DominantSubspace(operator, k=K, tol=0.1)
    basis = subspace.update()

    def frozen() -> None:
        with operator.frozen():
            operator.matvec(v[0])
            operator.matvec(v[0])

    def solve() -> None:
        so.DominantSubspace(operator, k=K, tol=0.1).update()

    found: dict[str, Callable[[], object]] = {
        "two, frozen": frozen,
        "product": lambda: operator.matvec(v[0]),
        "block": lambda: operator.matmat(v),
        "gradient": operator.gradient,
        "coefficients": lambda: basis.coefficients(v),
        "projection": lambda: basis.project_out(v),
        "known": subspace.update,
    }
    return found | ({"solve": solve} if budget == 0 else {})


def ledgers(model: nn.Module, data: Any, budget: int | None) -> dict[str, Any]:
    found = {}
    for name, job in jobs(model, data, budget).items():
        job()
        with Ledger() as ledger:
            job()
        counts = dict(ledger.collectives)
        found[name] = {"peak": ledger.peak, "shapes": ledger.shapes, "collectives": counts}
    return found


def run(rank: int, size: int, folder: str) -> None:
    """Takes part as one of ``size`` ranks, and saves what everything has cost it."""
    joined(rank, size, folder)
    joint = tuple(map(torch.cat, zip(*batches()[:size], strict=True)))
    model, mine = fsdp(made(Deep)), own(batches())[:1]
    results = {
        "kept": ledgers(model, mine, None),
        "streamed": ledgers(model, mine, 0),
        "whole": ledgers(made(Deep), [joint], 0),
        "here": sum(p.to_local().numel() for p in model.parameters()),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
