"""A product that is replayed as a CUDA graph: what the launches of its kernels cost."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.clock import seconds_of
from benchmarks.gpu.graphs import GradientGraph
from benchmarks.gpu.sections import NEEDS_CUDA
from benchmarks.speed.problems import Problem


def measure(problem: Problem, rows: dict[str, Any]) -> None:
    """Times a product as it is and replayed, and compares what comes out.

    Args:
        problem: at its present parameters.
        rows: ``"eager"``, ``"replayed"`` with the ratio and the difference; without a GPU, that
            it needs one.
    """
    device = problem.x.device
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).to(device)
    graph = GradientGraph(problem)
    rows["eager"] = {"seconds": seconds_of(lambda: graph.product(vector), device)}
    if device.type != "cuda":
        rows["replayed"] = NEEDS_CUDA
        return
    # A backward pass runs on the stream of its forward pass: both belong into the captured one.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph = GradientGraph(problem)
        for _ in range(3):  # what is allocated or tuned at a first call is not captured
            graph.product(vector)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=side):
        product = graph.product(vector)
    seconds = seconds_of(recorded.replay, device)
    wanted = graph.product(vector)
    rows["replayed"] = {
        "seconds": seconds,
        "replayed_over_eager": seconds / rows["eager"]["seconds"],
        "difference": float((product - wanted).abs().max() / wanted.abs().max()),
    }
