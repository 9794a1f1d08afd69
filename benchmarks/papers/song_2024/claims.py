"""What the paper says, as inequalities; all were fixed before anything was measured.

"Near 1" is at least 0.9 and "near 0" at most 0.2 for χ_k. A projection "fails" if it achieves at
most a tenth of the plain optimizer's decrease of the loss, and is "as effective" from nine tenths
on. "Second half" is of the measured steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final

from scipy import stats

from benchmarks.papers.reproduction import Claim, Raw
from benchmarks.papers.song_2024.runs import OPTIMIZERS

_MSE: Final = ("sgd-mlp-mse", "sgd-cnn-mse", "sgd-transformer-mse")
_CE: Final = ("sgd-mlp-ce", "sgd-cnn-ce", "sgd-transformer-ce")
_STANDARD: Final = ("sgd-vgg11", "sgd-resnet8")
_GD: Final = ("gd-mlp", "gd-cnn", "gd-transformer")
_RATES: Final = ("rates-transformer", "rates-mlp", "rates-cnn")

_NEAR_1: Final = 0.9
_NEAR_0: Final = 0.2
_FAILS: Final = 0.1
_AS_EFFECTIVE: Final = 0.9
_TRAINED: Final = 1e-3
"""Relative decrease of the loss below which SGD did not train, and shares of it mean nothing."""


def mean(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _last(values: Sequence[float], part: int) -> Sequence[float]:
    """The last part-th of a series, one value at least."""
    return values[-max(1, len(values) // part) :]


def _second_half(values: Sequence[float]) -> Sequence[float]:
    return values[len(values) // 2 :]


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


def alignment_of_sgd(raw: Raw) -> float:
    """Mean χ_k of the gradient along SGD after the switch."""
    return mean(raw["phases"]["SGD"]["chi_gradient"])


def achieved(branch: str) -> Callable[[Raw], float]:
    """The decrease of the loss in a branch, over that of SGD, where SGD's gradient was dominant.

    The loss of a branch at its end is the mean over the last quarter of its measured steps. NaN
    where the premise does not hold (mean χ_k along SGD below 0.9), or SGD does not train.
    """

    def share(raw: Raw) -> float:
        start = raw["switch_loss"]
        ends = {name: mean(_last(raw["phases"][name]["loss"], 4)) for name in (branch, "SGD")}
        trained = start - ends["SGD"]
        if not alignment_of_sgd(raw) >= _NEAR_1 or trained < _TRAINED * start:
            return math.nan
        return float((start - ends[branch]) / trained)

    return share


def moved(branch: str) -> Callable[[Raw], float]:
    """The distance from the switch in a branch, over that of SGD; NaN without the premise."""

    def share(raw: Raw) -> float:
        if not alignment_of_sgd(raw) >= _NEAR_1:
            return math.nan
        return float(raw["final_distance"][branch] / raw["final_distance"]["SGD"])

    return share


# --- noise -------------------------------------------------------------------------------------


def _after_switch(raw: Raw, name: str) -> list[float]:
    part = raw[name]
    return [
        chi
        for step, chi in zip(part["step"], part["chi_gradient"], strict=True)
        if step > part["switch_step"]
    ]


def jump_of_sharpness(raw: Raw) -> float:
    """The largest relative change of λ_1 from one row to the next after either switch."""
    changes = []
    for name in ("SGD to GD", "GD to SGD"):
        part = raw[name]
        values = [
            row[0]
            for step, row in zip(part["step"], part["eigenvalues"], strict=True)
            if step >= part["switch_step"]
        ]
        changes += [abs(b / a - 1) for a, b in pairwise(values)]
    return float(max(changes))


def parting(raw: Raw) -> float:
    """‖θ_GD − θ_SGD‖ over ‖θ_GD − θ_0‖ at the end."""
    ratio: float = raw["GD to SGD"][-1] / raw["GD"][-1]
    return ratio


# --- edge of stability -------------------------------------------------------------------------


def sharpness_at_edge(threshold: str) -> Callable[[Raw], float]:
    """Median of λ_1 over the threshold, in the last quarter before the switch."""

    def ratio(raw: Raw) -> float:
        part = raw["before"]
        late = slice(3 * len(part["step"]) // 4, None)
        pairs = zip(part["eigenvalues"][late], part[threshold][late], strict=True)
        return float(statistics.median(row[0] / edge for row, edge in pairs))

    return ratio


def alignment_at_edge(name: str, column: str) -> Callable[[Raw], float]:
    """Mean χ_k of a column over the branch that goes on as before."""
    return lambda raw: mean(raw[name][column])


def achieved_at_edge(branch: str, plain: str) -> Callable[[Raw], float]:
    """The decrease of the mean loss in a branch, over that of the plain optimizer."""

    def share(raw: Raw) -> float:
        means = raw["mean_loss"]
        return float((means["before"] - means[branch]) / (means["before"] - means[plain]))

    return share


def edge_with_gradient(raw: Raw) -> float:
    """Rank correlation of SAM-edge and gradient norm before the switch."""
    part = raw["before"]
    return float(stats.spearmanr(part["sam_edge"], part["gradient_norm"]).statistic)


# --- effective rates ---------------------------------------------------------------------------


def order_of_bulk_lr(raw: Raw) -> float:
    """The smallest ratio of a mean Bulk-LR to the one before, from GD(-m) to Adam(+m)."""
    means = [raw[name]["mean_bulk_lr"] for name in OPTIMIZERS]
    return float(min(b / a for a, b in pairwise(means)))


def plain_rate(raw: Raw) -> float:
    """The largest relative deviation of GD's two mean rates from its learning rate."""
    return float(
        max(abs(raw["GD(-m)"][rate] / raw["lr"] - 1) for rate in ("mean_dom_lr", "mean_bulk_lr"))
    )


