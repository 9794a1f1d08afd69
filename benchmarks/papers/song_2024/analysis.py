"""What the raw figures of `song_2024` say: numbers for claims and tables, curves for pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from statistics import geometric_mean
from typing import Final

import numpy as np
from scipy import stats

from benchmarks.papers.reductions import (
    Curve,
    late_mean,
    mean,
    mean_of,
    median_of,
    second_half,
    value,
)
from benchmarks.papers.reproduction import Raw
from benchmarks.papers.song_2024.rates import OPTIMIZERS

ALIGNED: Final = 0.9
_GONE: Final = 0.1
_AT_REST: Final = 3
"""Relaxations, after which a twentieth is left of what was along the k-th eigenvector."""
_QUICKLY: Final = 100
"""Steps: a hundredth of those that the paper's pictures have after a switch."""
_HARDLY_ALIGNED: Final = 0.5
"""Mean χ_k below which a projection onto the bulk is the step itself, for the most part."""


def aligned(raw: Raw, path: str) -> bool:
    """Whether the mean of χ_k along SGD, or another plain optimizer, is that of Phenomenon 1."""
    return mean(raw, path) >= ALIGNED


def aligned_late(raw: Raw, path: str) -> bool:
    """Whether it is in the second half."""
    return late_mean(raw, path) >= ALIGNED


# --- the critical experiment -------------------------------------------------------------------


def _spectra(raw: Raw, *parts: str) -> Iterator[tuple[list[float], list[float]]]:
    """The top k and the next k eigenvalues along SGD, where known; not of random parameters.

    Along the parts of a run that are named, or up to its switch and from there on.
    """
    phases = raw.get("phases", raw)
    for name in parts or ("warmup", "SGD"):
        part = phases[name]
        rows = zip(part["step"], part["eigenvalues"], part["next_eigenvalues"], strict=True)
        for step, top, following in rows:
            known = isinstance(following, list) and following and statistics.fmean(following) > 0
            if step and known:
                yield top, following


def rank_gap(raw: Raw) -> float:
    """Median along SGD of mean top k over mean next k eigenvalues."""
    return median_of(
        statistics.fmean(top) / statistics.fmean(following) for top, following in _spectra(raw)
    )


def gap_beyond_smooth(raw: Raw, *parts: str) -> float:
    """Median along SGD, or some parts of it, of geometric mean top k over next k, over that of 1/i.

    That is 2.45 for k = 2, and 3.36 for k = 10. A geometric mean, since one λ_1 of 20 makes the
    mean of ten eigenvalues 2.9 of which the others are all 1.
    """
    return median_of(
        geometric_mean(top) / geometric_mean(following) / _smooth_gap(len(top))
        for top, following in _spectra(raw, *parts)
        if min(following) > 0
    )


def parted_in_eval_mode(raw: Raw) -> float:
    """The share of what log `gap_beyond_smooth` lacks to 0 in train mode that eval mode brings.

    NaN where 0.05 or less is lacking.
    """
    in_train, in_eval = (math.log(gap_beyond_smooth(raw, mode)) for mode in ("train", "eval"))
    return (in_eval - in_train) / -in_train if in_train < -0.05 else math.nan


def _smooth_gap(k: int) -> float:
    inverse = [1 / i for i in range(1, 2 * k + 1)]
    return geometric_mean(inverse[:k]) / geometric_mean(inverse[k:])


