"""The paper's figures and tables, from the raw figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.papers.drawing import LOOK, finished, first_of, grid, in_turn, line, mark, shade
from benchmarks.papers.gur_ari_2018.claims import (
    NETWORKS,
    VARIANTS,
    Array,
    by_dimension,
    first_trained,
    log_density,
    median,
    outliers_beyond_classes,
    since,
)
from benchmarks.papers.gur_ari_2018.runs import CASES
from benchmarks.papers.reproduction import Exhibit, Raw, RawOfSeeds, Rows, mean

_TITLES: Final = {
    "fc": "FC, MNIST",
    "convnet": "ConvNet, CIFAR-10",
    "resnet": "ResNet-18 (reduced), CIFAR-10",
    "fc-five": "FC, MNIST digits 0 to 4",
    "softmax": "(c) no hidden layer",
    "fc-softplus": "(d) softplus",
    "fc-slow": "(a) η = 0.01",
    "fc-batch-256": "(b) batches of 256",
    "fc-random": "(e) random labels",
    "convnet-adam": "(f) ConvNet, Adam",
    "spectrum": "digits",
    "spectrum-random": "random labels",
    "spectrum-parity": "even and odd",
    "spectrum-five": "digits 0 to 4",
}
_F_TOP: Final = r"$f_{\mathrm{top}}$"
_PARTS: Final = ("first hidden layer", "second hidden layer", "top weights", "top biases")
_INDEX: Final = "i (dashed: where the top k end)"
_COLOURS: Final = (LOOK.dominant, LOOK.bulk, LOOK.third, LOOK.fourth)


def _text(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


# --- Figures 1 to 3, 9 and 10 ------------------------------------------------------------------


def early_training(raws: RawOfSeeds) -> Figure:
    """Figure 1: f_top above, loss and accuracy below."""
    titles = [_TITLES[run] for run in NETWORKS] + [""] * len(NETWORKS)
    panels = grid(titles, len(NETWORKS))
    for above, below, run in zip(panels, panels[len(NETWORKS) :], NETWORKS, strict=False):
        for raw, first in in_turn(raws[run]):
            last = raw["saved"][-1]
            shown = [i for i, step in enumerate(raw["at"]) if step <= last]
            steps = [raw["at"][i] for i in shown]
            line(above, raw["saved"], raw["f_top"], first, color=LOOK.dominant)
            for name, colour in (("loss", LOOK.ink), ("accuracy", LOOK.third)):
                line(below, steps, [raw[name][i] for i in shown], first, name, color=colour)
        above.set(ylim=(0, 1.02), xlabel="step", ylabel=_F_TOP)
        below.set(ylim=(0, None), xlabel="step", ylabel="training loss, accuracy")
    return finished(panels)


def _starts(raw: Raw) -> list[int]:
    """The numbers of a few bases to start from: the first after some training, not the last."""
    last = len(raw["saved"]) - 2
    evenly = {round(i) for i in np.linspace(0, max(last, 0), 6)}
    return sorted(i for i in evenly | {first_trained(raw)} if i <= last)


def _from_each_start(axes: Axes, raw: Raw, matrix: list[list[float]]) -> None:
    """The overlap with later subspaces, a line for each start."""
    saved = raw["saved"]
    for i in _starts(raw):
        after = [step - saved[i] for step in saved[i:]]
        look = {"color": shade(i, len(saved) - 1), "marker": "o", "ms": 2.5}
        line(axes, after, matrix[i][i:], True, f"$t_1 = {saved[i]}$", **look)


def _label_overlaps(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.set(ylim=(0, 1.02), xlabel=r"$t_2 - t_1$", ylabel="overlap")


def _count_along(axes: Axes, xlabel: str) -> None:
    """Labels an axis along which there are whole numbers alone."""
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


def top_and_next(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figure 2: how long the top k and the next k subspaces last, for the first seed."""
    titles = [f"{_TITLES[run]}: {which} k" for run in runs for which in ("top", "next")]
    panels = grid(titles, 2, width=4.4)
    for number, run in enumerate(runs):
        raw = first_of(raws[run])
        if raw is not None:
            _from_each_start(panels[2 * number], raw, raw["preserved"][str(raw["k"])])
            _from_each_start(panels[2 * number + 1], raw, raw["next"])
    _label_overlaps(panels)
    return finished(panels)


