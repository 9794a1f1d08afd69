"""What `sagun_2017` states, and the inequalities that decide it."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.papers.reproduction import Claim, Raw


class Printed(NamedTuple):
    """A row of Table 1 as it is printed; it has no heuristic count where there was no elbow."""

    mean: float
    gap: int
    ratio: int
    heuristic: int | None
    cutoff: float | None


TABLE: Final[dict[tuple[str, str, float, int], Printed]] = {
    ("GD", "tanh", 1.0, 2): Printed(1.19e-5, 2, 3, None, None),
    ("GD", "tanh", 1.0, 5): Printed(2.52e-5, 2, 17, None, None),
    ("GD", "tanh", 1.0, 10): Printed(3.75e-5, 2, 4, None, None),
    ("GD", "tanh", 1.0, 20): Printed(5.37e-5, 3, 4, None, None),
    ("GD", "relu", 1.0, 2): Printed(7.13e-6, 3, 4, 2, 0.003),
    ("GD", "relu", 1.0, 5): Printed(1.55e-5, 6, 7, 5, 0.003),
    ("GD", "relu", 1.0, 10): Printed(3.04e-5, 11, 12, 10, 0.003),
    ("GD", "relu", 1.0, 20): Printed(5.65e-5, 4, 21, 21, 0.003),
    ("GD", "relu", 1.0, 50): Printed(1.16e-4, 50, 51, 49, 0.003),
    ("SGD", "relu", 1.0, 2): Printed(8.96e-6, 3, 4, 2, 0.002),
    ("SGD", "relu", 1.0, 5): Printed(1.62e-5, 6, 7, 7, 0.002),
    ("SGD", "relu", 1.0, 10): Printed(2.97e-5, 2, 14, 15, 0.002),
    ("SGD", "relu", 1.0, 20): Printed(4.53e-5, 2, 3, 21, 0.002),
    ("SGD", "relu", 1.0, 50): Printed(6.78e-5, 50, 51, 49, 0.002),
    ("SGD", "relu", 10.0, 2): Printed(9.49e-5, 2, 4, 2, 0.015),
    ("SGD", "relu", 10.0, 5): Printed(1.68e-4, 5, 6, 5, 0.015),
    ("SGD", "relu", 10.0, 10): Printed(1.92e-4, 2, 11, 9, 0.015),
    ("SGD", "relu", 10.0, 20): Printed(3.10e-4, 20, 21, 19, 0.015),
    ("SGD", "relu", 10.0, 50): Printed(1.67e-4, 50, 51, 49, 0.005),
}
"""Table 1 by algorithm, activation, covariance and clusters. Its column of standard deviations
repeats that of the means."""


Offsets = tuple[int, int, int]
"""What is subtracted from the columns gap, ratio and heuristic."""
OFFSETS: Final[Offsets] = (1, 2, 0)
"""With which the printed columns seem to count: gap and ratio that see the same differ by one."""


def printed(raw: Raw, row: dict[str, Any]) -> Printed | None:
    """Returns the paper's row beside one of ours, if there is one."""
    key = (raw["algorithm"], raw["activation"], row["covariance"], row["clusters"])
    return TABLE.get(key)


# --- appendix A ----------------------------------------------------------------------------------


def rows_matched(raw: Raw) -> float:
    """Rows whose elbow is within one of the clusters, less the rows where the paper's is."""
    found = 0
    for row in raw["rows"]:
        theirs = printed(raw, row)
        if theirs is not None and theirs.heuristic is not None:
            found += abs(row["elbow"] - row["clusters"]) <= 1
            found -= abs(theirs.heuristic - row["clusters"]) <= 1
    return float(found)


