"""Ours against the peers, in one run: ``python -m benchmarks.speed``.

It installs the peers into an environment of their own, runs ours and theirs in turn on the same
parameters and data, checks every answer against a float64 reference, prints ratios with their
spread (median, smallest and largest), writes JSON after each section, and draws the picture of the
docs. Costs are in gradients over the same data, timed in the same round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.console import Console

from benchmarks import command, report
from benchmarks.data import DataUnavailableError
from benchmarks.files import alone, replacing, write_json
from benchmarks.progress import doing, shown
from benchmarks.speed import (
    apply,
    cold,
    drift,
    environment,
    estimates,
    memory,
    models,
    monitoring,
    observation,
    products,
    runs,
    sampling,
    scaling,
    step,
    synchronisations,
    trajectories,
    warm,
)
from benchmarks.speed.peers import RECIPE
from benchmarks.speed.picture import picture, sampling_picture
from benchmarks.speed.problems import DECODERS, PROBLEMS, Problem, problem
from benchmarks.speed.tables import TABLES
from benchmarks.speed.timing import processor_timed, timed


@dataclass(frozen=True)
class Plan:
    """How much is done for a model.

    Attributes:
        late: steps of SGD before what is measured late in training.
        rounds: repetitions.
        samples: of the true sine, in a run.
        scenarios: keys of ``runs.SCENARIOS``, with the number of steps.
        sections: of ``PER_MODEL``.
    """

    late: int
    rounds: int
    samples: int
    scenarios: dict[str, int]
    sections: tuple[str, ...] = ("products", "cold", "runs", "observation")


PER_MODEL: Final = (
    "products",
    "cold",
    "warm",
    "runs",
    "memory",
    "observation",
    "monitor",
    "synchronisations",
    "models",
    "estimates",
    "trajectories",
)
_DEFAULT: Final = PER_MODEL[:-3]  # without the last, which take longer than all the rest
GLOBAL: Final = ("apply", "step", "small", "scaling", "sampling", "drift")
_ALL: Final = {name: scenario.steps for name, scenario in runs.SCENARIOS.items()}
_FEW: Final = {"late": 30, "early": 10}
PLANS: Final = {
    "mlp": Plan(2000, 5, 10, _ALL, _DEFAULT),
    "cnn": Plan(500, 1, 2, _FEW),
    "cnn-5k": Plan(500, 1, 2, _FEW),
    "transformer": Plan(500, 1, 2, _FEW),
    "resnet18": Plan(500, 5, 4, _FEW, _DEFAULT),
    "vit": Plan(500, 3, 2, _FEW),
    "language": Plan(500, 1, 2, {}, ("products", "cold")),
    "phrases": Plan(500, 1, 2, {}, ("products", "cold")),
    "gpt2": Plan(50, 3, 2, {}, _DEFAULT),
}
_QUICK: Final = Plan(20, 1, 2, dict.fromkeys(_ALL, 4), PER_MODEL)
_QUICK_EXAMPLES: Final = 100


class Results:
    """What has been measured so far; on disk after each section."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "machine": report.machine(),
            "versions": report.versions(*environment.PEERS, "scipy"),
            "models": {},
            "finished": False,
        }

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, self.data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    default = ["mlp", "cnn", "transformer"]
    add("--models", nargs="+", choices=(*PROBLEMS, *DECODERS), default=default, metavar="MODEL")
    every = ", ".join(PER_MODEL + GLOBAL)
    sections = f"of {every} (default: of the MLP all but the three longest, fewer of the others)"
    add("--sections", nargs="+", choices=PER_MODEL + GLOBAL, metavar="SECTION", help=sections)
    add("--scenarios", nargs="+", choices=tuple(_ALL), help="of the runs (default: the plan's)")
    add("--k", type=int, help="dimension of the subspace (default: the classes)")
    add("--rounds", type=int, help="repetitions (default: 5 of the MLP, one of slower models)")
    add("--examples", type=int, help="of the data (default: all of the problem's)")
    add("--seeds", type=int, default=3, help="of the estimates' trajectories")
    add("--samples", type=int, default=15, help="of each of these trajectories")
    add("--limit", type=float, default=120.0, help="seconds a solve that a peer may take")
    add("--quick", action="store_true", help="tiny sizes, to see that it works")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA, else the hub)")
    add("--output", type=Path, default=Path("results/speed.json"))
    add("--picture", type=Path, default=Path("docs/speed.png"), help="not drawn with --quick")
    add("--sampling-picture", type=Path, default=Path("docs/sampling.png"), help="likewise")
    add("--peers", type=Path, default=environment.ROOT / ".venv-peers", help="where they live")
    add("--here", action="store_true", help="stay in this environment, with the peers it has")
    return parser


def _runs(
    made: Problem,
    k: int,
    plan: Plan,
    console: Console,
    measured: dict[str, Any],
    write: Callable[[], None],
) -> dict[str, Any]:
    """All scenarios of a model; the recipe's time late in training is the cold solves'.

    They take minutes each: those that were measured are on disk before the next.
    """
    solved = measured.get("cold", {}).get("solvers", {}).get(RECIPE, {}).get("seconds")
    result: dict[str, Any] = {}
    for name, steps in plan.scenarios.items():
        scenario = replace(runs.SCENARIOS[name], steps=steps)
        console.print(f"  {scenario.title}, {steps} steps")
        result[name] = runs.measure(
            made,
            k,
            scenario,
            late=plan.late,
            samples=plan.samples,
            rounds=plan.rounds,
            recipe_seconds=min(solved) if solved and scenario.start is None else None,
        )
        measured["runs"] = result
        write()
    return result


