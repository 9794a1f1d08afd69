"""The main job: compare optimizers from the moment the gradient of SGD is dominant.

``python -m benchmarks.compare`` runs the critical experiment of `song_2024` (sections 3.2 and
3.3) and writes ``results/<run>/``: ``comparison.png``, ``history.csv`` and ``summary.json``. As a
function of your own model, loss, data and optimizers it is ``benchmarks.compare.compare``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

import subspace_optim as so
from benchmarks import command, report
from benchmarks.data import DATASETS, DataUnavailableError, load
from benchmarks.experiment import OPTIMIZERS, WARMUP, Settings, compare
from benchmarks.files import ForeignFileError, alone, replacing
from benchmarks.losses import LOSSES
from benchmarks.models import DEFAULT_MODEL, MODELS, build, default_lr
from benchmarks.optimizers import DEFAULT, Recipe, recipes
from benchmarks.progress import Task, doing, shown

__all__ = ["OPTIMIZERS", "Settings", "compare", "main", "recipes"]

_FORMAT: Final = "benchmarks.compare, 1"
"""What a checkpoint says that it is; the number changes with what it holds."""
_NO_RUN_OPTIONS = ("resume", "results", "run", "data_root", "device")
"""Options that a resumed run may change: they do not change what it computes, but for rounding."""


def _parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, defaults = parser.add_argument, Settings(k=1)
    add("--data", choices=DATASETS, default="mnist-5k")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA, else the hub)")
    add("--model", choices=MODELS, help="default: what the paper trains on the data")
    add("--loss", choices=tuple(LOSSES), default="mse", help="mse: half the sum over classes")
    add(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        default=list(DEFAULT),
        help="sgd, domsgd, ..., newton, quasinewton; one of torch.optim, such as adamw; "
        "module:Class; a+b: a pair, of which a takes the parameters with exactly two dimensions "
        "and b the rest; dom:NAME and bulk:NAME: projected",
    )
    add(
        "--set",
        action="append",
        metavar="NAME.option=value",
        default=[],
        help="an option of an optimizer, such as adamw.lr=1e-3; can be repeated",
    )
    add(
        "--lr",
        type=float,
        help="of SGD, and of all that have no default of their own (default: the paper's)",
    )
    add("--batch-size", type=int, default=defaults.batch_size)
    add("--k", type=int, help="dimension of the subspace (default: the classes)")
    add("--steps", type=int, default=defaults.steps, help="steps after the switch")
    add("--switch-at", type=int, help="branch at this step, whatever the alignment")
    add("--last-switch", type=int, default=defaults.last_switch, help="branch here at the latest")
    add("--warmup-measure", type=int, default=defaults.warmup_measure, help="measure every N steps")
    add("--warmup-refresh", type=int, default=defaults.warmup_refresh, help="renew every N steps")
    add("--measure", type=int, default=defaults.measure, help="the same, after the switch")
    add(
        "--refresh",
        type=_refresh,
        default=defaults.refresh,
        help="the same after the switch: N, or auto: when it is stale",
    )
    add("--spectrum", type=int, default=defaults.spectrum, help="top 2k eigenvalues every N steps")
    add("--tol", type=float, default=defaults.tol, help="relative residual of the eigenpairs")
    add("--chunk", type=int, help="examples at a time in passes over all data (default: all)")
    add("--seed", type=int, default=defaults.seed)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--control", choices=("random",), help="a random subspace in the dominant one's place")
    add("--results", type=Path, default=Path("results"), help="folder of all runs")
    add("--run", help="name of the run's folder (default: from the options)")
    add("--resume", action="store_true", help="go on with the unfinished run of these options")
    return parser


def _refresh(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _settings(options: argparse.Namespace, num_classes: int) -> Settings:
    fields = {name: value for name, value in vars(options).items() if hasattr(Settings, name)}
    fields |= {"k": num_classes if options.k is None else options.k}
    fields["lr"] = default_lr(options.data, options.loss) if options.lr is None else options.lr
    return Settings(**fields)


@contextmanager
def _folder(options: argparse.Namespace, model: str) -> Iterator[Path]:
    """Gives the folder of this run, which no other process writes to: a new one, or to resume.

    Raises:
        ValueError: there is nothing to resume.
    """
    control = f"-{options.control}" if options.control else ""
    name: str = options.run or f"{options.data}-{model}-{options.loss}{control}-seed{options.seed}"
    results: Path = options.results
    if options.resume:
        unfinished = [f for f in _numbered(results / name) if (f / "checkpoint.pt").exists()]
        if not unfinished:
            raise ValueError(f"Nothing to resume: {results / name} holds no unfinished run.")
        with alone(unfinished[-1] / "lock"):
            yield unfinished[-1]
        return
    while True:  # two that start at once find the same number free, and one of them makes it
        folder = [*_numbered(results / name)][-1]
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    try:
        with alone(folder / "lock"):
            yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _numbered(first: Path) -> Iterator[Path]:
    """The folders of that name that there are, and the first that there is not."""
    folder, number = first, 1
    while folder.exists():
        yield folder
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    yield folder


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU. Use --device cpu or auto.")
    return torch.device(name)


class _Recorder:
    """Says how far it is, and keeps what was measured on disk as it comes."""

    def __init__(self, folder: Path, arguments: dict[str, Any], phases: ExitStack) -> None:
        self.folder, self.arguments, self.phases = folder, arguments, phases
        self.phase = ""
        self.task: Task
        self.written = 0

    def __call__(self, experiment: Any, measured: bool) -> None:
        """Takes note of one step."""
        result, phase = experiment.result, experiment.phase
        if phase != self.phase:
            self.phases.close()  # that before ends
            name = "SGD to the switch" if phase == WARMUP else phase
            total = experiment.planned_steps
            self.phase = phase
            self.task = self.phases.enter_context(doing(name, total, keep=True))
        done = experiment.step - (0 if phase == WARMUP else result.switch_step or 0)
        figures = [
            f"loss {row['loss']:.4f}  chi {row['chi_gradient']:.3f} (average "
            f"{row['chi_average']:.3f})  sharpness {row['sharpness']:.1f}"
            for row in result.of(phase)[-1:]
        ]
        self.task.at(done, *figures)
        if not measured:
            return
        path = self.folder / "history.csv"
        if len(result.rows) > self.written:
            report.write_history(result, path, only_last=self.written > 0)
            self.written = len(result.rows)
        kept = {"format": _FORMAT, "arguments": self.arguments, "state": experiment.state_dict()}
        with replacing(self.folder / "checkpoint.pt") as partial:
            torch.save(kept, partial)


def _kept(path: Path) -> dict[str, Any]:
    """Returns what an interrupted run has left.

    Raises:
        ForeignFileError: it is something else.
    """
    remedy = "Leave out --resume to begin anew, in a folder of its own."
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        arguments, state, form = dict(kept["arguments"]), dict(kept["state"]), kept["format"]
    except Exception as error:  # whatever torch, pickle and zipfile say to a foreign file
        reason = f"it cannot be read ({type(error).__name__})"
        raise ForeignFileError(path, "checkpoint of this version", reason, remedy) from error
    if form != _FORMAT:
        reason = f"its format is {form!r}, not {_FORMAT!r}"
        raise ForeignFileError(path, "checkpoint of this version", reason, remedy)
    return {"arguments": arguments, "state": state}


def _resume(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of an interrupted run.

    Raises:
        ValueError: it was started with other options.
    """
    kept = _kept(folder / "checkpoint.pt")
    differing = [
        f"--{name.replace('_', '-')} was {kept['arguments'].get(name)!r}, is {value!r}"
        for name, value in arguments.items()
        if name not in _NO_RUN_OPTIONS and kept["arguments"].get(name) != value
    ]
    if differing:
        raise ValueError(f"{folder} cannot be resumed with other options: {'; '.join(differing)}.")
    state: dict[str, Any] = kept["state"]
    return state


