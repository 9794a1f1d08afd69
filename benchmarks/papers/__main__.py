"""Figures, tables and claims of the four papers: ``python -m benchmarks.papers``.

Without arguments it lists the papers; with a paper its figures, tables and claims; with figures or
tables too, or ``all``, it measures what they need, as far as it is not on disk, draws them and says
what holds. What was measured is kept run by run and seed by seed, in ``results/papers``, with the
pictures and all verdicts, ``claims.json``; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.files import ForeignFileError, alone, replacing
from benchmarks.gallery import save
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.pages import CLAIMS, RAW, claims, judged, publish
from benchmarks.papers.processes import ROOT, Queue, Task
from benchmarks.papers.raw_files import RawFiles
from benchmarks.papers.reproduction import FIRST, SCALES, Exhibit, Paper, Scale
from benchmarks.papers.verdicts import Verdict, written
from benchmarks.progress import doing, shown

PAGES: Final = ROOT / "docs" / "papers"
_START: Final = 3.4
"""Seconds that a run's process takes before it runs: the imports, on the machine of the pages."""


# --- what there is, and what it takes ----------------------------------------------------------


def tasks_of(
    options: argparse.Namespace, wanted: dict[str, list[Exhibit]], results: RawFiles
) -> list[Task]:
    """Returns what is not on disk, one seed of all papers before the next."""
    tasks: list[Task] = []
    for key, exhibits in wanted.items():
        paper = PAPERS[key]
        needed = {name for exhibit in exhibits for name in exhibit.runs}
        for run in (run for run in paper.runs if needed & {run.name, run.reading_of}):
            tasks += [
                Task(paper, run, seed)
                for seed in run.deciding[: options.seeds]
                if results.read(key, run, options.scale, seed) is None
            ]
    return sorted(tasks, key=lambda task: task.seed)


def seconds_of(task: Task, scale: Scale, folders: Sequence[RawFiles]) -> float:
    """Returns what the run took for other seeds or where the pages were made; NaN: unknown."""
    found = (results.of(task.paper, task.run.name, scale).values() for results in folders)
    seconds = next(filter(None, ([record.seconds for record in records] for records in found)), [])
    return statistics.median(seconds) if seconds else math.nan


def _estimate(
    tasks: Sequence[Task], options: argparse.Namespace, folders: Sequence[RawFiles]
) -> str:
    seconds = [seconds_of(task, options.scale, folders) for task in tasks]
    known = [each + _START for each in seconds if not math.isnan(each)]
    if not known:
        return f"{len(tasks)} runs; none was ever made at this size, so how long is not known"
    unknown, minutes = len(tasks) - len(known), sum(known) / 60 / options.jobs
    more = f", and {unknown} that were never made at this size" if unknown else ""
    runs = "1 run" if len(tasks) == 1 else f"{len(tasks)} runs"
    long = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    return f"{runs}, {long}, {options.jobs} at a time{more}"


def _table(*rows: Sequence[str]) -> Table:
    """A table in the terminal, its first row the header."""
    head, *body = rows
    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for row in body:
        table.add_row(*row)
    return table


def _list_papers(console: Console) -> None:
    rows = [
        [paper.key, str(len(paper.exhibits)), str(len(paper.claims)), paper.citation]
        for paper in PAPERS.values()
    ]
    console.print(_table(["paper", "figures and tables", "claims", "what"], *rows))
    console.print("python -m benchmarks.papers PAPER lists one; PAPER all reproduces it.")


def _list_paper(paper: Paper, console: Console) -> None:
    console.print(f"{paper.citation}, {paper.address}", highlight=False)
    shown = [[each.name, each.title, ", ".join(each.runs)] for each in paper.exhibits]
    console.print(_table(["figure or table", "what", "runs"], *shown))
    claims = [[claim.name, claim.says, claim.inequality] for claim in paper.claims]
    console.print(_table(["claim", "what", "holds if"], *claims))


# --- what came out -----------------------------------------------------------------------------


def _show(
    wanted: dict[str, list[Exhibit]], results: RawFiles, scale: Scale, console: Console
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
    paper: Paper, exhibit: Exhibit, results: RawFiles, scale: Scale, console: Console
) -> None:
    raws = results.raws(paper, exhibit.runs, scale)
    if not any(raws.values()):
        return
    if exhibit.draw is not None:
        path = results.folder / scale / paper.key / f"{exhibit.name}.png"
        save(exhibit.draw(raws), path)
        console.print(f"{exhibit.title}: {path}", highlight=False)
    if exhibit.table is not None:
        console.print(exhibit.title, _table(*exhibit.table(raws)))


def _show_verdict(found: Verdict, console: Console) -> None:
    """Prints the verdict, if its runs were made for enough seeds, and else what there is."""
    claim = found.claim
    if not any(cell.figures for cell in found.cells):
        return
    word = str(found) if found.complete else "not decided by so few seeds"
    style = {"holds": "green", "fails": "red"}.get(found.word, "dim")
    console.print(f"{word}: {claim.name}: {claim.says}", style=style, highlight=False)
    console.print(f"    {claim.inequality}", highlight=False)
    for cell in found.cells:
        figures = " ".join(written(claim, figure) for figure in cell.figures.values())
        told = f"{cell}, {cell.word}: {figures}" if len(cell.figures) > 1 else figures
        console.print(f"    {cell.run}: {told}", highlight=False)


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
    add(
        "--seeds",
        type=int,
        help=f"how many at most, from {FIRST} on (default: 5, of cheap runs more)",
    )
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
    return command.status("papers", lambda: _run(parser, options, console), ForeignFileError)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> int:
    """Lists, or measures and shows; returns the exit status."""
    results = RawFiles(options.results)
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
    results: RawFiles,
    console: Console,
) -> int:
    """Measures what is not on disk, and shows what is wanted; returns the exit status."""
    tasks = tasks_of(options, wanted, results)
    queue = Queue(options, console)
    interrupted = False
    if tasks:
        console.print(_estimate(tasks, options, (results, RawFiles(PAGES / RAW))), highlight=False)
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
