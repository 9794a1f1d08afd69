"""The paper's figures and tables, from the raw figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.drawing import (
    LOOK,
    finished,
    first_of,
    grid,
    in_turn,
    line,
    mark,
    over_seeds,
)
from benchmarks.papers.reproduction import Exhibit, Raw, RawOfSeeds, Rows, mean
from benchmarks.papers.song_2024.claims import (
    ALIGNED,
    CE,
    GD,
    MSE,
    STANDARD,
    alignment_of_sgd,
)
from benchmarks.papers.song_2024.runs import OPTIMIZERS

_TITLES: Final = {
    "mlp": "MLP, MNIST",
    "cnn": "CNN, CIFAR-10",
    "transformer": "transformer, SST-2",
    "vgg11": "VGG11, CIFAR-10",
    "resnet8": "ResNet8, CIFAR-10",
}
_BRANCHES: Final = {"SGD": "SGD", "DomSGD": "Dom-SGD", "BulkSGD": "Bulk-SGD"}


def _title(run: str) -> str:
    return next(title for model, title in _TITLES.items() if model in run)


def _colour(name: str) -> str:
    if "Dom" in name:
        return LOOK.dominant
    return LOOK.bulk if "Bulk" in name else LOOK.ink


# --- the critical experiment -------------------------------------------------------------------


def losses_of_branches(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 1, 14 and 17: the loss before the switch, and of each branch after it.

    The part before is drawn for as many steps as the branches have, so that these can be seen.
    """
    panels = grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        for raw, first in in_turn(raws[run]):
            switch, after = raw["switch_step"], raw["losses"]
            before = raw["phases"]["warmup"]
            start = switch - len(after["SGD"])
            shown = [i for i, step in enumerate(before["step"]) if step >= start]
            steps, losses = ([before[c][i] for i in shown] for c in ("step", "loss"))
            line(axes, [*steps, switch], [*losses, after["SGD"][0]], first, color=LOOK.ink)
            for phase, losses in after.items():
                branch, x = _BRANCHES[phase], switch + np.arange(len(losses))
                line(axes, x, losses, first, branch, color=_colour(branch))
            mark(axes, switch)
        axes.set(yscale="log", xlabel="step", ylabel="training loss")
    return finished(panels)