def _run(options: argparse.Namespace, console: Console) -> int:
    """Runs the comparison; returns the exit status."""
    chosen: dict[str, Recipe] = recipes(options.optimizers, options.set)
    device = _device(options.device)
    with doing(f"loading {options.data}"):
        data = load(options.data, root=options.data_root)
    name = options.model or DEFAULT_MODEL[options.data]
    model = build(name, data, num_outputs=data.num_classes, seed=options.seed).to(device)
    settings = _settings(options, data.num_classes)
    arguments = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    } | {"model": name, "lr": settings.lr, "k": settings.k, "optimizers": list(chosen)}
    title = f"{options.data}, {name}, {options.loss}, lr {settings.lr:g}, seed {settings.seed}"
    if settings.control:
        title += ": control with a random subspace"
    with _folder(options, name) as folder:
        state = _resume(folder, arguments) if options.resume else None
        on = f"lr {settings.lr:g}, on {device}"
        console.print(f"{data.description}\n{name}, {options.loss}, {on}")
        with ExitStack() as phases:
            result = compare(
                model,
                LOSSES[options.loss],
                (data.x_train, data.y_train),
                chosen,
                settings=settings,
                test_data=data.test,
                resume_from=state,
                on_progress=_Recorder(folder, arguments, phases),
            )
        return _written(result, folder, arguments, title, console)


def _written(
    result: Any, folder: Path, arguments: dict[str, Any], title: str, console: Console
) -> int:
    """Writes and prints what came out; returns the exit status."""
    if result.rows:
        with replacing(folder / "history.csv") as partial:
            report.write_history(result, partial)
    with replacing(folder / "summary.json") as partial:
        report.write_summary(result, partial, arguments)
    with replacing(folder / "comparison.png") as partial:
        report.picture(result, title).savefig(partial, dpi=130, format="png")
    report.print_report(result, console)
    console.print(f"Written: {folder}/comparison.png, history.csv, summary.json")
    if not result.finished:
        if (folder / "checkpoint.pt").exists():
            console.print("Interrupted: the same command with --resume goes on.")
        return command.INTERRUPTED
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: as on the command line.

    Returns:
        0; 2 for what cannot be run, with the reason in one sentence; 130 if it was interrupted.
    """
    options = _parser().parse_args(arguments)
    console = command.console(width=120)

    def work() -> int:
        with shown("compare", console):
            return _run(options, console)

    return command.status("compare", work, DataUnavailableError, ValueError, so.NonFiniteError)


if __name__ == "__main__":
    sys.exit(main())
