"""What the raw figures of `sagun_2017` say: numbers for claims and tables, curves for pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from typing import Any, Final

import numpy as np

from benchmarks.papers.reductions import Curve, mean_of, median_of
from benchmarks.papers.reproduction import Raw
from benchmarks.papers.sagun_2017.clusters import TABLE

_RATIO: Final = 0.2
"""The left edge is shown up to this share of all eigenvalues."""


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


def clusters_matched(raw: Raw) -> float:
    """Share of the rows whose elbow is within one of the clusters."""
    return mean_of(abs(row["elbow"] - row["clusters"]) <= 1 for row in raw["rows"])


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


def off_printed(raw: Raw, name: str, less: int = 0) -> float:
    """Median difference of a count of ours from one printed less so many; NaN where none is."""
    return median_of(
        ours[name] - (theirs[name] - less) for ours, theirs in beside(raw) if name in theirs
    )


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


def deviation_by_cutoff(theirs: Raw) -> float:
    """The least deviation that a printed row can have, with so many eigenvalues above its cutoff.

    Each of them adds at least the square of the cutoff to the sum of squares.
    """
    size = parameters_of(theirs["clusters"])
    return math.sqrt(theirs["elbow"] / size * theirs["cutoff"] ** 2 - theirs["mean"] ** 2)


def parameters_of(clusters: int) -> int:
    """Of the network of Table 1."""
    return 3960 + 31 * clusters


def other_covariance(raw: Raw) -> list[tuple[Raw, Raw]]:
    """Rows of the smaller covariance and the larger, of the same clusters."""
    pairs = combinations(raw["rows"], 2)
    return [(near, far) for near, far in pairs if near["clusters"] == far["clusters"]]


def next_clusters(raw: Raw) -> list[tuple[Raw, Raw]]:
    """Rows of one number of clusters and the next, of the same classes."""
    return list(pairwise(raw["rows"]))


def moved_by_covariance(raw: Raw) -> float:
    """How much farther the bulk moves than the outliers between those, in logarithms; mean."""
    return _moved(other_covariance(raw))


def moved_by_clusters(raw: Raw) -> float:
    """The same with the number of clusters."""
    return _moved(next_clusters(raw))


def _moved(pairs: Iterable[tuple[Raw, Raw]]) -> float:
    return mean_of(
        abs(math.log(b["bulk"] / a["bulk"])) - abs(math.log(b["outlying"] / a["outlying"]))
        for a, b in pairs
    )


def between_classes_and_clusters(raw: Raw) -> float:
    """Where the elbow is, in logarithms: 0 at the classes, 1 at the clusters; mean over rows."""
    return mean_of(
        math.log(max(row["elbow"], 1) / row["classes"]) / math.log(row["clusters"] / row["classes"])
        for row in raw["rows"]
        if row["clusters"] > row["classes"]
    )


# --- section 3 -----------------------------------------------------------------------------------


def most_negative(raw: Raw) -> float:
    """The largest -λ_min / λ_max of the networks."""
    return float(max(-n["left"][0] / n["right"][0] for n in raw["networks"]))


def _edge(network: Raw) -> Any:
    """The largest twenty eigenvalues over the largest."""
    return np.array(network["right"][:20]) / network["right"][0]


def right_edge_distances(raw: Raw) -> list[float]:
    """Mean distances of the right edges, of height 1, from that of the widest network."""
    shapes = [_edge(network) for network in raw["networks"]]
    return [float(np.abs(shape - shapes[-1]).mean()) for shape in shapes[:-1]]


def other_edge_distance(raw: Raw) -> float:
    """The same distance of the widest network, trained on other data."""
    return float(np.abs(_edge(raw["other"]) - _edge(raw["networks"][-1])).mean())


def right_edges_apart(raw: Raw) -> float:
    """How far other widths move the right edge, beside other data."""
    return mean_of(right_edge_distances(raw)) / other_edge_distance(raw)


def outliers_grow(raw: Raw, narrowest: int = 0) -> float:
    """Large eigenvalues more, where a network has twice the parameters: a slope.

    Args:
        raw: the figures.
        narrowest: so many networks are left out.
    """
    networks = raw["networks"][narrowest:]
    sizes, counts = (np.array([n[name] for n in networks]) for name in ("size", "outliers"))
    return float(np.polyfit(np.log2(sizes), counts, 1)[0])


def outliers_apart(raw: Raw) -> float:
    """Large eigenvalues after large batches, less those after small ones."""
    large, small = (network["outliers"] for network in raw["networks"])
    return float(large - small)


def left_edge_distances(raw: Raw) -> list[float]:
    """Distances of left edges by ratio, each of norm 1: from each network to the next larger."""
    curves = [np.minimum(n["ratios"], 0.0) for n in raw["networks"] if n["ratios"]]
    shapes = [curve / np.linalg.norm(curve) for curve in curves]
    return [float(np.linalg.norm(a - b)) for a, b in pairwise(shapes)]


def left_edges_converge(raw: Raw) -> float:
    """The factor by which such a distance changes from one pair to the next; NaN of one pair."""
    distances = left_edge_distances(raw)
    if len(distances) < 2:
        return math.nan
    return float(np.exp(np.polyfit(range(len(distances)), np.log(distances), 1)[0]))


def negative_share_grows(raw: Raw) -> float:
    """Share of negative eigenvalues in the largest network with a whole spectrum, over the least's.

    NaN where the latter has none.
    """
    shares = [network["negative"] for network in raw["networks"] if "negative" in network]
    return shares[-1] / shares[0] if shares[0] else math.nan


def later_weights(network: Raw) -> int:
    """Of a network with ten classes, and a bias in each layer: all but those of the first layer."""
    width = network["width"]
    return int((width + 1) * (width + 10))


def negative_of_later(raw: Raw) -> list[float]:
    """Negative eigenvalues of each network over its weights behind the first layer.

    With ReLU outputs are piecewise linear in the first layer's weights: in their block the second
    part of the Hessian is zero, and the first is nowhere negative. So in their span the Hessian is
    not negative, and has at most as many negative eigenvalues as there are other weights.
    """
    return [
        network["negative"] * network["size"] / later_weights(network)
        for network in raw["networks"]
        if "negative" in network
    ]


def most_negative_of_later(raw: Raw) -> float:
    """The largest of these shares."""
    return max(negative_of_later(raw))


def negative_of_later_grows(raw: Raw) -> float:
    """That share in the largest network, over the smallest one's."""
    shares = negative_of_later(raw)
    return shares[-1] / shares[0]


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

    At the switch there are two, of which one is left out. A training that diverged has no such rows
    any more from there on.
    """
    rows = {row["step"]: row for row in raw["training"] if not row.get("diverged")}
    before = [row for step, row in rows.items() if step <= raw["switch"]]
    return before, [row for step, row in rows.items() if step > raw["switch"]]


def across(raw: Raw, name: str) -> tuple[float, float]:
    """Returns the means of a column over the last ten rows before the switch, and ten after it.

    NaN where the training diverged before.
    """
    before, after = halves(raw)
    return mean_of(row[name] for row in before[-10:]), mean_of(row[name] for row in after[:10])


def jump(raw: Raw, data: str) -> float:
    """The loss of training or test data after the switch, over that before it."""
    before, after = across(raw, f"{data}_loss")
    return after / before


def drop(raw: Raw) -> float:
    """The accuracy after the switch less that before it: of training or test data, the larger."""
    pairs = (across(raw, f"{data}_accuracy") for data in ("train", "test"))
    return float(np.max([after - before for before, after in pairs]))


def accuracy_gained(raw: Raw) -> float:
    """Test accuracy over the last ten rows of the small batches, less that of the large ones."""
    ends = (mean_of(row["test_accuracy"] for row in part[-10:]) for part in halves(raw))
    large, small = ends
    return small - large


def loss_regained(raw: Raw) -> float:
    """Training loss over the last ten rows of the small batches, over that of the large ones."""
    large, small = (mean_of(row["train_loss"] for row in part[-10:]) for part in halves(raw))
    return small / large


def _between(raw: Raw, line: str, name: str) -> list[float]:
    """A column from one end of a line to the other."""
    return [row[name] for row in raw[line] if 0 <= row["alpha"] <= 1]


def barrier(raw: Raw, line: str = "line") -> float:
    """The highest loss between the ends, over the higher end: of either data, the larger."""
    columns = (_between(raw, line, f"{data}_loss") for data in ("train", "test"))
    return max(max(losses) / max(losses[0], losses[-1]) for losses in columns)


def accuracy_lost(raw: Raw, line: str = "line") -> float:
    """How far the accuracy falls between the ends below the lower one: of either data, the more."""
    columns = (_between(raw, line, f"{data}_accuracy") for data in ("train", "test"))
    return max(min(values[0], values[-1]) - min(values) for values in columns)


def rises(raw: Raw) -> tuple[float, float]:
    """How far the training loss rises beyond the ends of the line, large batches first.

    Half the distance of the ends beyond each of them.
    """
    losses = {row["alpha"]: row["train_loss"] for row in raw["line"]}
    return losses[-0.5] - losses[0.0], losses[1.5] - losses[1.0]


def sharper_end(raw: Raw) -> float:
    """The first rise less the second."""
    large, small = rises(raw)
    return large - small


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