def eigenvalues_along_sgd(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 2, 12 and 15: the top k eigenvalues, and the next k."""
    panels = grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        raw = first_of(raws[run])
        if raw is not None:
            _eigenvalues(axes, [raw["phases"][phase] for phase in ("warmup", "SGD")])
        axes.set(xlabel="step", ylabel="eigenvalues")
    return finished(panels)


def _eigenvalues(axes: Axes, parts: Sequence[Raw]) -> None:
    """The top k and the next k of one seed, thin lines since there are so many.

    Some rows have the top k alone, and the last one of what diverged has none.
    """
    rows = [
        (part["step"][i], part["eigenvalues"][i], following)
        for part in parts
        for i, following in enumerate(part["next_eigenvalues"])
        if isinstance(following, list) and following
    ]
    if rows:
        steps, *both = zip(*rows, strict=True)
        looks = ((LOOK.dominant, "top k"), (LOOK.bulk, "next k"))
        for values, (colour, text) in zip(both, looks, strict=True):
            lines = axes.plot(steps, np.array(values, dtype=float), color=colour, lw=0.9)
            lines[0].set_label(text)


def alignment_along_sgd(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 3, 13 and 16: χ_k of the gradient along SGD, and its moving average of one seed."""
    panels = grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        for raw, first in in_turn(raws[run]):
            before, after = raw["phases"]["warmup"], raw["phases"]["SGD"]
            steps, chi, average = (
                before[column] + after[column] for column in ("step", "chi_gradient", "chi_average")
            )
            line(axes, steps, chi, first, "χ_k", color=LOOK.dominant)
            if first:
                line(axes, steps, average, first, "moving average", color=LOOK.bulk, ls="--")
                mark(axes, raw["switch_step"])
        axes.set(ylim=(0, 1.05), xlabel="step", ylabel="χ_k of the gradient")
    return finished(panels)


def table_of_switches(raws: RawOfSeeds) -> Rows:
    """Beside Figures 1 to 3 and 12 to 17: the steps of the switch, and χ_k along SGD after it."""
    rows = [
        [
            "run",
            "step of the switch, by seed",
            "where the average reached 0.95",
            "χ_k at the start",
            f"above {ALIGNED} from step",
            "mean χ_k after the switch",
        ]
    ]
    for run in (*MSE, *CE, *STANDARD):
        found = [raws[run][seed] for seed in sorted(raws[run])]
        reached = sum(not raw["switch_reason"].startswith("last") for raw in found)
        rows.append(
            [
                f"`{run}`",
                " ".join(f"{raw['switch_step']:,}" for raw in found),
                f"{reached} of {len(found)}",
                over_seeds(raw["phases"]["warmup"]["chi_gradient"][0] for raw in found),
                " ".join(map(_aligned_from, found)),
                over_seeds(map(alignment_of_sgd, found)),
            ]
        )
    return rows


def _aligned_from(raw: Raw) -> str:
    """The first measured step of the warm-up from which on χ_k is at least 0.9 up to its end."""
    warmup = raw["phases"]["warmup"]
    backward = zip(reversed(warmup["step"]), reversed(warmup["chi_gradient"]), strict=True)
    aligned = [step for step, _ in takewhile(lambda row: row[1] >= ALIGNED, backward)]
    return f"{aligned[-1]:,}" if aligned else "–"


def distances_of_branches(raws: RawOfSeeds) -> Figure:
    """Figure 22: the distance from the switch."""
    panels = grid([_title(run) for run in MSE])
    for axes, run in zip(panels, MSE, strict=True):
        for raw, first in in_turn(raws[run]):
            for name, part in raw["phases"].items():
                if name in _BRANCHES:
                    steps = np.array(part["step"]) - raw["switch_step"]
                    branch = _BRANCHES[name]
                    line(axes, steps, part["distance"], first, branch, color=_colour(branch))
        axes.set(xlabel="steps after the switch", ylabel="distance from the switch")
    return finished(panels)


# --- noise -------------------------------------------------------------------------------------


def alignment_at_switch(raws: RawOfSeeds, name: str) -> Figure:
    """Figures 4 and 5: χ_10 of the gradient, before and after the optimizer is switched."""
    (axes,) = grid([name], width=4.6)
    _alignment_at_switch(axes, raws, name)
    return finished([axes])


def _alignment_at_switch(axes: Axes, raws: RawOfSeeds, name: str) -> None:
    for raw, first in in_turn(raws["switching"]):
        part = raw[name]
        line(axes, part["step"], part["chi_gradient"], first, color=LOOK.dominant)
        mark(axes, part["switch_step"])
    axes.set(ylim=(0, 1.05), xlabel="step", ylabel="χ_10 of the gradient")


def all_at_switch(raws: RawOfSeeds, name: str) -> Figure:
    """Figures 20 and 21: χ_10, the loss, and the top 20 eigenvalues."""
    alignment, loss, eigenvalues = grid([f"{name}: χ_10", "training loss", "eigenvalues"])
    _alignment_at_switch(alignment, raws, name)
    for raw, first in in_turn(raws["switching"]):
        part = raw[name]
        line(loss, part["step"], part["loss"], first, color=LOOK.ink)
        if first:
            _eigenvalues(eigenvalues, [part])
        mark(loss, part["switch_step"])
        mark(eigenvalues, part["switch_step"])
    loss.set(yscale="log", xlabel="step", ylabel="training loss")
    eigenvalues.set(xlabel="step", ylabel="eigenvalues")
    return finished([alignment, loss, eigenvalues])


def alignment_along_gd(raws: RawOfSeeds) -> Figure:
    """Figure 18: χ_k of the gradient along GD at a small rate."""
    panels = grid([_title(run) for run in GD])
    for axes, run in zip(panels, GD, strict=True):
        for raw, first in in_turn(raws[run]):
            line(axes, raw["step"], raw["chi_gradient"], first, color=LOOK.dominant)
        axes.set(ylim=(0, 1.05), xlabel="step", ylabel="χ_k of the gradient")
    return finished(panels)


def distances_of_gd_and_sgd(raws: RawOfSeeds) -> Figure:
    """Figure 19: distances from the start, and of GD from SGD."""
    lines: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("GD", "GD from start", {"color": LOOK.ink}),
        ("SGD", "SGD from start", {"color": LOOK.bulk, "ls": "--"}),
        ("GD to SGD", "GD from SGD", {"color": LOOK.dominant}),
    )
    panels = grid([_title(run) for run in GD])
    for axes, run in zip(panels, GD, strict=True):
        for raw, first in in_turn(raws[run]):
            for name, text, look in lines:
                line(axes, raw["step"], raw[name], first, text, **look)
        axes.set(xlabel="step", ylabel="distance")
    return finished(panels, columns=2)


