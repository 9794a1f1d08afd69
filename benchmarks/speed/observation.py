"""What observing the class gradients of a minibatch costs, beside a loop of C backward passes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

import subspace_optim as so
from benchmarks.speed.problems import Problem
from benchmarks.speed.timing import in_turn, ratios, spread

BATCH: Final = 500
BAR: Final = 3.0


def measure(problem: Problem, rounds: int) -> dict[str, Any]:
    """Times gradients of a minibatch, observations of it, and the loop, in turn.

    Args:
        problem: a classification problem; its first examples are the minibatch.
        rounds: repetitions.

    Returns:
        Raw seconds, and costs in gradients of the minibatch. ``error`` compares the vectors with
        those of the loop.
    """
    classes = problem.k
    step = max(1, len(problem.x) // BATCH)
    x, y = problem.x[::step][:BATCH], problem.y[::step][:BATCH]
    parameters = list(problem.model.parameters())
    subspace = so.ClassGradientSubspace(problem.model, classes, decay=0.0)

    def gradient() -> None:
        problem.model.zero_grad()
        problem.loss(problem.model(x), y).backward()

    def loop() -> list[Tensor]:
        logits = problem.model(x)
        rows = []
        for k in range(classes):
            mean = logits[y == k, k].mean()
            slopes = torch.autograd.grad(mean, parameters, retain_graph=True)
            rows.append(torch.cat([slope.flatten() for slope in slopes]))
        return rows

    seconds = in_turn(
        {
            "minibatch gradient": gradient,
            "observation": lambda: subspace.observe(x, y),
            "loop of C backward passes": loop,
        },
        rounds,
    )
    exact = torch.nn.functional.normalize(torch.stack(loop()))
    gradients = {
        name: ratios(times, seconds["minibatch gradient"]) for name, times in seconds.items()
    }
    return {
        "batch": len(x),
        "classes": classes,
        "seconds": seconds,
        "gradients": gradients,
        "error": float((subspace.update().vectors - exact).abs().max()),
        "bar": BAR,
        "met": {"observation": spread(gradients["observation"]).median <= BAR},
    }
