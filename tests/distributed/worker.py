"""What each rank does: every scenario in turn, its results in a file for the test to compare."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import subspace_optim as so
from tests import clusters
from tests.dense import Problem, make_problem
from tests.processes import joined

SIZES = (3, 1, 4, 2, 5)  # examples of the batches, which the ranks take in turn
KINDS = {"exact": so.HessianOperator, "differences": so.FiniteDifferenceHessian}


def group() -> Any:
    return dist.group.WORLD


def problem() -> Problem:
    return make_problem("mlp", sizes=SIZES)


def shard(batches: list[Any]) -> list[Any]:
    return batches[dist.get_rank() :: dist.get_world_size()]


def readings(operator: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(4, operator.size, dtype=torch.float64, generator=generator)
    return {
        "matvec": operator.matvec(V[0]),
        "matmat": operator.matmat(V),
        "gradient": operator.gradient(),
        "loss": operator.loss(),
    }


def outcome(action: Callable[[], Any]) -> tuple[list[str], str]:
    """The classes of the error that an action raises, and its message; no class for none."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 (whatever it is, the test compares it)
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], ""


def rank_sees(rank: int, on_it: Any, elsewhere: Any) -> Any:
    return on_it if dist.get_rank() == rank else elsewhere


# --- scenarios ----------------------------------------------------------------------------------


def products() -> dict[str, Any]:
    """Each kind, before and after a move, on ranks that keep everything or nothing."""
    found = {}
    for name, kind in KINDS.items():
        p = problem()
        operator = kind(
            p.model,
            p.loss_fn,
            shard(p.batches),
            memory_budget=rank_sees(0, None, 0),
            process_group=group(),
        )
        found[name] = readings(operator)
        p.model[0].weight.data[0, 0] += 0.5
        found[f"{name} moved"] = readings(operator)
        KEPT[name] = operator.stats.graphs_kept
    return found


KEPT: dict[str, int] = {}  # batches that a rank keeps, which is its own affair


def weights() -> dict[str, Any]:
    """Weights of its own: one of the batches has none, and a mean that is not a number."""
    p = problem()
    return readings(
        so.HessianOperator.from_loss(
            p.model, weighted_loss, shard(p.batches), process_group=group()
        )
    )


def weighted_loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    weight = batch[0].shape[0] - 1
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return (loss if weight else loss * torch.nan), torch.tensor(weight)


def dropping(p: Problem) -> nn.Module:
    return nn.Sequential(p.model[0], nn.Dropout(0.4), *p.model[1:]).train()


def dropout() -> dict[str, Any]:
    p = problem()
    return readings(
        so.HessianOperator(dropping(p), p.loss_fn, shard(p.batches), seed=3, process_group=group())
    )


def subspace() -> dict[str, Any]:
    p = problem()
    operator = so.HessianOperator(p.model, p.loss_fn, shard(p.batches), process_group=group())
    basis = so.DominantSubspace(operator, k=3, refresh=1, tol=1e-6).refresh()
    return {"eigenvalues": basis.eigenvalues, "vectors": basis.vectors}


def sample() -> dict[str, Any]:
    """A basis of a sample, while the parameters move; each rank has rows of its own."""
    model, (x, y) = clusters.network(seed=3), clusters.clustered(4000, seed=3)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    hessian = so.HessianOperator(
        model, clusters.one_hot_mse, (x[own], y[own]), process_group=group()
    )
    subspace = so.DominantSubspace(hessian, 3, sample="auto", max_angle=0.15)
    found: dict[str, Any] = {"vectors": [], "stats": []}
    for step in range(4):
        if step:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.03)
        found["vectors"].append(subspace.update().vectors.clone())
        stats = subspace.stats
        found["stats"].append([stats.estimate, stats.sampling_error, stats.examples, stats.cold])
    return found


def stability() -> dict[str, Any]:
    """Rows of a monitor of the operator, whose losses are those of all the data."""
    p = problem()
    return stability_of(p, shard(p.batches), process_group=group())


def stability_of(p: Problem, batches: list[Any], **options: Any) -> dict[str, Any]:
    operator = so.HessianOperator(p.model, p.loss_fn, batches, **options)
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, operator, measures=so.measures.stability())
    for _ in range(4):
        optimizer.zero_grad()
        for x, y in p.batches:
            p.loss_fn(p.model(x), y).backward()
        optimizer.step()
    return {c: torch.tensor(values, dtype=torch.float64) for c, values in monitor.history.items()}


def monitored() -> dict[str, Any]:
    """A monitor on a sample, to which each rank adds rows of its own, or batches of its own."""
    found = {}
    for form in ("rows", "batches", "few batches"):
        model, (x, y) = clusters.network(seed=3), clusters.clustered(4000, seed=3)
        own = slice(dist.get_rank(), None, dist.get_world_size())
        x, y = x[own], y[own]
        size = {"batches": 20, "few batches": 200}.get(form)
        data: Any = (x, y)
        if size is not None:
            data = list(zip(x.split(size), y.split(size), strict=True))
        hessian = so.HessianOperator(model, clusters.one_hot_mse, data, process_group=group())
        subspace = so.FixedSubspace(model, torch.eye(hessian.size, dtype=torch.float64)[:6])
        subspace.operator = hessian
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = so.Monitor(optimizer, subspace, measures=so.measures.dominant(800))
        whole = so.Monitor(optimizer, subspace, measures=so.measures.dominant(None))
        with torch.no_grad():  # the same update on all ranks
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        optimizer.step()
        rows = [each.rows()[0] for each in (monitor, whole)]
        found[form] = [{c: v for c, v in row.items() if not math.isnan(v)} for row in rows]
    return found


