"""What it costs to use a basis, against the speed at which memory is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import subspace_optim as so
from benchmarks.speed.timing import in_turn, ratios, spread


def measure(size: int, k: int, rounds: int, device: str) -> dict[str, Any]:
    """Times projections by a basis of ``size`` coordinates, and a sum over the same numbers.

    A projection reads the k·P numbers twice: once for the coefficients, once for their
    combination. ``fraction`` is that traffic a second over the sum's.

    Args:
        size: P.
        k: dimension of the subspace.
        rounds: repetitions.
        device: where to compute.

    Returns:
        Raw seconds, GB/s and fractions; the error against float64 tells that it was computed.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    # Normal vectors this long are orthogonal to 1/√P: as good as a basis, for time.
    vectors = torch.randn(k, size, generator=generator, device=device).div_(size**0.5)
    basis = so.EigenBasis(torch.ones(k, device=device), vectors, torch.zeros(k, device=device))
    original = torch.randn(size, generator=generator, device=device)
    v, out = original.clone(), torch.empty_like(original)
    functions: dict[str, Callable[[], object]] = {
        "sum": vectors.sum,
        "project_out": lambda: basis.project_out(v, out=v),
        "project": lambda: basis.project(v, out=out),
        "project_out, new vector": lambda: basis.project_out(v),
    }
    seconds = in_turn(functions, rounds)
    found = basis.project_out(original)
    exact = original.double()
    for row in vectors.double():
        exact -= (row @ original.double()) * row
    traffic = {name: 4 * k * size * (1 if name == "sum" else 2) for name in functions}
    speeds = {name: [traffic[name] / t / 1e9 for t in times] for name, times in seconds.items()}
    fractions = {
        name: ratios(speed, speeds["sum"]) for name, speed in speeds.items() if name != "sum"
    }
    bar = 0.5 if device == "cpu" else 0.8
    return {
        "size": size,
        "k": k,
        "seconds": seconds,
        "gigabytes_per_second": speeds,
        "fraction": fractions,
        "error": float((found.double() - exact).abs().max() / exact.abs().max()),
        "bar": bar,
        "met": {name: spread(fractions[name]).median >= bar for name in ("project_out", "project")},
    }
