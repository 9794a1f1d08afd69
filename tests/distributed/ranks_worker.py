"""What two ranks do when one of them fails, or differs: every scenario, its results in a file."""

from __future__ import annotations

import copy
import subprocess
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_optim as so
from subspace_optim.curvature.process_group import Ranks, warn_without_group
from tests.dense import make_problem
from tests.optim.naive import DenseOperator, Quartic

K = 2
STRIDE = 89


def only(rank: int, on_it: Any, elsewhere: Any) -> Any:
    return on_it if dist.get_rank() == rank else elsewhere


def outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """The classes of what an action raises, its message, and its warnings."""
    kinds: list[str] = []
    text = ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever it is, the test compares it)
            kinds = [cls.__name__ for cls in type(error).__mro__]
            text = "" if isinstance(error, MuteError) else str(error)
    return {"kinds": kinds, "text": text, "warnings": [w.category.__name__ for w in seen]}


class Shared(DenseOperator):
    """The matrix of a `Quartic`, of which each rank has a part."""

    def __init__(self, model: Quartic) -> None:
        super().__init__(model)
        self._ranks = Ranks(dist.group.WORLD)

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    def matmat(self, vectors: Tensor) -> Tensor:
        part = (1 + self._ranks.rank) / 3  # of two ranks: a third, and two thirds
        with self._ranks.summed(vectors.shape, vectors.dtype, vectors.device) as total:
            total.add_(super().matmat(vectors), alpha=part)
        return total


class RunsOut(TorchDispatchMode):
    """Memory runs out at one operation of torch; those that communicate are not counted."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            self.seen += 1
            if self.seen == self.at:
                raise torch.OutOfMemoryError("memory has run out")
        return func(*args, **(kwargs or {}))


def state(subspace: so.DominantSubspace) -> dict[str, Any]:
    """All but the costs: of an attempt that failed, the ranks have done more and less."""
    found = subspace.state_dict()
    counts = ("products", "full_products", "gradients", "full_gradients")
    costs = dict.fromkeys(("seconds", *counts), 0)
    return found | {"stats": found["stats"] | costs}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)


# --- scenarios ----------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """Memory runs out on rank 1 at some of the operations of an update, from the first to the last.

    All of them are gone through by one process, which does not have to wait for another.
    """
    found: dict[str, Any] = {}
    for work, refresh in {"first": 1, "solve": 1, "renew": "auto"}.items():
        at, ran_out = 1 - STRIDE, True
        while ran_out:
            at += STRIDE
            model = Quartic()
            subspace = so.DominantSubspace(Shared(model), K, refresh=refresh, max_angle=0.01)
            if work != "first":
                subspace.update()
                move(model)
            with RunsOut(only(1, at, 0)) as mode:
                failed = outcome(subspace.update)
            after = state(subspace)
            move(model)
            found[f"{work} {at}"] = [failed, after, outcome(subspace.update), state(subspace)]
            reached = torch.tensor([only(1, mode.seen >= at, False)]).int()
            dist.broadcast(reached, 1)
            ran_out = bool(reached)
    return found


def network() -> list[Any]:
    """The same with the Hessian of a network, at some of its operations."""
    found = []
    for at in (0, 5, 50, 100, 200, 300, 400, 500, 700, 900, 1200):
        p = make_problem("mlp", sizes=(4, 4))
        batch = p.batches[dist.get_rank()]
        hessian = so.HessianOperator(p.model, p.loss_fn, batch, process_group=dist.group.WORLD)
        subspace = so.DominantSubspace(hessian, K)
        subspace.update()
        move(p.model)
        with RunsOut(only(1, at, 0)):
            result = outcome(subspace.refresh)
        found.append([result, state(subspace)])
        move(p.model)
        found[-1] += [outcome(subspace.update), state(subspace)]
    return found


def in_a_row() -> list[Any]:
    """Rank 1 has no room for a copy of its parameters, once it has found that a refresh is due."""
    model = Quartic()
    subspace = so.DominantSubspace(Shared(model), K, max_angle=0.01)
    subspace.update()
    flatten, error = subspace.parameters.flatten, torch.OutOfMemoryError("no room for a copy")
    calls = 0

    def fail(tensors: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise error  # always the same object, as where an error is kept
        return flatten(tensors)

    found = []
    for _ in range(4):
        move(model)
        calls = 0
        subspace.parameters.flatten = only(1, fail, flatten)  # type: ignore[method-assign]
        found.append([outcome(subspace.update), subspace.stats.failures, state(subspace)])
    subspace.parameters.flatten = flatten  # type: ignore[method-assign]
    return [*found, [outcome(subspace.update), subspace.stats.failures, state(subspace)]]


def options() -> dict[str, Any]:
    """An option that differs, and one that rank 1 alone cannot use."""
    differing = {"k": 1, "seed": 7, "max_angle": 0.2, "tol": 1e-5, "refresh": 3}
    found = {}
    for name, other in differing.items():
        arguments = {"k": K} | only(1, {name: other}, {})
        found[name] = outcome(lambda a=arguments: so.DominantSubspace(Shared(Quartic()), **a))
    wrong = only(1, 0, K)
    found["wrong"] = outcome(lambda: so.DominantSubspace(Shared(Quartic()), wrong))
    return found


class TwoArgumentsError(RuntimeError):
    """An error that is not made of one message."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