def each_dimension(raws: RawOfSeeds, run: str) -> Figure:
    """Figures 9 and 10: how long top subspaces of several dimensions last, for the first seed."""
    raw = first_of(raws[run])
    dimensions = [2, 5, 9, 11, 15, 20] if raw is None else [int(d) for d in raw["preserved"]]
    if raw is not None:
        dimensions = [d for d in dimensions if d != raw["k"]]
    panels = grid([f"top {d} subspace" for d in dimensions], 3, width=3.8)
    for axes, d in zip(panels, dimensions, strict=True):
        if raw is not None:
            _from_each_start(axes, raw, raw["preserved"][str(d)])
    _label_overlaps(panels)
    return finished(panels)


def dimension(raws: RawOfSeeds) -> Figure:
    """Figure 3: the mean overlap with later subspaces against the dimension, by start."""
    runs = ("fc", "resnet")
    panels = grid([_TITLES[run] for run in runs], width=4.4)
    for axes, run in zip(panels, runs, strict=True):
        for raw, first in in_turn(raws[run]):
            for i in _starts(raw):
                means = by_dimension(raw, i)
                label = f"$t_1 = {raw['saved'][i]}$"
                colour = shade(i, len(raw["saved"]) - 1)
                line(axes, list(means), list(means.values()), first, label, color=colour)
            mark(axes, raw["k"])
        axes.set(ylim=(0, 1.02), ylabel="mean overlap")
        _count_along(axes, "dimension (dashed: k)")
    return finished(panels)


def table_of_dimensions(raws: RawOfSeeds) -> Rows:
    """Beside Figures 3, 9 and 10: means over all starts from step 100 on."""
    rows = [["run", "dimension", "mean overlap with later subspaces"]]
    for run in ("fc", "resnet"):
        raw = first_of(raws[run])
        for d in [] if raw is None else raw["preserved"]:
            kept = mean(by_dimension(each)[int(d)] for each in raws[run].values())
            rows.append([_TITLES[run], d, _text(kept)])
    return rows


def table_of_repeats(raws: RawOfSeeds) -> Rows:
    """Beside Figure 2: how sharply the two subspaces are known at the end of training."""
    rows = [["run", "top k, solved twice", "next k, solved twice"]]
    for run in (*NETWORKS, "fc-five"):
        repeats = [raw["repeat"] for raw in raws[run].values()]
        parts = [mean(repeat[part] for repeat in repeats) for part in ("top", "next")]
        rows.append([_TITLES[run], *(_text(part, 3) for part in parts)])
    return rows


# --- spectra -----------------------------------------------------------------------------------

_SPECTRA: Final = ("spectrum", "spectrum-random", "spectrum-parity", "spectrum-five")


def spectra(raws: RawOfSeeds) -> Figure:
    """Figure 4: all eigenvalues as a histogram, and the largest in order."""
    panels = grid([_TITLES[run] for run in _SPECTRA] + [""] * 4, 4, width=3.0)
    for histogram, scree, run in zip(panels, panels[4:], _SPECTRA, strict=False):
        raw = first_of(raws[run])
        if raw is not None:
            low, high = raw["edges"]
            edges = np.linspace(low, high, len(raw["counts"]) + 1)
            histogram.stairs(raw["counts"], edges, color=LOOK.ink, lw=1.0)
            top = raw["eigenvalues"][: raw["k"]]
            histogram.plot(top, [0.6] * len(top), "^", ms=4, color=LOOK.dominant)
            histogram.set_yscale("log")
        for each, first in in_turn(raws[run]):
            values = np.array(each["eigenvalues"][: 3 * each["k"]], dtype=float)
            order = range(1, len(values) + 1)
            shown = np.where(values > 0, values, np.nan)
            line(scree, order, shown, first, color=LOOK.ink, marker="o", ms=2.5)
            mark(scree, each["k"] + 0.5)
            scree.set_yscale("log")
        histogram.set(xlabel="eigenvalue (triangles: the top k)", ylabel="number")
        scree.set(ylabel=r"$\lambda_i$")
        _count_along(scree, _INDEX)
    return finished(panels)


