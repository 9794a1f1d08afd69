"""Seconds of work on a device: between two events of its own stream, or by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Returns the median seconds of a call, after one that warms up.

    Args:
        function: what is called.
        device: where it works. On a GPU the host's own time does not count.
        repeats: calls that count.
    """
    function()
    measure = _on_stream if device.type == "cuda" else _here
    return statistics.median(measure(function) for _ in range(repeats))


def _here(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _on_stream(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
