"""What each rank does with class gradients of sharded models: its results in a file."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import subspace_optim as so
from subspace_optim.curvature import logit_gradients
from tests.distributed import sharding
from tests.distributed.class_gradients_worker import outcome
from tests.distributed.sharding import everywhere, fsdp, made, rows
from tests.processes import joined

C = 4
# The minibatches by their classes, in four parts, of which two ranks have two each. Class 3 is in
# none of the first; in the others there are classes that one rank has alone.
LABELS = [
    ([0, 1], [1, 2], [0], [2, 2]),
    ([1], [2, 0], [1, 1, 1], [3]),
    ([0, 3, 3], [2], [0], [1]),
]
STEPS = {"printed": 20, "orthogonal": 8}
MEASURED = ("loss", "chi_gradient", "chi_update", "update_norm", "dom_lr", "bulk_lr")


class Net(sharding.Net):
    """With four classes, what draws at random, and a parameter that one rank has all of."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(classes=C)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x) * self.scale)


class Parallel(sharding.Parallel):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, C)


def part(step: int, number: int) -> tuple[Tensor, Tensor]:
    labels = LABELS[step % len(LABELS)][number]
    generator = torch.Generator().manual_seed(10 * step + number)
    x = torch.randn(len(labels), 7, dtype=torch.float64, generator=generator)
    return x, torch.tensor(labels)


def shard(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """What one of ``size`` ranks has of a minibatch; all of it, of one rank."""
    each = 4 // size
    parts = [part(step, number) for number in range(rank * each, (rank + 1) * each)]
    x, y = (torch.cat(some) for some in zip(*parts, strict=True))
    return x, y


def own(step: int) -> tuple[Tensor, Tensor]:
    return shard(step, dist.get_rank(), dist.get_world_size())


def readings(subspace: Any) -> dict[str, Tensor]:
    basis = subspace.update()
    return {
        "eigenvalues": basis.eigenvalues,
        "vectors": rows(subspace.parameters, basis.vectors),
    }


def move(model: nn.Module, factor: float = 1.2) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)


def averages(model: nn.Module, rank: int, size: int, **options: Any) -> list[dict[str, Tensor]]:
    """The readings after each of three minibatches, while the parameters move."""
    subspace = so.ClassGradientSubspace(model, C, **options)
    found = []
    for step in range(len(LABELS)):
        subspace.observe(*shard(step, rank, size))
        found.append(readings(subspace))
        move(model)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "orthogonal": {"orthogonal": True},
    "coupled": {"coupled": True},
    "some parameters": {"params": "blocks.1.*"},
    "one coordinate": {"params": "scale"},
}


# --- scenarios: each takes the number of ranks --------------------------------------------------