# --- the toy quadratic -------------------------------------------------------------------------

_TOY: Final = {"GD": LOOK.ink, "SGD": LOOK.bulk}


def toy_paths(raws: RawOfSeeds) -> Figure:
    """Figure 6: the paths of GD and SGD in the plane."""
    panels = grid(list(_TOY))
    for axes, (name, colour) in zip(panels, _TOY.items(), strict=True):
        for raw, first in in_turn(raws["toy"]):
            line(axes, raw[name]["x"], raw[name]["y"], first, color=colour, marker=".", ms=3)
        axes.set(xlim=(-0.3, 1.05), xlabel="x", ylabel="y")
    return finished(panels)


def toy_alignment(raws: RawOfSeeds) -> Figure:
    """Figure 7: χ_1 along both."""
    (axes,) = grid(["the toy quadratic"], width=4.6)
    for raw, first in in_turn(raws["toy"]):
        for name, colour in _TOY.items():
            line(axes, raw[name]["step"], raw[name]["chi"], first, name, color=colour)
    axes.set(ylim=(0, 1.05), xlabel="step", ylabel="χ_1 of the gradient")
    return finished([axes])


# --- edge of stability and SAM -----------------------------------------------------------------


def edge(raws: RawOfSeeds, run: str, column: str, threshold: str, text: str) -> Figure:
    """Figures 9 and 10: eigenvalues with the threshold, χ_10, and the loss of each branch."""
    vector = "gradient" if column == "chi_gradient" else "update"
    eigenvalues, alignment, loss = grid(["eigenvalues", f"χ_10 of the {vector}", "training loss"])
    for raw, first in in_turn(raws[run]):
        names = [name for name in raw["losses"] if name != "before"]
        both = [raw["before"], raw[names[0]]]
        if first:
            _eigenvalues(eigenvalues, both)
            steps = [step for part in both for step in part["step"]]
            values = [value for part in both for value in part[threshold]]
            line(eigenvalues, steps, values, first, text, color=LOOK.ink, ls="--")
            eigenvalues.set_ylim(bottom=0)
        steps, chi = ([value for part in both for value in part[c]] for c in ("step", column))
        line(alignment, steps, chi, first, color=LOOK.dominant)
        for name, part in raw["losses"].items():
            label = "" if name == "before" else name
            start = 0 if name == "before" else raw["switch_step"]
            line(loss, start + np.arange(len(part)), part, first, label, color=_colour(name))
        mark(alignment, raw["switch_step"])
        mark(loss, raw["switch_step"])
    eigenvalues.set(xlabel="step", ylabel="eigenvalues")
    alignment.set(ylim=(0, 1.05), xlabel="step", ylabel="χ_10")
    loss.set(yscale="log", xlabel="step", ylabel="training loss")
    return finished([eigenvalues, alignment, loss])


# --- effective rates ---------------------------------------------------------------------------

_METHODS: Final = {
    "GD(-m)": (LOOK.ink, "-"),
    "GD(+m)": (LOOK.ink, "--"),
    "Adam(-m)": (LOOK.bulk, "-"),
    "Adam(+m)": (LOOK.bulk, "--"),
}


def losses_of_optimizers(raws: RawOfSeeds, run: str) -> Figure:
    """Figures 11, 23 and 24: the loss of GD and Adam, without and with momentum."""
    (axes,) = grid([_title(run)], width=4.6)
    for raw, first in in_turn(raws[run]):
        for name, (colour, dashes) in _METHODS.items():
            part = raw[name]
            line(axes, part["step"], part["loss"], first, name, color=colour, ls=dashes)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    return finished([axes], columns=2)


_PAPERS_TABLE_1: Final = {
    "GD(-m)": ((0.0100, 0.0000), (0.0100, 0.0000)),
    "GD(+m)": ((0.0070, 0.0232), (0.0828, 0.0576)),
    "Adam(-m)": ((0.0325, 0.0054), (0.4672, 0.3555)),
    "Adam(+m)": ((0.0004, 0.0101), (2.6639, 1.2480)),
}
"""Mean and deviation of Dom-LR and Bulk-LR. Those of Tables 2 and 3 are missing in our text."""