def table_of_outliers(raws: RawOfSeeds) -> Rows:
    """Beside Figure 4: outliers of each seed."""
    rows = [["labels", "classes", "outliers, by seed", "the paper's", "training accuracy"]]
    for run in _SPECTRA:
        raw = first_of(raws[run])
        if raw is not None:
            seeds = raws[run]
            counts = [
                f"{raw['k'] + outliers_beyond_classes(seeds[seed]):.0f}" for seed in sorted(seeds)
            ]
            accuracy = mean(each["accuracy"] for each in seeds.values())
            paper = "–" if run == "spectrum-five" else str(raw["k"])
            rows.append([_TITLES[run], str(raw["k"]), " ".join(counts), paper, _text(accuracy)])
    return rows


def right_edge(raws: RawOfSeeds) -> Figure:
    """Figure 5: the density of log eigenvalues at the right edge, and a Gaussian for the top k."""
    (axes,) = grid([""], width=5.6, height=3.2)
    for raw, first in in_turn(raws["right-edge"]):
        values, k = np.log10(np.array(raw["eigenvalues"], dtype=float)), raw["k"]
        x = np.linspace(values.min() - 0.1, values.max() + 0.1, 400)
        line(axes, x, log_density(raw, x), first, "density", color=LOOK.ink)
        if first:
            top = values[:, :k]
            fit = _normal(x, float(top.mean()), float(top.std())) * k / values.shape[1]
            line(axes, x, fit, first, "log-normal, top k", color=LOOK.dominant, ls="--")
            middle = float(values[:, k - 1].mean())
            axes.axvline(middle, color=LOOK.bulk, lw=1, ls=":", label=f"mean of the {k}th")
    axes.set(xlabel=r"$\log_{10} \lambda$", ylabel="density")
    return finished([axes])


def _normal(x: Array, mean: float, deviation: float) -> Array:
    density: Array = np.exp(-0.5 * np.square((x - mean) / deviation))
    return density / (deviation * math.sqrt(2 * math.pi))


# --- the first eigenvector and eigenvalue ------------------------------------------------------


def first_eigenvector(raws: RawOfSeeds) -> Figure:
    """Figure 6: its components along the network, at four steps, for the first seed."""
    raw = first_of(raws["fc"])
    steps = [] if raw is None else raw["anatomy"]["steps"]
    panels = grid([f"step {step}" for step in steps] or [""], 2 if steps else 1, width=4.4)
    for number, axes in enumerate(panels):
        if raw is not None:
            found, start = raw["anatomy"], 0
            for part, size in enumerate(found["sizes"]):
                low, high = found["low"][number][part], found["high"][number][part]
                edges = np.linspace(start, start + size, len(low) + 1)
                axes.stairs(
                    np.array(high, dtype=float),
                    edges,
                    baseline=np.array(low, dtype=float),
                    fill=True,
                    color=_COLOURS[part],
                    label=_PARTS[part],
                )
                start += size
        axes.set(xlabel="parameter", ylabel="components, from least to largest")
    return finished(panels, columns=2)


def last_layer(raws: RawOfSeeds) -> Figure:
    """Figure 7: its components in the last layer, for the first seed."""
    raw = first_of(raws["fc"])
    heads = {} if raw is None else raw["anatomy"]["head"]
    panels = grid([f"step {step}" for step in heads] or [""], width=4.4)
    for axes, head in zip(panels, heads.values(), strict=False):
        biases = 0 if raw is None else raw["anatomy"]["sizes"][-1]
        weights = len(head) - biases
        values = np.array(head, dtype=float)
        axes.plot(range(weights), values[:weights], lw=0.5, color=_COLOURS[2], label=_PARTS[2])
        axes.plot(range(weights, len(head)), values[weights:], color=_COLOURS[3], label=_PARTS[3])
    for axes in panels:
        axes.set(xlabel="parameter of the last layer", ylabel="component")
    return finished(panels)


def table_of_parts(raws: RawOfSeeds) -> Rows:
    """Beside Figures 6 and 7: how large the components are in each part."""
    rows = [["step", *(f"rms, {part}" for part in _PARTS), "top weights over first layer", "share"]]
    raw = first_of(raws["fc"])
    if raw is not None:
        found = raw["anatomy"]
        for step, rms, share in zip(found["steps"], found["rms"], found["share"], strict=True):
            sizes = [f"{value:.2g}" for value in rms]
            rows.append([str(step), *sizes, f"{rms[2] / rms[0]:.1f}", _text(sum(share[-2:]))])
    rows[0][-1] = "share of the last layer"
    return rows


