"""Real ranks: gloo processes of this machine count, and time, what the simulation says of them."""

from __future__ import annotations

import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import subspace_optim as so
from benchmarks.sharded import pieces
from benchmarks.sharded.dry import Recorder, dry_run
from benchmarks.sharded.formulas import Hardware
from benchmarks.sharded.meter import Counts
from benchmarks.sharded.models import Shape, batch, made, sharded

CASES: Final = {"kept": pieces.ROOM, "streamed": 0}
"""Memory budgets: graphs and gathered parameters stay, or nothing does."""


@dataclass
class Measured:
    """What a rank has counted and timed, or would count.

    Attributes:
        counts: by case and piece.
        seconds: likewise, the least of some rounds; of real ranks.
        read: by case, the matrices that its refresh has read.
        hardware: as this rank was timed; of real ranks.
    """

    counts: dict[str, dict[str, Counts]]
    seconds: dict[str, dict[str, float]]
    read: dict[str, list[Any]]
    hardware: Hardware | None = None


@dataclass
class Start:
    """Where real ranks begin.

    Attributes:
        weights: of the model; ``None`` for drawn ones.
        batches: of each rank; ``None`` for drawn ones.
    """

    weights: dict[str, Tensor] | None = None
    batches: list[tuple[Tensor, Tensor]] | None = None


def real(shape: Shape, ranks: int, k: int, start: Start, rounds: int = 3) -> list[Measured]:
    """Returns what each of real ranks has measured.

    Args:
        shape: of the model.
        ranks: processes.
        k: of the subspace.
        start: weights and data.
        rounds: of timing; none for 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "start"
        torch.save((start.weights, start.batches), given)
        arguments = (folder, shape, ranks, k, rounds)
        start_processes(_rank, arguments, ranks, start_method="forkserver")
        files = (Path(folder) / f"{rank}.pickle" for rank in range(ranks))
        return [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 (our own)


def _rank(rank: int, folder: str, shape: Shape, ranks: int, k: int, rounds: int) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of torch's own names of collectives
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    weights, batches = torch.load(Path(folder) / "start")
    model = made(shape)
    if weights is not None:
        model.load_state_dict(weights)
    model = sharded(model, ranks)
    data = batch(shape, seed=rank) if batches is None else batches[rank]
    found = Measured({}, {}, {}, _hardware(ranks, rounds) if rounds else None)
    for case, budget in CASES.items():
        if rounds:
            found.seconds[case] = _seconds(model, data, budget, k, rounds)
        with Recorder(2 * k + 6) as meter:
            found.counts[case], operator = pieces.products(model, data, budget, meter)
            operator.release()
            meter.seen.clear()
            subspace = so.DominantSubspace(operator, k, refresh=pieces.NEVER)
            found.counts[case]["refresh"] = pieces.counted(meter, subspace.refresh)
            found.read[case] = meter.seen
            found.counts[case]["step"] = pieces.step(model, subspace, meter)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def dry(shape: Shape, ranks: int, k: int, read: dict[str, list[Any]]) -> Measured:
    """Returns what rank 0 would count, of ranks that are not there.

    Args:
        shape: of the model.
        ranks: how many.
        k: of the subspace.
        read: by case, the matrices that a solve reads.
    """
    found = Measured({}, {}, read)
    with dry_run(ranks) as meter:
        model, data = sharded(made(shape, "meta"), ranks), batch(shape, "meta")
        for case, matrices in read.items():
            parts, operator = pieces.products(model, data, CASES[case], meter)
            found.counts[case] = parts
            operator.release()
            meter.replayed = list(matrices)
            solve, subspace = pieces.solve(operator, k, meter)
            parts["solve"] = solve.counts
            parts["refresh"] = pieces.refresh(parts, solve)
            parts["step"] = pieces.step(model, subspace, meter)
    return found


# --- seconds -------------------------------------------------------------------------------------


def _least(work: Callable[[], object], rounds: int, *, warm: bool = False) -> float:
    """Returns the least seconds of work that all ranks begin together, after a first time.

    The least, since others may be at work on the machine.

    Args:
        work: what is timed.
        rounds: that count.
        warm: whether there has been a first time.
    """
    found = []
    for _ in range(rounds if warm else rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found[-rounds:])


def _seconds(model: Any, data: Any, budget: int, k: int, rounds: int) -> dict[str, float]:
    operator = pieces.operator_of(model, data, budget)
    vectors = torch.ones(2, operator.parameters.size_here)

    def graph() -> None:
        operator.release()
        operator.linearize()

    found = {"graph": _least(graph, rounds)}
    with operator.frozen():
        found["product"] = _least(lambda: operator.matmat(vectors[:1]), rounds)
        found["two products"] = _least(lambda: operator.matmat(vectors), rounds)
    subspace = so.DominantSubspace(operator, k, refresh=pieces.NEVER)
    found["refresh"] = _least(subspace.refresh, 1, warm=True)
    with pieces.optimizer_of(model, subspace) as optimizer:
        found["step"] = _least(optimizer.step, rounds)
    return found


def _hardware(ranks: int, rounds: int) -> Hardware:
    """Times what the model of costs is made of, on all ranks at once."""
    matrix = torch.randn(512, 512)
    flops = 2 * 512**3 / _least(lambda: matrix @ matrix, 5 * rounds)
    large = torch.ones(1 << 24)
    memory = 2 * large.nbytes / _least(lambda: large.mul_(1.0), rounds)
    small = torch.ones(8)

    def calls() -> None:  # 600 operations, and as many backwards
        x = small.clone().requires_grad_()
        y = x
        for _ in range(300):
            y = (y * 0.5).tanh()
        torch.autograd.grad(y.sum(), x)

    call = _least(calls, rounds) / 1200
    if ranks == 1:
        return Hardware(flops, memory, float("inf"), 0.0, call)

    def sums() -> None:
        for _ in range(50):
            dist.all_reduce(small)

    latency = _least(sums, rounds) / 50
    own = torch.ones(1 << 20)
    every = torch.empty(ranks << 20)

    def gather() -> None:
        dist.all_gather_into_tensor(every, own)

    link = (ranks - 1) * own.nbytes / _least(gather, rounds)
    return Hardware(flops, memory, link, latency, call)


# --- both, side by side --------------------------------------------------------------------------


def alike(one: Counts, other: Counts, *, in_order: bool) -> bool:
    """Whether the collectives, their bytes, and the operations of matrix products are the same.

    Args:
        one: of a piece.
        other: of the same.
        in_order: of the collectives too.
    """
    those = [each.collectives for each in (one, other)]
    if not in_order:
        those = [sorted(each) for each in those]
    return those[0] == those[1] and one.flops == other.flops