_COLUMNS: Final = ("dom_lr", "bulk_lr")


def table_of_rates(
    raws: RawOfSeeds, run: str, papers: Mapping[str, Sequence[tuple[float, float]]] | None = None
) -> Rows:
    """Tables 1 to 3: mean effective rates, their deviation along training, ours over the paper's.

    The means are over seeds of the means over the measured steps; so are the deviations. A mean of
    the paper that is smaller than its deviation has an uncertain ratio, in parentheses.
    """
    head = ["method", "mean Dom-LR", "mean Bulk-LR", "loss, last tenth"]
    if papers:
        head += ["paper: Dom-LR", "Bulk-LR", "ours / paper: Dom-LR", "Bulk-LR"]
    rows = [head]
    found = list(raws[run].values())
    for name in OPTIMIZERS:
        means = [mean(raw[name][f"mean_{rate}"] for raw in found) for rate in _COLUMNS]
        stds = [mean(raw[name][f"std_{rate}"] for raw in found) for rate in _COLUMNS]
        row = [name, *(f"{m:.4f} ({s:.4f})" for m, s in zip(means, stds, strict=True))]
        row.append(f"{math.exp(mean(raw[name]['mean_log_loss'] for raw in found)):.3g}")
        if papers:
            row += [f"{m:.4f} ({s:.4f})" for m, s in papers[name]]
            for ours, (theirs, deviation) in zip(means, papers[name], strict=True):
                ratio = f"{ours / theirs:.2f}"
                row.append(f"({ratio})" if theirs < deviation else ratio)
        rows.append(row)
    return rows


# --- the exhibits ------------------------------------------------------------------------------


_PREMISE: Final = (
    "Where the gradient is not dominant (the table of the switches), a panel tells nothing of that."
)
_ALIGNMENT: Final = (
    "In the paper χ_k reaches 1 after a few early steps, and stays near it. The average, of the "
    "first seed, starts from 0, so that its first point is half of χ_k: a rise from there need not "
    "be one of χ_k."
)


def _critical(
    numbers: tuple[int, int, int], runs: tuple[str, ...], more: str, others: str = "SGD"
) -> list[Exhibit]:
    low_rank, aligned, loss = numbers
    drawings: dict[int, tuple[str, Callable[..., Figure], str]] = {
        low_rank: (
            "Top k and next k eigenvalues along SGD",
            eigenvalues_along_sgd,
            "In the paper the top k are significantly larger than the next k.",
        ),
        aligned: (
            "χ_k of the gradient along SGD",
            alignment_along_sgd,
            _ALIGNMENT,
        ),
        loss: (
            "Training loss of SGD and its projections",
            losses_of_branches,
            f"In the paper training stops with Dom-SGD, and goes on with {others}. {_PREMISE}",
        ),
    }
    return [
        Exhibit(f"figure-{number}", title + more, runs, draw=partial(draw, runs=runs), note=note)
        for number, (title, draw, note) in sorted(drawings.items())
    ]


def _place(name: str) -> tuple[int, int]:
    """The order of figures, tables, and others."""
    kind, _, number = name.partition("-")
    kinds = ("figure", "table")
    return (kinds.index(kind), int(number)) if kind in kinds else (len(kinds), 0)


