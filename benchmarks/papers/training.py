"""One training loop for all runs: it records rows, and goes on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.experiment import minibatch
from benchmarks.losses import accuracy, cross_entropy
from benchmarks.optimizers import step_together
from benchmarks.papers.checkpoint import Checkpoint
from benchmarks.papers.reproduction import Job
from benchmarks.progress import doing
from subspace_optim.curvature.contexts import Mode, in_mode, seeded

Row = dict[str, Any]
_CHUNK = 1000
"""Examples that are evaluated together."""


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        model: see there.
        loss_fn: a mean over examples.
        x: all inputs.
        y: all targets.
    """

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    def sgd(self, lr: float, momentum: float = 0.0) -> Optimizer:
        """Returns SGD; gradient descent, where all examples are a batch."""
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def hessian(self, chunk: int | None = None, mode: Mode | None = None) -> so.HessianOperator:
        """Returns the Hessian over all examples, so many at a time; of the model in a mode."""
        size = chunk or len(self.x)
        batches = list(zip(self.x.split(size), self.y.split(size), strict=True))
        data = batches if chunk else (self.x, self.y)
        return so.HessianOperator(self.model, self.loss_fn, data, mode=mode)

    def loss_of(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """Returns the loss of a minibatch, which dropout sees alike whenever it is evaluated."""
        with seeded(x.device, seed):
            return self.loss_fn(self.model(x), y)

    @torch.no_grad()
    def loss(self) -> float:
        """Returns the loss over all examples."""
        return self.loss_fn(self.model(self.x), self.y).item()

    def theta(self) -> Tensor:
        """Returns a copy of the parameters as one vector."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()


@torch.no_grad()
def performance(model: nn.Module, x: Tensor, y: Tensor) -> Row:
    """Returns cross-entropy and accuracy over examples, of the model in eval mode."""
    with in_mode(model, "eval"):
        output = torch.cat([model(part) for part in x.split(_CHUNK)])
    return {"loss": cross_entropy(output, y).item(), "accuracy": accuracy(output, y)}


def top_of(operator: so.CurvatureOperator, k: int, tol: float, seed: int = 0) -> so.EigenBasis:
    """Returns the top k eigenpairs, solved for anew."""
    return so.DominantSubspace(operator, k, refresh=1, tol=tol, seed=seed).update()


def column(rows: Sequence[Row], name: str) -> list[Any]:
    """Returns what the rows that have it say."""
    return [row[name] for row in rows if name in row]


Stateful = Any
"""What a training needs beside model and optimizers, such as a subspace: with a ``state_dict``."""


def train(
    job: Job,
    name: str,
    problem: Problem,
    optimizer: Optimizer,
    *,
    steps: int,
    batch_size: int | None = None,
    replacement: bool = False,
    record: Callable[[int], Row | None] | None = None,
    every: int | Callable[[int], bool] = 1,
    first: int = 0,
    before: Callable[[Tensor, Tensor], None] | None = None,
    also: Sequence[Stateful] = (),
    losses: list[float] | None = None,
) -> list[Row]:
    """Trains, and returns what ``record`` said along the way.

    Step t takes minibatch t, a function of the seed and t alone; so do two optimizers that go on
    from one step see the same examples. A loss that is not finite ends the
    training, and is a last row ``{"step": t, "diverged": True}``.

    Args:
        job: the seed, and the folder where the state is kept every few seconds. A training of the
            same ``name`` that was interrupted goes on from there, if model, optimizer and
            ``also`` are made as before.
        name: of this training, unique in its run.
        problem: its model is trained.
        optimizer: steps on the model.
        steps: how many.
        batch_size: ``None``: all examples at each step.
        replacement: minibatches are drawn with replacement, not of shuffled epochs.
        record: called at θ_t before step t, and with ``t = first + steps`` at the end; what it
            returns is a row, to which the step is added, if it returns one.
        every: at one step in so many, counted from ``first``, and at the end; or where
            ``every(t)`` is true.
        first: number of the first step.
        before: called with each minibatch before the gradient is taken.
        also: objects whose state belongs to the training.
        losses: gets the loss of each step's minibatch, at θ_t.

    Returns:
        The rows.
    """
    x, y = problem.x, problem.y
    checkpoint = Checkpoint(None if job.scratch is None else job.scratch / f"{name}.pt")
    states: list[Stateful] = [problem.model, optimizer, *also]
    rows: list[Row] = []
    step, over = first, False
    batch: Tensor | slice

    def load(kept: dict[str, Any]) -> None:
        nonlocal rows, step, over
        for each, state in zip(states, kept["states"], strict=True):
            each.load_state_dict(state)
        rows, step, over = kept["rows"], kept["step"], kept["over"]
        if losses is not None:
            losses[:] = kept["losses"]

    def state_dict() -> dict[str, Any]:
        kept = {"states": [s.state_dict() for s in states], "rows": rows, "step": step}
        return kept | {"losses": losses or [], "over": over}

    def due() -> bool:
        if step == first + steps:
            return True
        return every(step) if callable(every) else (step - first) % every == 0

    checkpoint.take_up(x.device, load)
    with doing(f"training {name}", steps) as task, checkpoint.held():
        while not over:
            task.at(step - first)
            row = None
            if record is not None and due():
                row = record(step)
                if row is not None:
                    rows.append({"step": step} | row)
            over = step == first + steps
            if not over:
                batch = slice(None)
                if batch_size is not None:
                    drawn = minibatch(len(x), batch_size, step, job.seed, replacement)
                    batch = drawn.to(x.device)
                examples, seed = (x[batch], y[batch]), job.seed + step
                try:
                    if before is not None:
                        with seeded(x.device, seed):
                            before(*examples)
                    of_batch = partial(problem.loss_of, *examples, seed)
                    loss = step_together([optimizer], of_batch)[0].item()
                except so.NonFiniteError:  # of an optimizer's subspace
                    loss = math.nan
                if losses is not None:
                    losses.append(loss)
                if not math.isfinite(loss):
                    rows.append({"step": step, "diverged": True})
                    over = True
                step += 1
                task.at(step - first, f"loss {loss:.4g}")
            checkpoint.keep(state_dict, measured=row is not None, over=over)
    return rows
