"""What the paper says, as inequalities about the raw figures."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from benchmarks.papers.reproduction import Claim, Raw

_LAST: Final = 3
"""Rows that the end of a curve is the mean of."""
_TREND: Final = 0.9
"""A method is ahead from a row on if it is in so many of the rows that follow."""

Curve = dict[str, Any]


def losses(curve: Curve) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the validation losses; infinite where they are no numbers."""
    values = np.array(curve["loss"], dtype=float)
    return np.where(np.isfinite(values), values, math.inf)


def final_loss(curve: Curve) -> float:
    """Returns the loss at the end; infinite where training diverged."""
    return math.inf if curve["diverged"] else float(losses(curve)[-_LAST:].mean())


def final_accuracy(curve: Curve, classes: int) -> float:
    """Returns the accuracy at the end; chance where training diverged."""
    if curve["diverged"]:
        return 1 / classes
    return float(np.mean(curve["accuracy"][-_LAST:]))


def pairs(raw: Raw) -> list[tuple[Curve, Curve]]:
    """Returns the curves of SGD and quasi-Newton, printed or damped, by rate or batch size."""
    found = raw["curves"]
    sgd, newton = found["sgd"], found["damped" if "damped" in found else "printed"]
    return [(sgd[key], newton[key]) for key in sgd]


def accuracy_gains(raw: Raw) -> list[float]:
    """Returns how much more accurate the quasi-Newton method is at the end than SGD."""
    classes = raw["classes"]
    return [final_accuracy(b, classes) - final_accuracy(a, classes) for a, b in pairs(raw)]


def loss_gains(raw: Raw) -> list[float]:
    """Returns how much lower the quasi-Newton method's loss is at the end; NaN if none has one."""
    return [final_loss(a) - final_loss(b) for a, b in pairs(raw)]


def behind(raw: Raw) -> list[bool]:
    """Returns, for each rate and each epoch after the start, whether quasi-Newton's loss is above.

    Epochs that it did not live to see count as such where SGD did.
    """
    answers = []
    for sgd, newton in pairs(raw):
        mine, theirs = losses(newton), losses(sgd)
        mine = np.append(mine, [math.inf] * max(0, len(theirs) - len(mine)))
        answers += [bool(a > b) for a, b in zip(mine[1:], theirs[1:], strict=False)]
    return answers


