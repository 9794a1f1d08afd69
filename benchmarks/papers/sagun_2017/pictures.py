"""What no data can say of the pictures and tables of `sagun_2017`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes

import subspace_optim as so
from benchmarks.papers.drawing import LOOK, first_of
from benchmarks.papers.reproduction import Raw, RawOfSeeds, Rows
from benchmarks.papers.sagun_2017.analysis import (
    COUNTS,
    OFFSETS,
    Offsets,
    agreeing,
    beside,
    later_weights,
    left_edge_distances,
    negative_of_later,
    next_clusters,
    other_covariance,
    other_edge_distance,
    parameters_of,
    residual_share,
    right_edge_distances,
)
from benchmarks.papers.sagun_2017.clusters import TABLE
from benchmarks.papers.tables import over_seeds

_PARTS: Final = {"parts-mnist": "MNIST", "parts-clusters": "ten clusters"}
_NUMBERS: Final = ("mean", "std", "cutoff")
_MOVED: Final = ("outlying", "bulk")


def table_clusters(raws: RawOfSeeds) -> Rows:
    """Returns all rows of Table 1, ours beside the paper's."""
    pairs = [
        pair for of_seeds in raws.values() for raw in of_seeds.values() for pair in beside(raw)
    ]
    both = [f"{name}: {whose}" for name in (*COUNTS, *_NUMBERS) for whose in ("paper", "ours")]
    rows = [["training", "size", "cov", "clusters", *both]]
    for (algorithm, activation, covariance, clusters), theirs in TABLE.items():
        ours = [row for row, printed in pairs if printed is theirs]
        cells = [f"{algorithm} {activation}", str(parameters_of(clusters)), f"{covariance:g}"]
        cells.append(str(clusters))
        for name in COUNTS:
            cells += [_or_dash(theirs.get(name)), listed(row[name] for row in ours)]
        for name in _NUMBERS:  # of the deviations the means are printed again
            value = theirs.get("mean" if name == "std" else name)
            cells += [_or_dash(value), over_seeds(row[name] for row in ours)]
        rows.append(cells)
    agreement = {"within one": (0, 0, 0), "within one, paper less 1 (gap) and 2 (ratio)": OFFSETS}
    return rows + [_agreement(raws, name, less) for name, less in agreement.items()]


def _agreement(raws: RawOfSeeds, name: str, less: Offsets) -> list[str]:
    """A row: how many of our counts are within one of those printed, less offsets."""
    found = [agreeing(raw, less) for of_seeds in raws.values() for raw in of_seeds.values()]
    cells = []
    for at in range(len(less)):
        answers = [answer for columns in found for answer in columns[at]]
        cells += ["", f"{sum(answers)} of {len(answers)}"]
    return [name, "", "", "", *cells, *[""] * 6]


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def listed(counts: Iterable[float]) -> str:
    """Returns the counts of the seeds, in order."""
    return ", ".join(f"{count:g}" for count in counts) or "–"


def _rows_by(of_seeds: Mapping[int, Raw], *names: str) -> dict[tuple[Any, ...], list[Raw]]:
    """The rows of all seeds that have the same in some columns."""
    found: dict[tuple[Any, ...], list[Raw]] = {}
    for row in (row for raw in of_seeds.values() for row in raw["rows"]):
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table_moves(raws: RawOfSeeds) -> Rows:
    """Returns how far other data move outliers and bulk, of networks of one size and one loss."""
    rows = [["from", "to", "classes", "elbow", "outliers, factor", "bulk, factor", "losses"]]
    for run, pairs_of, where in (
        ("more-clusters", next_clusters, ""),
        ("sgd-relu-even", other_covariance, ""),
        ("scattered", other_covariance, " across"),
        ("overlapping", other_covariance, " in the span"),
    ):
        found: dict[tuple[str, str, int], list[tuple[Raw, Raw]]] = {}
        for _, raw in sorted(raws[run].items()):
            for a, b in pairs_of(raw):
                key = (_data_of(a), _data_of(b) + where, b["classes"])
                found.setdefault(key, []).append((a, b))
        for (first, second, classes), pairs in found.items():
            factors = [over_seeds(b[name] / a[name] for a, b in pairs) for name in _MOVED]
            elbows = (
                f"{listed(a['elbow'] for a, _ in pairs)} → {listed(b['elbow'] for _, b in pairs)}"
            )
            losses = over_seeds(row["loss"] for pair in pairs for row in pair)
            rows.append([first, second, str(classes), elbows, *factors, losses])
    return rows


def _data_of(row: Raw) -> str:
    return f"{row['clusters']} clusters, covariance {row['covariance']:g}"


