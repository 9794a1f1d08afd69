"""Processes of their own, without the seconds that torch takes to import in each.

They are forked from a server that has imported it, and has done nothing else.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.utils._pytree import tree_leaves

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "subspace_optim"])


def together(work: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Runs ``work(rank, *args)`` for each rank, and raises what one of them has raised."""
    torch.multiprocessing.start_processes(work, args, count, start_method="forkserver")


def once(factory: pytest.TempPathFactory, name: str, work: Callable[[Path], object]) -> Path:
    """Returns a folder that ``work(folder)`` has filled: once for all processes of the tests.

    Those of a file may be run by several, each of which would else do the same at the same time.
    """
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, outcome = root / name, root / f"{name}.outcome"
    try:
        folder.mkdir()
    except FileExistsError:
        while not outcome.exists():
            time.sleep(0.1)
    else:
        said = "it was stopped"
        try:
            work(folder)
            said = ""
        except BaseException as error:
            said = repr(error)
            raise
        finally:
            part = root / f"{name}.part"
            part.write_text(said)
            part.rename(outcome)
    said = outcome.read_text()
    if said:
        message = f"What the tests of this file look at has failed before: {said}"
        raise RuntimeError(message)
    return folder


def joined(rank: int, size: int, folder: str) -> None:
    """Makes this process one of ``size`` ranks, that meet in a file of ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )


def alike(ranks: list[dict[str, Any]], scenario: str) -> Any:
    """What all ranks have found in a scenario, bit by bit."""
    first, *others = ([*tree_leaves(results[scenario])] for results in ranks)
    assert len(first) > 1
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return ranks[0][scenario]


def apart(work: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    """Starts ``work(*args)``; what becomes of it is nobody else's end."""
    process = _FORKS.Process(target=work, args=args)
    process.start()
    return process


def started(
    command: Callable[[Sequence[str]], int], options: Sequence[str], output: Path
) -> BaseProcess:
    """Starts ``command(options)``; what it prints goes to a file, and it exits with its result."""
    process = _FORKS.Process(target=_run, args=(command, list(options), output))
    process.start()
    return process


def _run(command: Callable[[Sequence[str]], int], options: Sequence[str], output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        sys.stdout = file
        status = command(options)
        file.flush()
    sys.exit(status)


def ended(process: BaseProcess, timeout: float = 300) -> int | None:
    """Waits, and returns the exit code; ``None`` if it is still at work, which is killed then."""
    process.join(timeout)
    code = process.exitcode
    if code is None:
        with suppress(ProcessLookupError):
            process.kill()
    return code
