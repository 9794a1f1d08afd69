"""What a sharded model costs a rank: bytes at their peak, shapes, and collectives."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from benchmarks.sharded.meter import Meter
from tests.distributed.sharding import batches, fsdp, made, own
from tests.processes import joined

LAYERS, WIDTH, K = 8, 32, 2
_TRIES = 5  # of which the smallest peak is taken


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


class Ledger(Meter):
    """Also notes the shapes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[torch.Size]()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(func, args, kwargs)
        self.shapes |= {t.shape for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


def jobs(model: nn.Module, data: Any, budget: int | None) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
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
        tries = [Ledger() for _ in range(_TRIES)]
        for ledger in tries:
            with ledger:
                job()
        found[name] = {
            # A thread of gloo may let go of a buffer late, which is no need of ours.
            "peak": min(ledger.counts.peak for ledger in tries),
            "shapes": tries[-1].shapes,
            "collectives": dict(Counter(kind for kind, _ in tries[-1].counts.collectives)),
        }
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