def layouts(size: int) -> dict[str, Any]:
    """Every way of sharding a model, and every option."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (size,))
    model, parallel = made(Net), made(Parallel)
    found: dict[str, Any] = {}
    group = dist.group.WORLD  # may be given: they are the same ranks
    for name, options in OPTIONS.items():
        found[name] = averages(fsdp(model), rank, size, process_group=group, **options)
    with mock.patch.object(logit_gradients, "may_be_kept", return_value=0):
        found["gathered again"] = averages(fsdp(model), rank, size)
        found["gathered again, coupled"] = averages(fsdp(model), rank, size, coupled=True)
    whole_head = copy.deepcopy(model)
    fully_shard(whole_head, mesh=mesh, ignored_params=set(whole_head.head.parameters()))
    found["a layer on all ranks"] = averages(whole_head, rank, size)
    if size == 2:
        for name, options in {"": {}, " coupled": {"coupled": True}}.items():
            split = sharding.tensor_parallel(parallel, mesh)
            found[f"tensor parallel{name}"] = averages(split, 0, 1, **options)
        columns = {"head": ColwiseParallel(use_local_output=False)}  # logits are a DTensor
        split = parallelize_module(sharding.tensor_parallel(parallel, mesh), mesh, columns)
        found["tensor parallel logits"] = averages(split, 0, 1)
    else:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        split = sharding.tensor_parallel(parallel, both["model"])
        place = both["data"].get_local_rank()
        found["tensor parallel, 2 x 2"] = averages(fully_shard(split, mesh=both["data"]), place, 2)
        found["hybrid"] = averages(fsdp(model, both), rank, size)
    return found


def dropout(size: int) -> dict[str, Any]:
    """Masks, of which each rank has its own; the random state is left as it was."""
    subspace = so.ClassGradientSubspace(fsdp(made(lambda: Net(0.5))), C)
    torch.manual_seed(5 + dist.get_rank())
    before = torch.get_rng_state()
    subspace.observe(*own(0))
    return readings(subspace) | {"state": bool(torch.equal(before, torch.get_rng_state()))}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 5), nn.BatchNorm1d(5)])
        self.head = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(x))


def normed(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """What a rank has of a minibatch, of which batch norm needs two examples."""
    parts = shard(0, rank, size), shard(1, rank, size)
    x, y = (torch.cat(some) for some in zip(*parts, strict=True))
    return x, y


def batch_norm(size: int) -> dict[str, Any]:
    """Each rank has the statistics of its own part, which goes through the model as a whole."""
    model = fsdp(made(Normed))
    subspace = so.ClassGradientSubspace(model, C)
    before = [b.clone() for b in model.buffers()]
    subspace.observe(*normed(dist.get_rank(), size))
    kept = all(map(torch.equal, before, model.buffers()))
    return readings(subspace) | {"buffers": kept}


def low_precision(size: int) -> dict[str, Any]:
    """Of float32 shards that train in bf16, and of shards that are bf16 themselves."""
    found = {}
    for name, model in {
        "policy": sharding.bf16(made(Net, torch.float32)),
        "shards": fsdp(made(Net, torch.bfloat16)),
    }.items():
        subspace = so.ClassGradientSubspace(model, C)
        x, y = own(0)
        subspace.observe(x.to(next(model.parameters()).dtype), y)
        found[name] = readings(subspace)
    return found


def trained(name: str, model: nn.Module, rank: int, size: int) -> dict[str, Any]:
    """Steps of the quasi-Newton optimizer, with a monitor where there is a projector."""
    orthogonal = name == "orthogonal"
    subspace = so.ClassGradientSubspace(model, C, orthogonal=orthogonal)
    optimizer = so.ClassGradientQuasiNewton(
        model.parameters(), lr=0.05, newton_lr=0.05, damping=0.1, subspace=subspace
    )
    monitor = None
    if orthogonal:
        data = [shard(0, rank, size)]
        operator = so.HessianOperator(model, F.cross_entropy, data, verify=False)
        subspace.operator = operator  # whose loss and gradient the rows have
        monitor = so.Monitor(optimizer, subspace, every=2)
    losses = []
    for step in range(STEPS[name]):
        x, y = shard(step, rank, size)
        total = len(shard(step, 0, 1)[1])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") / total
        (loss * size).backward()  # fully_shard takes the mean over ranks
        subspace.observe(x, y)
        optimizer.step()
        losses.append(loss.detach())
    found: dict[str, Any] = {
        "theta": torch.cat([everywhere(p).reshape(-1) for p in model.parameters()]),
        "eigenvalues": subspace.update().eigenvalues,
        "observations": subspace.stats.observations,
    }
    if monitor is not None:
        found |= {column: monitor.history[column] for column in MEASURED}
    return found


def trainings(size: int) -> dict[str, Any]:
    rank = dist.get_rank()
    return {name: trained(name, fsdp(made(Net)), rank, size) for name in STEPS}


def untouched(size: int) -> dict[str, Any]:
    """A training that is observed between its forward and backward passes, and one without."""
    found = {}
    for observed in (False, True):
        model = fsdp(made(Net))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        subspace = so.ClassGradientSubspace(model, C)
        for step in range(3):
            x, y = own(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if observed:
                subspace.observe(x, y)
            loss.backward()
            optimizer.step()
        found[str(observed)] = [everywhere(p) for p in model.parameters()]
    return found


def errors(size: int) -> dict[str, Any]:
    """Rank 1 fails; nothing has changed on any, and the next minibatch is as good as ever."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (size,))
    at_fault = rank == 1
    model = made(Net)
    fully_shard(model, mesh=mesh, ignored_params=set(model.head.parameters()))
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(*own(0))
    before = readings(subspace)
    x, y = own(1)
    found: dict[str, Any] = {}

    def observing(x: Any, y: Any) -> tuple[str, str]:
        return outcome(lambda: subspace.observe(x, y))

    found["class"] = observing(x, y + 9 if at_fault else y)
    found["kind of x"] = observing(x.tolist() if at_fault else x, y)
    found["no examples"] = observing(x[:0] if at_fault else x, y[:0] if at_fault else y)
    found["indices"] = observing(Unindexed(x) if at_fault else x, y)
    found["not finite"] = observing(x / (0.0 if at_fault else 1.0), y)
    with torch.no_grad():
        model.head.weight[0, 0] += float(at_fault)
        found["parameters"] = observing(x, y)
        model.head.weight[0, 0] -= float(at_fault)
    good = subspace.state_dict()
    changed = good | {"norms": good["norms"] * 2} if at_fault else good
    found["state"] = outcome(lambda: subspace.load_state_dict(changed))
    after = readings(subspace)
    found["unchanged"] = [torch.equal(before[name], after[name]) for name in before]
    subspace.observe(x, y)
    decay = 0.8 if at_fault else 0.5
    found["argument"] = outcome(lambda: so.ClassGradientSubspace(model, C, decay=decay))
    alone = dist.new_group([rank], use_local_synchronization=True)
    found["group"] = outcome(lambda: so.ClassGradientSubspace(model, C, process_group=alone))
    if size == 2:
        split = sharding.tensor_parallel(made(Parallel), mesh)
        of_two = so.ClassGradientSubspace(split, C)
        found["other data"] = outcome(lambda: of_two.observe(*own(0)))
    return found | {"next": readings(subspace)}


