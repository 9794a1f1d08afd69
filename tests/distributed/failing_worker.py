"""A rank of a sharded model that fails where the others wait for it: it raises, or it is killed."""

import itertools
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import subspace_optim as so
from tests.distributed import sharding

LIMIT = 4
"""Seconds that a rank waits for another."""


def run(rank: int, folder: str, ends: str) -> None:
    """Saves what each rank has raised, when, and whether it could train afterwards."""
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    model, data = sharding.fsdp(sharding.made(sharding.Net)), sharding.own(sharding.batches())
    calls = itertools.count()  # not a number: those are put back after an evaluation

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if rank == 1 and next(calls) >= 7:  # in the midst of a pass over the data
            if ends == "killed":
                os._exit(9)
            raise ValueError("no loss on rank one")
        return F.cross_entropy(output, target)

    operator = so.HessianOperator(model, loss_fn, data)
    start = time.monotonic()
    found = {"kind": "", "text": "", "trained": False}
    try:
        operator.matvec(torch.ones(operator.parameters.size_here, dtype=torch.float64))
    except Exception as error:  # noqa: BLE001 (the test compares it)
        found |= {"kind": type(error).__name__, "text": str(error)}
    found["seconds"] = time.monotonic() - start
    if ends == "raised":
        x, y = data[0]
        F.cross_entropy(model(x), y).backward()
        found["trained"] = all(p.grad is not None for p in model.parameters())
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)  # the others may be gone, and are not waited for
