"""What each rank does with sharded models: every scenario in turn, its results in a file."""

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import subspace_optim as so
from tests.distributed import sharding
from tests.distributed.sharding import MODELS, batches, fsdp, made, own, part, rows, whole
from tests.processes import joined

KINDS = {
    "exact": so.HessianOperator,
    "gauss-newton": so.GaussNewtonOperator,
    "differences": so.FiniteDifferenceHessian,
}


def directions(size: int) -> torch.Tensor:
    return torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def readings(operator: Any) -> dict[str, Any]:
    space = operator.parameters
    v = directions(space.size)
    V = torch.stack([part(space, row) for row in v]).to(operator.dtype)
    return {
        "products": rows(space, operator.matmat(V)),
        "gradient": whole(space, operator.gradient()),
        "loss": operator.loss(),
    }


def operator_of(kind: str, model: nn.Module, data: Any, **options: Any) -> Any:
    return KINDS[kind](model, F.cross_entropy, data, **options)


# --- scenarios: each takes the number of ranks, and whether to do all of it ----------------------


def operators(size: int, *, full: bool) -> dict[str, Any]:
    """Every kind of operator, and every kind of model by the exact one."""
    found: dict[str, Any] = {}
    data = own(batches())
    for kind in KINDS:
        found[f"mlp {kind}"] = readings(operator_of(kind, fsdp(made(sharding.Net)), data))
    for name, make in MODELS.items():
        model = fsdp(made(make))
        found[name] = readings(operator_of("exact", model, data, verify=name == "gpt"))
        # Nothing kept: parameters are gathered again for backward passes, and graphs made anew.
        streamed = operator_of("exact", model, data, memory_budget=0, verify=False)
        found[f"{name} streamed"] = readings(streamed)
    return found


def layouts(size: int, *, full: bool) -> dict[str, Any]:
    """Every way of sharding a model."""
    data, found = batches(), {}
    mesh = init_device_mesh("cpu", (size,))
    model = made(sharding.Net)
    whole_head = copy.deepcopy(model)
    fully_shard(whole_head, mesh=mesh, ignored_params=set(whole_head.head.parameters()))
    frozen = copy.deepcopy(model)
    frozen.head.requires_grad_(False)
    uneven = data[:1] if dist.get_rank() == 0 else own(data[1:], dist.get_rank() - 1, size - 1)
    cases: dict[str, tuple[nn.Module, Any]] = {
        "in one": (fully_shard(copy.deepcopy(model), mesh=mesh), own(data)),
        "a layer on all ranks": (whole_head, own(data)),
        "a frozen layer": (fsdp(frozen), own(data)),
        "more batches on one rank": (fsdp(model), uneven),
        "checkpointed": (fsdp(made(sharding.Checkpointed)), own(data)),
        "bf16": (sharding.bf16(made(sharding.Net, torch.float32)), own(batches(torch.float32))),
    }
    parallel = made(sharding.Parallel)
    if size == 2:
        cases["tensor parallel"] = sharding.tensor_parallel(parallel, mesh), data
    else:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        split = sharding.tensor_parallel(parallel, both["model"])
        place = both["data"].get_local_rank()
        cases["2 x 2"] = fully_shard(split, mesh=both["data"]), own(data, place, 2)
        cases["hybrid"] = fsdp(model, both), own(data)
    for name, (sharded, mine) in cases.items():
        for budget in (None, 0) if full else (0,):
            verify = budget is None or name == "tensor parallel"
            operator = operator_of("exact", sharded, mine, memory_budget=budget, verify=verify)
            found[name if budget is None else f"{name} streamed"] = readings(operator)
    return found


def untouched(size: int, *, full: bool) -> dict[str, Any]:
    """A training with an operator that is asked between the steps, and one without."""
    return {f"asked {asked}": _trained(asked) for asked in (False, True)}