class Unindexed:
    """Inputs that are found to be none when the first of them are taken."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, indices: Any) -> Any:
        raise KeyError("these are no inputs")


def checkpoints(size: int, folder: str = "") -> dict[str, Any]:
    """A checkpoint, and what goes on from it: on as many ranks here, on others in ``resume``."""
    model = fsdp(made(Net))
    subspace = so.ClassGradientSubspace(model, C, orthogonal=True)
    fresh = so.ClassGradientSubspace(model, C, orthogonal=True)
    for step in range(2):
        subspace.observe(*own(step))
    found = {"saved": readings(subspace)}
    dcp.save({"subspace": subspace}, checkpoint_id=f"{folder}/checkpoint")
    dcp.load({"subspace": fresh}, checkpoint_id=f"{folder}/checkpoint")
    for each in (subspace, fresh):
        each.observe(*own(2))
    found["next"], found["loaded"] = readings(subspace), readings(fresh)
    found["observations"] = {"n": fresh.stats.observations}
    return found


def resume(rank: int, size: int, folder: str) -> None:
    """Loads the checkpoint of another number of ranks, and goes on."""
    joined(rank, size, f"{folder}/resumed")
    subspace = so.ClassGradientSubspace(fsdp(made(Net)), C, orthogonal=True)
    dcp.load({"subspace": subspace}, checkpoint_id=f"{folder}/checkpoint")
    found = {"saved": readings(subspace)}
    subspace.observe(*own(2))
    found["next"] = readings(subspace)
    torch.save({"resumed": found}, Path(folder) / f"resumed {rank}.pt")
    dist.destroy_process_group()


SCENARIOS: list[Callable[..., dict[str, Any]]] = [
    layouts,
    dropout,
    batch_norm,
    low_precision,
    trainings,
    untouched,
    errors,
]


def run(rank: int, size: int, folder: str) -> None:
    """Takes part as one of ``size`` ranks, and saves what every scenario gave it."""
    joined(rank, size, folder)
    results = {scenario.__name__: scenario(size) for scenario in SCENARIOS}
    results["checkpoints"] = checkpoints(size, folder=folder)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