def gap_at_k(raw: Raw, *parts: str) -> float:
    """Median along SGD of λ_k / λ_{k+1}, over the geometric mean of the others up to λ_2k."""
    found = []
    for top, following in _spectra(raw, *parts):
        steps, at = len(top) + len(following) - 2, top[-1] / following[0]
        if steps and min(following) > 0:
            found.append(at / (top[0] / following[-1] / at) ** (1 / steps))
    return median_of(found)


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last fifth; what is no number is infinite."""
    fifth = max(1, len(losses) // 5)
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return mean_of(known[:fifth]), mean_of(known[-fifth:])


def decrease(losses: Sequence[float]) -> float:
    """From the mean over the first fifth to that over the last."""
    first, last = _ends(losses)
    return first - last


def over_scatter(raw: Raw, branch: str) -> float:
    """The decrease of the loss over its scatter within the two fifths; NaN where it diverged."""
    losses = raw["losses"][branch]
    fifth, fall = max(1, len(losses) // 5), decrease(losses)
    if not math.isfinite(fall):
        return math.nan
    scatter = math.hypot(statistics.pstdev(losses[:fifth]), statistics.pstdev(losses[-fifth:]))
    return fall / scatter if scatter else fall * math.inf


def achieved(raw: Raw, branch: str, plain: str = "SGD", chi: str = "") -> float:
    """The decrease of the loss in a branch, over that of the plain optimizer.

    Losses go up and down, at the edge of stability above all. Between means over fifths, a branch
    that stands still scores 0, wherever in the ups and downs it began.

    Args:
        raw: of the run.
        branch: a projection of the plain optimizer.
        plain: see there.
        chi: column of χ_k along the plain optimizer; empty where nothing is asked of it.

    Returns:
        The share, at most 2, and at least -1, which is that of what climbs as much, or diverges in
        the bulk: a mean over seeds of which one is -60 says nothing of the others. NaN where the
        plain optimizer does not lower its loss by its scatter within fifths, so that shares of that
        are noise; where the branch is so short that the dominant directions have not come to rest,
        and what is random at the switch is much of the decrease; where mean χ_k is below 0.5, since
        what is hardly aligned fails in the dominant subspace of itself; and where a Dom branch
        diverges, which is not that it fails to lower the loss.
    """
    losses = raw["losses"]
    at_rest = not raw["relaxations"] < _AT_REST  # with momentum none are told, which is NaN
    clear = over_scatter(raw, plain) >= 1 and at_rest
    if not clear or not _half_aligned(raw, chi):
        return math.nan
    share = decrease(losses[branch]) / decrease(losses[plain])
    if branch.startswith("Dom") and not math.isfinite(share):
        return math.nan
    return float(np.clip(share, -1, 2))


def _half_aligned(raw: Raw, chi: str) -> bool:
    """Whether mean χ_k is 0.5; true where no column is told."""
    return not chi or mean(raw, chi) >= _HARDLY_ALIGNED


def loss_steps(raw: Raw, branch: str) -> Sequence[int]:
    """The steps that the losses of a branch are of."""
    every, number = raw.get("loss_every", 1), len(raw["losses"][branch])
    return range(raw["switch_step"], raw["switch_step"] + every * number, every)


def relative_decrease(raw: Raw, branch: str) -> float:
    """The decrease of the loss in a branch, over its first loss."""
    losses = raw["losses"][branch]
    return float(decrease(losses) / losses[0])


def gained_late(raw: Raw, branch: str, chi: str) -> float:
    """How much of its distance from the switch a branch gains in its second half, over SGD's.

    NaN where mean χ_k is below 0.5, as in ``achieved``, and for a branch that stopped before SGD.
    """
    if not _half_aligned(raw, chi):
        return math.nan
    if len(raw["phases"][branch]["distance"]) < len(raw["phases"]["SGD"]["distance"]):
        return math.nan
    gained = {
        name: raw["final_distance"][name] - raw["phases"][name]["distance"][rows // 2]
        for name in (branch, "SGD")
        for rows in [len(raw["phases"][name]["distance"]) + 1]
    }
    return float(gained[branch] / gained["SGD"])


def gone(raw: Raw, branch: str, chi: str) -> float:
    """The distance of a branch from the switch, over SGD's; NaN as in ``gained_late``."""
    if not _half_aligned(raw, chi):
        return math.nan
    return float(raw["final_distance"][branch] / raw["final_distance"]["SGD"])


def epoch_ends_over_drawn(raw: Raw) -> float:
    """χ_k at ends of shuffled epochs, over that with replacement from the same point."""
    return in_epoch(raw, 0) / mean_of(raw["phases"]["SGD"]["chi_gradient"])


def in_epoch(raw: Raw, place: int) -> float:
    """Mean χ_k in shuffled epochs: at their ends, where the place is 0, or half-way."""
    part = raw.get("shuffled", {"place": [], "chi_gradient": []})
    rows = zip(part["place"], part["chi_gradient"], strict=True)
    return mean_of(chi for at, chi in rows if at == place)


def reached(raw: Raw) -> bool:
    """Whether the switch is where the moving average of χ_k reached 0.95."""
    return str(raw["switch_reason"]).startswith("the average")


def aligned_from(raw: Raw) -> float:
    """The first measured step after 0 from which on χ_k is aligned, up to the switch.

    Aligned is that it is 0.9 there, and its median from there on; infinite where it never is.
    """
    warmup = raw["phases"]["warmup"]
    for number, (step, chi) in enumerate(zip(warmup["step"], warmup["chi_gradient"], strict=True)):
        later = median_of(warmup["chi_gradient"][number:])
        if step and min(chi, later) >= ALIGNED:
            return float(step)
    return math.inf