def largest_eigenvalue(raws: RawOfSeeds) -> Figure:
    """Figure 8: the largest eigenvalue along training."""
    runs = ("fc", "resnet")
    panels = grid([_TITLES[run] for run in runs], width=4.0)
    for axes, run in zip(panels, runs, strict=True):
        for raw, first in in_turn(raws[run]):
            line(axes, raw["at"], raw["largest"], first, color=LOOK.dominant)
        scale = "log" if run == "resnet" else "linear"
        axes.set(yscale=scale, xlabel="step", ylabel=r"$\lambda_1$")
    return finished(panels)


# --- Figures 11 and 12, Table 1 ----------------------------------------------------------------

_STEPS: Final = (0, 50, 100, 200)


def along_eigenvectors(raws: RawOfSeeds) -> Figure:
    """Figure 11: the part of the gradient along each eigenvector, at four steps."""
    panels = grid([f"step {step}" for step in _STEPS], 2)
    for axes, step in zip(panels, _STEPS, strict=True):
        for raw, first in in_turn(raws["fc"]):
            if step in raw["saved"]:
                fractions = raw["fractions"][raw["saved"].index(step)]
                order = range(1, len(fractions) + 1)
                line(axes, order, fractions, first, color=LOOK.dominant, marker="o", ms=3)
                mark(axes, raw["k"] + 0.5)
        axes.set(ylabel=r"$c_i^2$")
        _count_along(axes, _INDEX)
    return finished(panels)


def table_along_eigenvectors(raws: RawOfSeeds) -> Rows:
    """Beside Figure 11: the sums that the paper gives."""
    wanted = ((0, 0, 20, 0.20), (50, 0, 20, 0.94), (50, 0, 10, 0.93), (50, 10, 20, 0.01))

    def total(raw: Raw, step: int, start: int, stop: int) -> float:
        if step not in raw["saved"]:
            return math.nan
        return math.fsum(raw["fractions"][raw["saved"].index(step)][start:stop])

    rows = [["step", "sum of c_i² over i", "ours", "the paper's", "difference"]]
    for step, start, stop, paper in wanted:
        ours = mean(total(raw, step, start, stop) for raw in raws["fc"].values())
        name = f"{start + 1} to {stop}"
        rows.append([str(step), name, _text(ours), _text(paper), _text(ours - paper)])
    return rows


def variants(raws: RawOfSeeds) -> Figure:
    """Figure 12: f_top in six other trainings."""
    runs = sorted(VARIANTS, key=lambda run: _TITLES[run])
    panels = grid([_TITLES[run] for run in runs], 3)
    for axes, run in zip(panels, runs, strict=True):
        for raw, first in in_turn(raws[run]):
            line(axes, raw["saved"], raw["f_top"], first, color=LOOK.dominant)
        axes.set(ylim=(0, 1.02), xlabel="step", ylabel=_F_TOP)
    return finished(panels)


def table_1(raws: RawOfSeeds) -> Rows:
    """Table 1: ours beside the paper's."""
    head = ["dataset", "model", "comment", "ours", "the paper's", "difference", "on test data"]
    rows = [[*head, "training accuracy"]]
    for name, case in CASES.items():
        ours, tested, accuracy = (
            mean(raw[column] for raw in raws[name].values())
            for column in ("mean_overlap", "mean_overlap_test", "accuracy")
        )
        numbers = (ours, case.paper, ours - case.paper, tested, accuracy)
        rows.append([case.dataset, case.network, case.comment, *map(_text, numbers)])
    return rows


def table_of_random_vectors(raws: RawOfSeeds) -> Rows:
    """Section 2.2: overlaps of g and of random vectors, medians from step 100 on."""
    rows = [["run", "g", "random, top subspace", "equation 4", "random", "ratio of decreases"]]

    def estimate(raw: Raw) -> float:
        values = since(raw, "eigenvalues").reshape(-1, 2 * raw["k"])[:, : raw["k"]]
        return median(values.sum(axis=1) / np.sqrt(raw["k"] * np.square(values).sum(axis=1)))

    measures = (
        lambda raw: median(since(raw, "overlap_there")),
        lambda raw: median(since(raw, "random_in_top")),
        estimate,
        lambda raw: median(since(raw, "random")),
        lambda raw: median(since(raw, "decrease")),
    )
    for run in (*NETWORKS, "fc-five"):
        numbers = [mean(map(measure, raws[run].values())) for measure in measures]
        rows.append([_TITLES[run], *map(_text, numbers)])
    return rows


