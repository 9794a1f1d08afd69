"""What two ranks of a data-parallel training record: each scenario's results in a file."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import subspace_optim as so
from tests.dense import Problem, make_problem

STEPS = 4


def problem() -> Problem:
    """Batches of one size, which two ranks take in turn."""
    return make_problem("mlp", sizes=[4] * 8)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def shard(batches: list[Any]) -> list[Any]:
    return batches[dist.get_rank() :: 2]


def table(monitor: so.Monitor) -> dict[str, Tensor]:
    return {c: torch.tensor(values).double() for c, values in monitor.history.items()}


def watched(batches: list[Any], wrap: Any = None, **options: Any) -> dict[str, Tensor]:
    """A training on minibatches, of which the monitor sees the one at hand."""
    p, batch = problem(), so.CurrentBatch()
    model = p.model if wrap is None else wrap(p.model)
    hessian = so.HessianOperator(model, p.loss_fn, batch, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    subspace = so.DominantSubspace(hessian, 2, tol=1e-8, refresh=1)
    monitors = [
        so.Monitor(optimizer, hessian),
        so.Monitor(optimizer, subspace, measures=so.measures.dominant()),
    ]
    for x, y in batches:
        batch.set(x, y)
        optimizer.zero_grad()
        p.loss_fn(model(x), y).backward()
        optimizer.step()
    return table(monitors[0]) | table(monitors[1])


def current_batch() -> dict[str, Tensor]:
    """Each rank sets its own minibatch; gradients are averaged by DistributedDataParallel."""
    wrap = nn.parallel.DistributedDataParallel
    return watched(shard(problem().batches), wrap, process_group=dist.group.WORLD)


class Averages(torch.optim.Optimizer):
    """Averages the gradients of the ranks itself, and leaves in `.grad` what was there."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            mean = p.grad.clone()
            dist.all_reduce(mean)
            p.sub_(mean / 2, alpha=0.02)


def own_gradients(nearness: float) -> dict[str, Tensor]:
    """In `.grad` each rank has the gradient of its own data, which are alike on both."""
    p = problem()
    x, y = p.batches[0]
    x = x * (1 + nearness * dist.get_rank())
    hessian = so.HessianOperator(p.model, p.loss_fn, (x, y), process_group=dist.group.WORLD)
    optimizer = Averages(p.model.parameters())
    exact = so.measures.directional_sharpness()
    monitors = [
        so.Monitor(optimizer, hessian),
        so.Monitor(optimizer, hessian, measures=exact),
    ]
    for _ in range(3):
        optimizer.zero_grad()
        p.loss_fn(p.model(x), y).backward()
        optimizer.step()
    found = {name: table(monitor) for name, monitor in zip("ab", monitors, strict=True)}
    return {f"{name} {c}": v for name, columns in found.items() for c, v in columns.items()}


def nearly_equal() -> dict[str, Tensor]:
    """Both are near to the gradient of all data."""
    return own_gradients(1e-3)


def minibatches() -> dict[str, Any]:
    """Gradients of all minibatches, and what is made of them."""
    p = problem()
    batches, group = shard(p.batches), dist.group.WORLD
    hessian = so.HessianOperator(p.model, p.loss_fn, batches, process_group=group)
    gradients = [view.gradient() for view in hessian.minibatches(seed=3).views]
    found = so.diagnostics.batch_sharpness(hessian, relative_error=0.0, seed=3)
    estimate = torch.tensor([found.value, found.standard_error, found.products])
    optimizer = torch.optim.SGD(p.model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, hessian, measures=so.measures.batch_sharpness(batch_size=2))
    for x, y in p.batches:
        p.loss_fn(p.model(x), y).backward()
    optimizer.step()
    return {"of_each": torch.stack(gradients), "found": estimate} | table(monitor)


SCENARIOS = [current_batch, nearly_equal, minibatches]


def run(rank: int, folder: str) -> None:
    """Takes part as one of two ranks, and saves what every scenario gave it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save({each.__name__: each() for each in SCENARIOS}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
