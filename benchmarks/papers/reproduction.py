"""What a paper is reproduced by: runs that measure, exhibits that show, claims that decide.

A *run* measures something once for each seed, mostly along the training of one network, and gives
raw figures. *Exhibits* are the paper's figures and tables, drawn from the raw figures of one or
several runs. A *claim* is one number of each run's raw figures and an inequality about it, which
``verdicts`` decides for each run by seeds that nobody had seen when it was written down. Where the
paper leaves open how something is measured, its *readings* are runs, one of them the primary one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from matplotlib.figure import Figure

Scale = Literal["small", "paper"]
SCALES: Final[tuple[Scale, ...]] = ("small", "paper")

FIRST: Final = 10
"""The first seed that decides; some of those before it were seen as rules and sizes were chosen."""
LEAST_SEEDS: Final = 5
SECOND_LOOK: Final = 20
"""Seeds of a run that a claim was inconclusive about, where more of them are cheap."""

Kind = Literal["claim", "number", "identity", "misprint", "ours"]
KINDS: Final[dict[Kind, str]] = {
    "claim": "Claims",
    "number": "Printed numbers",
    "identity": "Identities",
    "misprint": "Misprints and contradictions",
    "ours": "Claims of ours",
}
"""What is decided, and its heading: the paper's sentences; numbers that it prints, within a stated
distance; what follows from definitions, and tells of formulas rather than of networks; what it
prints and cannot be meant; and what the paper does not say (†)."""

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
        seeds: how many, from ``FIRST`` on.
        looked_again: names of the claims that these left open, for which there are ``SECOND_LOOK``.
        reading: of what the paper leaves open, in words.
        reading_of: the run of the primary reading, where this is another one.
    """

    name: str
    what: str
    measure: Callable[..., Raw]
    small: Mapping[str, Any]
    paper: Mapping[str, Any]
    title: str = ""
    version: int = 1
    seeds: int = LEAST_SEEDS
    looked_again: Sequence[str] = ()
    reading: str = ""
    reading_of: str = ""

    def __post_init__(self) -> None:
        if self.seeds < LEAST_SEEDS:
            raise ValueError(f"run {self.name!r} has {self.seeds} seeds: at least {LEAST_SEEDS}")
        if self.looked_again and self.seeds >= SECOND_LOOK:
            raise ValueError(f"run {self.name!r} has {self.seeds} seeds: no second look has more")

    @property
    def first_look(self) -> range:
        """The seeds that decide at first."""
        return range(FIRST, FIRST + self.seeds)

    @property
    def deciding(self) -> range:
        """The seeds that decide, all that there are to be."""
        return range(FIRST, FIRST + SECOND_LOOK) if self.looked_again else self.first_look

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
        runs: names of the runs that it is about, a network each.
        measure: the number, from the raw figures of one seed of one run; NaN where there is none,
            such as a share of next to nothing.
        at_least: the smallest value with which it holds; ``None``: there is none.
        at_most: the largest.
        kind: what is decided.
        formula: ``measure`` as data tell it.
        threshold: where ``at_least`` or ``at_most`` comes from: the paper's words, or a null.
        premise: whether the raw figures of a seed meet what the paper takes for granted.
        geometric: whether means over seeds are of logarithms.
        untestable: why it cannot be decided at ``small``; empty where it can.
        evidence: of a misprint.
        changed: what was other in an earlier form, and why.
    """

    name: str
    says: str
    source: str
    quantity: str
    runs: tuple[str, ...]
    measure: Callable[[Raw], float]
    at_least: float | None = None
    at_most: float | None = None
    kind: Kind = "claim"
    formula: str = ""
    threshold: str = ""
    premise: Callable[[Raw], bool] | None = None
    geometric: bool = False
    untestable: str = ""
    evidence: str = ""
    changed: str = ""

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"claim {self.name!r} has neither at_least nor at_most")
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.name!r} is of kind {self.kind!r}: not of {list(KINDS)}")

    def holds(self, value: float) -> bool:
        """Returns whether the inequality holds; it does not for NaN."""
        return not self.below(value) and not self.above(value) and not math.isnan(value)

    def below(self, value: float) -> bool:
        """Returns whether a value is too small."""
        return self.at_least is not None and value < self.at_least

    def above(self, value: float) -> bool:
        """Returns whether a value is too large."""
        return self.at_most is not None and value > self.at_most

    @property
    def inequality(self) -> str:
        """Returns the inequality as a text."""
        if self.at_most is None:
            return f"{self.quantity} ≥ {self.at_least:g}"
        if self.at_least is None:
            return f"{self.quantity} ≤ {self.at_most:g}"
        return f"{self.at_least:g} ≤ {self.quantity} ≤ {self.at_most:g}"

    @property
    def rule(self) -> str:
        """Returns all that decides, but for the code of ``measure``: raw files keep it."""
        mean = "geometric mean" if self.geometric else "mean"
        untestable = ", untestable" if self.untestable else ""
        bounds = f"[{self.at_least}, {self.at_most}]"
        return f"{self.kind}: {mean} of {self.formula} in {bounds}{untestable}"


@dataclass(frozen=True)
class Cause:
    """Why a claim does not hold in all of its runs, as far as it is known.

    Attributes:
        text: the explanation.
        shown_by: names of claims that show it where they hold, in all of their runs or in the one
            that is explained, or of runs where this claim holds; none where it is a guess.
        shown_in: the same of single runs, where causes differ, by their names.
    """

    text: str
    shown_by: tuple[str, ...] = ()
    shown_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def showing(self, run: str) -> tuple[str, ...]:
        """Returns the names of what shows it in one of the claim's runs."""
        return self.shown_by + self.shown_in.get(run, ())


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
        came_out: what came out at ``small``; a paragraph each, as are ...
        depends: ... what depends on the regime, and how, and ...
        did_not: ... what did not come out.
        causes: of claims that do not hold in all of their runs, by name. They, and what came out
            and did not, are written after the runs.
        rules: the commit that rules, readings and sizes are of, and those of what was added after
            it, in words; empty before there is one.
    """

    key: str
    citation: str
    address: str
    runs: tuple[Run, ...]
    exhibits: tuple[Exhibit, ...]
    claims: tuple[Claim, ...]
    differences: tuple[str, ...]
    came_out: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    did_not: tuple[str, ...] = ()
    causes: Mapping[str, Cause] = field(default_factory=dict)
    rules: str = ""

    def __post_init__(self) -> None:
        names = {run.name for run in self.runs}
        users = [(exhibit.name, exhibit.runs) for exhibit in self.exhibits]
        users += [(claim.name, claim.runs) for claim in self.claims]
        users += [(run.name, (run.reading_of,)) for run in self.runs if run.reading_of]
        for user, runs in users:
            if missing := set(runs) - names:
                raise ValueError(f"{self.key}: {user} needs runs that there are not: {missing}")
        for run in self.runs:
            about = {claim.name for claim in self.claims_about(run)}
            if unknown := set(run.looked_again) - about:
                raise ValueError(f"{self.key}: {run.name} is looked at again for none of {unknown}")
        known = names | {claim.name for claim in self.claims}
        claims = {claim.name: claim for claim in self.claims}
        if unknown := set(self.causes) - set(claims):
            raise ValueError(f"{self.key}: causes of claims that there are not: {unknown}")
        for name, cause in self.causes.items():
            named = {*cause.shown_by, *itertools.chain(*cause.shown_in.values())}
            if missing := named - known:
                raise ValueError(f"{self.key}: nothing shows the cause of {name}: {missing}")
            if unknown := set(cause.shown_in) - set(claims[name].runs):
                raise ValueError(f"{self.key}: {name} is not about {unknown}, as its cause is")

    def run(self, name: str) -> Run:
        """Returns the run of that name; a ``KeyError`` tells that there is none."""
        return {run.name: run for run in self.runs}[name]

    def readings_of(self, name: str) -> tuple[Run, ...]:
        """Returns the runs that are other readings of the run of that name."""
        return tuple(run for run in self.runs if run.reading_of == name)

    def claims_about(self, run: Run) -> tuple[Claim, ...]:
        """Returns the claims about a run, or about that which it is another reading of."""
        name = run.reading_of or run.name
        return tuple(claim for claim in self.claims if {name, run.name} & set(claim.runs))

    def exhibit(self, name: str) -> Exhibit:
        """Returns the exhibit of that name; a ``KeyError`` tells that there is none."""
        return {exhibit.name: exhibit for exhibit in self.exhibits}[name]
