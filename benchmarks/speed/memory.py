"""The peak memory of a cold solve, counted on every tensor that is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from benchmarks.speed.problems import Problem


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that were allocated inside and live at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, then takes stock."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        alive = {c: (r, size) for c, (r, size) in self.storages.items() if not r.expired()}
        self.storages = alive
        self.peak = max(self.peak, sum(size for _, size in alive.values()))
        return result


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Returns the most memory that was held at once inside, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    memory = PeakMemory()
    with memory:
        function()
    return memory.peak


def measure(problem: Problem, k: int, *, batches: int = 10) -> dict[str, Any]:
    """Measures a cold solve with kept graphs, and with graphs that are streamed.

    ``vectors`` is the peak less the graphs, in vectors of P; ``vectors_beyond_a_product`` the peak
    less that of a single product, which holds graphs and the activations in passing.

    Args:
        problem: at its present parameters.
        k: how many pairs.
        batches: into which the data are split, to stream them.

    Returns:
        ``cases``: bytes of the peak, of the graphs and of one product's peak, and vectors.
    """
    xs, ys = problem.x.chunk(batches), problem.y.chunk(batches)
    split = list(zip(xs, ys, strict=True))
    vector = 4 * problem.size
    probe = torch.ones(problem.size, device=problem.x.device)

    def operator(data: Any, budget: int | None) -> so.HessianOperator:
        return so.HessianOperator(problem.model, problem.loss, data, memory_budget=budget)

    one_batch = operator(split[0], None)
    one_batch.matvec(probe)
    cases: dict[str, tuple[Any, int | None]] = {
        "kept, one batch": ((problem.x, problem.y), 1 << 40),
        f"kept, {batches} batches": (split, 1 << 40),
        f"streamed, {batches} batches": (split, 0),
    }
    measured: dict[str, Any] = {}
    for name, (data, budget) in cases.items():
        hessian = operator(data, budget)
        subspace = so.DominantSubspace(hessian, k)
        peak = peak_bytes(subspace.refresh, problem.x.device)
        graphs = hessian.stats.graph_bytes if budget else one_batch.stats.graph_bytes
        alone = operator(data, budget)
        product = peak_bytes(lambda alone=alone: alone.matvec(probe), problem.x.device)  # type: ignore[misc]
        measured[name] = {
            "peak_bytes": peak,
            "graph_bytes": graphs,
            "product_bytes": product,
            "vectors": (peak - graphs) / vector,
            "vectors_beyond_a_product": (peak - product) / vector,
        }
    return {"cases": measured, "bar_vectors": 2 * k + 12}
