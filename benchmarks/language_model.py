"""What it costs to watch a language model: ``python -m benchmarks.language_model``.

A decoder of GPT-2's shape with 2.1 million parameters is trained on the sentences of SST-2 by
AdamW, without a monitor and with ``measures.stability()`` on the minibatch at hand, ``every=50``
and ``every_share(0.05)``; the MLP and the CNN of the papers by SGD, without and with
``every_share(0.05)``. All runs of a model begin at one state and take the same steps, in turn, in
another order each round; the ratios are of whole runs of one round, first rows and proofs
included, of the time that passed and of the processor's, which others on the machine do not add
to. The trained parameters have to be the same to the bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import subspace_optim as so
from benchmarks import command
from benchmarks.architectures import LanguageModel, next_token_loss
from benchmarks.data import DataUnavailableError, load
from benchmarks.experiment import minibatch
from benchmarks.files import alone, write_json
from benchmarks.gallery import save
from benchmarks.losses import mse
from benchmarks.models import build, default_lr, drawn
from benchmarks.progress import doing, shown
from benchmarks.report import machine, versions
from benchmarks.speed.timing import processor_timed, ratios, spread, timed
from benchmarks.text import windows
from subspace_optim.diagnostics import plots

Every = Callable[[], Any]
"""Makes the argument of ``Monitor``: a schedule belongs to one monitor alone."""

SHARE: Final = 0.05
_WARM_UP: Final = 100
"""Steps in which AdamW's rate grows to what it stays at."""


@dataclass(frozen=True)
class Problem:
    """A training: all that is needed to begin it anew.

    Attributes:
        name: of the model.
        model: makes it, always the same.
        loss_fn: of its output and a target.
        data: inputs and targets, one a row.
        batch_size: examples of a step.
        steps: of a timed run.
        optimizer: makes it, and what steps its rate, of parameters.
        schedules: of the monitor, by what is said of them.
    """

    name: str
    model: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    batch_size: int
    steps: int
    optimizer: Callable[[Iterator[nn.Parameter]], tuple[torch.optim.Optimizer, Any]]
    schedules: Mapping[str, Every]


@dataclass(frozen=True)
class Run:
    """What came of a training.

    Attributes:
        parameters: at the end.
        history: of the monitor; ``None`` without one.
    """

    parameters: list[Tensor]
    history: dict[str, list[Any]] | None


