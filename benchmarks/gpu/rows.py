"""Products of several rows: by one backward pass for all, beside one after the other."""

from __future__ import annotations

from typing import Any, Final

import torch

from benchmarks.files import first_line
from benchmarks.gpu.clock import seconds_of
from benchmarks.gpu.graphs import GradientGraph
from benchmarks.speed.problems import Problem

_ROWS: Final = (2, 4, 10)


def measure(problem: Problem, rows: dict[str, Any]) -> None:
    """Times blocks of rows both ways, and compares what comes out.

    Args:
        problem: at its present parameters.
        rows: one for each size of a block: seconds a row both ways, their ratio, and the largest
            difference relative to the largest entry.
    """
    graph, device = GradientGraph(problem), problem.x.device
    generator = torch.Generator().manual_seed(0)
    for count in _ROWS:
        block = torch.randn(count, problem.size, generator=generator).to(device)
        single = seconds_of(lambda block=block: graph.matmat(block), device) / count  # type: ignore[misc]
        row = rows[str(count)] = {"one_by_one_seconds": single}
        try:
            batched = seconds_of(lambda block=block: graph.batched(block), device) / count  # type: ignore[misc]
        except RuntimeError as error:  # out of memory, or an operation without a batching rule
            row["batched"] = f"failed: {first_line(error)}"
            continue
        wanted = graph.matmat(block)
        off = (graph.batched(block) - wanted).abs().max() / wanted.abs().max()
        row |= {
            "batched_seconds": batched,
            "batched_over_one_by_one": batched / single,
            "difference": float(off),
        }
