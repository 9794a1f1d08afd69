"""What no data can say of the pictures and tables of `gur_ari_2018`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes

from benchmarks.papers.drawing import LOOK, first_of
from benchmarks.papers.gur_ari_2018.analysis import (
    SUMS,
    by_dimension,
    fractions_at,
    largest_components,
)
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.reductions import mean_of
from benchmarks.papers.reproduction import Raw, RawOfSeeds, Rows
from benchmarks.papers.tables import number

_PARTS: Final = ("first hidden layer", "second hidden layer", "top weights", "top biases")
_COLOURS: Final = (LOOK.dominant, LOOK.bulk, LOOK.third, LOOK.fourth)


def histogram(axes: Axes, of_seeds: Mapping[int, Raw]) -> None:
    """Draws all eigenvalues of the first seed, and triangles for the top k."""
    raw = first_of(of_seeds)
    if raw is not None:
        low, high = raw["edges"]
        edges = np.linspace(low, high, len(raw["counts"]) + 1)
        axes.stairs(raw["counts"], edges, color=LOOK.ink, lw=1.0)
        top = raw["eigenvalues"][: raw["k"]]
        axes.plot(top, [0.6] * len(top), "^", ms=4, color=LOOK.dominant)
        axes.set_yscale("log")


def anatomy(axes: Axes, of_seeds: Mapping[int, Raw], number: int) -> None:
    """Draws where the components of the first eigenvector are, at one of its steps."""
    raw = first_of(of_seeds)
    found = {} if raw is None else raw["anatomy"]
    if number < len(found.get("steps", ())):
        ends = np.cumsum([0, *found["sizes"]])
        for part, (low, high) in enumerate(
            zip(found["low"][number], found["high"][number], strict=True)
        ):
            edges = np.linspace(ends[part], ends[part + 1], len(low) + 1)
            base, label = np.array(low, dtype=float), _PARTS[part]
            look: dict[str, Any] = {"fill": True, "color": _COLOURS[part], "label": label}
            axes.stairs(np.array(high, dtype=float), edges, baseline=base, **look)


def table_1(raws: RawOfSeeds) -> Rows:
    """Returns Table 1, ours beside the paper's."""
    head = ["dataset", "model", "comment", "ours", "the paper's", "difference", "on test data"]
    rows = [[*head, "training accuracy", "own labels, on test data"]]
    for name, case in CASES.items():
        ours, tested, accuracy, own = (
            mean_of(raw.get(column, math.nan) for raw in raws[name].values())
            for column in ("mean_overlap", "mean_overlap_test", "accuracy", "mean_overlap_own")
        )
        numbers = (ours, case["paper"], ours - case["paper"], tested, accuracy, own)
        texts = [case[column] for column in ("dataset", "network", "comment")]
        rows.append([*texts, *map(number, numbers)])
    return rows


def table_of_dimensions(raws: RawOfSeeds) -> Rows:
    """Returns the means of Figures 3, 9 and 10 over all starts from step 100 on."""
    rows = [["run", "dimension", "mean overlap with later subspaces"]]
    titles = {"fc": "FC, MNIST", "resnet": "ResNet-18 (reduced), CIFAR-10"}
    for run, title in titles.items():
        raw = first_of(raws[run])
        for d in [] if raw is None else raw["preserved"]:
            kept = mean_of(by_dimension(each)[int(d)] for each in raws[run].values())
            rows.append([title, d, number(kept)])
    return rows


def table_of_parts(raws: RawOfSeeds) -> Rows:
    """Returns how large the components of the first eigenvector are in each part."""
    more = ["top weights over first layer: rms", "largest", "share of the last layer"]
    rows = [["step", *(f"rms, {part}" for part in _PARTS), *more]]
    raw = first_of(raws["fc"])
    if raw is not None:
        found = raw["anatomy"]
        columns = (found["steps"], found["rms"], largest_components(found), found["share"])
        for step, rms, largest, share in zip(*columns, strict=True):
            sizes = [f"{value:.2g}" for value in rms]
            ratios = [f"{each[-2] / each[0]:.1f}" for each in (rms, largest)]
            rows.append([str(step), *sizes, *ratios, number(sum(share[-2:]))])
    return rows


def table_along_eigenvectors(raws: RawOfSeeds) -> Rows:
    """Returns the sums that the paper gives beside Figure 11."""
    rows = [["step", "sum of c_i² over i", "ours", "the paper's", "difference"]]
    for (step, start, stop), paper in SUMS.items():
        found = [fractions_at(raw, step) for raw in raws["fc"].values()]
        ours = mean_of(math.fsum(each[start:stop]) if each else math.nan for each in found)
        numbers = (ours, paper, ours - paper)
        rows.append([str(step), f"{start + 1} to {stop}", *map(number, numbers)])
    return rows


def table_of_mixtures(raws: RawOfSeeds) -> Rows:
    """Returns the mixtures at the end of training, of the first seed."""
    head = ["k", "σ", "biases", "rank, σ = 0", "f_top, start", "f_top, end", "c_k²", "λ_k/λ_1"]
    rows = [[*head, "λ_{k+1}/λ_k"]]
    raw = first_of(raws["mixture"])
    for case in [] if raw is None else raw["cases"]:
        k, values = case["k"], case["eigenvalues"][-1]
        rank = dict(map(tuple, raw["ranks"]))[k] if raw else 0
        ends = (case["f_top"][0], case["f_top"][-1], case["fractions"][-1][-1])
        numbers = (*ends, values[k - 1] / values[0], values[k] / values[k - 1])
        start = [str(k), f"{case['noise']:g}", "yes" if case["bias"] else "no", str(rank)]
        rows.append([*start, *(number(each, ".3f") for each in numbers)])
    return rows