def other_classes(raws: RawOfSeeds) -> Figure:
    """Five classes: f_top, and what is kept of the top 5 and of the next 5."""
    panels = grid(["f_top, k = 5", "top 5 subspace", "next 5 subspace"], width=3.8)
    for raw, first in in_turn(raws["fc-five"]):
        line(panels[0], raw["saved"], raw["f_top"], first, color=LOOK.dominant)
        if first:
            _from_each_start(panels[1], raw, raw["preserved"][str(raw["k"])])
            _from_each_start(panels[2], raw, raw["next"])
    panels[0].set(ylim=(0, 1.02), xlabel="step", ylabel=_F_TOP)
    _label_overlaps(panels[1:])
    return finished(panels)


# --- the solvable model ------------------------------------------------------------------------


def closed_forms(raws: RawOfSeeds) -> Figure:
    """Section 3: gradient descent on two samples beside the closed forms, for the first seed."""
    titles = ["lead of the right logit", "gradient", "Hessian", "relative errors"]
    panels = grid(titles, 2, width=4.2)
    raw = first_of(raws["two-samples"])
    if raw is not None:
        time = np.array(raw["time"], dtype=float)
        lead, flow = (np.array(raw[name], dtype=float)[:, 0] for name in ("lead", "flow"))
        norm = np.array(raw["norm"], dtype=float) * time
        values = np.array(raw["eigenvalues"], dtype=float) * time[:, None]
        panels[0].plot(time, lead, color=LOOK.ink, lw=2.5, alpha=0.4, label="gradient descent")
        panels[0].plot(time, flow, "--", color=LOOK.dominant, label=r"$u + e^u = \eta t + c$")
        panels[0].plot(time, np.log(time), ":", color=LOOK.bulk, label=r"$\log \eta t$")
        panels[1].plot(time, norm, color=LOOK.ink, label=r"$\eta t\,\|g\|$")
        panels[1].axhline(1, ls="--", color=LOOK.dominant, label="corrected")
        panels[1].axhline(4, ls=":", color=LOOK.bulk, label="as printed")
        panels[2].plot(time, values[:, 0], color=LOOK.ink, label=r"$\eta t\,\lambda_1$")
        panels[2].plot(time, values[:, 1], "--", color=LOOK.dominant, label=r"$\eta t\,\lambda_2$")
        panels[2].plot(time, values[:, 2], ":", color=LOOK.bulk, label=r"$\eta t\,\lambda_3$")
        for name, colour, dashes in (
            ("gradient", LOOK.dominant, "-"),
            ("gradient_printed", LOOK.bulk, "--"),
            ("trajectory", LOOK.third, "-."),
        ):
            errors = np.array(raw[name], dtype=float)
            label = name.replace("_", ", ")
            panels[3].plot(time, errors, dashes, color=colour, label=label)
        panels[3].set_yscale("log")
    for axes, ylabel in zip(panels, ("u", "", "", "error of the late form"), strict=True):
        axes.set(xscale="log", xlabel=r"$\eta t$", ylabel=ylabel)
    return finished(panels)


def mixtures(raws: RawOfSeeds) -> Figure:
    """Section 3: f_top with noise, the k-th eigenvalue over the next, and c_k² with biases."""
    titles = ["σ = 0.02: f_top", "no noise: the top k emerge", "biases: the smallest of the top k"]
    panels = grid(titles, width=3.6)
    for raw, first in in_turn(raws["mixture"]):
        for case in raw["cases"]:
            k, steps = case["k"], [max(step, 0.5) for step in case["step"]]
            name = f"k = {k}" + (", σ = 0.02" if case["noise"] else "")
            colour = {2: LOOK.dominant, 5: LOOK.bulk, 10: LOOK.third}.get(k, LOOK.ink)
            look = {"color": colour, "ls": "--" if case["noise"] else "-"}
            values = np.array(case["eigenvalues"], dtype=float)
            if case["bias"]:
                last = np.array(case["fractions"], dtype=float)[:, -1]
                line(panels[2], steps, last, first, name, **look)
            elif case["noise"]:
                line(panels[0], steps, case["f_top"], first, f"k = {k}", color=colour)
            elif k > 2:
                line(panels[1], steps, values[:, k - 1] / values[:, k], first, name, **look)
    labels = (_F_TOP, r"$\lambda_k / \lambda_{k+1}$", r"$c_k^2$")
    for axes, ylabel in zip(panels, labels, strict=True):
        axes.set(xscale="log", xlabel="step", ylabel=ylabel)
    return finished(panels, columns=2)


