"""What a paper is reproduced by: runs that measure, exhibits that show, claims that decide.

A *run* measures something once for each seed, and gives raw figures. *Exhibits* are the paper's
figures and tables, drawn from the raw figures of one or several runs. A *claim* is one number of
each run's raw figures and an inequality about it. It is reproduced if the inequality holds in every
run that it is about, for every seed that decides: for all, where runs and inequality were fixed
before anything was measured, and else for those that nobody had seen when they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from matplotlib.figure import Figure

Scale = Literal["small", "paper"]
SCALES: Final[tuple[Scale, ...]] = ("small", "paper")

TRIAL: Final = 0
"""The seed of first trials."""

Raw = dict[str, Any]
"""Figures that JSON can hold: numbers, texts, and lists and dicts of these."""
RawOfSeeds = Mapping[str, Mapping[int, Raw]]
"""Raw figures by the name of the run, and then by the seed."""
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Job:
    """One run for one seed.

    Attributes:
        seed: of data, initial parameters, minibatches and random vectors.
        device: where to compute.
        root: folder of data sets, as ``benchmarks.data.load`` has it.
        scratch: folder for what an interrupted run takes up again; ``None``: nothing is kept.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    root: str | None = None
    scratch: Path | None = None

    def generator(self) -> torch.Generator:
        """Returns a generator on the CPU, at the start of the seed's numbers."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Run:
    """What is measured together, because it comes from the same training.

    Attributes:
        name: unique in the paper.
        what: one line.
        measure: ``measure(job, **size)`` returns the raw figures of one seed.
        small: its size on two CPU cores: the arguments of ``measure``.
        paper: the paper's own size.
        title: in pictures and tables, where it is not the name.
        version: of what is measured; raw files of another version are measured anew.
        seeds: how many, from 0 on: more where the first ones do not decide.
    """

    name: str
    what: str
    measure: Callable[..., Raw]
    small: Mapping[str, Any]
    paper: Mapping[str, Any]
    title: str = ""
    version: int = 1
    seeds: int = 3

    def size(self, scale: Scale) -> dict[str, Any]:
        """Returns the arguments of ``measure``."""
        return dict(self.small if scale == "small" else self.paper)


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table of the paper.

    Attributes:
        name: such as ``figure-1`` or ``table-2``; several that one picture shows are one exhibit.
        title: what it shows.
        runs: names of the runs that it needs.
        draw: the picture, in the layout of the paper's; it gets the seeds that there are.
        table: the table beside the paper's, its first row the header.
        note: what the paper says of its own, and what has to be known of ours.
    """

    name: str
    title: str
    runs: tuple[str, ...]
    draw: Callable[[RawOfSeeds], Figure] | None = None
    table: Callable[[RawOfSeeds], Rows] | None = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the inequality that decides it.

    Attributes:
        name: unique in the paper.
        says: the claim, in our words.
        source: where the paper says it.
        quantity: what ``measure`` returns, in words.
        runs: names of the runs that it is about.
        measure: the number, from the raw figures of one seed of one run.
        at_least: the smallest value with which it holds; ``None``: there is none.
        at_most: the largest.
        identity: it follows from definitions, and tells of formulas rather than of networks.
        changed: what was changed after a first trial, of the rule or of the runs, and why; empty
            where nothing was.
        seen: the seeds whose figures were known when it was changed; the others decide.
    """

    name: str
    says: str
    source: str
    quantity: str
    runs: tuple[str, ...]
    measure: Callable[[Raw], float]
    at_least: float | None = None
    at_most: float | None = None
    identity: bool = False
    changed: str = ""
    seen: tuple[int, ...] = (TRIAL,)

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"claim {self.name!r} has neither at_least nor at_most")

    def decided_by(self, seed: int) -> bool:
        """Returns whether the claim had its present form before the seed was seen."""
        return not self.changed or seed not in self.seen

    def holds(self, value: float) -> bool:
        """Returns whether the inequality holds; it does not for NaN."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= value <= high

    @property
    def inequality(self) -> str:
        """Returns the inequality as a text."""
        if self.at_most is None:
            return f"{self.quantity} ≥ {self.at_least:g}"
        if self.at_least is None:
            return f"{self.quantity} ≤ {self.at_most:g}"
        return f"{self.at_least:g} ≤ {self.quantity} ≤ {self.at_most:g}"


@dataclass(frozen=True)
class Paper:
    """All that is reproduced of a paper.

    Attributes:
        key: as everywhere in the project, such as ``song_2024``.
        citation: authors, year, title.
        address: where it can be read.
        runs: what is measured.
        exhibits: what is shown.
        claims: what is decided.
        differences: what is other than in the paper, and why; a sentence each.
        outcome: what came out at ``small``, in short; a paragraph each.
        causes: of claims that were not reproduced, by name: why, as far as it is known. They and
            the outcome alone are written after the runs.
    """

    key: str
    citation: str
    address: str
    runs: tuple[Run, ...]
    exhibits: tuple[Exhibit, ...]
    claims: tuple[Claim, ...]
    differences: tuple[str, ...]
    outcome: tuple[str, ...]
    causes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {run.name for run in self.runs}
        users: list[Exhibit | Claim] = [*self.exhibits, *self.claims]
        for user in users:
            if missing := set(user.runs) - names:
                raise ValueError(
                    f"{self.key}: {user.name} needs runs that there are not: {missing}"
                )
        if unknown := set(self.causes) - {claim.name for claim in self.claims}:
            raise ValueError(f"{self.key}: causes of claims that there are not: {unknown}")

    def run(self, name: str) -> Run:
        """Returns the run of that name; a ``KeyError`` tells that there is none."""
        return {run.name: run for run in self.runs}[name]

    def exhibit(self, name: str) -> Exhibit:
        """Returns the exhibit of that name; a ``KeyError`` tells that there is none."""
        return {exhibit.name: exhibit for exhibit in self.exhibits}[name]
