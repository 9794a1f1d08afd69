"""What the raw figures of `sagun_2017` say: numbers for claims and tables, curves for pictures."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.papers.reductions import Curve, mean_of
from benchmarks.papers.reproduction import Raw

_RATIO: Final = 0.2
"""The left edge is shown up to this share of all eigenvalues."""


Place = tuple[str, str, float, int]
"""Of a row of Table 1: algorithm, activation, covariance and clusters."""
TABLE: Final[dict[Place, Raw]] = {
    (row["algorithm"], row["activation"], row["covariance"], row["clusters"]): row
    for row in tomllib.loads(Path(__file__).with_name("table-1.toml").read_text("utf-8"))["rows"]
}
"""The table as it is printed."""
COUNTS: Final = ("gap", "ratio", "elbow")

Offsets = tuple[int, int, int]
"""What is subtracted from the columns gap, ratio and heuristic."""
OFFSETS: Final[Offsets] = (1, 2, 0)
"""With which the printed columns seem to count: gap and ratio that see the same differ by one."""


def beside(raw: Raw) -> Iterator[tuple[Raw, Raw]]:
    """Yields each of our rows with the paper's, where it has one."""
    for row in raw["rows"]:
        place = (raw["algorithm"], raw["activation"], row["covariance"], row["clusters"])
        if place in TABLE:
            yield row, TABLE[place]


# --- appendix A ----------------------------------------------------------------------------------


def rows_matched(raw: Raw) -> float:
    """Rows whose elbow is within one of the clusters, less the rows where the paper's is."""
    found = 0
    for pair in beside(raw):
        if "elbow" in pair[1]:
            ours, theirs = (abs(row["elbow"] - row["clusters"]) <= 1 for row in pair)
            found += ours - theirs
    return float(found)


def agreeing(raw: Raw, less: Offsets = (0, 0, 0)) -> tuple[list[bool], ...]:
    """Whether our counts are within one of those printed less offsets: gap, ratio and elbow."""
    return tuple(
        [
            abs(ours[name] - (theirs[name] - offset)) <= 1
            for ours, theirs in beside(raw)
            if name in theirs
        ]
        for name, offset in zip(COUNTS, less, strict=True)
    )


def counts_agreeing(raw: Raw) -> float:
    """Share of all counts of the table that ours are within one of."""
    return mean_of(answer for column in agreeing(raw) for answer in column)


def exact_matches(raw: Raw) -> float:
    """Share of the rows of covariance 1 whose elbow is at the number of clusters."""
    near = (row for row in raw["rows"] if row["covariance"] == 1)
    return mean_of(row["elbow"] == row["clusters"] for row in near)


def matches_beyond_two(raw: Raw) -> float:
    """Share of the rows of more than two clusters that gap or ratio is within one of."""
    return mean_of(
        min(abs(row[name] - row["clusters"]) for name in ("gap", "ratio")) <= 1
        for row in raw["rows"]
        if row["clusters"] > 2
    )


def bulk_over_outliers(raw: Raw) -> float:
    """How far the bulk moves with the covariance, beside the outliers; both in logarithms."""
    shares = []
    pairs = combinations(raw["rows"], 2)
    for near, far in pairs:
        if near["clusters"] == far["clusters"]:
            outliers = math.log(far["outlying"] / near["outlying"])
            shares.append(abs(math.log(far["bulk"] / near["bulk"]) / outliers))
    return float(np.median(shares)) if shares else math.nan


# --- section 3 -----------------------------------------------------------------------------------


def most_negative(raw: Raw) -> float:
    """The largest -λ_min / λ_max of the networks."""
    return float(max(-n["left"][0] / n["right"][0] for n in raw["networks"]))


def right_edges_apart(raw: Raw) -> float:
    """The largest mean distance of a right edge, of height 1, from that of the widest network."""
    shapes = [np.array(n["right"][:20]) / n["right"][0] for n in raw["networks"]]
    return float(max(np.abs(shape - shapes[-1]).mean() for shape in shapes))


def outliers_apart(raw: Raw) -> float:
    """The largest number of large eigenvalues, less the smallest."""
    counts = [network["outliers"] for network in raw["networks"]]
    return float(max(counts) - min(counts))


