"""What each rank does with sharded models: every scenario in turn, its results in a file."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    return {how: _trained(how) for how in ("alone", "asked", "watched")}


def _trained(how: str) -> list[Any]:
    model = fsdp(made(sharding.Net))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = own(batches())
    operator, asked = operator_of("exact", model, data), how == "asked"
    if how == "watched":
        so.Monitor(optimizer, so.DominantSubspace(operator, k=2, refresh=2), every=2)
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


class Drawn(nn.Module):
    """Layers of any sizes, of which one may have fewer rows than there are ranks."""

    def __init__(self, widths: list[int], norms: list[bool]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for inputs, outputs, norm in zip([7, *widths], [*widths, 3], norms, strict=True):
            layers = [nn.Linear(inputs, outputs, bias=not norm), nn.Tanh()]
            self.blocks.append(nn.Sequential(*([nn.LayerNorm(inputs)] if norm else []), *layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], list[bool], list[bool], int | None]:
    """Widths, which blocks begin with a norm, which are sharded by themselves, and the budget."""
    widths = draw(st.lists(st.integers(1, 9), max_size=3))
    flags = st.lists(st.booleans(), min_size=len(widths) + 1, max_size=len(widths) + 1)
    return widths, draw(flags), draw(flags), draw(st.sampled_from([None, 0]))


def drawn(size: int, *, full: bool) -> dict[str, Any]:
    """Models that hypothesis draws, the same on all ranks, against double backward."""
    errors = []

    # Nothing may depend on what a rank has found: the ranks would draw other models.
    @settings(
        max_examples=60 if full else 8,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
    )
    @given(models())
    def compared(of: tuple[list[int], list[bool], list[bool], int | None]) -> None:
        widths, norms, alone, budget = of
        model = made(lambda: Drawn(widths, norms))
        expected = by_double_backward(model, batches())
        mesh = init_device_mesh("cpu", (size,))
        for block, by_itself in zip(model.blocks, alone, strict=True):
            if by_itself:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        operator = operator_of("exact", model, own(batches()), memory_budget=budget, verify=False)
        for name, found in readings(operator).items():
            error = (torch.as_tensor(found, dtype=torch.float64) - expected[name]).abs().max()
            errors.append(float(error / expected[name].abs().max().clamp(min=1e-3)))

    compared()
    return {"errors": errors, "count": len(errors)}


def by_double_backward(model: nn.Module, data: Any) -> dict[str, torch.Tensor]:
    """Loss and derivatives of the whole model, row by row: torch.func's are wrong for LayerNorm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        total = sum(len(y) for _, y in data)
        loss = sum(F.cross_entropy(model(x), y) * (len(y) / total) for x, y in data)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in slopes])
    held = {"retain_graph": True, "materialize_grads": True}
    products = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient @ v, parameters, **held)])
        for v in directions(len(gradient))
    ]
    return {"loss": loss.detach(), "gradient": gradient.detach(), "products": torch.stack(products)}


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


def parts(data: list[Any], count: int, rank: int) -> tuple[list[Any], list[float]]:
    """The batches of one of ``count`` parts of the ranks, and the scales of their losses."""
    groups = range(0, len(data) - count + 1, count)
    scales = []
    for first in groups:
        sizes = [len(y) for _, y in data[first : first + count]]
        scales.append(count * sizes[rank] / sum(sizes))
    return [data[first + rank] for first in groups], scales


def trainings(size: int, *, full: bool) -> dict[str, Any]:
    """Every optimizer, on a model of which each rank has a part, as on the whole one."""
    mine, scales = parts(batches(), size, dist.get_rank())
    names = TRAININGS if full else TRAININGS[:2]
    return {name: trained(name, fsdp(made(Small)), mine, scales) for name in names}


def parallel_trainings(size: int, *, full: bool) -> dict[str, Any]:
    """Optimizers on models that are tensor parallel, and on a mesh of two dimensions."""
    data, found = batches(), dict[str, Any]()
    if size == 2:
        mesh = init_device_mesh("cpu", (2,))
        ways: dict[str, Any] = {
            "tensor parallel": (lambda: sharding.tensor_parallel(made(sharding.Parallel), mesh), 1)
        }
    else:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        parallel = functools.partial(sharding.tensor_parallel, mesh=both["model"])
        ways = {
            "2 x 2": (lambda: fully_shard(parallel(made(sharding.Parallel)), mesh=both["data"]), 2),
            "hybrid": (lambda: fsdp(made(Small), both), 4),
        }
    for way, (make, count) in ways.items():
        rank = dist.get_rank() * count // size
        mine, scales = parts(data, count, rank)
        for name in TRAININGS[:4] if full else ("BulkSGD",):
            found[f"{way} {name}"] = trained(name, make(), mine, scales)
    return found


def many(count: int = 48) -> list[Any]:
    """Batches of a few examples, enough to be sampled."""
    generator = torch.Generator().manual_seed(5)
    data = []
    for number in range(count):
        n = 4 + number % 3
        x = torch.rand(n, 7, generator=generator, dtype=torch.float64)
        noise = torch.rand(n, generator=generator, dtype=torch.float64)
        data.append((x, (x.sum(1) + noise).long().remainder(3)))
    return data


def samples(size: int, *, full: bool) -> dict[str, Any]:
    """Operators of samples, of batches and of rows, and a basis that is found on them."""
    found: dict[str, Any] = {}
    mine = own(many())
    sample = operator_of("exact", fsdp(made(Small)), mine).sample(60, seed=3)
    found["batches"] = sample.examples, readings(sample)
    together = tuple(map(torch.cat, zip(*mine, strict=True)))
    operator = operator_of("exact", fsdp(made(Small)), together)
    some, every = (operator.sample(n, seed=3) for n in (80, len(many()) * 5))
    found["rows"] = some.examples, readings(some)
    found["all rows"] = every.examples, readings(every)
    found["uncut"] = operator_of("exact", fsdp(made(Small)), own(batches())[0]).sample(2, seed=3)
    found["other counts"] = operator_of("exact", fsdp(made(Small)), mine[dist.get_rank() :]).sample(
        60, seed=3
    )
    for name, data in (("of batches", mine), ("of rows", together)):
        operator = operator_of("exact", fsdp(made(Small)), data)
        subspace = so.DominantSubspace(operator, k=1, sample=100, max_angle=0.5)
        basis = subspace.update()
        found[name] = {
            "vectors": rows(operator.parameters, basis.vectors),
            "examples": subspace.stats.examples,
            "estimate": subspace.stats.estimate,
        }
    return found


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
    model = made(Small)
    operator = operator_of("exact", model, own(data))
    fsdp_in_place(model)
    found["sharded since"] = refused(operator.loss)
    found["trained"] = {}
    for name in ("BulkSGD", "SAM"):
        model = made(Small)
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model, mesh=mesh, ignored_params=set(model.head.parameters()))
        found["trained"][name] = with_a_whole_head(name, model, data, dist.get_rank(), size)
    return found


def fsdp_in_place(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def refused(call: Callable[[], object]) -> str:
    """What is said of a call that cannot be."""
    try:
        call()
    except so.ArgumentError as error:
        return str(error)
    return "nothing"


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
    parallel_trainings,
    drawn,
    samples,
    not_finite,
    corners,
]


def run(rank: int, size: int, folder: str, full: bool) -> None:
    """Takes part as one of ``size`` ranks, and saves what every scenario gave it."""
    joined(rank, size, folder)
    results = {scenario.__name__: scenario(size, full=full) for scenario in SCENARIOS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
