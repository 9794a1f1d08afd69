"""Figures, tables and claims of the four papers: ``python -m benchmarks.papers``.

Without arguments it lists the papers; with a paper its figures, tables and claims; with figures or
tables too, or ``all``, it measures what they need, as far as it is not on disk, draws them and says
what holds. What was measured is kept run by run and seed by seed, in ``results/papers``, with the
pictures and all verdicts, ``claims.json``; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.files import BusyError, ForeignFileError, alone, replacing
from benchmarks.gallery import save
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.pages import CLAIMS, RAW, claims, judged, publish
from benchmarks.papers.reproduction import SCALES, Exhibit, Paper, Run, Scale
from benchmarks.papers.results import Results
from benchmarks.papers.verdicts import Verdict, written
from benchmarks.progress import doing, shown

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = ROOT / "docs" / "papers"
_START: Final = 3.4
"""Seconds that a run's process takes before it runs: the imports, on the machine of the pages."""
_PATIENCE: Final = 20.0
"""Seconds that a process may take to end its step and keep what it has."""


@dataclass(frozen=True)
class Task:
    """A run and a seed that is not on disk."""

    paper: Paper
    run: Run
    seed: int

    def __str__(self) -> str:
        return f"{self.paper.key} {self.run.name} seed {self.seed}"