def before_switch(raw: Raw) -> Iterator[Curve]:
    """The loss before the switch, for as many steps as the branches have."""
    switch, sgd, before = raw["switch_step"], raw["losses"]["SGD"], raw["phases"]["warmup"]
    first = switch - raw.get("loss_every", 1) * len(sgd)
    shown = [i for i, step in enumerate(before["step"]) if step >= first]
    steps, losses = ([before[name][i] for i in shown] for name in ("step", "loss"))
    yield Curve([*steps, switch], [*losses, sgd[0]])


def joined(raw: Raw, name: str, *parts: str) -> Iterator[Curve]:
    """A column along one part of a run after the other."""
    phases = raw.get("phases", raw)
    x, y = ([v for part in parts for v in phases[part][each]] for each in ("step", name))
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


def of_each(raw: Raw, counts: str, label: str) -> Iterator[Curve]:
    """Yields χ_k along SGD, for each number of examples, in all or of a minibatch."""
    for number, count in enumerate(raw[counts]):
        part = raw[str(count)]
        shade = number / max(len(raw[counts]) - 1, 1)
        yield Curve(part["step"], part["chi_gradient"], label.format(count), shade)


def more_aligned_on_more(raw: Raw) -> float:
    """How much larger χ_k is on average on the most examples than on the fewest."""
    fewest, *_, most = raw["counts"]
    return mean(raw, f"{most}.chi_gradient") - mean(raw, f"{fewest}.chi_gradient")


def aligned_with(raw: Raw, place: int) -> float:
    """Mean χ_k over the second half after the switch, with one of the sizes of minibatches."""
    return late_mean(raw, f"{raw['batch_sizes'][place]}.chi_gradient")


def aligned_by_noise(raw: Raw) -> float:
    """How much of what χ_k lacks to 0.9 the smallest minibatches bring, over the second half.

    NaN where 0.05 or less is lacking with those before the switch.
    """
    before, noisier = (aligned_with(raw, place) for place in (0, -1))
    lacking = ALIGNED - before
    return (noisier - before) / lacking if lacking > 0.05 else math.nan


# --- noise -------------------------------------------------------------------------------------


def late_alignment(raw: Raw, name: str) -> float:
    """Mean χ_k over the second half after a switch."""
    part = raw[name]
    rows = zip(part["step"], part["chi_gradient"], strict=True)
    return late_mean({"chi": [chi for step, chi in rows if step > part["switch_step"]]}, "chi")


def aligned_before(raw: Raw, name: str) -> bool:
    """Whether χ_k is at least 0.9 where SGD is switched off, or at most 0.1 where GD is."""
    part = raw[name]
    rows = zip(part["step"], part["chi_gradient"], strict=True)
    *_, chi = (chi for step, chi in rows if step <= part["switch_step"])
    return bool(chi >= ALIGNED if name.startswith("SGD") else chi <= _GONE)


def turned_within(raw: Raw, name: str) -> float:
    """How many steps after a switch χ_k has come to 0.1, or to 0.9 where SGD takes over.

    It is the first measured step at which it is there, and its median from there on; infinite where
    there is none.
    """
    part, sign = raw[name], -1 if name.startswith("SGD") else 1
    rows = zip(part["step"], part["chi_gradient"], strict=True)
    after = [(step - part["switch_step"], chi) for step, chi in rows if step > part["switch_step"]]
    bound = sign * (ALIGNED if sign > 0 else _GONE)
    for number, (step, chi) in enumerate(after):
        if min(sign * chi, sign * median_of(later for _, later in after[number:])) >= bound:
            return float(step)
    return math.inf


def jump(raw: Raw, name: str) -> float:
    """The largest relative change of λ_1, or of the loss, within 100 steps after either switch."""
    changes = []
    for switch in ("SGD to GD", "GD to SGD"):
        part = raw[switch]
        after = [
            (step, value[0] if isinstance(value, list) else value)
            for step, value in zip(part["step"], part[name], strict=True)
            if step >= part["switch_step"]
        ]
        changes += [
            abs(later / value - 1)
            for number, (step, value) in enumerate(after)
            for at, later in after[number + 1 :]
            if at - step <= _QUICKLY
        ]
    return math.nan if any(map(math.isnan, changes)) else float(max(changes))


# --- momentum ----------------------------------------------------------------------------------


def update_over_sgd(raw: Raw) -> float:
    """Mean χ_k of the plain optimizer's update, over that of SGD's from the same point.

    NaN where the gradient is not half in the dominant subspace along SGD either.
    """
    if not _half_aligned(raw, "SGD.chi_gradient"):
        return math.nan
    return mean(raw, "plain.chi_update") / mean(raw, "SGD.chi_update")


# --- edge of stability -------------------------------------------------------------------------