def momentum_amplifies(raw: Raw) -> float:
    """Bulk-LR with momentum over that without, the smaller of GD's and Adam's ratio."""
    return float(
        min(
            raw[f"{name}(+m)"]["mean_bulk_lr"] / raw[f"{name}(-m)"]["mean_bulk_lr"]
            for name in ("GD", "Adam")
        )
    )


def adam_amplifies(raw: Raw) -> float:
    """Adam's Bulk-LR over GD's, the smaller ratio of those without and with momentum."""
    return float(
        min(
            raw[f"Adam({m})"]["mean_bulk_lr"] / raw[f"GD({m})"]["mean_bulk_lr"]
            for m in ("-m", "+m")
        )
    )


def bulk_over_dom(raw: Raw) -> float:
    """The smallest Bulk-LR over |Dom-LR| of the three that are not plain GD."""
    return float(
        min(raw[name]["mean_bulk_lr"] / abs(raw[name]["mean_dom_lr"]) for name in OPTIMIZERS[1:])
    )


def rate_and_speed(raw: Raw) -> float:
    """Rank correlation, over the four optimizers, of the mean Bulk-LR and −log of the loss."""
    rates = [raw[name]["mean_bulk_lr"] for name in OPTIMIZERS]
    speeds = [-raw[name]["mean_log_loss"] for name in OPTIMIZERS]
    return round(float(stats.spearmanr(rates, speeds).statistic), 6)  # 0.8 is 4/5


# --- the claims --------------------------------------------------------------------------------


def _critical(runs: tuple[str, ...], where: str, figures: Sequence[str], key: str) -> list[Claim]:
    """The three statements that the paper repeats for other losses and architectures."""
    low_rank, aligned, dom = figures
    return [
        Claim(
            f"low-rank{key}",
            f"The top k eigenvalues are far above the next k{where}.",
            f"section 1, {low_rank}",
            "median along SGD of (mean of λ_1 … λ_k) / (mean of λ_{k+1} … λ_{2k})",
            runs,
            rank_gap,
            at_least=3.0,
        ),
        Claim(
            f"alignment{key}",
            f"Along SGD the gradient comes into the dominant subspace, and stays there{where}.",
            f"Phenomenon 1, {aligned}",
            "mean χ_k of the gradient along SGD after the switch",
            runs,
            alignment_of_sgd,
            at_least=_NEAR_1,
        ),
        Claim(
            f"dom-fails{key}",
            f"SGD projected onto the dominant subspace no longer lowers the loss{where}.",
            f"Phenomenon 2, {dom}",
            "loss decrease of Dom-SGD / that of SGD, where the gradient is dominant",
            runs,
            achieved("DomSGD"),
            at_most=_FAILS,
        ),
    ]