@dataclass
class Queue:
    """Runs tasks in processes of their own, several at a time.

    Attributes:
        options: of the command.
        console: says what has ended.
        failed: tasks that ended with an error.
    """

    options: argparse.Namespace
    console: Console
    failed: list[Task] = field(default_factory=list)

    def __call__(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks; an interrupt ends those that run, which then can be taken up again."""
        waiting = list(tasks)
        running: dict[subprocess.Popen[bytes], tuple[Task, float, ExitStack]] = {}
        try:
            with doing("runs", len(tasks), unit="done") as whole:
                while waiting or running:
                    while waiting and len(running) < self.options.jobs:
                        task = waiting.pop(0)
                        told = ExitStack()
                        running[self._start(task)] = (task, time.monotonic(), told)
                        told.enter_context(doing(str(task), figures=partial(self._latest, task)))
                    time.sleep(0.2)
                    for process in [p for p in running if p.poll() is not None]:
                        task, start, told = running.pop(process)
                        told.close()
                        whole.at(len(tasks) - len(waiting) - len(running))
                        self._say(task, process.returncode, start, f"{whole.step} of {len(tasks)}")
        finally:
            for _, _, told in running.values():
                told.close()
            _end(running)

    def _start(self, task: Task) -> subprocess.Popen[bytes]:
        with self._log(task).open("wb") as log:
            return subprocess.Popen(  # noqa: S603 (our own command)
                self._command(task), cwd=ROOT, env=_environment(), stdout=log, stderr=log
            )

    def _command(self, task: Task) -> list[str]:
        options = self.options
        command = [sys.executable, "-m", "benchmarks.papers.worker"]
        command += [task.paper.key, task.run.name, str(task.seed), "--scale", options.scale]
        command += ["--results", str(options.results.resolve()), "--device", options.device]
        if options.device == "cpu":
            command += ["--threads", str(max(1, (os.cpu_count() or 1) // options.jobs))]
        if options.data_root:
            command += ["--data-root", options.data_root]
        return command

    def _log(self, task: Task) -> Path:
        results = Results(self.options.results)
        path = results.path(task.paper.key, task.run.name, self.options.scale, task.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_suffix(".log")

    def _latest(self, task: Task) -> str:
        """What the task's process has told last, without its time and its name."""
        try:
            lines = self._log(task).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # it has just ended
            return ""
        told = [line.partition("| ")[2] for line in lines if line.startswith("[")]
        return told[-1] if told else ""

    def _say(self, task: Task, code: int, start: float, progress: str) -> None:
        minutes = (time.monotonic() - start) / 60
        log = self._log(task)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code == 0:
            warned = f"; it warned: {log}" if "Warning" in text else ""
            if not warned:
                log.unlink()
            self.console.print(
                f"{task}: {minutes:.1f} min ({progress}){warned}", highlight=False, markup=False
            )
            return
        self.failed.append(task)
        lines = text.strip().splitlines()
        last = lines[-1] if lines else f"exit status {code}"
        self.console.print(
            f"{task} failed: {last} ({log})", style="red", highlight=False, markup=False
        )


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ends processes: after their present step, then at once, then by force."""
    left = list(processes)
    for end in (subprocess.Popen.terminate, subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in left:
            end(process)
        deadline = time.monotonic() + _PATIENCE
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = [process for process in left if process.poll() is None]


def _environment() -> dict[str, str]:
    """Threads are set by the worker; what is inherited would be for one process alone."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


# --- what there is, and what it takes ----------------------------------------------------------


def tasks_of(
    options: argparse.Namespace, wanted: dict[str, list[Exhibit]], results: Results
) -> list[Task]:
    """Returns what is not on disk, all of one seed before the next."""
    tasks: list[Task] = []
    for key, exhibits in wanted.items():
        paper = PAPERS[key]
        needed = {name for exhibit in exhibits for name in exhibit.runs}
        for run in (run for run in paper.runs if run.name in needed):
            tasks += [
                Task(paper, run, seed)
                for seed in range(options.seeds or run.seeds)
                if results.read(key, run, options.scale, seed) is None
            ]
    return sorted(tasks, key=lambda task: task.seed)


def seconds_of(task: Task, scale: Scale, folders: Sequence[Results]) -> float | None:
    """Returns what the run took for other seeds or where the pages were made; ``None``: unknown."""
    for results in folders:
        records = results.of(task.paper, task.run.name, scale).values()
        if records:
            return statistics.median(record.seconds for record in records)
    return None


def _estimate(
    tasks: Sequence[Task], options: argparse.Namespace, folders: Sequence[Results]
) -> str:
    known = [seconds_of(task, options.scale, folders) for task in tasks]
    minutes = sum(each + _START for each in known if each is not None) / 60 / options.jobs
    unknown = known.count(None)
    if unknown == len(tasks):
        return f"{len(tasks)} runs; none was ever made at this size, so how long is not known"
    more = f", and {unknown} that were never made at this size" if unknown else ""
    runs = "1 run" if len(tasks) == 1 else f"{len(tasks)} runs"
    long = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    return f"{runs}, {long}, {options.jobs} at a time{more}"


def _list_papers(console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("paper", "figures and tables", "claims", "what"):
        table.add_column(column)
    for paper in PAPERS.values():
        table.add_row(paper.key, str(len(paper.exhibits)), str(len(paper.claims)), paper.citation)
    console.print(table)
    console.print("python -m benchmarks.papers PAPER lists one; PAPER all reproduces it.")


def _list_paper(paper: Paper, console: Console) -> None:
    console.print(f"{paper.citation}, {paper.address}", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("figure or table", "what", "runs"):
        table.add_column(column)
    for exhibit in paper.exhibits:
        table.add_row(exhibit.name, exhibit.title, ", ".join(exhibit.runs))
    console.print(table)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("claim", "what", "holds if"):
        table.add_column(column, overflow="fold")
    for claim in paper.claims:
        table.add_row(claim.name, claim.says, claim.inequality)
    console.print(table)


# --- what came out -----------------------------------------------------------------------------


def _show(
    wanted: dict[str, list[Exhibit]], results: Results, scale: Scale, console: Console
) -> None:
    """Shows what is wanted with the claims about its runs, and writes the verdicts on all."""
    verdicts = judged(results, PAPERS)
    for key, exhibits in wanted.items():
        runs = {name for exhibit in exhibits for name in exhibit.runs}
        for exhibit in exhibits:
            _show_exhibit(PAPERS[key], exhibit, results, scale, console)
        for found in verdicts[key, scale]:
            if not runs.isdisjoint(found.claim.runs):
                _show_verdict(found, console)
    with replacing(results.folder / CLAIMS) as file:
        file.write_text(claims(results, PAPERS, verdicts), encoding="utf-8")


def _show_exhibit(
    paper: Paper, exhibit: Exhibit, results: Results, scale: Scale, console: Console
) -> None:
    raws = results.raws(paper, exhibit.runs, scale)
    if not any(raws.values()):
        return
    if exhibit.draw is not None:
        path = results.folder / scale / paper.key / f"{exhibit.name}.png"
        save(exhibit.draw(raws), path)
        console.print(f"{exhibit.title}: {path}", highlight=False)
    if exhibit.table is not None:
        head, *rows = exhibit.table(raws)
        table = Table(*head, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(exhibit.title, table)


def _show_verdict(found: Verdict, console: Console) -> None:
    """Prints the verdict, if all runs of the claim were made."""
    if not all(found.figures.values()):
        return
    claim = found.claim
    figures = " ".join(
        written(claim, *each) for seeds in found.figures.values() for each in seeds.items()
    )
    word = found.word if found.complete else "not decided by seeds known when it changed"
    style = {"reproduced": "green", "not reproduced": "red"}.get(word, "dim")
    says = f"{claim.says} (identity)" if claim.identity else claim.says
    console.print(f"{word}: {claim.name}: {says}", style=style, highlight=False)
    console.print(f"    {claim.inequality}: {figures}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=(__doc__ or "").split("\n\n")[1].replace("``", ""),
    )
    add = parser.add_argument
    add("paper", nargs="?", choices=(*PAPERS, "all"), help="which; all: all of every paper")
    add("exhibits", nargs="*", metavar="FIGURE", help="such as figure-1 or table-2, or all")
    size = "small (the default), or the paper's own size, for a GPU"
    add("--scale", choices=SCALES, default="small", help=size)
    add("--seeds", type=int, help="how many, from 0 on (default: 3, or what a run's claims take)")
    jobs = "runs at a time (default: %(default)s)"
    add("--jobs", type=int, default=os.cpu_count() or 1, help=jobs)
    add("--device", choices=("cpu", "cuda"), help="default at small: cpu")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA, else the hub)")
    folder = "where raw figures are kept (default: %(default)s)"
    add("--results", type=Path, default=Path("results/papers"), help=folder)
    add("--publish", action="store_true", help="write docs/papers from what is in --results")
    return parser


def _wanted(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> dict[str, list[Exhibit]]:
    if options.paper == "all":
        if options.exhibits:
            parser.error("all papers are run whole: name one paper to choose its figures")
        return {key: list(paper.exhibits) for key, paper in PAPERS.items()}
    paper = PAPERS[options.paper]
    if options.exhibits == ["all"]:
        return {paper.key: list(paper.exhibits)}
    names = [exhibit.name for exhibit in paper.exhibits]
    unknown = [name for name in options.exhibits if name not in names]
    if unknown:
        has = f"it has {', '.join(names)}; or all, alone"
        parser.error(f"{paper.key} has no {', '.join(unknown)}: {has}")
    return {paper.key: [paper.exhibit(name) for name in options.exhibits]}


def main(arguments: list[str] | None = None) -> int:
    """Lists, or measures and shows.

    Args:
        arguments: as on the command line.

    Returns:
        0; 1 where a run failed; 2 for what cannot be run, with the reason in one sentence; 130
        where it was interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    console = command.console(width=120)
    for name in ("seeds", "jobs"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} {number}: at least 1")
    try:
        with command.ended_by_signals():
            return _run(parser, options, console)
    except (BusyError, ForeignFileError) as error:
        print(f"papers: {error}", file=sys.stderr)
        return command.REFUSED
    except KeyboardInterrupt:
        print("papers: interrupted", file=sys.stderr)
        return command.INTERRUPTED


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> int:
    """Lists, or measures and shows; returns the exit status."""
    results = Results(options.results)
    if options.paper is None:
        if options.publish:
            for path in publish(results, PAPERS, PAGES):
                console.print(str(path), highlight=False)
        else:
            _list_papers(console)
        return 0
    if options.paper != "all" and not options.exhibits:
        if options.publish:
            parser.error(f"--publish writes the pages of all papers: leave out {options.paper}")
        _list_paper(PAPERS[options.paper], console)
        return 0

    wanted = _wanted(parser, options)
    if options.device is None:
        if options.scale == "paper":
            parser.error("--scale paper takes a GPU: --device cuda (with cpu it takes weeks)")
        options.device = "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results {options.results}: {error.strerror}")
    with alone(options.results / "lock"), shown("papers", console):
        return _measure(options, wanted, results, console)


def _measure(
    options: argparse.Namespace,
    wanted: dict[str, list[Exhibit]],
    results: Results,
    console: Console,
) -> int:
    """Measures what is not on disk, and shows what is wanted; returns the exit status."""
    tasks = tasks_of(options, wanted, results)
    queue = Queue(options, console)
    interrupted = False
    if tasks:
        console.print(_estimate(tasks, options, (results, Results(PAGES / RAW))), highlight=False)
        try:
            queue(tasks)
        except KeyboardInterrupt:
            interrupted = True
            console.print("Interrupted. The same command goes on from here.")
    with doing("pictures and claims"):
        _show(wanted, results, options.scale, console)
        if options.publish:
            publish(results, PAPERS, PAGES)
    return command.INTERRUPTED if interrupted else int(bool(queue.failed))


if __name__ == "__main__":
    sys.exit(main())