def training() -> dict[str, Any]:
    """Three steps of a wrapped model, each with a basis of its own."""
    p = make_problem("mlp", sizes=(4, 4, 4, 4))
    model = nn.parallel.DistributedDataParallel(p.model)
    batches = shard(p.batches)
    operator = so.HessianOperator(model, p.loss_fn, batches, process_group=group())
    subspace = so.DominantSubspace(operator, k=2, refresh=1, tol=1e-6)
    optimizer = so.BulkSGD(model.parameters(), lr=0.1, subspace=subspace)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.loss_fn(model(x), y) for x, y in batches).div(len(batches)).backward()
        optimizer.step()
    return {name: q.detach() for name, q in p.model.named_parameters()}


def collectives() -> dict[str, Any]:
    """The number of elements of each all-reduce, in order."""
    p = problem()
    operator = so.HessianOperator(
        p.model,
        p.loss_fn,
        shard(p.batches),
        memory_budget=rank_sees(0, None, 0),
        process_group=group(),
        verify=False,
    )
    counts: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    found = {}
    V = torch.ones(5, operator.size, dtype=torch.float64)

    def record(name: str, action: Callable[[], Any]) -> None:
        counts.clear()
        action()
        found[name] = list(counts)

    try:
        with operator.frozen():
            record("first product", lambda: operator.matvec(V[0]))
            record("block of products", lambda: operator.matmat(V))
            record("gradient and loss", lambda: (operator.gradient(), operator.loss()))
        record("product outside of frozen", lambda: operator.matvec(V[0]))
    finally:
        dist.all_reduce = all_reduce
    return found | {"size": operator.size}


def knowledge() -> dict[str, Any]:
    """One rank goes on with a copy that knows nothing, the others with what they have."""
    p = problem()
    operator = so.HessianOperator(p.model, p.loss_fn, shard(p.batches), process_group=group())
    readings(operator)
    if dist.get_rank() == 0:
        _, operator = copy.deepcopy((p.model, operator))
    pickled = outcome(lambda: pickle.dumps(operator))
    return readings(operator) | {"pickled": pickled}


class Changing:
    """Batches that are other ones from the given pass on."""

    def __init__(self, batches: list[Any], changes_at: int) -> None:
        self.batches, self.changes_at, self.passes = batches, changes_at, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        change = 1.0 if self.passes == self.changes_at else 0.0
        return iter([(x + change, y) for x, y in self.batches])


def errors() -> dict[str, Any]:
    """Rank 1 fails; afterwards the operator is as good as new, where it is one."""
    found: dict[str, Any] = {}

    def operator_of(p: Problem, data: Any = None, **options: Any) -> Any:
        data = shard(p.batches) if data is None else data
        return so.HessianOperator(p.model, p.loss_fn, data, process_group=group(), **options)

    def ask(name: str, operator: Any, repair: Callable[[], Any]) -> None:
        v = torch.ones(operator.size, dtype=torch.float64)
        for what in (lambda: operator.matvec(v), operator.gradient, operator.loss):
            found.setdefault(name, []).append(outcome(what))
        repair()
        found[f"{name}, repaired"] = readings(operator)

    p = problem()
    batches = [(x.clone(), y) for x, y in shard(p.batches)]
    batches[0][0][0, 0] = rank_sees(1, torch.nan, 0.0)
    ask("not finite", operator_of(p, batches), lambda: batches[0][0][0, 0].fill_(0.5))

    p = problem()

    def fail(*_: Any) -> None:
        raise KeyError("the forward pass failed")

    hook = p.model[2].register_forward_hook(rank_sees(1, fail, lambda *_: None))
    ask("forward", operator_of(p), hook.remove)

    p = problem()
    with torch.no_grad():
        p.model[0].weight[0, 0] += rank_sees(1, 1e-9, 0.0)

    def equal() -> None:
        p.model.load_state_dict(problem().model.state_dict())

    ask("parameters", operator_of(p), equal)

    def changed(passes: int) -> Any:
        data = rank_sees(1, Changing(shard(p.batches), passes), shard(p.batches))
        return operator_of(p, data, memory_budget=0, verify=False)

    operator = changed(2)
    operator.loss()
    found["data of a gradient"] = [outcome(operator.gradient)]
    operator = changed(3)
    with operator.frozen():
        v = torch.ones(operator.size, dtype=torch.float64)
        operator.matvec(v)
        found["data of a product"] = [outcome(lambda: operator.matvec(v))]
    found["data of a product, repaired"] = readings(operator)

    class NoBatches:
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    empty = rank_sees(1, [], shard(p.batches))
    found["no data"] = [outcome(lambda: operator_of(p, empty))]
    none = rank_sees(1, NoBatches(), shard(p.batches))
    found["no data in the end"] = [outcome(operator_of(p, none).loss)]
    arguments = {"memory_budget": rank_sees(1, -1, 0)}
    found["argument"] = [outcome(lambda: operator_of(p, **arguments))]
    return found


SCENARIOS = [
    products,
    weights,
    dropout,
    subspace,
    sample,
    stability,
    monitored,
    training,
    collectives,
    knowledge,
    errors,
]


def run(rank: int, size: int, folder: str) -> None:
    """Takes part as one of ``size`` ranks, and saves what every scenario gave it."""
    joined(rank, size, folder)
    results = {scenario.__name__: scenario() for scenario in SCENARIOS}
    results["kept"] = KEPT
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