def table_growth(raws: RawOfSeeds) -> Rows:
    """Returns large eigenvalues by size, and how far edges are apart."""
    head = ["width", "P", "steps", "large eigenvalues, by seed", "distance of the right edge"]
    head += ["distance of the left edge from the next", "share below -λ_1 / 10⁶", "-λ_min / λ_1"]
    rows = [head]
    seeds = [raw for _, raw in sorted(raws["growth"].items())]
    if not seeds:
        return rows
    right, left = (
        [of_raw(raw) for raw in seeds] for of_raw in (right_edge_distances, left_edge_distances)
    )
    for at, network in enumerate(seeds[0]["networks"]):
        ours = [raw["networks"][at] for raw in seeds]
        steps = over_seeds(row["steps"] for row in ours)
        cells = [listed(row["outliers"] for row in ours)]
        cells += [
            over_seeds(distances[at] for distances in found if at < len(distances))
            for found in (right, left)
        ]
        cells.append(over_seeds(row["negative"] for row in ours if "negative" in row))
        cells.append(over_seeds(-row["left"][0] / row["right"][0] for row in ours))
        rows.append([str(network["width"]), f"{network['size']:,}", steps, *cells])
    steps = over_seeds(raw["other"]["steps"] for raw in seeds)
    other = over_seeds(map(other_edge_distance, seeds))
    return [*rows, ["other data", rows[-1][1], steps, "", other, "", "", ""]]


def table_negative(raws: RawOfSeeds) -> Rows:
    """Returns how many eigenvalues are negative, beside all weights and those of later layers."""
    rows = [["images", "width", "P", "later weights", "negative, of P", "of the later weights"]]
    for run, images in (("growth", "14x14"), ("small-images", "7x7")):
        seeds = [raw for _, raw in sorted(raws[run].items())]
        of_later = [negative_of_later(raw) for raw in seeds]
        for at, network in enumerate(seeds[0]["networks"] if seeds else []):
            if "negative" in network:
                sizes = [f"{network['size']:,}", f"{later_weights(network):,}"]
                of_all = over_seeds(raw["networks"][at]["negative"] for raw in seeds)
                shares = [of_all, over_seeds(found[at] for found in of_later)]
                rows.append([images, str(network["width"]), *sizes, *shares])
    return rows


def table_parts(raws: RawOfSeeds) -> Rows:
    """Returns how large the second part is, and how far the top eigenvalues of H and G agree."""
    rows = [["data", "step", "loss", "norm of H − G over that of G", "λ(G)/λ(H), the ten largest"]]
    for run, name in _PARTS.items():
        for (step,), found in _rows_by(raws[run], "step").items():
            ratios = [
                np.mean(np.array(row["gauss_newton"][:10]) / np.array(row["hessian"][:10]))
                for row in found
            ]
            cells = [[row["loss"] for row in found], map(residual_share, found), ratios]
            rows.append([name, f"{step:,}", *map(over_seeds, cells)])
    return rows


def table_trivial(raws: RawOfSeeds) -> Rows:
    """Returns zeros and near zeros of both matrices, beside what there must be."""
    rows = [["N", "trained", "P", "P − NC", "zeros of G", "|λ(H)| ≤ λ₁/1000", "loss"]]
    for (examples, trained), ours in _rows_by(raws["trivial"], "examples", "trained").items():
        first = [str(examples), "yes" if trained else "no"]
        first += [f"{ours[0][name]:,}" for name in ("size", "bound")]
        counts = [over_seeds((row[name] for row in ours), 4) for name in ("zeros", "hessian")]
        rows.append([*first, *counts, over_seeds(row["loss"] for row in ours)])
    return rows


def law(axes: Axes, of_seeds: Mapping[int, Raw], number: int) -> None:
    """Draws the density of the eigenvalues that are not zero, of the first seed, and its law."""
    raw = first_of(of_seeds)
    if raw is None:
        return
    ratio, values = raw["rows"][number]["ratio"], np.array(raw["rows"][number]["eigenvalues"])
    lower, upper = so.diagnostics.marchenko_pastur_edges(ratio)
    bins = np.linspace(0.9 * lower, 1.1 * upper, 25)
    heights, _ = np.histogram(values, bins)
    densities = heights / np.diff(bins) / len(values)
    axes.stairs(densities, bins, fill=True, color=LOOK.grid, label="measured")
    x = torch.linspace(lower, upper, 400, dtype=torch.float64)
    density = so.diagnostics.marchenko_pastur_density(x, ratio)
    axes.plot(x.tolist(), density.tolist(), color=LOOK.dominant, label="law")


def spikes(axes: Axes, of_seeds: Mapping[int, Raw]) -> None:
    """Draws the largest eigenvalues of all draws, and the theory."""
    rows = [row for raw in of_seeds.values() for row in raw["rows"]]
    colours = (LOOK.dominant, LOOK.bulk, LOOK.third, LOOK.fourth)
    for ratio, colour in zip(sorted({row["ratio"] for row in rows}), colours, strict=False):
        ours = [row for row in rows if row["ratio"] == ratio]
        x = np.linspace(0, 1.1 * max(row["spike"] for row in ours), 100)
        theory = [so.diagnostics.spiked_eigenvalue(1 + s * ratio**0.5, ratio) for s in x]
        axes.plot(x, theory, color=colour, label=f"γ = {ratio:g}")
        for row in ours:
            at = [row["spike"]] * len(row["largest"])
            axes.plot(at, row["largest"], linestyle="", marker=".", color=colour, alpha=0.6)
