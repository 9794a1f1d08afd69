"""Verdicts: what the raw figures say of each claim, in each network.

A *cell* is a claim in one run. Its mean over seeds has a 90 % interval of Student's t; the claim
*holds* there if all of the interval is on the right side of the threshold, *fails* if all of it is
on the wrong side, and else is *inconclusive*. So what is just at its threshold is said to hold once
in twenty times, and to fail as often. The seeds are those that the run was told to have beforehand,
all of them. Where they left a claim open, and the run was looked at again with more, intervals of
98 % keep both looks together to once in seventeen. A claim as a whole holds if it does in each of
its runs that can be tested.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, get_args

from scipy import stats

from benchmarks.papers.raw_files import RawFiles, Record
from benchmarks.papers.reproduction import Claim, Paper, Scale

Word = Literal["holds", "partly", "fails", "inconclusive", "untestable", "not measured"]
"""A claim holds *partly* that holds in some of its runs and not in others."""
WORDS: Final[tuple[Word, ...]] = get_args(Word)
FIGURES: Final = 3
"""Seeds that have a figure at least: where fewer have, the claim is untestable there."""
CONFIDENCE: Final = 0.9
CONFIDENCE_AGAIN: Final = 0.98
"""Of a run that is looked at again."""
_TINY: Final = 1e-12
"""Figures below this are told apart from zero alone."""


@dataclass(frozen=True)
class Cell:
    """A claim in one run.

    Attributes:
        claim: what is decided.
        run: the name of the run.
        seeds: those that the run is to have.
        figures: by the seed; NaN where there is none.
        premises: by the seed, whether what the paper takes for granted is so; empty without one.
        first: what it was at the first look, where the run was looked at again.
    """

    claim: Claim
    run: str
    seeds: range
    figures: Mapping[int, float]
    premises: Mapping[int, bool]
    first: Cell | None = None

    @property
    def confidence(self) -> float:
        """Of the interval."""
        return CONFIDENCE if self.first is None else CONFIDENCE_AGAIN

    @property
    def numbers(self) -> Sequence[float]:
        """The figures that are numbers, infinite ones included."""
        return [figure for figure in self.figures.values() if not math.isnan(figure)]

    @cached_property
    def interval(self) -> tuple[float, float, float]:
        """The mean over seeds between the ends of its interval; NaN for fewer than two numbers.

        Where a figure is infinite, or its logarithm would be, there is no mean: then it is the
        median, between figures that are both beyond the true one as rarely: of 5 the smallest and
        the largest, each once in 32.
        """
        numbers, beyond = self.numbers, (1 - self.confidence) / 2
        if len(numbers) < 2:
            return (math.nan, math.nan, math.nan)
        if not all(map(math.isfinite, numbers)) or (self.claim.geometric and min(numbers) <= 0):
            return _median_between(numbers, beyond)
        if self.claim.geometric:
            numbers = [math.log(number) for number in numbers]
        mean, error = statistics.fmean(numbers), statistics.stdev(numbers) / len(numbers) ** 0.5
        reach = float(stats.t.isf(beyond, len(numbers) - 1)) * error
        ends = (mean - reach, mean, mean + reach)
        if self.claim.geometric:
            return (math.exp(ends[0]), math.exp(ends[1]), math.exp(ends[2]))
        return ends

    @property
    def word(self) -> Word:
        """The verdict in this run."""
        if set(self.seeds) - set(self.figures):
            return "not measured"
        if self.claim.untestable or len(self.numbers) < FIGURES:
            return "untestable"
        low, _, high = self.interval
        if self.claim.holds(low) and self.claim.holds(high):
            return "holds"
        return "fails" if self.claim.below(high) or self.claim.above(low) else "inconclusive"

    def __str__(self) -> str:
        """The mean with its interval; how many seeds have a figure, where not as many as usual."""
        low, mean, high = (written(self.claim, value) for value in self.interval)
        text = mean if low == high else f"{mean} [{low}, {high}]"
        if len(self.numbers) < 2:
            text = "".join(written(self.claim, value) for value in self.numbers) or "–"
        missing = len(self.figures) - len(self.numbers)
        if missing:
            text = f"{text} ({len(self.numbers)} of {len(self.figures)})"
        return text if self.first is None else f"{text}, at first {self.first}"


@dataclass(frozen=True)
class Verdict:
    """A claim beside its figures.

    Attributes:
        claim: what is decided.
        cells: one for each run that it is about.
        readings: by the name of such a run, cells of its other readings; they decide nothing.
    """

    claim: Claim
    cells: Sequence[Cell]
    readings: Mapping[str, Sequence[Cell]]

    @property
    def complete(self) -> bool:
        """Every run of the claim was made for as many seeds as it takes."""
        return all(cell.word != "not measured" for cell in self.cells)

    @property
    def word(self) -> Word:
        """The verdict on the claim as a whole."""
        if not self.complete:
            return "not measured"
        words = {cell.word for cell in self.cells} - {"untestable"}
        if not words:
            return "untestable"
        if "holds" in words:
            return "holds" if len(words) == 1 else "partly"
        return "fails" if "fails" in words else "inconclusive"

    @property
    def exceptions(self) -> Mapping[str, Word]:
        """The runs in which it does not hold, with their verdicts."""
        return {cell.run: cell.word for cell in self.cells if cell.word != "holds"}

    @property
    def granted(self) -> bool:
        """Whether what the paper takes for granted is so for half of the seeds at least."""
        met = [each for cell in self.cells for each in cell.premises.values()]
        return 2 * sum(met) >= len(met)

    def holds_in(self, run: str) -> bool:
        """Returns whether it holds in one of its runs, or of their other readings."""
        cells = (*self.cells, *(cell for each in self.readings.values() for cell in each))
        return any(cell.run == run and cell.word == "holds" for cell in cells)

    def __str__(self) -> str:
        """The word; of what does not hold in all of its runs, in how many it does."""
        held = len(self.cells) - len(self.exceptions)
        return f"holds in {held} of {len(self.cells)}" if held and self.exceptions else self.word


def verdict(results: RawFiles, paper: Paper, claim: Claim, scale: Scale) -> Verdict:
    """Returns the verdict on a claim from the raw files that there are."""

    def cell(run: str) -> Cell:
        told, found = paper.run(run), results.of(paper, run, scale)
        seeds, first = told.deciding, None
        raws = {
            seed: found[seed].raw for seed in seeds if seed in found and decides(claim, found[seed])
        }
        figures = {seed: _figure(claim, raw) for seed, raw in raws.items()}
        premise = claim.premise
        premises = {} if premise is None else {seed: premise(raw) for seed, raw in raws.items()}
        if told.looked_again:
            seen = told.first_look
            before = {seed: figure for seed, figure in figures.items() if seed in seen}
            first = Cell(claim, run, seen, before, {})
        return Cell(claim, run, seeds, figures, premises, first)

    readings = {run: [cell(other.name) for other in paper.readings_of(run)] for run in claim.runs}
    return Verdict(
        claim,
        [cell(run) for run in claim.runs],
        {run: cells for run, cells in readings.items() if cells},
    )


def shown(
    paper: Paper, found: Verdict, verdicts: Sequence[Verdict]
) -> Mapping[str, tuple[str, ...]]:
    """Returns what shows the cause of a claim, for each run in which it does not hold.

    That is another claim that holds in all of its runs, or in that one; or another reading in which
    this claim holds. Of runs in which it cannot be tested nothing is shown.

    Args:
        paper: it is of.
        found: the verdict on the claim.
        verdicts: on all claims of the paper.

    Returns:
        Names of claims and readings by the run; empty without a cause.
    """
    cause = paper.causes.get(found.claim.name)
    if cause is None or found.word not in ("partly", "fails", "inconclusive"):
        return {}
    others = {each.claim.name: each for each in verdicts}

    def shows(name: str, run: str) -> bool:
        other = others.get(name)
        claimed = other is not None and (other.word == "holds" or other.holds_in(run))
        return claimed or found.holds_in(name)

    return {
        run: tuple(name for name in cause.showing(run) if shows(name, run))
        for run, word in found.exceptions.items()
        if word != "untestable"
    }


def explained(paper: Paper, found: Verdict, verdicts: Sequence[Verdict]) -> bool:
    """Returns whether the cause of a claim is shown for each run in which it does not hold."""
    of_runs = shown(paper, found, verdicts)
    return bool(of_runs) and all(of_runs.values())


def decides(claim: Claim, record: Record) -> bool:
    """Returns whether the claim had its present rule when the seed was run."""
    return record.rules.get(claim.name) == claim.rule


def _figure(claim: Claim, raw: dict[str, object]) -> float:
    """The figure; a share of nothing and the mean of no rows are NaN."""
    try:
        return float(claim.measure(raw))
    except (ArithmeticError, statistics.StatisticsError):
        return math.nan


def _median_between(numbers: Sequence[float], beyond: float) -> tuple[float, float, float]:
    """The median, between the figures that it is beyond with that probability at most."""
    numbers = sorted(numbers)
    chances = [stats.binom.cdf(i, len(numbers), 0.5) for i in range(len(numbers) // 2)]
    rarely = [i for i, chance in enumerate(chances) if chance <= beyond]
    if not rarely:
        return -math.inf, statistics.median(numbers), math.inf
    return numbers[rarely[-1]], statistics.median(numbers), numbers[-1 - rarely[-1]]


def written(claim: Claim, value: float) -> str:
    """Returns a figure with as many digits as tell on which side of the inequality it is."""
    digits = 3 if claim.holds(float(f"{value:.3g}")) == claim.holds(value) else 6
    return f"below {_TINY:g}" if 0 < abs(value) < _TINY else f"{value:.{digits}g}"