def agreeing(raw: Raw, less: Offsets = (0, 0, 0)) -> tuple[list[bool], ...]:
    """Whether our counts are within one of those printed less offsets: gap, ratio and elbow."""
    answers: tuple[list[bool], ...] = ([], [], [])
    for row in raw["rows"]:
        theirs = printed(raw, row)
        if theirs is not None:
            ours = (row["gap"], row["ratio"], row["elbow"])
            counts = (theirs.gap, theirs.ratio, theirs.heuristic)
            for column, a, b, offset in zip(answers, ours, counts, less, strict=True):
                if b is not None:
                    column.append(abs(a - (b - offset)) <= 1)
    return answers


def counts_agreeing(raw: Raw) -> float:
    """Share of all counts of the table that ours are within one of."""
    agree = [answer for column in agreeing(raw) for answer in column]
    return sum(agree) / len(agree) if agree else math.nan


def exact_matches(raw: Raw) -> float:
    """Share of the rows of covariance 1 whose elbow is at the number of clusters."""
    hits = [row["elbow"] == row["clusters"] for row in raw["rows"] if row["covariance"] == 1]
    return sum(hits) / len(hits) if hits else math.nan


def matches_beyond_two(raw: Raw) -> float:
    """Share of the rows of more than two clusters that gap or ratio is within one of."""
    hits = [
        min(abs(row[name] - row["clusters"]) for name in ("gap", "ratio")) <= 1
        for row in raw["rows"]
        if row["clusters"] > 2
    ]
    return sum(hits) / len(hits) if hits else math.nan


def spread_over_mean(raw: Raw) -> float:
    """The largest standard deviation of the eigenvalues, over their mean."""
    return float(max(row["std"] / row["mean"] for row in raw["rows"]))


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


def near_zero(raw: Raw) -> float:
    """The smaller share of eigenvalues near zero, of the start and of the end."""
    return float(min(raw["whole"][when]["near_zero"] for when in ("start", "end")))


def large_over_small(raw: Raw) -> float:
    """Geometric mean of the ten largest eigenvalues: of large batches over of small ones."""
    large, small = (np.array(network["right"][:10]) for network in raw["networks"])
    return float(np.exp(np.log(large / small).mean()))


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


# --- section 2 and appendix B --------------------------------------------------------------------


def residual_share(row: dict[str, Any]) -> float:
    """The spectral norm of the second part of the Hessian, over that of the first."""
    return float(max(map(abs, row["residual"])) / row["gauss_newton"][0])


def residual_at_end(raw: Raw) -> float:
    """That share at the end of training."""
    return residual_share(raw["rows"][-1])


def residual_shrinks(raw: Raw) -> float:
    """That share at the end of training, over that at the start."""
    return residual_share(raw["rows"][-1]) / residual_share(raw["rows"][0])


def zeros_of_trained(raw: Raw) -> float:
    """The smallest number of eigenvalues of a trained network's Hessian near zero, over P - NC."""
    return float(min(row["hessian"] / row["bound"] for row in raw["rows"] if row["trained"]))


def zeros_beyond_theory(raw: Raw) -> float:
    """The smallest number of zeros of the Gauss-Newton matrix, less P - NC."""
    return float(min(row["zeros"] - row["bound"] for row in raw["rows"]))


def law_missed(raw: Raw) -> float:
    """The largest distance of a spectrum from its law."""
    return float(max(row["distance"] for row in raw["rows"]))


def spike_missed(raw: Raw) -> float:
    """The largest relative error of the largest eigenvalue that is expected."""
    return float(max(abs(np.mean(row["largest"]) / row["expected"] - 1) for row in raw["rows"]))


