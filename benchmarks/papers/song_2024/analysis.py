"""What the raw figures of `song_2024` say: numbers for claims and tables, curves for pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Final

import numpy as np
from scipy import stats

from benchmarks.papers.reductions import Curve, late_mean, mean_of
from benchmarks.papers.reproduction import Raw
from benchmarks.papers.song_2024.runs import OPTIMIZERS

ALIGNED: Final = 0.9
_TRAINED: Final = 1e-3
"""Relative decrease of the loss below which SGD did not train, and shares of it mean nothing."""


# --- the critical experiment -------------------------------------------------------------------


def rank_gap(raw: Raw) -> float:
    """Median along SGD, after the switch and before, of mean top k over mean next k eigenvalues."""
    ratios = [
        statistics.fmean(top) / statistics.fmean(bulk)
        for phase in ("warmup", "SGD")
        for top, bulk in zip(
            raw["phases"][phase]["eigenvalues"],
            raw["phases"][phase]["next_eigenvalues"],
            strict=True,
        )
        if isinstance(bulk, list) and bulk and statistics.fmean(bulk) > 0
    ]
    return statistics.median(ratios) if ratios else math.nan


def dominant(raw: Raw) -> bool:
    """Whether the gradient is dominant along SGD after the switch: mean χ_k at least 0.9."""
    return mean_of(raw["phases"]["SGD"]["chi_gradient"]) >= ALIGNED


def decrease(losses: Sequence[float]) -> float:
    """From the mean over the first fifth to that over the last; what is no number is infinite."""
    fifth = max(1, len(losses) // 5)
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return mean_of(known[:fifth]) - mean_of(known[-fifth:])


def achieved(raw: Raw, branch: str) -> float:
    """The decrease of the loss in a branch, over that of SGD; NaN where SGD does not train."""
    losses = raw["losses"]
    trained = decrease(losses["SGD"])
    if trained < _TRAINED * losses["SGD"][0]:
        return math.nan
    return decrease(losses[branch]) / trained


def reached(raw: Raw) -> bool:
    """Whether the moving average reached the 0.95 of a switch."""
    return not raw["switch_reason"].startswith("last")


def aligned_from(raw: Raw) -> str:
    """The first measured step of the warm-up from which on χ_k is at least 0.9 up to its end."""
    warmup = raw["phases"]["warmup"]
    backward = zip(reversed(warmup["step"]), reversed(warmup["chi_gradient"]), strict=True)
    aligned = [step for step, _ in takewhile(lambda row: row[1] >= ALIGNED, backward)]
    return f"{aligned[-1]:,}" if aligned else "–"


def before_switch(raw: Raw) -> Iterator[Curve]:
    """The loss before the switch, for as many steps as the branches have."""
    switch, sgd, before = raw["switch_step"], raw["losses"]["SGD"], raw["phases"]["warmup"]
    shown = [i for i, step in enumerate(before["step"]) if step >= switch - len(sgd)]
    steps, losses = ([before[name][i] for i in shown] for name in ("step", "loss"))
    yield Curve([*steps, switch], [*losses, sgd[0]])


def joined(raw: Raw, name: str, *parts: str) -> Iterator[Curve]:
    """A column along one part of a run after the other."""
    phases = raw.get("phases", raw)
    x, y = ([v for part in parts for v in phases[part][column]] for column in ("step", name))
    yield Curve(x, y)


def eigenvalues(raw: Raw, name: str, *parts: str) -> Iterator[Curve]:
    """The top k eigenvalues, or the next k, along parts of a run, a curve each.

    Some rows have the top k alone, and the last one of what diverged has none.
    """
    phases = raw.get("phases", raw)
    rows = [
        (phases[part]["step"][i], phases[part][name][i])
        for part in parts
        for i, following in enumerate(phases[part]["next_eigenvalues"])
        if isinstance(following, list) and following
    ]
    if rows:
        steps, values = zip(*rows, strict=True)
        for each in np.array(values, dtype=float).T:
            yield Curve(steps, each)


# --- noise -------------------------------------------------------------------------------------


def late_alignment(raw: Raw, name: str) -> float:
    """Mean χ_k over the second half after a switch."""
    part = raw[name]
    rows = zip(part["step"], part["chi_gradient"], strict=True)
    return late_mean({"chi": [chi for step, chi in rows if step > part["switch_step"]]}, "chi")


def jump_of_sharpness(raw: Raw) -> float:
    """The largest relative change of λ_1 from one row to the next after either switch."""
    changes = []
    for name in ("SGD to GD", "GD to SGD"):
        part = raw[name]
        if not all(isinstance(row, list) for row in part["eigenvalues"]):
            return math.nan  # it diverged
        values = [
            row[0]
            for step, row in zip(part["step"], part["eigenvalues"], strict=True)
            if step >= part["switch_step"]
        ]
        changes += [abs(b / a - 1) for a, b in pairwise(values)]
    return float(max(changes))


# --- edge of stability -------------------------------------------------------------------------


def sharpness_at_edge(raw: Raw, threshold: str) -> float:
    """Median of λ_1 over the threshold, in the last quarter before the switch."""
    part = raw["before"]
    late = slice(3 * len(part["step"]) // 4, None)
    pairs = zip(part["eigenvalues"][late], part[threshold][late], strict=True)
    return float(statistics.median(row[0] / edge for row, edge in pairs))


def achieved_at_edge(raw: Raw, branch: str, plain: str) -> float:
    """The decrease of the loss in a branch, over that of the plain optimizer.

    At the edge the loss goes up and down. Between means over fifths, a branch that stands still
    scores 0, wherever in the ups and downs it began.
    """
    trained = decrease(raw["losses"][plain])
    return decrease(raw["losses"][branch]) / trained if trained > 0 else math.nan


def edge_with_gradient(raw: Raw) -> float:
    """Rank correlation of SAM-edge and gradient norm before the switch."""
    part = raw["before"]
    return float(stats.spearmanr(part["sam_edge"], part["gradient_norm"]).statistic)


# --- effective rates ---------------------------------------------------------------------------


def plain_rate(raw: Raw) -> float:
    """The largest relative deviation of GD's two mean rates from its learning rate."""
    return float(
        max(abs(raw["GD(-m)"][rate] / raw["lr"] - 1) for rate in ("mean_dom_lr", "mean_bulk_lr"))
    )


def rate_and_speed(raw: Raw) -> float:
    """Rank correlation, over the four optimizers, of the mean Bulk-LR and −log of the loss."""
    rates = [raw[name]["mean_bulk_lr"] for name in OPTIMIZERS]
    speeds = [-raw[name]["mean_log_loss"] for name in OPTIMIZERS]
    return round(float(stats.spearmanr(rates, speeds).statistic), 6)  # 0.8 is 4/5