def sharpness_at_edge(raw: Raw, threshold: str) -> float:
    """Median of λ_1 over the threshold, in the last quarter before the switch."""
    part = raw["before"]
    late = slice(3 * len(part["step"]) // 4, None)
    pairs = zip(part["eigenvalues"][late], part[threshold][late], strict=True)
    return float(statistics.median(row[0] / edge for row, edge in pairs))


def nearer_to_sam(raw: Raw) -> float:
    """Distance of λ_1 from SAM's edge over that from GD's, 2/η, both as ratios; NaN below 0."""
    of_sam, of_gd = (sharpness_at_edge(raw, edge) for edge in ("sam_edge", "threshold"))
    if min(of_sam, of_gd) <= 0:
        return math.nan
    return abs(math.log(of_sam)) / abs(math.log(of_gd))


def sharpness_at_printed_edge(raw: Raw) -> float:
    """Median of λ_1 over SAM's edge as printed, in the last quarter before the switch.

    Printed is n/(2ρ) · (√(1 + 8/(ηn)) − 1) for a gradient of norm n, without the ρ below the root.
    """
    part = raw["before"]
    edges = [
        norm / (2 * raw["rho"]) * (math.sqrt(1 + 4 * threshold / norm) - 1)
        for norm, threshold in zip(part["gradient_norm"], part["threshold"], strict=True)
    ]
    return sharpness_at_edge({"before": part | {"printed": edges}}, "printed")


def sharpness_with_edge(raw: Raw) -> float:
    """Rank correlation of λ_1 and SAM's edge, in the second half before the switch."""
    part = raw["before"]
    top = second_half([row[0] for row in part["eigenvalues"]])
    return float(stats.spearmanr(top, second_half(part["sam_edge"])).statistic)


def edge_with(raw: Raw, name: str) -> float:
    """Rank correlation of SAM-edge and another column, before the switch."""
    part = raw["before"]
    return float(stats.spearmanr(part["sam_edge"], part[name]).statistic)


def sharpened(raw: Raw) -> float:
    """λ_1 where it settles, the median of the last quarter before the switch, over the start's."""
    top = [row[0] for row in raw["before"]["eigenvalues"]]
    return float(statistics.median(top[3 * len(top) // 4 :]) / top[0])


def left_below_the_edge(raw: Raw, branch: str, plain: str) -> float:
    """Mean loss over the last fifth of a branch in the bulk, over the plain optimizer's.

    NaN where λ_{k+1} comes to 2/η along the branch: then the bulk is unstable too.
    """
    part = raw[branch]
    rows = zip(part["next_eigenvalues"], part["threshold"], strict=True)
    if any(following[0] >= edge for following, edge in rows):
        return math.nan
    (_, last), (_, last_of_plain) = (_ends(raw["losses"][name]) for name in (branch, plain))
    return last / last_of_plain


def aligned_at_the_edge(raw: Raw, threshold: str, chi: str) -> float:
    """Mean χ_k where λ_1 is at the edge, 0.95 of it or more, less where it is below 0.8 of it.

    Before the switch, without step 0, where parameters are random; NaN where either has no row.
    """
    part, near, far = raw["before"], [], []
    rows = zip(part["eigenvalues"], part[threshold], part[chi], strict=True)
    for values, edge, share in list(rows)[1:]:
        if values[0] >= 0.95 * edge:
            near.append(share)
        elif values[0] < 0.8 * edge:
            far.append(share)
    return mean_of(near) - mean_of(far)


# --- effective rates ---------------------------------------------------------------------------


def plain_rate(raw: Raw) -> float:
    """The largest relative deviation of GD's two mean rates from its learning rate."""
    return float(
        max(abs(raw["GD(-m)"][rate] / raw["lr"] - 1) for rate in ("mean_dom_lr", "mean_bulk_lr"))
    )


def rate_and_speed(raw: Raw, rate: str = "bulk_lr") -> float:
    """Rank correlation, over the four optimizers, of a mean rate and −log of the loss."""
    rates = [raw[name][f"mean_{rate}"] for name in OPTIMIZERS]
    speeds = [-raw[name]["mean_log_loss"] for name in OPTIMIZERS]
    return float(round(stats.spearmanr(rates, speeds).statistic, 9))


def bulk_rather_than_dom(raw: Raw) -> float:
    """How much more Bulk-LR goes with speed than Dom-LR does."""
    return rate_and_speed(raw) - rate_and_speed(raw, "dom_lr")


def from_printed(raw: Raw, path: str, printed: float, deviation: float) -> float:
    """How far a mean rate is from a printed one, in deviations along training, as printed."""
    return (value(raw, path) - printed) / deviation