CLAIMS: Final = (
    *_critical(_MSE, "", ("Figure 2", "Figure 3", "Figure 1"), ""),
    Claim(
        "bulk-works",
        "SGD projected onto the bulk is as effective as SGD.",
        "Phenomenon 2, Figure 1",
        "loss decrease of Bulk-SGD / that of SGD, where the gradient is dominant",
        _MSE,
        achieved("BulkSGD"),
        at_least=_AS_EFFECTIVE,
    ),
    Claim(
        "dom-stays-near",
        "Dom-SGD stays near the point of the switch.",
        "appendix G.4, Figure 22",
        "distance of Dom-SGD from the switch / that of SGD, where the gradient is dominant",
        _MSE,
        moved("DomSGD"),
        at_most=0.5,
    ),
    Claim(
        "bulk-goes-as-far",
        "Bulk-SGD goes about as far from the switch as SGD.",
        "appendix G.4, Figure 22",
        "distance of Bulk-SGD from the switch / that of SGD, where the gradient is dominant",
        _MSE,
        moved("BulkSGD"),
        at_least=0.8,
    ),
    *_critical(_CE, ", with cross-entropy", ("Figure 12", "Figure 13", "Figure 14"), "-ce"),
    *_critical(
        _STANDARD,
        ", in VGG11 and ResNet8",
        ("Figure 15", "Figure 16", "Figure 17"),
        "-standard",
    ),
    Claim(
        "gd-not-aligned",
        "Along GD at a small rate the gradient is in the bulk.",
        "appendix G.1, Figure 18",
        "mean χ_k of the gradient over the second half of GD",
        _GD,
        lambda raw: mean(_second_half(raw["chi_gradient"])),
        at_most=_NEAR_0,
    ),
    Claim(
        "sgd-follows-gd",
        "SGD and GD from one start stay near each other.",
        "appendix G.2, Figure 19",
        "‖θ_GD − θ_SGD‖ / ‖θ_GD − θ_0‖ at the end",
        _GD,
        parting,
        at_most=0.2,
    ),
    Claim(
        "noise-off",
        "The alignment vanishes when SGD is switched to GD.",
        "Phenomenon 3, Figure 4",
        "mean χ_10 over the second half after the switch",
        ("switching",),
        lambda raw: mean(_second_half(_after_switch(raw, "SGD to GD"))),
        at_most=_NEAR_0,
    ),
    Claim(
        "noise-on",
        "The alignment appears when GD is switched to SGD.",
        "Phenomenon 3, Figure 5",
        "mean χ_10 over the second half after the switch",
        ("switching",),
        lambda raw: mean(_second_half(_after_switch(raw, "GD to SGD"))),
        at_least=_NEAR_1,
    ),
    Claim(
        "smooth-sharpness",
        "While the alignment jumps at a switch, the eigenvalues do not.",
        "appendix G.3, Figures 20 and 21",
        "largest relative change of λ_1 between rows after a switch",
        ("switching",),
        jump_of_sharpness,
        at_most=0.1,
    ),
    Claim(
        "toy-gd",
        "On the toy quadratic the gradient along GD leaves the top eigenvector.",
        "appendix A.2, Figure 7",
        "mean χ_1 over the second half of GD",
        ("toy",),
        lambda raw: float(raw["GD"]["mean_chi_of_the_second_half"]),
        at_most=_NEAR_0,
    ),
    Claim(
        "toy-sgd",
        "On the toy quadratic the gradient along SGD stays along the top eigenvector.",
        "appendix A.2, Figure 7",
        "mean χ_1 over the second half of SGD",
        ("toy",),
        lambda raw: float(raw["SGD"]["mean_chi_of_the_second_half"]),
        at_least=_NEAR_1,
    ),
    Claim(
        "toy-dom-fails",
        "On the toy quadratic SGD's update along the top eigenvector alone does not train.",
        "appendix A.2",
        "loss decrease of Dom-SGD after half of the steps / that of SGD, each from the first to "
        "the last quarter of them",
        ("toy",),
        lambda raw: float(raw["Dom-SGD"]["decrease"] / raw["SGD"]["decrease"]),
        at_most=_FAILS,
    ),
    Claim(
        "edge-of-stability",
        "At a large rate the sharpness of GD settles at 2/η.",
        "appendix B.1, Figure 9a",
        "median of λ_1 η / 2 in the last quarter before the switch",
        ("edge",),
        sharpness_at_edge("threshold"),
        at_least=0.9,
        at_most=1.1,
    ),
    Claim(
        "edge-alignment",
        "At the edge of stability the gradient of GD lies in the dominant subspace.",
        "appendix B.1, Figure 9b",
        "mean χ_10 of the gradient along GD after the switch",
        ("edge",),
        alignment_at_edge("GD", "chi_gradient"),
        at_least=_NEAR_1,
    ),
    Claim(
        "edge-dom-fails",
        "Dom-GD no longer lowers the loss at the edge of stability.",
        "appendix B.1, Figure 9c",
        "loss decrease of Dom-GD / that of GD",
        ("edge",),
        achieved_at_edge("Dom-GD", "GD"),
        at_most=_FAILS,
    ),
    Claim(
        "edge-bulk-works",
        "Bulk-GD is as effective as GD at the edge of stability.",
        "appendix B.1, Figure 9c",
        "loss decrease of Bulk-GD / that of GD",
        ("edge",),
        achieved_at_edge("Bulk-GD", "GD"),
        at_least=_AS_EFFECTIVE,
    ),
    Claim(
        "sam-edge",
        "The sharpness of SAM settles near its own edge.",
        "appendix B.2, Figure 10a",
        "median of λ_1 / SAM-edge in the last quarter before the switch",
        ("sam",),
        sharpness_at_edge("sam_edge"),
        at_least=0.8,
        at_most=1.2,
    ),
    Claim(
        "sam-alignment",
        "At its edge the update of SAM lies in the dominant subspace.",
        "appendix B.2, Figure 10b",
        "mean χ_10 of the update along SAM after the switch",
        ("sam",),
        alignment_at_edge("SAM", "chi_update"),
        at_least=_NEAR_1,
    ),
    Claim(
        "sam-dom-fails",
        "Dom-SAM no longer lowers the loss.",
        "appendix B.2, Figure 10c",
        "loss decrease of Dom-SAM / that of SAM",
        ("sam",),
        achieved_at_edge("Dom-SAM", "SAM"),
        at_most=_FAILS,
    ),
    Claim(
        "sam-bulk-works",
        "Bulk-SAM is as effective as SAM.",
        "appendix B.2, Figure 10c",
        "loss decrease of Bulk-SAM / that of SAM",
        ("sam",),
        achieved_at_edge("Bulk-SAM", "SAM"),
        at_least=_AS_EFFECTIVE,
    ),
    Claim(
        "sam-edge-falls",
        "SAM's edge falls as the gradient grows (the sentence below the formula).",
        "appendix B.2",
        "rank correlation of SAM-edge and the gradient's norm along SAM",
        ("sam",),
        edge_with_gradient,
        at_most=0.0,
    ),
    Claim(
        "rates-of-gd",
        "Both effective rates of plain GD are its learning rate.",
        "appendix C, Tables 1-3",
        "largest relative deviation of GD's mean Dom-LR and Bulk-LR from η",
        _RATES,
        plain_rate,
        at_most=0.01,
    ),
    Claim(
        "rates-order",
        "Bulk-LR grows from GD over GD with momentum and Adam without it to Adam (transformer).",
        "appendix C, Table 1",
        "smallest ratio of a mean Bulk-LR to the one before",
        ("rates-transformer",),
        order_of_bulk_lr,
        at_least=1.0,
    ),
    Claim(
        "momentum-amplifies",
        "Momentum raises Bulk-LR.",
        "appendix H, Tables 1-3",
        "Bulk-LR with momentum / without, the smaller of GD's and Adam's",
        _RATES,
        momentum_amplifies,
        at_least=1.0,
    ),
    Claim(
        "adam-amplifies",
        "Adam's adaptive rates raise Bulk-LR.",
        "appendix H, Tables 1-3",
        "Bulk-LR of Adam / of GD, the smaller of those without and with momentum",
        _RATES,
        adam_amplifies,
        at_least=1.0,
    ),
    Claim(
        "bulk-over-dom",
        "With momentum or Adam the effective rate is larger in the bulk than in the dominant "
        "subspace.",
        "appendix H, Tables 1-3",
        "smallest Bulk-LR / |Dom-LR| of the three that are not plain GD",
        _RATES,
        bulk_over_dom,
        at_least=1.0,
    ),
    Claim(
        "rate-and-speed",
        "The larger Bulk-LR, the faster the training.",
        "appendix C, Figures 11, 23 and 24",
        "rank correlation of the four mean Bulk-LR and the mean −log loss of the last 100 steps",
        _RATES,
        rate_and_speed,
        at_least=0.8,
    ),
)
