"""One run for one seed, in a process of its own: ``python -m benchmarks.papers.worker``."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from benchmarks.files import BusyError, ForeignFileError, alone
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.checkpoint import end_when_kept
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import SCALES, Job
from benchmarks.progress import shown

EVERY: Final = 5.0
"""Seconds between the lines of a worker: the command shows the last one beside its own."""


def main() -> None:
    """Measures, and writes the raw file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers.worker", description=__doc__)
    add = parser.add_argument
    add("paper", choices=tuple(PAPERS))
    add("run")
    add("seed", type=int)
    add("--scale", choices=SCALES, default="small")
    add("--results", type=Path, required=True)
    add("--device", default="cpu")
    add("--data-root")
    add("--threads", type=int)
    options = parser.parse_args()
    # Ctrl-C goes to all processes of a terminal: the command ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_when_kept)
    if options.threads:
        torch.set_num_threads(options.threads)
    paper = PAPERS[options.paper]
    results = RawFiles(options.results)
    run = paper.run(options.run)
    # What was begun at another size is of no use.
    size = zlib.crc32(repr((run.version, run.size(options.scale))).encode())
    path = results.path(paper.key, run.name, options.scale, options.seed)
    scratch = path.with_name(f"{path.stem}-{size:08x}")
    job = Job(options.seed, torch.device(options.device), options.data_root, scratch)
    try:
        # Two processes would write over each other's checkpoints: that of a command that was
        # killed goes on.
        with alone(scratch / "lock"), shown(run.name, Console(width=120), EVERY):
            results.write(measure(paper, run, options.scale, job))
            for done in path.parent.glob(f"{path.stem}-*"):  # what was begun at other sizes too
                shutil.rmtree(done, ignore_errors=True)
    except (BusyError, ForeignFileError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