class MuteError(ValueError):
    """An error that cannot tell of itself."""

    def __str__(self) -> str:
        raise RuntimeError("no message")


ERRORS: dict[str, Callable[[], Exception]] = {
    "ExceptionGroup": lambda: ExceptionGroup("two at once", [KeyError("a"), ValueError("b")]),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "CalledProcessError": lambda: subprocess.CalledProcessError(3, "make"),
    "TwoArgumentsError": lambda: TwoArgumentsError("a forward pass", "no memory"),
    "MuteError": MuteError,
    "FileNotFoundError": lambda: FileNotFoundError(2, "No such file", "data.pt"),
    "NonFiniteError": lambda: so.NonFiniteError("the loss is nan"),
    "ArgumentError": lambda: so.ArgumentError("data", "empty", "one batch"),
}


def kinds() -> dict[str, Any]:
    """Each kind of error, of rank 1; the sums go on afterwards."""
    ranks, found = Ranks(dist.group.WORLD), {}
    for name, make in ERRORS.items():

        def inside(make: Any = make) -> None:
            summed = ranks.summed((2,), torch.float32, torch.device("cpu"))
            with ranks.all_or_none(), summed as total:
                total.add_(1)
                if dist.get_rank() == 1:
                    raise make()

        def alone(make: Any = make) -> None:
            with ranks.all_or_none():
                if dist.get_rank() == 1:
                    raise make()
                ranks.sum_(torch.ones(3))

        found[name] = [outcome(inside), outcome(alone), ranks.sum_(torch.ones(3))]
    return found


def different() -> list[Any]:
    """The ranks do not call the same; afterwards they do, and it works."""
    ranks, cpu = Ranks(dist.group.WORLD), torch.device("cpu")
    found = [
        outcome(lambda: ranks.sum_(torch.ones(only(1, 3, 4)))),
        outcome(only(1, lambda: ranks.agree([1], cpu), lambda: ranks.sum_(torch.ones(2)))),
    ]
    subspace = so.DominantSubspace(Shared(Quartic()), K, refresh="auto")
    subspace.update()
    move(subspace.parameters.model)
    found.append(outcome(only(1, subspace.refresh, subspace.update)))
    one_alone = so.DominantSubspace(Shared(Quartic()), K, refresh=1)
    if dist.get_rank() == 0:
        one_alone.load_state_dict(subspace.state_dict())
    found.append(outcome(one_alone.update))
    agreed = [ranks.agree([2**63 - 1, only(1, -(2**63), 5)], cpu), ranks.agree([7, 8], cpu)]
    decided = [ranks.any(lambda: only(1, True, False)), ranks.any(lambda: False)]
    return [*found, agreed, decided, ranks.any(lambda: None), ranks.sum_(torch.ones(3))]


def without_group() -> dict[str, Any]:
    """What is warned of, of which model."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    models = {
        "plain": nn.Linear(2, 2),
        "wrapped": wrapped,
        "held": nn.Sequential(wrapped, nn.ReLU()),
    }
    found = {name: outcome(lambda m=m: warn_without_group(m, None)) for name, m in models.items()}
    with_group = lambda: warn_without_group(wrapped, dist.group.WORLD)  # noqa: E731
    return found | {"with a group": outcome(with_group)}


def checkpoint(folder: str) -> list[Any]:
    """Training that is saved by both ranks, and goes on from there in new objects."""
    model = Quartic()
    subspace = so.DominantSubspace(Shared(model), K)
    optimizer = so.BulkSGD(model.parameters(), lr=0.02, subspace=subspace)

    def train(model: Quartic, optimizer: Any) -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    for _ in range(3):
        train(model, optimizer)
    subspace.stats.seconds += dist.get_rank()  # which of them is saved is not known
    dcp.save({"model": model.state_dict(), "subspace": subspace}, checkpoint_id=folder)
    resumed = Quartic(seed=1)
    resumed.A, resumed.b, resumed.c = model.A, model.b, model.c
    theirs = so.DominantSubspace(Shared(resumed), K)
    weights = resumed.state_dict()
    dcp.load({"model": weights, "subspace": theirs}, checkpoint_id=folder)
    resumed.load_state_dict(weights)
    found = [[state(subspace), state(theirs)]]
    second = so.BulkSGD(resumed.parameters(), lr=0.02, subspace=theirs)
    for _ in range(3):
        train(model, optimizer)
        train(resumed, second)
        values = [[p.detach().clone() for p in m.parameters()] for m in (model, resumed)]
        found += [copy.deepcopy(values), [state(subspace), state(theirs)]]
    return found


SCENARIOS = [memory, network, in_a_row, options, kinds, different, without_group]


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
    results = {scenario.__name__: scenario() for scenario in SCENARIOS}
    results["checkpoint"] = checkpoint(f"{folder}/checkpoint")
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