def _modes(
    made: Problem, k: int, rounds: int, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """A cold solve in eval mode, and in training mode where that is another function."""
    normed = any(True for _ in made.model.buffers())  # the running statistics of batch norm
    timer = timed if made.x.is_cuda else processor_timed
    modes: tuple[Literal["eval", "train"], ...] = ("eval", "train") if normed else ("eval",)
    return {
        mode: models.measure(made, k, rounds, mode, console, limit=options.limit, timer=timer)
        for mode in modes
    }


def _sections(
    made: Problem,
    again: Callable[..., Problem],
    k: int,
    plan: Plan,
    options: argparse.Namespace,
    console: Console,
    measured: dict[str, Any],
    write: Callable[[], None],
) -> dict[str, Callable[[], dict[str, Any] | None]]:
    """What each section of a model does; ``None`` is a section that does not apply."""
    rounds = plan.rounds

    def late(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def at_late() -> dict[str, Any]:
            made.move_to(plan.late)
            return function()

        return at_late

    return {
        "products": late(lambda: products.measure(made, k, rounds)),
        "cold": late(lambda: cold.measure(made, k, rounds, options.limit, console)),
        "warm": lambda: warm.measure(made, k, rounds, plan.late, 50 if plan.late > 50 else 5),
        "runs": lambda: _runs(made, k, plan, console, measured, write) or None,
        "memory": late(lambda: memory.measure(made, k)),
        "observation": late(lambda: observation.measure(made, max(rounds, 10))),
        "monitor": lambda: monitoring.measure(
            made, k, rounds, plan.late, 8 if plan is _QUICK else 200
        ),
        "synchronisations": lambda: synchronisations.measure(made, k) if made.x.is_cuda else None,
        "models": late(lambda: _modes(made, k, rounds, options, console)),
        "trajectories": lambda: trajectories.measure(
            again(), k, 6 if plan is _QUICK else 2000, 2 if plan is _QUICK else options.samples
        ),
        "estimates": lambda: estimates.measure(
            again,
            k,
            plan.late,
            seeds=options.seeds,
            samples=options.samples,
            quick=plan is _QUICK,
        ),
    }


def _run(options: argparse.Namespace, console: Console) -> None:
    """Measures section by section, and writes after each.

    Raises:
        ValueError: there is no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here.")
    results = Results(options.output, options)

    def keep(place: dict[str, Any], section: str, name: str, outcome: dict[str, Any]) -> None:
        place[section] = outcome
        results.write()
        console.print(TABLES[section](name, outcome))
        console.print()

    for name in options.models:
        plan = _QUICK if options.quick else PLANS[name]
        if options.rounds:
            plan = replace(plan, rounds=options.rounds)
        if options.scenarios:
            plan = replace(
                plan, scenarios={s: plan.scenarios.get(s, 30) for s in options.scenarios}
            )
        again = partial(
            problem,
            name,
            root=options.data_root,
            device=options.device,
            examples=_QUICK_EXAMPLES if options.quick else options.examples,
        )
        with doing(f"loading {name}"):
            made = again()
        k = options.k or made.k
        console.print(f"[bold]{name}[/]: P = {made.size:,}, N = {len(made.x)}, k = {k}")
        measured = {"parameters": made.size, "examples": len(made.x), "k": k, "late": plan.late}
        results.data["models"][name] = measured
        sections = _sections(made, again, k, plan, options, console, measured, results.write)
        chosen = options.sections or plan.sections
        for section in (s for s in PER_MODEL if s in chosen):
            with doing(f"{name}: {section}"):
                outcome = sections[section]()
            if outcome is not None:
                keep(measured, section, name, outcome)
    rounds = options.rounds or (2 if options.quick else 20)
    size = 10**6 if options.quick else 11 * 10**6
    chosen = options.sections or GLOBAL
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "apply": lambda: apply.measure(size, 10, rounds, options.device),
        "step": lambda: step.measure(size, 10, rounds, options.device),
        "small": lambda: step.measure_small(351, rounds),
        "scaling": lambda: scaling.measure(options.data_root, options.device, quick=options.quick),
        "sampling": lambda: sampling.measure(options.data_root, quick=options.quick),
        "drift": lambda: drift.measure(3 if options.quick else drift.RUNS),
    }
    for section in (s for s in GLOBAL if s in chosen):
        with doing(section):
            outcome = parts[section]()
        keep(results.data, section, "", outcome)
    for path, draw in (
        (options.picture, picture),
        (options.sampling_picture, sampling_picture),
    ):
        figure = None if options.quick else draw(results.data)
        if figure is not None:
            with replacing(path) as partly:
                figure.savefig(partly, dpi=130, format=path.suffix[1:] or "png")
            console.print(f"Drawn: {path}")
    results.data["finished"] = True
    results.write()
    console.print(f"Written: {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, in the environment of the peers.

    Args:
        arguments: as on the command line.

    Returns:
        0; 2 for what cannot be run, with the reason in one sentence; 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    console = command.console(width=150)
    peers: Path = options.peers.absolute()

    def work() -> int:
        if not options.here:
            with alone(_lock(peers)), shown("the environment of the peers", console):
                python = environment.make(peers)
            environment.continue_in(python, arguments)
        with alone(_lock(options.output)), shown("speed", console):
            _run(options, console)
        return 0

    told = (DataUnavailableError, ValueError, subprocess.CalledProcessError)
    return command.status("speed", work, *told, kept=f"{options.output} has what was measured")


def _lock(path: Path) -> Path:
    """Beside what one process at a time writes."""
    return path.with_name(f"{path.name}.lock")


if __name__ == "__main__":
    sys.exit(main())
