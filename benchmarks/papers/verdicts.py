"""Verdicts: what the raw figures say of each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.papers.reproduction import Claim, Paper, Scale
from benchmarks.papers.results import Results


@dataclass(frozen=True)
class Verdict:
    """A claim beside its figures.

    Attributes:
        claim: what is decided.
        figures: by the name of the run, and then by the seed; NaN where the figure does not exist.
    """

    claim: Claim
    figures: Mapping[str, Mapping[int, float]]

    @property
    def complete(self) -> bool:
        """Every run of the claim was made, for one seed at least."""
        return all(self.figures[run] for run in self.claim.runs)

    @property
    def reproduced(self) -> bool:
        """The inequality holds in every run, for every seed."""
        figures = [value for seeds in self.figures.values() for value in seeds.values()]
        return self.complete and all(map(self.claim.holds, figures))

    @property
    def word(self) -> str:
        """Returns the verdict as a word."""
        if not self.complete:
            return "not measured"
        return "reproduced" if self.reproduced else "not reproduced"


def verdict(results: Results, paper: Paper, claim: Claim, scale: Scale) -> Verdict:
    """Returns the verdict on a claim from the raw files that there are.

    A figure that cannot be computed, such as a share of nothing or the mean of no rows, is NaN: the
    claim does not hold.
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
    except (ArithmeticError, LookupError, ValueError):
        return math.nan
