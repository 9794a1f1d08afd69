"""What the raw figures of `song_2024` say: numbers for claims and tables, curves for pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Final

import numpy as np
from scipy import stats

from benchmarks.papers.reductions import Curve, late_mean, mean_of, median_of, value
from benchmarks.papers.reproduction import Raw
from benchmarks.papers.song_2024.rates import OPTIMIZERS

ALIGNED: Final = 0.9
_TRAINED: Final = 0.005
"""Relative decrease of the loss below which a training stands still, and shares of it are noise."""


# --- the critical experiment -------------------------------------------------------------------


def _spectra(raw: Raw) -> Iterator[tuple[list[float], list[float]]]:
    """The top k and the next k eigenvalues along SGD, before the switch and after, where known."""
    for phase in ("warmup", "SGD"):
        part = raw["phases"][phase]
        for top, following in zip(part["eigenvalues"], part["next_eigenvalues"], strict=True):
            if isinstance(following, list) and following and statistics.fmean(following) > 0:
                yield top, following


def rank_gap(raw: Raw) -> float:
    """Median along SGD of mean top k over mean next k eigenvalues, over that of λ_i = 1/i.

    Of 1/i it is 2.57 for k = 2 and 4.38 for k = 10: any spectrum that falls off has some.
    """
    ratios = [
        statistics.fmean(top) / statistics.fmean(following) / _smooth_gap(len(top))
        for top, following in _spectra(raw)
    ]
    return median_of(ratios)


def _smooth_gap(k: int) -> float:
    inverse = [1 / i for i in range(1, 2 * k + 1)]
    return sum(inverse[:k]) / sum(inverse[k:])


def gap_at_k(raw: Raw) -> float:
    """Median along SGD of λ_k / λ_{k+1}, over the geometric mean of the others up to λ_2k."""
    found = []
    for top, following in _spectra(raw):
        steps, at = len(top) + len(following) - 2, top[-1] / following[0]
        if steps and min(following) > 0:
            found.append(at / (top[0] / following[-1] / at) ** (1 / steps))
    return median_of(found)


def decrease(losses: Sequence[float]) -> float:
    """From the mean over the first fifth to that over the last; what is no number is infinite."""
    fifth = max(1, len(losses) // 5)
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return mean_of(known[:fifth]) - mean_of(known[-fifth:])


def achieved(raw: Raw, branch: str, plain: str = "SGD") -> float:
    """The decrease of the loss in a branch, over that of the plain optimizer.

    Losses go up and down, at the edge of stability above all. Between means over fifths, a branch
    that stands still scores 0, wherever in the ups and downs it began. NaN where the plain
    optimizer lowers its loss by less than 0.005 of it, and shares of that are noise.
    """
    losses = raw["losses"]
    trained = relative_decrease(raw, plain)
    return decrease(losses[branch]) / decrease(losses[plain]) if trained >= _TRAINED else math.nan


def relative_decrease(raw: Raw, branch: str) -> float:
    """The decrease of the loss in a branch, over its first loss."""
    losses = raw["losses"][branch]
    return float(decrease(losses) / losses[0])


def shuffled_over_drawn(raw: Raw) -> float:
    """χ_k where SGD goes on in shuffled epochs, over that with replacement from the same point."""
    return mean_of(raw["shuffled"]["chi_gradient"]) / mean_of(raw["phases"]["SGD"]["chi_gradient"])


def in_epoch(raw: Raw, place: int) -> float:
    """Mean χ_k in shuffled epochs: at their ends, where the place is 0, or half-way."""
    part = raw.get("shuffled", {"place": [], "chi_gradient": []})
    rows = zip(part["place"], part["chi_gradient"], strict=True)
    return mean_of(chi for at, chi in rows if at == place)


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


def nearer_to_sam(raw: Raw) -> float:
    """Distance of λ_1 from SAM's edge over that from GD's, 2/η, both as ratios."""
    of_sam, of_gd = (sharpness_at_edge(raw, edge) for edge in ("sam_edge", "threshold"))
    return abs(math.log(of_sam)) / abs(math.log(of_gd))


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
    return float(stats.spearmanr(rates, speeds).statistic)


def from_printed(raw: Raw, path: str, printed: float, deviation: float) -> float:
    """How far a mean rate is from a printed one, in deviations along training, as printed."""
    return (value(raw, path) - printed) / deviation


def over_printed(raw: Raw, path: str, printed: float) -> float:
    """A mean rate over a printed one."""
    return value(raw, path) / printed