def train(problem: Problem, every: Every | None, steps: int, seed: int = 0) -> Run:
    """Trains from the beginning.

    Args:
        problem: what.
        every: of the monitor; ``None`` without one.
        steps: how many.
        seed: of the minibatches.

    Returns:
        What came of it.
    """
    x, y = problem.data
    model = problem.model()
    optimizer, scheduler = problem.optimizer(model.parameters())
    batch, monitor = so.CurrentBatch(), None
    if every is not None:
        hessian = so.HessianOperator(model, problem.loss_fn, batch)
        measures = so.measures.stability()
        monitor = so.Monitor(optimizer, hessian, measures=measures, every=every())
    with doing(f"training of the {problem.name}", steps) as task:
        for step in range(steps):
            rows = minibatch(len(x), problem.batch_size, step, seed)
            inputs, targets = x[rows], y[rows]
            if monitor is not None:
                batch.set(inputs, targets)
            optimizer.zero_grad()
            problem.loss_fn(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
            task.at(step + 1)
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    if monitor is None:
        return Run(parameters, None)
    monitor.detach()
    return Run(parameters, monitor.history)


def measure(problem: Problem, rounds: int) -> dict[str, Any]:
    """Trains without a monitor and with each schedule, in turn.

    Args:
        problem: what.
        rounds: how often, after a first one that is not counted.

    Returns:
        Raw seconds, those of the processor, ratios to the run without a monitor of the same
        round, rows of a run, and whether all of them ended at the same parameters.
    """
    variants: dict[str, Every | None] = {"without": None, **problem.schedules}
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    of_processor: dict[str, list[float]] = {name: [] for name in names}
    rows: dict[str, list[int]] = {name: [] for name in problem.schedules}
    identical = True
    with doing(problem.name, rounds + 1, unit="round") as task:
        for turn in range(rounds + 1):
            start = turn % len(names)  # nobody is always the first
            expected: list[Tensor] | None = None
            for name in names[start:] + names[:start]:
                task.at(turn + 1, name)
                work = partial(train, problem, variants[name], problem.steps)
                duration, (processor, run) = timed(partial(processor_timed, work))
                expected = expected or run.parameters
                identical &= all(map(torch.equal, run.parameters, expected))
                if turn:
                    seconds[name].append(duration)
                    of_processor[name].append(processor)
                    if run.history is not None:
                        rows[name].append(len(run.history["step"]))
    return {
        "parameters": sum(p.numel() for p in problem.model().parameters()),
        "steps": problem.steps,
        "batch_size": problem.batch_size,
        "seconds": seconds,
        "processor_seconds": of_processor,
        "ratios": {name: ratios(seconds[name], seconds["without"]) for name in rows},
        "processor_ratios": {
            name: ratios(of_processor[name], of_processor["without"]) for name in rows
        },
        "rows": rows,
        "identical": identical,
    }


# --- the problems --------------------------------------------------------------------------------


def _language_model(*, quick: bool) -> tuple[Problem, str]:
    """The decoder, and where its text is from."""
    count, length, vocabulary = (64, 8, 60) if quick else (8000, 64, 4000)
    shape = (
        {"width": 16, "heads": 2, "layers": 1} if quick else {"width": 128, "heads": 4, "layers": 8}
    )
    text = windows(count=count, length=length, vocabulary=vocabulary)

    def optimizer(parameters: Iterator[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        adamw = torch.optim.AdamW(parameters, lr=1e-3)
        growth = torch.optim.lr_scheduler.LinearLR(adamw, 0.01, total_iters=_WARM_UP)
        return adamw, growth

    spacing = 10 if quick else 50
    made = Problem(
        "language model",
        lambda: drawn(0, lambda: LanguageModel(vocabulary, length, **shape)),
        next_token_loss,
        (text.tokens, text.following),
        8 if quick else 16,
        40 if quick else 500,
        optimizer,
        {f"every={spacing}": lambda: spacing, f"every_share({SHARE})": _share},
    )
    return made, text.source


def _of_the_papers(name: str, data: str, steps: int) -> Problem:
    """The MLP or the CNN, by SGD on minibatches of 50."""
    found = load(data)

    def optimizer(parameters: Iterator[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        sgd = torch.optim.SGD(parameters, lr=default_lr(data, "mse"))
        return sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)

    return Problem(
        name.upper(),
        lambda: build(name, found, num_outputs=found.num_classes, seed=0),
        mse,
        (found.x_train, found.y_train),
        50,
        steps,
        optimizer,
        {f"every_share({SHARE})": _share},
    )


def _share() -> Any:
    return so.every_share(SHARE)


# --- the command ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the measurement.

    Args:
        arguments: as on the command line.

    Returns:
        0; 1 where a monitor has changed a training; 2 for what cannot be run, with the reason in
        one sentence; 130 if it was interrupted.
    """
    about = (__doc__ or "").split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="all of it in miniature, in some seconds")
    add("--rounds", type=int, default=5, help="of the runs in turn")
    add("--picture-steps", type=int, default=600, help="of the run that is drawn; 0: no picture")
    add("--output", type=Path, default=Path("results/language-model.json"))
    add("--pictures", type=Path, default=Path("docs/pictures"), help="folder of the picture")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    console = command.console(width=110)
    lock = options.output.with_name(f"{options.output.name}.lock")

    def work() -> int:
        with alone(lock), shown("language_model", console):
            return _run(options, console)

    return command.status("language_model", work, DataUnavailableError, kept="it writes at its end")


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measures, writes and prints; returns the exit status."""
    language_model, source = _language_model(quick=options.quick)
    problems = [
        language_model,
        _of_the_papers("mlp", *(("digits", 60) if options.quick else ("mnist-5k", 5000))),
        _of_the_papers("cnn", *(("digits", 40) if options.quick else ("cifar10-5k", 1000))),
    ]
    models = {problem.name: measure(problem, options.rounds) for problem in problems}
    result = {
        "models": models,
        "text": source,
        "quick": options.quick,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
    }
    if options.picture_steps:
        run = train(language_model, lambda: 10, options.picture_steps)
        result["history"] = run.history
        history = run.history or {}
        save(plots.stability(history), options.pictures / "language-model.png")
        dark = plots.stability(history, theme="dark")
        save(dark, options.pictures / "language-model-dark.png")
    write_json(options.output, result)
    _print(models, source, console)
    console.print(f"Written: {options.output}")
    return int(not all(found["identical"] for found in models.values()))


def _print(models: dict[str, Any], source: str, console: Console) -> None:
    """Prints a line for each schedule of each model."""
    columns = ("model", "parameters", "schedule", "rows", "time, over without", "of the processor")
    table = Table(*columns, box=None)
    for name, found in models.items():
        for schedule, over in found["ratios"].items():
            rows = str(spread(found["rows"][schedule]))
            ours = str(spread(found["processor_ratios"][schedule]))
            cells = (name, f"{found['parameters']:,}", schedule, rows, str(spread(over)), ours)
            table.add_row(*cells)
    console.print(table)
    steps = (f"{found['steps']} ({name})" for name, found in models.items())
    console.print(f"Steps of a run: {', '.join(steps)}.")
    console.print(f"Median, smallest and largest over the rounds. Text: {source}.")
    for name, found in models.items():
        if not found["identical"]:
            console.print(f"The monitor has changed the training of the {name}.", style="red")


if __name__ == "__main__":
    sys.exit(main())