CLAIMS: Final = (
    Claim(
        name="one-outlier-a-cluster",
        says="With ReLU the elbow of the scree plot is within one of the number of clusters, in as "
        "many rows as in Table 1 (5 of 5 with gradient descent, 8 of 10 with SGD).",
        source="appendix A, Table 1, column heur",
        quantity="rows within one of the clusters, less the paper's such rows",
        runs=("gd-relu", "sgd-relu"),
        measure=rows_matched,
        at_least=0,
    ),
    Claim(
        name="exactly-one-a-class",
        says="After SGD with ReLU on clusters of covariance 1, exactly as many eigenvalues as "
        "classes are above the gap, for 2, 5, 10, 20 and 50.",
        source="section 3.1, Figure 3 (its own Table 1 has 2, 7, 15, 21 and 49)",
        quantity="share of the rows whose elbow is at the number of clusters",
        runs=("sgd-relu",),
        measure=exact_matches,
        at_least=1,
    ),
    Claim(
        name="table-agrees",
        says="The counts of Table 1 come out again: by the largest gap, the largest ratio, and "
        "the elbow.",
        source="appendix A, Table 1",
        quantity="share of our counts within one of those printed",
        runs=("gd-tanh", "gd-relu", "sgd-relu"),
        measure=counts_agreeing,
        at_least=0.8,
    ),
    Claim(
        name="no-gap-with-tanh",
        says="With tanh and gradient descent neither the largest gap nor the largest ratio finds "
        "more than two clusters.",
        source="appendix A, Table 1, rows GD tanh",
        quantity="share of the rows of more than two clusters where one of them is within one",
        runs=("gd-tanh",),
        measure=matches_beyond_two,
        at_most=0,
    ),
    Claim(
        name="deviation-is-mean",
        says="The eigenvalues' standard deviation is their mean, as Table 1 prints it.",
        source="appendix A, Table 1, column mean&std",
        quantity="largest standard deviation over mean",
        runs=("gd-tanh", "gd-relu", "sgd-relu"),
        measure=spread_over_mean,
        at_most=1.01,
        identity=True,
    ),
    Claim(
        name="data-moves-outliers",
        says="Data that are less separable, at a fixed network, move the outliers of the spectrum "
        "and leave its bulk.",
        source="abstract and section 3.1",
        quantity="|Δ log bulk| / |Δ log outliers| from covariance 1 to 10, median over clusters",
        runs=("sgd-relu",),
        measure=bulk_over_outliers,
        at_most=0.5,
    ),
    Claim(
        name="few-eigenvalues-matter",
        says="Almost all eigenvalues are near zero, at a random point and after training.",
        source="section 1.2, Figure 1",
        quantity="share of eigenvalues within a hundredth of the largest from zero, at both points",
        runs=("growth",),
        measure=near_zero,
        at_least=0.95,
    ),
    Claim(
        name="negative-but-tiny",
        says="There are negative eigenvalues after training, orders of magnitude smaller than the "
        "largest.",
        source="sections 3.2 and 3.3, Figures 4 to 8",
        quantity="largest -λ_min / λ_max of the networks",
        runs=("growth", "batches"),
        measure=most_negative,
        at_least=1e-6,
        at_most=0.01,
    ),
    Claim(
        name="right-edge-keeps-shape",
        says="The shape of the right edge of the spectrum stays as the network grows.",
        source="section 3.2, Figure 4",
        quantity="largest mean distance of λ_i / λ_1, i to 20, from the widest network's",
        runs=("growth",),
        measure=right_edges_apart,
        at_most=0.1,
    ),
    Claim(
        name="outliers-belong-to-data",
        says="The number of large eigenvalues depends on neither the size of the network nor that "
        "of the batches.",
        source="sections 3.2 and 3.3, Figures 4 and 8",
        quantity="largest less smallest number of large eigenvalues of the networks",
        runs=("growth", "batches"),
        measure=outliers_apart,
        at_most=1,
    ),
    Claim(
        name="left-edge-scales",
        says="By ratio of all eigenvalues the left edges of networks of all sizes have one shape.",
        source="section 3.2, Figure 6",
        quantity="largest distance of two left edges, each of norm 1",
        runs=("growth",),
        measure=left_edges_apart,
        at_most=0.2,
    ),
    Claim(
        name="large-batch-is-sharper",
        says="Large batches end where the large eigenvalues are larger than where small batches "
        "of the same rate end, after as many steps.",
        source="section 3.3, Figure 8",
        quantity="ten largest eigenvalues, large over small batches, geometric mean",
        runs=("batches",),
        measure=large_over_small,
        at_least=1.1,
    ),
    Claim(
        name="switch-jumps",
        says="The training loss jumps where small batches take over from large ones.",
        source="section 4.1, Figure 9",
        quantity="highest loss in ten rows after the switch, over the loss there",
        runs=("phases",),
        measure=jump,
        at_least=1.25,
    ),
    Claim(
        name="small-batch-generalises",
        says="The small batches end at a slightly better test accuracy (about 1 % in the paper).",
        source="section 4.1, Figures 9 and 10",
        quantity="test accuracy of the last ten rows, small less large batches",
        runs=("phases",),
        measure=accuracy_gained,
        at_least=0,
    ),
    Claim(
        name="one-basin",
        says="There is no barrier on the straight line between the ends of both parts.",
        source="section 4.1, Figure 10",
        quantity="highest loss on the line, over one that changes evenly from end to end",
        runs=("phases",),
        measure=barrier,
        at_most=1.05,
        changed="It was the highest loss over that of the higher end, which was 1 at all seeds: "
        "one end is at two to four times the loss of the other, and what rises on the way to it "
        "was no barrier.",
        seen=(0, 1, 2),
    ),
    Claim(
        name="second-part-is-small",
        says="At the end of training the Hessian is its Gauss-Newton part: the other can be "
        "ignored.",
        source="sections 1.2 and 2.1, eq. 3",
        quantity="spectral norm of the second part over that of the first",
        runs=("parts-mnist", "parts-clusters"),
        measure=residual_at_end,
        at_most=0.1,
    ),
    Claim(
        name="second-part-shrinks",
        says="Beside the Gauss-Newton part, the other shrinks in the course of training.",
        source="section 1.2",
        quantity="share of spectral norms at the end over that at the start",
        runs=("parts-mnist", "parts-clusters"),
        measure=residual_shrinks,
        at_most=0.5,
    ),
    Claim(
        name="trivial-eigenvalues",
        says="The Hessian of a trained network has as many trivial eigenvalues as its "
        "Gauss-Newton part must have: P - NC.",
        source="section 2.1",
        quantity="eigenvalues below a thousandth of the largest, over P - NC, the smallest",
        runs=("trivial",),
        measure=zeros_of_trained,
        at_least=1,
    ),
    Claim(
        name="trivial-eigenvalues-of-first-part",
        says="The Gauss-Newton part has at least P - NC eigenvalues that are zero, before and "
        "after training: a theorem, which the measurement has to meet.",
        source="section 2.1",
        quantity="eigenvalues below 1e-12 of the largest, less P - NC, the smallest",
        runs=("trivial",),
        measure=zeros_beyond_theory,
        at_least=0,
        identity=True,
        changed="It was added. At a first trial zeros of the Hessian were too few at one seed, and "
        "this tells whether those of its Gauss-Newton part are all there.",
        seen=(0, 1),
    ),
    Claim(
        name="bulk-is-marchenko-pastur",
        says="The Gauss-Newton matrix of a linear model on white data has the spectrum of "
        "Marchenko and Pastur, with an atom at zero for more parameters than examples.",
        source="appendix B",
        quantity="largest distance of cumulative distributions",
        runs=("white",),
        measure=law_missed,
        at_most=0.05,
        identity=True,
    ),
    Claim(
        name="spike-leaves-bulk",
        says="One large variance of the data leaves the bulk above the threshold of Baik, Ben "
        "Arous and Péché, and where their theory has it; below the threshold it does not.",
        source="appendix B",
        quantity="largest relative error of the expected largest eigenvalue, mean of five draws",
        runs=("spiked",),
        measure=spike_missed,
        at_most=0.05,
        identity=True,
    ),
)