def table_of_mixtures(raws: RawOfSeeds) -> Rows:
    """The mixtures at the end of training, the first seed."""
    head = ["k", "σ", "biases", "rank, σ = 0", "f_top, start", "f_top, end", "c_k²", "λ_k/λ_1"]
    rows = [[*head, "λ_{k+1}/λ_k"]]
    raw = first_of(raws["mixture"])
    if raw is not None:
        ranks = dict(map(tuple, raw["ranks"]))
        for case in raw["cases"]:
            k, values = case["k"], case["eigenvalues"][-1]
            numbers = (
                case["f_top"][0],
                case["f_top"][-1],
                case["fractions"][-1][-1],
                values[k - 1] / values[0],
                values[k] / values[k - 1],
            )
            biases = "yes" if case["bias"] else "no"
            start = [str(k), f"{case['noise']:g}", biases, str(ranks[k])]
            rows.append([*start, *(_text(number, 3) for number in numbers)])
    return rows


def newton_and_descent(raws: RawOfSeeds) -> Figure:
    """Equation 11 beside gradient descent and SGD, from one state."""
    (axes,) = grid([""], width=5.0, height=3.2)
    names = {
        "newton": ("low-rank Newton", LOOK.dominant, "-"),
        "gd": ("gradient descent", LOOK.bulk, "--"),
        "sgd": ("SGD", LOOK.third, ":"),
    }
    for raw, first in in_turn(raws["newton"]):
        for name, (label, colour, dashes) in names.items():
            losses = raw["loss"][name]
            line(axes, range(len(losses)), losses, first, label, color=colour, ls=dashes)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    return finished([axes])


# --- the exhibits ------------------------------------------------------------------------------

