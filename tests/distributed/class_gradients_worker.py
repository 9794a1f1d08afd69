"""What each rank does with class gradients: every scenario, its results in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import subspace_optim as so
from tests.processes import joined

C = 4
# The minibatches of two ranks, by their classes: a class is on one rank, on both, or on none.
SHARDS = [
    ([0, 1, 1, 2], [0, 2]),
    ([1, 0], [1, 1, 1, 3]),
    ([2], [0, 0]),
]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).double()


def minibatch(labels: list[int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, dtype=torch.float64, generator=generator)
    return x, torch.tensor(labels)


def shard(step: int, rank: int) -> tuple[Tensor, Tensor]:
    return minibatch(SHARDS[step][rank], 10 * step + rank)


def readings(subspace: Any) -> dict[str, Tensor]:
    basis = subspace.update()
    return {"eigenvalues": basis.eigenvalues, "vectors": basis.vectors}


def outcome(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:  # noqa: BLE001 (whatever it is, the test compares it)
        return type(error).__name__, str(error)
    return "", ""


def averages(model: nn.Module, **options: Any) -> list[dict[str, Tensor]]:
    """The readings after each of three minibatches, while the parameters move."""
    group = dist.group.WORLD
    subspace = so.ClassGradientSubspace(model, C, process_group=group, **options)
    found = []
    for step in range(len(SHARDS)):
        subspace.observe(*shard(step, dist.get_rank()))
        found.append(readings(subspace))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)
    return found


def as_printed() -> Any:
    return averages(mlp())


def coupled() -> Any:
    return averages(mlp(), coupled=True)


def orthogonal() -> Any:
    return averages(nn.parallel.DistributedDataParallel(mlp()), orthogonal=True)


def errors() -> dict[str, Any]:
    """Rank 1 fails; nothing has changed on any, and the next minibatch is as good as ever."""
    rank, model = dist.get_rank(), mlp()
    subspace = so.ClassGradientSubspace(model, C, process_group=dist.group.WORLD)
    subspace.observe(*shard(0, rank))
    before = readings(subspace)
    x, y = shard(1, rank)
    found: dict[str, Any] = {}
    found["class"] = outcome(lambda: subspace.observe(x, y + 9 * rank))
    found["not finite"] = outcome(lambda: subspace.observe(x / (1 - rank), y))
    model[0].weight.data[0, 0] += rank
    found["parameters"] = outcome(lambda: subspace.observe(x, y))
    model[0].weight.data[0, 0] -= rank
    state = subspace.state_dict()
    alone = so.ClassGradientSubspace(model, C)
    alone.observe(x, y)
    subspace.load_state_dict(alone.state_dict())
    found["averages"] = outcome(lambda: subspace.observe(x, y))
    subspace.load_state_dict(state)
    after = readings(subspace)
    found["unchanged"] = [torch.equal(before[name], after[name]) for name in before]
    subspace.observe(x, y)
    decay = 2.0 if rank else 0.5
    found["argument"] = outcome(
        lambda: so.ClassGradientSubspace(model, C, decay=decay, process_group=dist.group.WORLD)
    )
    return found | {"next": readings(subspace)}


SCENARIOS = [as_printed, coupled, orthogonal, errors]


def run(rank: int, size: int, folder: str) -> None:
    """Takes part as one of ``size`` ranks, and saves what every scenario gave it."""
    joined(rank, size, folder)
    results = {scenario.__name__: scenario() for scenario in SCENARIOS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