def left_edges_apart(raw: Raw) -> float:
    """The largest distance of two left edges by ratio, each of norm 1."""
    curves = [np.minimum(n["ratios"], 0.0) for n in raw["networks"] if n["ratios"]]
    shapes = [curve / np.linalg.norm(curve) for curve in curves]
    distances = [float(np.linalg.norm(a - b)) for a, b in combinations(shapes, 2)]
    return max(distances, default=math.nan)


def large_over_small(raw: Raw) -> float:
    """Geometric mean of the ten largest eigenvalues: of large batches over of small ones."""
    large, small = (np.array(network["right"][:10]) for network in raw["networks"])
    return float(np.exp(np.log(large / small).mean()))


def right_edges(raw: Raw) -> Iterator[Curve]:
    """The largest eigenvalues of each network."""
    for network, label, place in _in_order(raw):
        yield Curve(range(1, len(network["right"]) + 1), network["right"], label, place)


def left_edges(raw: Raw, unit: str) -> Iterator[Curve]:
    """The left edge of each network, by number or by ratio; a dot where one eigenvalue is known."""
    for network, label, place in _in_order(raw):
        if network["ratios"]:
            curve = np.array(network["ratios"])
            shares = np.linspace(0, 0.5, len(curve))
            inside = shares <= _RATIO
            x = shares[inside] * (network["size"] if unit == "number" else 1)
            yield Curve(x, curve[inside], label, place)
        elif unit == "number":
            look = {"marker": "o", "ls": ""}
            yield Curve(0, network["left"][0], label, place, look)


def _in_order(raw: Raw) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Each network with its size as a label, and its place among them."""
    for number, network in enumerate(raw["networks"]):
        label = f"P = {network['size']:,}"
        yield network, label, number / max(len(raw["networks"]) - 1, 1)


# --- section 4 -----------------------------------------------------------------------------------


def halves(raw: Raw) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the large batches, and those of the small ones after the switch.

    A training that diverged has no such rows any more from there on.
    """
    rows = [row for row in raw["training"] if not row.get("diverged")]
    before = [row for row in rows if row["step"] <= raw["switch"]]
    return before, [row for row in rows if row["step"] > raw["switch"]]


def jump(raw: Raw) -> float:
    """The highest loss in the ten rows after the switch, over the loss at the switch."""
    before, after = halves(raw)
    highest = max((row["train_loss"] for row in after[:10]), default=math.nan)
    return float(highest / before[-1]["train_loss"])


def accuracy_gained(raw: Raw) -> float:
    """Test accuracy over the last ten rows of the small batches, less that of the large ones."""
    before, after = halves(raw)
    if not after:
        return math.nan
    ends = (np.mean([row["test_accuracy"] for row in part[-10:]]) for part in (after, before))
    return float(next(ends) - next(ends))


def barrier(raw: Raw) -> float:
    """The highest ratio of the loss, between the ends, to a straight line between those of both."""
    losses = np.array([row["train_loss"] for row in raw["line"] if 0 <= row["alpha"] <= 1])
    return float(np.max(losses / np.linspace(losses[0], losses[-1], len(losses))))


def course(raw: Raw, name: str) -> Iterator[Curve]:
    """A column of the training up to where it ended, or diverged."""
    before, after = halves(raw)
    rows = before + after
    yield Curve([row["step"] for row in rows], [row[name] for row in rows])


# --- section 2 and appendix B --------------------------------------------------------------------


def residual_share(row: dict[str, Any]) -> float:
    """The spectral norm of the second part of the Hessian, over that of the first."""
    return float(max(map(abs, row["residual"])) / row["gauss_newton"][0])


def residual_norms(raw: Raw) -> list[float]:
    """The spectral norms of the second part along the training."""
    return [max(map(abs, row["residual"])) for row in raw["rows"]]


def residual_at_end(raw: Raw) -> float:
    """That share at the end of training."""
    return residual_share(raw["rows"][-1])


def residual_shrinks(raw: Raw) -> float:
    """That share at the end of training, over that at the start."""
    return residual_share(raw["rows"][-1]) / residual_share(raw["rows"][0])


def zeros_of_trained(raw: Raw) -> float:
    """The smallest number of eigenvalues of a trained network's Hessian near zero, over P - NC."""
    return float(min(row["hessian"] / row["bound"] for row in raw["rows"] if row["trained"]))


def spike_missed(raw: Raw) -> float:
    """The largest relative error of the largest eigenvalue that is expected."""
    return float(max(abs(np.mean(row["largest"]) / row["expected"] - 1) for row in raw["rows"]))
