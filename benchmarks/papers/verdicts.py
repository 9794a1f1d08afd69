"""Verdicts: what the raw figures say of each claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.papers.raw_files import RawFiles
from benchmarks.papers.reproduction import Claim, Paper, Scale

Word = Literal["reproduced", "not reproduced", "undecided", "not measured"]
WORDS: Final[tuple[Word, ...]] = ("reproduced", "not reproduced", "undecided")
"""Of what was measured."""
_TINY: Final = 1e-12
"""Figures below this are told apart from zero alone."""


@dataclass(frozen=True)
class Verdict:
    """A claim beside its figures.

    Attributes:
        claim: what is decided.
        figures: by the name of the run, and then by the seed; NaN where the claim's premise does
            not hold, such as that a network was trained.
    """

    claim: Claim
    figures: Mapping[str, Mapping[int, float]]

    @property
    def deciding(self) -> Mapping[str, Sequence[float]]:
        """The figures that decide, by the name of the run."""
        return {
            run: [value for seed, value in seeds.items() if self.claim.decided_by(seed)]
            for run, seeds in self.figures.items()
        }

    @property
    def complete(self) -> bool:
        """Every run of the claim was made, for one seed that decides at least."""
        return all(self.deciding.values())

    @property
    def word(self) -> Word:
        """The verdict: where the inequality fails once, a claim is not reproduced."""
        if not self.complete:
            return "not measured"
        figures = [value for values in self.deciding.values() for value in values]
        if not all(self.claim.holds(value) for value in figures if not math.isnan(value)):
            return "not reproduced"
        return "undecided" if any(map(math.isnan, figures)) else "reproduced"


def verdict(results: RawFiles, paper: Paper, claim: Claim, scale: Scale) -> Verdict:
    """Returns the verdict on a claim from the raw files that there are.

    A share of nothing and the mean of no rows are NaN.
    """
    return Verdict(
        claim,
        {
            run: {
                seed: _figure(claim, record.raw)
                for seed, record in results.of(paper, run, scale).items()
            }
            for run in claim.runs
        },
    )


def _figure(claim: Claim, raw: dict[str, object]) -> float:
    try:
        return float(claim.measure(raw))
    except (ArithmeticError, statistics.StatisticsError):
        return math.nan


def written(claim: Claim, seed: int, value: float, failing: str = "") -> str:
    """Returns the figure of a seed: on its side of the inequality, in parentheses if of a trial.

    Args:
        claim: that the figure is of.
        seed: of the run.
        value: the figure.
        failing: around figures for which the inequality fails.
    """
    digits = 3 if claim.holds(float(f"{value:.3g}")) == claim.holds(value) else 6
    text = f"below {_TINY:g}" if 0 < abs(value) < _TINY else f"{value:.{digits}g}"
    if not claim.holds(value) and not math.isnan(value):
        text = f"{failing}{text}{failing}"
    return text if claim.decided_by(seed) else f"({text})"
