"""Runs in processes of their own, several at a time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks.papers.raw_files import RawFiles
from benchmarks.papers.reproduction import Paper, Run
from benchmarks.progress import doing

ROOT: Final = Path(__file__).resolve().parents[2]
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
        # Threads are set by the worker; what is inherited would be for one process alone.
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self._log(task).open("wb") as log:
            return subprocess.Popen(  # noqa: S603 (our own command)
                self._command(task), cwd=ROOT, env=env, stdout=log, stderr=log
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
        results = RawFiles(self.options.results)
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
        log, style = self._log(task), None
        text = log.read_text(encoding="utf-8", errors="replace")
        if code:
            self.failed.append(task)
            last, style = [f"exit status {code}", *text.strip().splitlines()][-1], "red"
            told = f"{task} failed: {last} ({log})"
        elif "Warning" in text:
            told = f"{task}: {minutes:.1f} min ({progress}); it warned: {log}"
        else:
            log.unlink()
            told = f"{task}: {minutes:.1f} min ({progress})"
        self.console.print(told, style=style, highlight=False, markup=False)


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