def volatility(curve: Curve) -> float:
    """Returns the mean change of log loss from epoch to epoch in the second half of a training."""
    values = losses(curve)
    late = values[len(values) // 2 :]
    if curve["diverged"] or not np.isfinite(late).all():
        return math.inf
    return float(np.abs(np.diff(np.log(late))).mean())


def volatility_ratio(raw: Raw) -> float:
    """Returns the geometric mean over the rates of quasi-Newton's volatility over SGD's."""
    values = np.array([[volatility(each) for each in pair] for pair in pairs(raw)])
    with np.errstate(divide="ignore", invalid="ignore"):  # of infinities
        return float(np.exp(np.diff(np.log(values)).mean()))


def best_accuracy(raw: Raw) -> float:
    """Returns the best accuracy at the end of SGD and the printed method, at the lowest rate."""
    sgd, newton = pairs(raw)[0]
    return max(final_accuracy(each, raw["classes"]) for each in (sgd, newton))


def early_lead(raw: Raw) -> float:
    """Returns SGD's loss over quasi-Newton's, at best, in the first tenth of the steps."""
    best = 0.0
    for sgd, newton in pairs(raw):
        rows = max(2, len(sgd["loss"]) // 10)
        early = zip(losses(sgd)[1:rows].tolist(), losses(newton)[1:rows].tolist(), strict=False)
        best = max([best, *(a / b for a, b in early)])
    return best


def late_leads(raw: Raw) -> list[float]:
    """Returns for each batch size the share of the rows of the second half with SGD ahead.

    Rows that quasi-Newton did not live to see count as such.
    """
    shares = []
    for sgd, newton in pairs(raw):
        theirs, mine = losses(sgd), losses(newton)
        mine = np.append(mine, [math.inf] * max(0, len(theirs) - len(mine)))[: len(theirs)]
        half = len(theirs) // 2
        shares.append(float((theirs[half:] < mine[half:]).mean()))
    return shares


def crossover(sgd: Curve, newton: Curve) -> float:
    """Returns the step from which SGD is ahead, but for a tenth of the rows; infinite: from none.

    A row in which neither has been trained yet is no lead.
    """
    theirs, mine = losses(sgd), losses(newton)
    mine = np.append(mine, [math.inf] * max(0, len(theirs) - len(mine)))[: len(theirs)]
    ahead = theirs < mine
    for row, step in enumerate(sgd["step"]):
        if row and ahead[row] and ahead[row:].mean() >= _TREND:
            return float(step)
    return math.inf


def first_crossover(raw: Raw) -> float:
    """Returns the crossover with the smallest batch, in epochs."""
    sizes = [int(size) for size in raw["curves"]["sgd"]]
    size = min(sizes)
    return crossover(*pairs(raw)[sizes.index(size)]) * size / int(raw["examples"])


def late_rank(raw: Raw) -> float:
    """Returns the median rank in the second half of training, by the rule for single precision."""
    if raw["diverged"]:
        return math.nan
    ranks = raw["ranks"][0]
    return float(np.median(ranks[len(ranks) // 2 :]))


def assigned(raw: Raw) -> float:
    """Returns the mean assigned cosine over the minibatches of the second half of training."""
    if raw["diverged"]:
        return math.nan
    cosines = raw["assigned"]
    return float(np.mean(cosines[len(cosines) // 2 :]))


def over_chance(raw: Raw) -> float:
    """Returns the assigned cosine over that of random directions."""
    return math.nan if raw["diverged"] else assigned(raw) / raw["chance"][0]


def cutoff(raw: Raw) -> float:
    """Returns λ_{C+1} / λ_1."""
    if raw["diverged"]:
        return math.nan
    return float(raw["eigenvalues"][raw["classes"]] / raw["eigenvalues"][0])


def nearest_guess(raw: Raw) -> float:
    """Returns how far the best of the counts of outliers is from C."""
    if raw["diverged"]:
        return math.nan
    return float(min(abs(count - raw["classes"]) for count in raw["outliers"].values()))


def mean_cosine_between(raw: Raw) -> float:
    """Returns the mean |cosine| between the class gradients of two classes."""
    if raw["diverged"]:
        return math.nan
    cosines = np.abs(np.array(raw["of_all"]["between"], dtype=float))
    return float(cosines[~np.eye(len(cosines), dtype=bool)].mean())


def curvature_ratio(raw: Raw) -> float:
    """Returns the median of v_kᵀHv_k / λ_k over classes and steps."""
    if raw["diverged"]:
        return math.nan
    return float(np.median([ratio for ratios in raw["ratios"].values() for ratio in ratios]))


def _of(raw: Raw, *keys: str) -> float:
    """Returns a figure of the run of class gradients; NaN where it diverged."""
    if raw["diverged"]:
        return math.nan
    value: Any = raw
    for key in keys:
        value = value[key]
    return float(value)


# What diverges is behind, slower and overtaken: that says more of a training that does not.
_FIGURE_1 = ("resnet9", "resnet9-damped")
_FIGURE_2 = ("batch-sizes", "batch-sizes-damped")
_CLASSES = ("class-gradients",)
_COST = ("cost-cnn", "cost-resnet9")

CLAIMS: Final = (
    Claim(
        "table-1-ahead",
        "by its table, the quasi-Newton method ends more accurate than SGD at every rate",
        "Table 1",
        "smallest gain in accuracy over the three rates (what diverged: chance)",
        _FIGURE_1,
        lambda raw: float(np.min(accuracy_gains(raw))),
        at_least=0.01,
    ),
    Claim(
        "table-2-ahead",
        "by its table, the quasi-Newton method ends at a lower validation loss at every rate",
        "Table 2",
        "smallest gain in loss over the three rates (what diverged: infinite)",
        _FIGURE_1,
        lambda raw: float(np.min(loss_gains(raw))),
        at_least=0.01,
    ),
    Claim(
        "text-behind",
        "by its text, the quasi-Newton method ends less accurate than SGD on average",
        "section 3",
        "mean gain in accuracy over the three rates (what diverged: chance)",
        _FIGURE_1,
        lambda raw: float(np.mean(accuracy_gains(raw))),
        at_most=0.0,
    ),
    Claim(
        "text-similar",
        "the final performance of both methods is similar (the table's differ by 6 % on average)",
        "section 3",
        "mean difference in accuracy over the three rates (what diverged: chance)",
        _FIGURE_1,
        lambda raw: float(np.mean(np.abs(accuracy_gains(raw)))),
        at_most=0.06,
    ),
    Claim(
        "text-slower",
        "the quasi-Newton method is slower to improve",
        "section 3, Figure 1",
        "share of epochs and rates in which its validation loss is above SGD's (once it diverged: "
        "infinite)",
        _FIGURE_1,
        lambda raw: float(np.mean(behind(raw))),
        at_least=0.5,
    ),
    Claim(
        "text-volatile",
        "the quasi-Newton method's loss is more volatile",
        "section 3, Figure 1",
        "late change of log loss between epochs over SGD's, geometric mean over the rates (what "
        "diverged: infinite)",
        _FIGURE_1,
        volatility_ratio,
        at_least=1.1,
    ),
    Claim(
        "both-diverge-above-0.1",
        "neither method stands a rate above 0.1",
        "section 3",
        "best accuracy at the end at η = 0.2, which chance puts at 0.1",
        ("above-0.1",),
        best_accuracy,
        at_most=0.2,
    ),
    Claim(
        "starts-faster",
        "with some batch size the quasi-Newton method learns faster at the start",
        "section 4, Figure 2",
        "SGD's loss over its, at best, in the first tenth of the steps",
        _FIGURE_2,
        early_lead,
        at_least=1.05,
    ),
    Claim(
        "sgd-overtakes",
        "SGD overtakes it and stays ahead whatever the batch size, the full batch included, so "
        "that the noise of minibatches is not the reason",
        "section 4, Figure 2",
        "smallest share over batch sizes of the late rows with SGD's loss below (once it diverged: "
        "infinite)",
        _FIGURE_2,
        lambda raw: min(late_leads(raw)),
        at_least=0.9,
    ),
    Claim(
        "small-batches-cross-early",
        "with small batches SGD overtakes within the first epoch",
        "section 4",
        "epoch from which SGD is ahead with batches of 64",
        _FIGURE_2,
        first_crossover,
        at_most=1.0,
    ),
    Claim(
        "reasonable-cutoff",
        "for those who know it, C is a reasonable place to cut the spectrum",
        "section 5.1, Figure 3",
        "λ_{C+1} / λ_1",
        _CLASSES,
        cutoff,
        at_most=0.2,
    ),
    Claim(
        "no-guess",
        "the number of classes could not be guessed from the spectrum alone",
        "section 5.1, Figure 3",
        "distance from C of the nearest of three counts of outliers (gap, ratio, elbow)",
        _CLASSES,
        nearest_guess,
        at_least=1.0,
    ),
    Claim(
        "rank-declines",
        "class gradients of minibatches come to span the same as the last C eigenvectors: the rank "
        "of both falls from 2C to C, or one or two more",
        "appendix C, Figure 4a",
        "median rank in the second half of training, by the rule of linear algebra libraries",
        _CLASSES,
        late_rank,
        at_most=12.0,
    ),
    Claim(
        "assigned-cosine",
        "class gradients and top C eigenvectors, matched as well as can be, have a cosine of "
        "about 0.36",
        "appendix C, Figure 4b",
        "mean assigned cosine in the second half of training",
        _CLASSES,
        assigned,
        at_least=0.26,
        at_most=0.46,
    ),
    Claim(
        "significant-cosine",
        "that is far above what random directions would have",
        "appendix C",
        "assigned cosine over that of random directions, also assigned",
        _CLASSES,
        over_chance,
        at_least=10.0,
    ),
    Claim(
        "chance-cosine",
        "random directions have a cosine of order 10⁻³",
        "appendix C",
        "assigned cosine of random directions (the paper means that of any pair)",
        _CLASSES,
        lambda raw: math.nan if raw["diverged"] else float(raw["chance"][0]),
        at_most=10**-2.5,
    ),
    Claim(
        "spans-intersect",
        "the span of the class gradients is mostly that of the top C eigenvectors",
        "abstract, section 1.2",
        "overlap of the spans after training, class gradients of all examples",
        _CLASSES,
        lambda raw: _of(raw, "of_all", "overlap"),
        at_least=0.5,
    ),
    Claim(
        "orthogonal-classes",
        "class gradients are about orthogonal, as eqs. 11 to 15 assume",
        "section 2, section 5.1",
        "mean |cosine| of two classes after training",
        _CLASSES,
        mean_cosine_between,
        at_most=0.2,
    ),
    Claim(
        "curvature-along-classes",
        "λ_k is the curvature of the loss along v_k, so that 1/λ_k is Newton's rate (here over all "
        "steps together; the medians at single steps, the start among them, are in the table of "
        "the assumptions)",
        "section 2, eqs. 11 to 13",
        "median of v_kᵀHv_k / λ_k over classes and steps",
        _CLASSES,
        curvature_ratio,
        at_least=0.5,
        at_most=2.0,
    ),
    Claim(
        "no-second-term",
        "the second term of the Hessian is exactly 0 for a network with ReLU",
        "section 1.3, eq. 7",
        "its Frobenius norm over the Hessian's, after training",
        _CLASSES,
        lambda raw: _of(raw, "second_term"),
        at_most=1e-3,
    ),
    Claim(
        "memory",
        "the method needs C + 1 times the memory of SGD",
        "appendix B",
        "memory of gradients, optimizer and subspace over SGD's, without momentum (C = 10)",
        _COST,
        lambda raw: float(raw["memory"]["printed"] / raw["memory"]["sgd"]),
        at_least=10.9,
        at_most=11.1,
    ),
    Claim(
        "backward-passes",
        "it needs C backward passes a step for the class gradients",
        "appendix B",
        "backward passes of an example for one observation (C = 10)",
        _COST,
        lambda raw: float(raw["passes"]),
        at_least=10.0,
    ),
)
