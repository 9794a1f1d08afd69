"""All that a GPU can tell, in at most eight minutes: ``python -m benchmarks.gpu``.

It runs the tests that are marked ``gpu``, then the sections of the speed table in the order of
their worth, each with a time limit, and writes JSON before and after each of them: a kill loses the
section at work and no other. What only CUDA has says so on a CPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks import command, report
from benchmarks.files import alone, first_line, write_json
from benchmarks.gpu import capture, problems, rows, solves, starts, suite, waits
from benchmarks.gpu.sections import Section, run
from benchmarks.progress import shown
from benchmarks.speed import environment, products
from subspace_optim.curvature.contexts import full_precision

BUDGET: Final = 465.0
"""Seconds of all sections together; 15 more, and the process is ended from outside of Python."""
_TESTS: Final = 100.0
_INSTALL: Final = 60.0
_ROUNDS: Final = {"full": 3, "tiny": 1}


def sections(options: argparse.Namespace) -> list[Section]:
    """Returns what is measured, the most important first.

    The solves of each model beside the peers, then what decides how products are to be taken, the
    largest model first. A capture that fails can leave a GPU unusable: these come last.
    """
    size, device = options.size, options.device
    cached: dict[str, Any] = {}

    def on(name: str) -> Any:
        if name not in cached:
            cached.clear()  # one model at a time
            cached[name] = problems.made(name, size, options.data_root, device)
        return cached[name]

    def solve(name: str, found: dict[str, Any]) -> None:
        made = on(name)
        found["problem"] = {"parameters": made.size, "examples": len(made.x), "k": made.k}
        solves.measure(made, made.k, _ROUNDS[size], 5.0, found)

    def product(name: str, found: dict[str, Any]) -> None:
        made = on(name)
        found.update(products.measure(made, made.k, 1))

    kinds = {
        "products": product,
        "waits": lambda name, found: waits.measure(on(name), on(name).k, found),
        "rows": lambda name, found: rows.measure(on(name), found),
        "starts": lambda name, found: starts.measure(on(name), on(name).k, found),
    }
    suite_of = partial(suite.measure, device, _TESTS)
    plan = [Section("tests", _TESTS + 5, suite_of)]
    limits = {"mlp": 40.0, "resnet18": 60.0, "gpt2": 100.0}
    plan += [Section(f"solves {name}", limits[name], partial(solve, name)) for name in limits]
    models = ("gpt2", "mlp", "resnet18")
    for name in models:
        plan += [Section(f"{k} {name}", 30.0, partial(f, name)) for k, f in kinds.items()]
    for name in models:
        captured = partial(lambda name, found: capture.measure(on(name), found), name)
        plan.append(Section(f"capture {name}", 15.0, captured))
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--size", choices=("full", "tiny"), default="full", help="tiny: to see that all of it runs")
    add("--seconds", type=float, default=BUDGET, help="of all sections together")
    add("--sections", nargs="+", metavar="NAME", help="names or their beginnings (default: all)")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA, else the hub)")
    add("--output", type=Path, default=Path("results/gpu.json"))
    add("--peers", type=Path, default=environment.ROOT / ".venv-peers", help="where they live")
    add("--here", action="store_true", help="stay in this environment, with the peers it has")
    add("--resume", action="store_true", help="go on with the file that is there, and its time")
    return parser


class Results:
    """What has been measured so far, on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.output
        if options.resume:
            self.data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self.data = {
                "options": {name: str(value) for name, value in vars(options).items()},
                "machine": report.machine(),
                "began": time.time(),
                "finished": False,
                "sections": {},
            }
        self.data["versions"] = report.versions(*environment.PEERS, "scipy")

    @property
    def ends(self) -> float:
        """When the time is over."""
        return float(self.data["began"]) + float(self.data["options"]["seconds"])

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, self.data)


def _measure(options: argparse.Namespace, results: Results, console: Console) -> None:
    """Runs the sections that were asked for."""
    asked = tuple(options.sections or ("",))
    plan = [s for s in sections(options) if s.name.startswith(asked)]
    if not options.here:
        plan = plan[:1] if plan and plan[0].name == "tests" else []
    # Convolutions of float32 are TF32 on a GPU by default: all solvers alike compute in IEEE.
    with full_precision(torch.device(options.device), fused=True):
        run(plan, results.data["sections"], results.ends, results.write, console.print)


def _with_peers(options: argparse.Namespace, results: Results) -> Path | None:
    """Returns the Python of the peers; ``None`` if they cannot be had, and the file says why."""
    peers: Path = options.peers.absolute()
    try:
        with alone(peers.with_name(f"{peers.name}.lock")):
            return environment.make(peers, seconds=_INSTALL)
    except (subprocess.SubprocessError, OSError) as error:
        results.data["peers"] = f"not installed: {first_line(error)}"
        results.write()
        return None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: the tests here, and the table in the environment of the peers.

    Args:
        arguments: as on the command line.

    Returns:
        0, also where a section has failed; 2 for what cannot be run; 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    console = command.console(width=120)

    def work() -> int:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; --device cpu --size tiny runs")
        results = Results(options)
        left = max(1.0, results.ends - time.time())
        faulthandler.dump_traceback_later(left + 15, exit=True)
        results.write()
        with shown("gpu", console):
            _measure(options, results, console)
        if not options.here:
            python = _with_peers(options, results)
            going_on = [*arguments, "--resume"]
            if python is not None:
                environment.continue_in(python, going_on, module="benchmarks.gpu")
            return main([*going_on, "--here"])
        results.data["finished"] = True
        results.write()
        console.print(f"Written: {options.output}")
        faulthandler.cancel_dump_traceback_later()
        return 0

    kept = f"{options.output} has what was measured"
    return command.status("gpu", work, ValueError, kept=kept)


if __name__ == "__main__":
    sys.exit(main())