def _trained(asked: bool) -> list[Any]:
    model = fsdp(made(sharding.Net))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = own(batches())
    operator = operator_of("exact", model, data)
    losses = []
    for step in range(6):
        x, y = data[step % len(data)]
        loss = F.cross_entropy(model(x), y)
        if asked and step == 3:  # between a forward pass and its backward pass, as well
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            operator.gradient()
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        if asked:
            operator.matvec(torch.ones(operator.parameters.size_here, dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.full_tensor().detach() for p in model.parameters())]


def solves(size: int, *, full: bool) -> dict[str, Any]:
    """The subspace of every kind of model, and what it has cost."""
    found: dict[str, Any] = {}
    for name, make in (MODELS if full else {"gpt": MODELS["gpt"]}).items():
        operator = operator_of("exact", fsdp(made(make)), own(batches()), verify=False)
        subspace = so.DominantSubspace(operator, k=3, tol=1e-8)
        basis = subspace.update()
        found[name] = {
            "eigenvalues": basis.eigenvalues,
            "vectors": rows(operator.parameters, basis.vectors),
            "products": operator.stats.products,
        }
    return found


def held(size: int, *, full: bool) -> dict[str, Any]:
    """A basis that is held in bfloat16, and read from a checkpoint into another subspace."""
    model = fsdp(made(Small))
    operator = operator_of("exact", model, own(batches()), verify=False)
    options: dict[str, Any] = {"k": 3, "tol": 1e-13, "basis_dtype": torch.bfloat16}
    subspace, other = (so.DominantSubspace(operator, **options) for _ in range(2))
    basis = subspace.update()
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    dcp.save({"subspace": subspace}, checkpoint_id=folder[0])
    dcp.load({"subspace": other}, checkpoint_id=folder[0])
    loaded = other.basis
    own_gradient = operator.gradient()
    saved = subspace.state_dict()["vectors"]
    return {
        "dtypes": [str(basis.rows.dtype), *(str(tensor.dtype) for tensor in saved.values())],
        "estimate": subspace.stats.estimate,
        "vectors": rows(operator.parameters, basis.vectors),
        "gradient": whole(operator.parameters, own_gradient),
        "bulk": whole(operator.parameters, basis.project_out(own_gradient)),
        "same": torch.equal(loaded.rows, basis.rows) and loaded.rounding == basis.rounding,
        "updated": other.update() is loaded,
    }


