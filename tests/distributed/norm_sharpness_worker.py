"""What each rank finds of the unit balls of norms, where matrices are sharded."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import subspace_optim as so
from subspace_optim.diagnostics import dual_norm, norm_sharpness
from subspace_optim.diagnostics.unit_balls import ball_of_norm
from tests.distributed import sharding
from tests.distributed.sharding import batches, fsdp, made, own, part, rows
from tests.processes import joined

NORMS: dict[str, Any] = {
    "spectral": "spectral",
    "Muon": {"*.bias": "sign", "*norm*": "euclidean", "*": "spectral"},
}
# Of a matrix without full rank, as the gradient of the last layer, there are many polar factors,
# and rounding decides which of them a search goes to.
FULL_RANK: Any = {
    "blocks.0.linear.weight": "spectral",
    "up.weight": "spectral",
    "second.weight": "spectral",
    "*": "sign",
}


def found(model: nn.Module, data: Any, norm: Any) -> dict[str, Any]:
    """Points of the ball, and what a search from the gradient alone reaches."""
    operator = so.HessianOperator(model, F.cross_entropy, data, verify=False)
    space = operator.parameters
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(2, space.size, dtype=torch.float64, generator=generator)
    mine = torch.stack([part(space, row) for row in directions])
    ball = ball_of_norm(norm, space)
    return {
        "best": rows(space, ball.best(mine)),
        "nearest": rows(space, ball.nearest(mine)),
        "dual norm": dual_norm(operator, norm=norm),
        "sharpness": norm_sharpness(operator, norm=FULL_RANK, starts=1, steps=5),
    }


def trained(model: nn.Module, data: Any) -> dict[str, Any]:
    """A row of a monitor of torch's Muon."""
    operator = so.HessianOperator(model, F.cross_entropy, data, verify=False)
    # Torch's Muon takes no matrix with fewer rows than ranks.
    matrices = [p for p in model.parameters() if p.dim() == 2 and len(p) > 3]
    others = [p for p in model.parameters() if p.dim() != 2 or len(p) <= 3]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.Adam(others, lr=0.01)]
    measure = so.measures.norm_sharpness(starts=1, steps=3)
    monitor = so.Monitor(optimizers, operator, measures=[measure])
    x, y = data[0]
    F.cross_entropy(model(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    return {c: monitor.history[c] for c in ("norm_sharpness", "norm_threshold")}


def layouts(size: int) -> dict[str, Any]:
    """Every way of sharding a matrix, and a kernel."""
    mesh, data = init_device_mesh("cpu", (size,)), own(batches())
    results = {
        f"fsdp {name}": found(fsdp(made(sharding.Net)), data, norm) for name, norm in NORMS.items()
    }
    results["convolutions"] = found(fsdp(made(sharding.Convolutions)), data, "spectral")
    model = made(sharding.Net)
    fully_shard(model, mesh=mesh, ignored_params=set(model.head.parameters()))
    results["a layer on all ranks"] = found(model, data, "spectral")
    parallel = made(sharding.Parallel)
    if size == 2:
        split = sharding.tensor_parallel(parallel, mesh)
        results["tensor parallel"] = found(split, batches(), "spectral")
    else:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        split = sharding.tensor_parallel(parallel, both["model"])
        place = both["data"].get_local_rank()
        data = own(batches(), place, 2)
        results["2 x 2 tensor parallel"] = found(
            fully_shard(split, mesh=both["data"]), data, "spectral"
        )
        results["hybrid"] = found(fsdp(made(sharding.Net), both), own(batches()), "spectral")
    return results


def run(rank: int, size: int, folder: str) -> None:
    """Takes part as one of ``size`` ranks, and saves what it has found."""
    joined(rank, size, folder)
    # All have one batch to train on, so that the step is that of one process.
    results = {
        "layouts": layouts(size),
        "monitor": trained(fsdp(made(sharding.Net)), batches()[-1:]),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
