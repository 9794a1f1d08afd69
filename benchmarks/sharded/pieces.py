"""What is counted, piece by piece, by the package's own code: the same on ranks of every kind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.architectures import next_token_loss
from benchmarks.sharded.meter import Counts, Meter

NEVER: Final = 10**9
ROOM: Final = 1 << 60
"""A memory budget that everything fits."""


@dataclass
class Solve:
    """A refresh of which the products were left out.

    Attributes:
        counts: of all else.
        blocks: how many rows each block of products had.
        held: the most bytes that were held when one began.
    """

    counts: Counts
    blocks: list[int]
    held: int


def operator_of(model: nn.Module, data: Any, budget: int) -> so.HessianOperator:
    """Returns the operator, unproved."""
    return so.HessianOperator(model, next_token_loss, data, memory_budget=budget, verify=False)


def products(
    model: nn.Module, data: Any, budget: int, meter: Meter
) -> tuple[dict[str, Counts], so.HessianOperator]:
    """Counts a gradient, what all products need, and products; ``release`` has not been called.

    Args:
        model: sharded.
        data: of this rank.
        budget: bytes that may be kept.
        meter: that counts.

    Returns:
        By what it is: ``gradient``; ``graph``, once for each parameter state; ``product`` and
        ``two products``, further blocks of one and of two. And the operator.
    """
    operator = operator_of(model, data, budget)
    vectors = torch.ones(2, operator.parameters.size_here, device=operator.device)
    operator.state()  # what all operators of a process share is made once
    found = {"gradient": counted(meter, operator.gradient)}
    operator = operator_of(model, data, budget)
    with operator.frozen():
        found["graph"] = counted(meter, operator.linearize)
        for name, rows in (("product", vectors[:1]), ("two products", vectors)):
            found[name] = counted(meter, lambda rows=rows: operator.matmat(rows))  # type: ignore[misc]
    return found, operator


def counted(meter: Meter, work: Callable[[], object]) -> Counts:
    """Returns what work has cost; ``peak`` is beyond what was held before."""
    gc.collect()  # what earlier work has left is not held by this one
    meter.take()
    before = meter.alive()
    work()
    found = meter.take()
    found.peak -= before
    found.left = meter.alive() - before
    return found


def solve(operator: so.HessianOperator, k: int, meter: Meter) -> tuple[Solve, so.DominantSubspace]:
    """Counts a cold refresh, with products that cost nothing.

    Args:
        operator: whose; afterwards it multiplies as before.
        k: of the subspace.
        meter: that counts.

    Returns:
        What was counted, and the subspace, which has a basis now.
    """
    subspace = so.DominantSubspace(operator, k, refresh=NEVER)
    result = Solve(Counts(), [], 0)
    gc.collect()
    meter.take()
    before = meter.alive()

    def free(vectors: Tensor) -> Tensor:
        result.blocks.append(len(vectors))
        result.held = max(result.held, meter.alive() - before)
        return torch.empty_like(vectors)

    with _instead(operator, "matmat", free):
        subspace.refresh()
    result.counts = meter.take()
    result.counts.peak -= before
    return result, subspace


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]


@contextmanager
def optimizer_of(model: nn.Module, subspace: so.DominantSubspace) -> Iterator[so.BulkSGD]:
    """Yields an optimizer of steps that hardly move anything; there are gradients inside."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    yield so.BulkSGD(model.parameters(), lr=1e-12, subspace=subspace)
    for p in model.parameters():
        p.grad = None


def step(model: nn.Module, subspace: so.DominantSubspace, meter: Meter) -> Counts:
    """Counts a step of BulkSGD with a basis that serves, beyond the gradient."""
    with optimizer_of(model, subspace) as optimizer:
        optimizer.step()  # makes the memory of the update
        return counted(meter, optimizer.step)


def refresh(parts: dict[str, Counts], solve: Solve) -> Counts:
    """Returns what a refresh costs, put together from its pieces.

    Args:
        parts: as ``products`` has counted.
        solve: what is beside products.
    """
    total, graph = solve.counts, parts["graph"]
    peak = max(total.peak + graph.left, graph.peak + solve.held)
    for rows in solve.blocks:
        piece = parts["product" if rows == 1 else "two products"]
        total = total + piece
        peak = max(peak, piece.peak + graph.left + solve.held)
    total = total + graph
    total.peak = peak
    return total
