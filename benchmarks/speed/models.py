"""Large models on few examples: where the time of a solve goes, and beside the peers.

There a vector is as much work as a product: P numbers of each row against the layers of few
examples. Seconds are the processor's, of one thread, so that others on the machine count little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from rich.console import Console
from torch import Tensor

import subspace_optim as so
from benchmarks.speed import cold
from benchmarks.speed.peers import CURVLINOPS, EIGENTHINGS, OURS
from benchmarks.speed.problems import Problem
from benchmarks.speed.timing import Timer, processor_timed, spread
from subspace_optim.curvature.evaluation import Derivatives, Point
from subspace_optim.curvature.objective import BatchLoss

BARS: Final = {"faster_peer": 0.7, "arithmetic": 0.25}
"""Of our time over that of the faster peer, and of the share of vector arithmetic in it."""


class PartedHessian(so.HessianOperator):
    """Tells the seconds that gradient graphs take from those of products.

    Attributes:
        seconds: of ``"graphs"``, and of ``"products"`` with the graphs inside of them.
    """

    def __init__(self, problem: Problem, timer: Timer) -> None:
        super().__init__(problem.model, problem.loss, (problem.x, problem.y))
        self.timer, self.seconds = timer, {"graphs": 0.0, "products": 0.0}

    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        inherited = super()._linearize
        seconds, derivatives = self.timer(lambda: inherited(batch_loss, point))
        self.seconds["graphs"] += seconds
        return derivatives

    def matmat(self, vectors: Tensor) -> Tensor:
        """As the operator has it."""
        inherited = super().matmat
        seconds, products = self.timer(lambda: inherited(vectors))
        self.seconds["products"] += seconds
        return products


def parts(problem: Problem, k: int, timer: Timer = processor_timed) -> dict[str, Any]:
    """Returns what a cold solve of a proven operator spends its time on.

    Args:
        problem: at its present parameters.
        k: how many pairs.
        timer: of the seconds.

    Returns:
        Seconds of graph, products and the rest, which is vector arithmetic; their shares; and the
        seconds that the first use of an operator takes to prove it.
    """
    hessian = PartedHessian(problem, timer)
    vector = torch.ones(problem.size, device=problem.x.device)
    first, _ = timer(lambda: hessian.matvec(vector))
    second, _ = timer(lambda: hessian.matvec(vector))
    hessian.release()
    hessian.seconds = {"graphs": 0.0, "products": 0.0}
    subspace = so.DominantSubspace(hessian, k)
    total, _ = timer(subspace.refresh)
    graphs, inside = hessian.seconds["graphs"], hessian.seconds["products"]
    seconds = {"graph": graphs, "products": inside - graphs, "arithmetic": total - inside}
    share = {name: value / total for name, value in seconds.items()}
    return {
        "seconds": seconds | {"solve": total, "proof": first - second - graphs},
        "share": share,
        "products": subspace.stats.products,
        "bar": BARS["arithmetic"],
        "met": share["arithmetic"] <= BARS["arithmetic"],
    }


@contextmanager
def in_mode(problem: Problem, mode: Literal["train", "eval"]) -> Iterator[None]:
    """Puts the model in a mode for a while; buffers that training mode moves are put back."""
    buffers = [buffer.clone() for buffer in problem.model.buffers()]
    before = problem.model.training
    problem.model.train(mode == "train")
    try:
        yield
    finally:
        problem.model.train(before)
        with torch.no_grad():
            for buffer, held in zip(problem.model.buffers(), buffers, strict=True):
                buffer.copy_(held)


def measure(
    problem: Problem,
    k: int,
    rounds: int,
    mode: Literal["train", "eval"],
    console: Console,
    *,
    limit: float = 600.0,
    timer: Timer = processor_timed,
) -> dict[str, Any]:
    """Measures a cold solve at the problem's present parameters.

    Args:
        problem: what to measure.
        k: how many pairs.
        rounds: repetitions.
        mode: of the model; in training mode batch norm takes the statistics of the data.
        console: is told of the tuning of the peers.
        limit: seconds, as of ``cold.measure``.
        timer: of the seconds.

    Returns:
        ``parts``, the cold solve beside the peers, and our time over that of the faster of those
        that reached the residual.
    """
    with in_mode(problem, mode):
        where = parts(problem, k, timer)
        solvers = (OURS, EIGENTHINGS, CURVLINOPS)
        beside = cold.measure(
            problem, k, rounds, limit, console, solvers=solvers, timer=timer, exact=False
        )
    over = [
        spread(row["ours_over_this"]).median
        for name, row in beside["solvers"].items()
        if name != OURS and row.get("reached")
    ]
    ratio = max(over, default=None)
    return {
        "mode": mode,
        "parts": where,
        "cold": beside,
        "ours_over_faster_peer": ratio,
        "bar": BARS["faster_peer"],
        "met": None if ratio is None else ratio <= BARS["faster_peer"],
    }