EXHIBITS: Final = (
    Exhibit(
        "figure-1",
        "The fraction of the gradient in the top subspace, loss and accuracy",
        NETWORKS,
        draw=early_training,
        note=(
            "In the paper f_top starts small and quickly grows to nearly 1. Loss and accuracy are "
            "drawn up to the last step at which f_top was measured."
        ),
    ),
    Exhibit(
        "table-1",
        "Mean overlaps of g and Hg over the last 1,000 steps",
        tuple(CASES),
        table=table_1,
        note=(
            "In the paper there are no figures for test data: the text says that the overlap is "
            "large there as well, but for random labels."
        ),
    ),
    Exhibit(
        "overlaps-of-random-vectors",
        "Overlaps of the gradient and of random vectors with their products (section 2.2)",
        (*NETWORKS, "fc-five"),
        table=table_of_random_vectors,
        note=(
            "In the paper the estimate for a vector in the top subspace, from eigenvalues in "
            "proportion to i, is 0.87; our column for equation 4 has the eigenvalues that were "
            "found. The last column is by how much a small step along g_top lowers the loss, over "
            "what one along g does."
        ),
    ),
    Exhibit(
        "figure-2",
        "Overlap of top subspaces of two steps, and of the subspaces of the next k",
        NETWORKS,
        draw=partial(top_and_next, runs=NETWORKS),
        note=(
            "In the paper the overlap of the top subspaces remains significant from about step 100 "
            "on, and that of the next ones decays quickly."
        ),
    ),
    Exhibit(
        "figure-2-accuracy",
        "Two solves at one point, from other random starts",
        (*NETWORKS, "fc-five"),
        table=table_of_repeats,
        note="What is below 1 here is due to the tolerance of the solves, not to training.",
    ),
    Exhibit(
        "figure-3",
        "Mean overlap with later top subspaces against their dimension",
        ("fc", "resnet"),
        draw=dimension,
        table=table_of_dimensions,
        note=(
            "In the paper the overlap hardly depends on the dimension up to 9, and falls from 10 "
            "on. The table has means over all starts from step 100 on."
        ),
    ),
    Exhibit(
        "figure-4",
        "All eigenvalues of a small network, for four sets of labels",
        _SPECTRA,
        draw=spectra,
        table=table_of_outliers,
        note=(
            "In the paper there are 10 large eigenvalues for digits and for random labels, and 2 "
            "for even and odd; five digits are ours. One outlier fewer than classes counts as "
            "well: for even and odd, where k − 1 = 1, that is a weak test, since any spectrum has "
            "a largest eigenvalue. The histograms are those of the first seed."
        ),
    ),
    Exhibit(
        "figure-5",
        "The density at the right edge of the spectrum, over realisations",
        ("right-edge",),
        draw=right_edge,
        note=(
            "In the paper the density has a dip near the 100th eigenvalue of CIFAR-100, and the "
            "part of the top subspace is nearly Gaussian. Here there are 20 classes, and the dip "
            "is to the right of the mean of the 20th, between it and the 19th."
        ),
    ),
    Exhibit(
        "figure-6",
        "The first eigenvector along the network",
        ("fc",),
        draw=first_eigenvector,
        table=table_of_parts,
        note=(
            "In the paper it changes along training and has components everywhere; the largest, "
            "those of the top weights, are only some 4 times the typical ones of the first layer."
        ),
    ),
    Exhibit(
        "figure-7",
        "The first eigenvector in the last layer",
        ("fc",),
        draw=last_layer,
        note="In the paper it is not sparse, no component dominates, and it changes in time.",
    ),
    Exhibit(
        "figure-8",
        "The largest eigenvalue along training",
        ("fc", "resnet"),
        draw=largest_eigenvalue,
        note="In the paper it grows at first, remains large during training, and then decays.",
    ),
    Exhibit(
        "figure-9",
        "Overlap of top subspaces of several dimensions: FC",
        ("fc",),
        draw=partial(each_dimension, run="fc"),
        note=(
            "In the paper 15 and 20 dimensions are significantly less preserved than the others, "
            "and 11 marginally less."
        ),
    ),
    Exhibit(
        "figure-10",
        "Overlap of top subspaces of several dimensions: ResNet-18",
        ("resnet",),
        draw=partial(each_dimension, run="resnet"),
        note="In the paper the same is said of ResNet-18 as of the FC network.",
    ),
    Exhibit(
        "figure-11",
        "The fraction of the gradient along each of the top 20 eigenvectors",
        ("fc",),
        draw=along_eigenvectors,
        table=table_along_eigenvectors,
        note=(
            "In the paper the gradient is spread over the first ten from step 50 on, and never has "
            "a significant part beyond."
        ),
    ),
    Exhibit(
        "figure-12",
        "The fraction of the gradient in the top subspace, for other trainings",
        VARIANTS,
        draw=variants,
        note=(
            "In the paper the gradient quickly converges to the top subspace in all six, and stays "
            "there."
        ),
    ),
    Exhibit(
        "five-classes",
        "Five digits instead of ten: k = 5",
        ("fc-five",),
        draw=other_classes,
        note=(
            "In the paper the dimension of the top subspace is the number of classes; these five "
            "are ours."
        ),
    ),
    Exhibit(
        "solvable-model",
        "Softmax regression on two orthonormal samples (eqs. 7-9 and 13-19)",
        ("two-samples",),
        draw=closed_forms,
        note=(
            "In the paper the gradient of equations 8 and 17 is four times that of the middle of "
            "equation 17. Ours is the latter; the rest is as printed."
        ),
    ),
    Exhibit(
        "mixtures",
        "Softmax regression on Gaussian mixtures, with noise and biases (section 3)",
        ("mixture",),
        draw=mixtures,
        table=table_of_mixtures,
        note=(
            "In the paper the gradient still evolves into the top subspace with a little noise, k "
            "of the k(k − 1) eigenvalues come to dominate, and with biases the gradient aligns "
            "with the eigenvector of the smallest of the top k. The table is that of the first "
            "seed."
        ),
    ),
    Exhibit(
        "low-rank-newton",
        "Newton's method in the top subspace (eq. 11)",
        ("newton",),
        draw=newton_and_descent,
        note=(
            "In the paper it is proposed, and said to descend rather than climb; there is no "
            "figure. All three go on from the same state of SGD."
        ),
    ),
)