class Small(nn.Module):
    """So few coordinates that a solve is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


TRAININGS = ("AdamW", "DomSAM", "BulkSGD", "LowRankNewton", "auto")
STEPS = 20
MEASURED = ("loss", "chi_gradient", "dom_lr", "bulk_lr", "sharpness")


def trained(name: str, model: nn.Module, data: list[Any], scales: list[float]) -> dict[str, Any]:
    """A training of 20 steps: the parameters, the rows of a monitor, and what the basis has cost.

    Args:
        name: of the optimizer.
        model: sharded or whole.
        data: the batches of this rank, one a step.
        scales: of the losses of the batches, so that their mean over ranks is that of all examples.
    """
    operator = operator_of("exact", model, data, verify=name == "AdamW")
    parameters = list(model.parameters())
    subspace: Any = so.DominantSubspace(operator, k=3, refresh=10, tol=1e-13)
    if name == "auto":
        subspace = so.DominantSubspace(operator, k=3, tol=1e-13)
    optimizer: Any = {
        "BulkSGD": lambda: so.BulkSGD(
            parameters, lr=0.05, momentum=0.9, weight_decay=0.01, subspace=subspace
        ),
        "DomSAM": lambda: so.DomSAM(parameters, lr=0.05, subspace=subspace),
        "LowRankNewton": lambda: so.LowRankNewton(
            parameters, lr=0.1, damping=0.1, bulk_ratio=0.1, subspace=subspace
        ),
        "AdamW": lambda: torch.optim.AdamW(parameters, lr=0.01),
        "auto": lambda: so.BulkSGD(parameters, lr=0.02, subspace=subspace),
    }[name]()
    if name == "AdamW":
        so.project_updates(optimizer, subspace, onto="bulk")
    monitor = so.Monitor(optimizer, subspace, every=5)
    for step in range(STEPS):
        (x, y), scale = data[step % len(data)], scales[step % len(data)]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = scale * F.cross_entropy(model(x), y)  # noqa: B023 (called in this step)
            loss.backward()
            return loss

        if name == "DomSAM":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return {
        "theta": theta(model),
        "rows": {c: monitor.history[c] for c in MEASURED},
        "refreshes": subspace.stats.refreshes,
    }


def trainings(size: int, *, full: bool) -> dict[str, Any]:
    """Every optimizer, on a model of which each rank has a part, as on the whole one."""
    data = batches()
    rank, groups = dist.get_rank(), range(0, len(data) - size + 1, size)
    scales = []
    for first in groups:
        counts = [len(y) for _, y in data[first : first + size]]
        scales.append(size * counts[rank] / sum(counts))
    mine = [data[first + rank] for first in groups]
    names = TRAININGS if full else TRAININGS[:2]
    return {name: trained(name, fsdp(made(Small)), mine, scales) for name in names}


def not_finite(size: int, *, full: bool) -> dict[str, Any]:
    """A gradient that is NaN on one rank, in a step of SAM; and then a step as usual."""
    model, data = fsdp(made(Small)), own(batches())
    optimizer = so.SAM(model.parameters(), lr=0.1, adaptive=True)
    found = {"before": theta(model)}
    for name in ("not finite", "finite"):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data[0][0]), data[0][1])
            loss.backward()
            if name == "not finite" and dist.get_rank() == 1:  # noqa: B023
                next(model.parameters()).grad.to_local().fill_(math.nan)
            return loss

        optimizer.step(closure)
        found[name] = theta(model)
    return found


def corners(size: int, *, full: bool) -> dict[str, Any]:
    """What is easily forgotten."""
    data, found = batches(), dict[str, Any]()
    model = fsdp(made(Small))
    operator = operator_of("exact", model, own(data))
    operator.loss()
    state = {name: 1.5 * p.detach() for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    found["parameters that were replaced"] = readings(operator)
    uneven = data[:1] if dist.get_rank() == 0 else data[1:3]
    found["passed"] = operator_of("exact", fsdp(made(Small)), uneven).check().passed
    found["trained"] = {}
    for name in ("BulkSGD", "SAM"):
        model = made(Small)
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model, mesh=mesh, ignored_params=set(model.head.parameters()))
        found["trained"][name] = with_a_whole_head(name, model, data, dist.get_rank(), size)
    return found


def with_a_whole_head(name: str, model: nn.Module, data: Any, rank: int, size: int) -> torch.Tensor:
    """Steps of an optimizer with momentum on plain and sharded parameters together."""
    operator = operator_of("exact", model, own(data, rank, size), verify=False)
    subspace = so.DominantSubspace(operator, k=2, refresh=10, tol=1e-13)
    optimizer: Any = so.SAM(model.parameters(), lr=0.1, momentum=0.9)
    if name == "BulkSGD":
        optimizer = so.BulkSGD(model.parameters(), lr=0.1, momentum=0.9, subspace=subspace)
    x, y = data[-1]  # on all ranks

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return theta(model)


def theta(model: nn.Module) -> torch.Tensor:
    return torch.cat([sharding.everywhere(p).reshape(-1) for p in model.parameters()])


SCENARIOS: list[Callable[..., dict[str, Any]]] = [
    operators,
    layouts,
    untouched,
    solves,
    held,
    trainings,
    not_finite,
    corners,
]


def run(rank: int, size: int, folder: str, full: bool) -> None:
    """Takes part as one of ``size`` ranks, and saves what every scenario gave it."""
    joined(rank, size, folder)
    results = {scenario.__name__: scenario(size, full=full) for scenario in SCENARIOS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