_EXHIBITS: Final = (
    *_critical((2, 3, 1), MSE, ", squared error", "SGD and Bulk-SGD"),
    Exhibit(
        "figure-4",
        "χ_10 when SGD is switched to GD",
        ("switching",),
        draw=partial(alignment_at_switch, name="SGD to GD"),
        note="In the paper χ_10 drops sharply at the switch, at step 20,000.",
    ),
    Exhibit(
        "figure-5",
        "χ_10 when GD is switched to SGD",
        ("switching",),
        draw=partial(alignment_at_switch, name="GD to SGD"),
        note="In the paper χ_10 rises sharply at the switch.",
    ),
    Exhibit(
        "figure-6",
        "Paths on the toy quadratic",
        ("toy",),
        draw=toy_paths,
        note="In the paper, by its text, x falls to 0 quickly, and both paths stay close to the "
        "y-axis from then on.",
    ),
    Exhibit(
        "figure-7",
        "χ_1 on the toy quadratic",
        ("toy",),
        draw=toy_alignment,
        note="In the paper SGD's gradient aligns with the top eigenvector, and GD's does not.",
    ),
    Exhibit(
        "figure-9",
        "GD at the edge of stability, and its projections",
        ("edge",),
        draw=partial(edge, run="edge", column="chi_gradient", threshold="threshold", text="2/η"),
        note="In the paper the sharpness settles near 2/η, χ_10 is near 1 from then on, and Dom-GD "
        "fails to lower the loss further, in contrast to GD and Bulk-GD.",
    ),
    Exhibit(
        "figure-10",
        "SAM at its edge, and its projections",
        ("sam",),
        draw=partial(edge, run="sam", column="chi_update", threshold="sam_edge", text="SAM-edge"),
        note="In the paper it is as for GD, with SAM's edge in the place of 2/η.",
    ),
    *(
        Exhibit(
            f"figure-{number}",
            f"Training loss of GD and Adam: {_title(run)}",
            (run,),
            draw=partial(losses_of_optimizers, run=run),
            note="In the paper, by its text, the larger Bulk-LR, the faster the training.",
        )
        for number, run in ((11, "rates-transformer"), (23, "rates-mlp"), (24, "rates-cnn"))
    ),
    *_critical((12, 13, 14), CE, ", cross-entropy"),
    *_critical((15, 16, 17), STANDARD, ", VGG11 and ResNet8"),
    Exhibit(
        "figure-18",
        "χ_k of the gradient along GD at a small rate",
        GD,
        draw=alignment_along_gd,
        note="In the paper χ_k reaches 0 after a few early steps, and stays near it.",
    ),
    Exhibit(
        "figure-19",
        "Distances of GD and SGD",
        GD,
        draw=distances_of_gd_and_sgd,
        note="In the paper SGD stays near GD all along.",
    ),
    Exhibit(
        "figure-20",
        "Switching SGD to GD",
        ("switching",),
        draw=partial(all_at_switch, name="SGD to GD"),
        note="In the paper loss and eigenvalues change smoothly at the switch.",
    ),
    Exhibit(
        "figure-21",
        "Switching GD to SGD",
        ("switching",),
        draw=partial(all_at_switch, name="GD to SGD"),
        note="In the paper loss and eigenvalues change smoothly at the switch.",
    ),
    Exhibit(
        "figure-22",
        "Distance from the switch",
        MSE,
        draw=distances_of_branches,
        note="In the paper Dom-SGD makes no further progress, in contrast to SGD and Bulk-SGD. "
        f"{_PREMISE}",
    ),
    Exhibit(
        "switches",
        "Where SGD was switched, and how dominant its gradient was from there on",
        (*MSE, *CE, *STANDARD),
        table=table_of_switches,
        note="In the paper the switch is where the moving average of χ_k exceeds 0.95; at which "
        "steps that is, it does not say.",
    ),
    Exhibit(
        "table-1",
        "Mean effective rates over the first 1,000 steps: transformer",
        ("rates-transformer",),
        table=partial(table_of_rates, run="rates-transformer", papers=_PAPERS_TABLE_1),
        note="In the paper the data are 1,000 examples, and here 100; ours are means over every "
        "50th step. The ratio to a mean that is below its own deviation is in parentheses. Adam's "
        "Dom-LR without momentum is 0.04 to 0.06 at the first step, and 0.14 to 0.32 from step 50 "
        "on; with momentum, single steps of up to 0.9 either way shift its mean (medians of 0.10, "
        "0.001 and 0.05). Why the paper's are smaller is not known.",
    ),
    Exhibit(
        "table-2",
        "Mean effective rates over the first 1,000 steps: MLP",
        ("rates-mlp",),
        table=partial(table_of_rates, run="rates-mlp"),
    ),
    Exhibit(
        "table-3",
        "Mean effective rates over the first 1,000 steps: CNN",
        ("rates-cnn",),
        table=partial(table_of_rates, run="rates-cnn"),
    ),
)

EXHIBITS: Final = tuple(sorted(_EXHIBITS, key=lambda exhibit: _place(exhibit.name)))
"""As the paper counts them: figures, tables, and what is ours."""
