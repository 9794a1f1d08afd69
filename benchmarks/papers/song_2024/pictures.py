"""What no data can say of the tables of `song_2024`."""

from __future__ import annotations

import math
from typing import Final

from benchmarks.papers.reductions import mean_of
from benchmarks.papers.reproduction import RawOfSeeds, Rows
from benchmarks.papers.song_2024.rates import OPTIMIZERS

_PAPERS_TABLE_1: Final = {
    "GD(-m)": ((0.0100, 0.0000), (0.0100, 0.0000)),
    "GD(+m)": ((0.0070, 0.0232), (0.0828, 0.0576)),
    "Adam(-m)": ((0.0325, 0.0054), (0.4672, 0.3555)),
    "Adam(+m)": ((0.0004, 0.0101), (2.6639, 1.2480)),
}
"""Mean and deviation of Dom-LR and Bulk-LR. Those of Tables 2 and 3 are missing in our text."""


def table_of_rates(raws: RawOfSeeds, run: str, beside_the_papers: bool = False) -> Rows:
    """Returns Tables 1 to 3: mean effective rates, their deviation along training, and the paper's.

    The means are over seeds of the means over the measured steps; so are the deviations. A mean of
    the paper that is smaller than its deviation has an uncertain ratio, in parentheses.
    """
    rows = [["method", "mean Dom-LR", "mean Bulk-LR", "loss, last tenth"]]
    if beside_the_papers:
        rows[0] += ["paper: Dom-LR", "Bulk-LR", "ours / paper: Dom-LR", "Bulk-LR"]
    found = list(raws[run].values())

    def average(name: str, column: str) -> float:
        return mean_of(raw[name][column] for raw in found)

    for name in OPTIMIZERS:
        means, deviations = (
            [average(name, f"{what}_{rate}") for rate in ("dom_lr", "bulk_lr")]
            for what in ("mean", "std")
        )
        row = [name, *(f"{m:.4f} ({s:.4f})" for m, s in zip(means, deviations, strict=True))]
        row.append(f"{math.exp(average(name, 'mean_log_loss')):.3g}")
        if beside_the_papers:
            papers = _PAPERS_TABLE_1[name]
            row += [f"{m:.4f} ({s:.4f})" for m, s in papers]
            for ours, (theirs, deviation) in zip(means, papers, strict=True):
                ratio = f"{ours / theirs:.2f}"
                row.append(f"({ratio})" if theirs < deviation else ratio)
        rows.append(row)
    return rows
