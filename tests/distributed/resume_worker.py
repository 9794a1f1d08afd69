"""A training that is saved in the middle by some ranks, and taken up by others."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import subspace_optim as so
from tests.distributed.sharded_worker import Small, theta
from tests.distributed.sharding import fsdp, made
from tests.processes import joined

SAVED, STEPS, EXAMPLES = 7, 14, 4
MEASURED = ("step", "loss", "chi_gradient", "sharpness")


def examples(step: int) -> tuple[Tensor, Tensor]:
    """What all ranks together see in a step; each takes its part."""
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(EXAMPLES, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (EXAMPLES,), generator=generator)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    return x[part], y[part]


class Training:
    """A model of which each rank has a part, its optimizer, and a monitor."""

    def __init__(self, refresh: Any) -> None:
        self.model = fsdp(made(Small))
        data = [examples(step) for step in range(3)]
        operator = so.HessianOperator(self.model, F.cross_entropy, data, verify=False)
        self.subspace = so.DominantSubspace(operator, k=3, refresh=refresh, tol=1e-13)
        parameters = self.model.parameters()
        self.optimizer = so.BulkSGD(parameters, lr=0.1, momentum=0.9, subspace=self.subspace)
        self.monitor = so.Monitor(self.optimizer, self.subspace, every=1)

    def steps(self, numbers: range) -> None:
        for step in numbers:
            x, y = examples(step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        ours = {"subspace": self.subspace, "monitor": self.monitor}
        return {"model": model, "optimizer": optimizer, **ours}

    def save(self, folder: str) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        saved = self.state()
        dcp.load(saved, checkpoint_id=folder)
        self.subspace.state_dict()  # which changes nothing, before the model is loaded either
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states)

    def found(self) -> dict[str, Any]:
        basis = self.subspace.basis
        assert basis is not None
        stats = self.subspace.stats
        return {
            "theta": theta(self.model),
            "rows": {name: self.monitor.history[name] for name in MEASURED},
            "eigenvalues": basis.eigenvalues,
            "counts": [stats.refreshes, self.subspace.clock],
        }


def run(rank: int, size: int, folder: str, resumes: bool) -> None:
    """Takes part, and saves what came out: of a whole training, or of the rest of a saved one."""
    joined(rank, size, folder)
    found = {}
    for refresh in (5, "auto"):
        training = Training(refresh)
        saved = f"{Path(folder).parent}/{refresh}"
        if resumes:
            training.load(saved)
        else:
            training.steps(range(SAVED))
            training.subspace.update()  # so that it has seen the state that is saved
            training.save(saved)
        training.steps(range(SAVED, STEPS))
        found[refresh] = training.found()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
