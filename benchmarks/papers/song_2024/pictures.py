"""The paper's figures and tables, from the raw figures; seed 0 is drawn strongly, others thinly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.reproduction import Exhibit, Raw, RawOfSeeds, Rows
from benchmarks.papers.song_2024.claims import mean
from benchmarks.papers.song_2024.runs import OPTIMIZERS
from subspace_optim.diagnostics.plots.style import THEMES, key, label_powers, paint, panels_of, say

_LOOK: Final = THEMES["light"]
_COLOURS: Final = {"plain": _LOOK.ink, "Dom": _LOOK.dominant, "Bulk": _LOOK.bulk}
_TITLES: Final = {
    "mlp": "MLP, MNIST",
    "cnn": "CNN, CIFAR-10",
    "transformer": "transformer, SST-2",
    "vgg11": "VGG11, CIFAR-10",
    "resnet8": "ResNet8, CIFAR-10",
}
_MSE: Final = ("sgd-mlp-mse", "sgd-cnn-mse", "sgd-transformer-mse")
_CE: Final = ("sgd-mlp-ce", "sgd-cnn-ce", "sgd-transformer-ce")
_STANDARD: Final = ("sgd-vgg11", "sgd-resnet8")
_GD: Final = ("gd-mlp", "gd-cnn", "gd-transformer")


def _title(run: str) -> str:
    return next(title for model, title in _TITLES.items() if model in run)


def _grid(titles: Sequence[str], width: float = 3.4, keys: int = 1) -> list[Axes]:
    """A row of panels with titles, and so many lines for the key below these."""
    panels = panels_of(None, _LOOK, (width * len(titles), 2.9), 1, len(titles))
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9, color=_LOOK.ink, pad=8 + 14 * keys)
    return panels


def _seeds(raws: RawOfSeeds, run: str) -> Iterator[tuple[Raw, dict[str, Any]]]:
    """Each seed's figures, and how its lines are drawn; the first one last, on top."""
    for seed, raw in sorted(raws.get(run, {}).items(), reverse=True):
        first = seed == min(raws[run])
        yield raw, {"lw": 1.4 if first else 0.6, "alpha": 1.0 if first else 0.45}


def _finish(axes: Axes, ylabel: str, xlabel: str = "step", columns: int = 3) -> None:
    paint(axes, _LOOK, xlabel, ylabel)
    if axes.get_yscale() == "log" and axes.has_data():
        label_powers(axes.yaxis, *axes.get_ylim())
    key(axes, _LOOK, columns)
    say(axes, _LOOK, "not measured")


def _label(name: str, style: Mapping[str, Any]) -> dict[str, Any]:
    """The line of the first seed has the label."""
    return {"label": name} if style["alpha"] == 1.0 else {}


def _colour(name: str) -> str:
    return next((c for part, c in _COLOURS.items() if part in name), _LOOK.ink)


# --- the critical experiment -------------------------------------------------------------------


def losses_of_branches(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 1, 14 and 17: the loss before the switch, and of each branch after it.

    The part before is drawn for as many steps as the branches have, so that these can be seen.
    """
    panels = _grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        for raw, style in _seeds(raws, run):
            for phase, part in raw["phases"].items():
                name = "SGD" if phase == "warmup" else phase
                label = {} if phase == "warmup" else _label(name, style)
                start = 2 * raw["switch_step"] - raw["phases"]["SGD"]["step"][-1]
                shown = [i for i, step in enumerate(part["step"]) if step >= start]
                steps, losses = ([part[c][i] for i in shown] for c in ("step", "loss"))
                if phase == "warmup":
                    steps, losses = (
                        [*steps, raw["switch_step"]],
                        [*losses, raw["switch_loss"]],
                    )
                axes.plot(steps, losses, color=_colour(name), **style, **label)
            axes.axvline(raw["switch_step"], color=_LOOK.faint, lw=0.6, ls=":")
        axes.set_yscale("log")
        _finish(axes, "training loss")
    return panels[0].figure.figure


def eigenvalues_along_sgd(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 2, 12 and 15: the top k eigenvalues, and the next k."""
    panels = _grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        for raw, style in list(_seeds(raws, run))[-1:]:
            parts = [raw["phases"][phase] for phase in ("warmup", "SGD")]
            _eigenvalues(axes, [_with_both(part) for part in parts], style)
        _finish(axes, "eigenvalues")
    return panels[0].figure.figure


def _with_both(part: Raw) -> Raw:
    """The rows that have the next k eigenvalues too."""
    chosen = [i for i, values in enumerate(part["next_eigenvalues"]) if values]
    return {
        name: [part[name][i] for i in chosen]
        for name in ("step", "eigenvalues", "next_eigenvalues")
    }


def _eigenvalues(axes: Axes, parts: Sequence[Raw], style: Mapping[str, Any]) -> None:
    for name, colour, text in (
        ("eigenvalues", _LOOK.dominant, "top k"),
        ("next_eigenvalues", _LOOK.bulk, "next k"),
    ):
        steps = [step for part in parts for step in part["step"]]
        values = np.array([row for part in parts for row in part[name]], dtype=float)
        if values.size:
            lines = axes.plot(steps, values, color=colour, lw=0.9, alpha=style["alpha"])
            lines[0].set_label(text)


def alignment_along_sgd(raws: RawOfSeeds, runs: Sequence[str]) -> Figure:
    """Figures 3, 13 and 16: χ_k of the gradient along SGD, and its moving average."""
    panels = _grid([_title(run) for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        for raw, style in list(_seeds(raws, run))[-1:]:
            parts = [raw["phases"][phase] for phase in ("warmup", "SGD")]
            lines: tuple[tuple[str, str, dict[str, Any]], ...] = (
                ("chi_gradient", "χ_k", {"color": _LOOK.dominant}),
                ("chi_average", "moving average", {"color": _LOOK.bulk, "ls": "--"}),
            )
            for column, name, look in lines:
                for number, part in enumerate(parts):
                    label: dict[str, Any] = {"label": name} if not number else {}
                    axes.plot(part["step"], part[column], **look, **style, **label)
            axes.axvline(raw["switch_step"], color=_LOOK.faint, lw=0.6, ls=":")
        axes.set_ylim(0, 1.05)
        _finish(axes, "χ_k of the gradient")
    return panels[0].figure.figure


def distances_of_branches(raws: RawOfSeeds) -> Figure:
    """Figure 22: the distance from the switch."""
    panels = _grid([_title(run) for run in _MSE])
    for axes, run in zip(panels, _MSE, strict=True):
        for raw, style in _seeds(raws, run):
            for name, part in raw["phases"].items():
                if name != "warmup":
                    steps = np.array(part["step"]) - raw["switch_step"]
                    colour = _colour(name)
                    axes.plot(steps, part["distance"], color=colour, **style, **_label(name, style))
        _finish(axes, "distance from the switch", "steps after the switch")
    return panels[0].figure.figure


# --- noise -------------------------------------------------------------------------------------


def alignment_at_switch(raws: RawOfSeeds, name: str) -> Figure:
    """Figures 4 and 5: χ_10 of the gradient, before and after the optimizer is switched."""
    panels = _grid([name], 4.6)
    _alignment_at_switch(panels[0], raws, name)
    return panels[0].figure.figure


def _alignment_at_switch(axes: Axes, raws: RawOfSeeds, name: str) -> None:
    for raw, style in _seeds(raws, "switching"):
        part = raw[name]
        axes.plot(part["step"], part["chi_gradient"], color=_LOOK.dominant, **style)
        axes.axvline(part["switch_step"], color=_LOOK.faint, lw=0.6, ls=":")
    axes.set_ylim(0, 1.05)
    _finish(axes, "χ_10 of the gradient")


def all_at_switch(raws: RawOfSeeds, name: str) -> Figure:
    """Figures 20 and 21: χ_10, the loss, and the top 20 eigenvalues."""
    panels = _grid([f"{name}: χ_10", "training loss", "eigenvalues"])
    _alignment_at_switch(panels[0], raws, name)
    for raw, style in _seeds(raws, "switching"):
        part = raw[name]
        panels[1].plot(part["step"], part["loss"], color=_LOOK.ink, **style)
        if style["alpha"] == 1.0:
            _eigenvalues(panels[2], [part], style)
        for axes in panels[1:]:
            axes.axvline(part["switch_step"], color=_LOOK.faint, lw=0.6, ls=":")
    panels[1].set_yscale("log")
    _finish(panels[1], "training loss")
    _finish(panels[2], "eigenvalues")
    return panels[0].figure.figure


def alignment_along_gd(raws: RawOfSeeds) -> Figure:
    """Figure 18: χ_k of the gradient along GD at a small rate."""
    panels = _grid([_title(run) for run in _GD])
    for axes, run in zip(panels, _GD, strict=True):
        for raw, style in _seeds(raws, run):
            axes.plot(raw["step"], raw["chi_gradient"], color=_LOOK.dominant, **style)
        axes.set_ylim(0, 1.05)
        _finish(axes, "χ_k of the gradient")
    return panels[0].figure.figure


def distances_of_gd_and_sgd(raws: RawOfSeeds) -> Figure:
    """Figure 19: distances from the start, and of GD from SGD."""
    panels = _grid([_title(run) for run in _GD])
    for axes, run in zip(panels, _GD, strict=True):
        for raw, style in _seeds(raws, run):
            lines: tuple[tuple[str, str, dict[str, Any]], ...] = (
                ("GD", "GD from start", {"color": _LOOK.ink}),
                ("SGD", "SGD from start", {"color": _LOOK.bulk, "ls": "--"}),
                ("GD to SGD", "GD from SGD", {"color": _LOOK.dominant}),
            )
            for name, text, look in lines:
                axes.plot(raw["step"], raw[name], **look, **style, **_label(text, style))
        _finish(axes, "distance")
    return panels[0].figure.figure


# --- the toy quadratic -------------------------------------------------------------------------


def toy_paths(raws: RawOfSeeds) -> Figure:
    """Figure 6: the paths of GD and SGD in the plane."""
    panels = _grid(["GD", "SGD"])
    for axes, name in zip(panels, ("GD", "SGD"), strict=True):
        for raw, style in _seeds(raws, "toy"):
            colour = _LOOK.bulk if name == "SGD" else _LOOK.ink
            axes.plot(raw[name]["x"], raw[name]["y"], ".-", ms=3, color=colour, **style)
        axes.set_xlim(-0.3, 1.05)
        _finish(axes, "y", "x")
    return panels[0].figure.figure


def toy_alignment(raws: RawOfSeeds) -> Figure:
    """Figure 7: χ_1 along both."""
    panels = _grid(["the toy quadratic"], 4.6)
    axes = panels[0]
    for raw, style in _seeds(raws, "toy"):
        for name, colour in (("GD", _LOOK.ink), ("SGD", _LOOK.bulk)):
            part = raw[name]
            axes.plot(part["step"], part["chi"], color=colour, **style, **_label(name, style))
    axes.set_ylim(0, 1.05)
    _finish(axes, "χ_1 of the gradient")
    return axes.figure.figure


# --- edge of stability and SAM -----------------------------------------------------------------


def edge(raws: RawOfSeeds, run: str, column: str, threshold: str, text: str) -> Figure:
    """Figures 9 and 10: eigenvalues with the threshold, χ_10, and the loss of each branch."""
    vector = "gradient" if column == "chi_gradient" else "update"
    panels = _grid(["eigenvalues", f"χ_10 of the {vector}", "training loss"])
    for raw, style in _seeds(raws, run):
        names = [name for name in raw["losses"] if name != "before"]
        both = [raw["before"], raw[names[0]]]
        if style["alpha"] == 1.0:
            _eigenvalues(panels[0], both, style)
            steps = [step for part in both for step in part["step"]]
            values = [value for part in both for value in part[threshold]]
            panels[0].plot(steps, values, color=_LOOK.ink, ls="--", lw=1.0, label=text)
        for part in both:
            panels[1].plot(part["step"], part[column], color=_LOOK.dominant, **style)
        before = raw["losses"]["before"]
        panels[2].plot(before["step"], before["loss"], color=_LOOK.ink, **style)
        for name in names:
            part = raw["losses"][name]
            colour = _colour(name)
            panels[2].plot(part["step"], part["loss"], color=colour, **style, **_label(name, style))
        for axes in panels[1:]:
            axes.axvline(raw["switch_step"], color=_LOOK.faint, lw=0.6, ls=":")
    if any(values and values[0] for values in raws.values()):
        panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.05)
    panels[2].set_yscale("log")
    for axes, label in zip(panels, ("eigenvalues", "χ_10", "training loss"), strict=True):
        _finish(axes, label)
    return panels[0].figure.figure


# --- effective rates ---------------------------------------------------------------------------

_LINES: Final = {"GD(-m)": "-", "GD(+m)": "--", "Adam(-m)": "-", "Adam(+m)": "--"}


def losses_of_optimizers(raws: RawOfSeeds, run: str) -> Figure:
    """Figures 11, 23 and 24: the loss of GD and Adam, without and with momentum."""
    panels = _grid([_title(run)], 4.6, keys=2)
    axes = panels[0]
    for raw, style in _seeds(raws, run):
        for name, line in _LINES.items():
            colour = _LOOK.ink if name.startswith("GD") else _LOOK.bulk
            axes.plot(
                raw[name]["step"],
                raw[name]["loss"],
                line,
                color=colour,
                **style,
                **_label(name, style),
            )
    axes.set_yscale("log")
    _finish(axes, "training loss", columns=2)
    return axes.figure.figure


_PAPERS_TABLE_1: Final = {
    "GD(-m)": (0.0100, 0.0100),
    "GD(+m)": (0.0070, 0.0828),
    "Adam(-m)": (0.0325, 0.4672),
    "Adam(+m)": (0.0004, 2.6639),
}
"""Mean Dom-LR and Bulk-LR. The figures of Tables 2 and 3 are missing in the text that we have."""


def table_of_rates(
    raws: RawOfSeeds, run: str, papers: Mapping[str, tuple[float, float]] | None = None
) -> Rows:
    """Tables 1 to 3: mean effective rates, their deviation along training, ours over the paper's.

    The means are over seeds of the means over the measured steps; so are the deviations.
    """
    head = ["method", "mean Dom-LR", "mean Bulk-LR", "loss at the end"]
    if papers:
        head += ["paper: Dom-LR", "Bulk-LR", "ours / paper: Dom-LR", "Bulk-LR"]
    rows = [head]
    found = list(raws.get(run, {}).values())
    for name in OPTIMIZERS:
        means = [mean(raw[name][f"mean_{rate}"] for raw in found) for rate in _RATES]
        stds = [mean(raw[name][f"std_{rate}"] for raw in found) for rate in _RATES]
        row = [name, *(f"{m:.4f} ({s:.4f})" for m, s in zip(means, stds, strict=True))]
        row.append(f"{math.exp(mean(raw[name]['mean_log_loss'] for raw in found)):.3g}")
        if papers:
            row += [f"{value:.4f}" for value in papers[name]]
            row += [f"{m / value:.2f}" for m, value in zip(means, papers[name], strict=True)]
        rows.append(row)
    return rows


_RATES: Final = ("dom_lr", "bulk_lr")


# --- the exhibits ------------------------------------------------------------------------------


def _critical(numbers: tuple[int, int, int], runs: tuple[str, ...], more: str) -> list[Exhibit]:
    low_rank, aligned, loss = numbers
    drawings: dict[int, tuple[str, Callable[..., Figure], str]] = {
        low_rank: (
            "Top k and next k eigenvalues along SGD",
            eigenvalues_along_sgd,
            "k blue curves far above k orange ones.",
        ),
        aligned: (
            "χ_k of the gradient along SGD",
            alignment_along_sgd,
            "after a few steps the values and their moving average are near 1.",
        ),
        loss: (
            "Training loss of SGD and its projections",
            losses_of_branches,
            "Dom-SGD is flat from the switch on; SGD and Bulk-SGD, where it is shown, go on down.",
        ),
    }
    return [
        Exhibit(f"figure-{number}", title + more, runs, draw=partial(draw, runs=runs), note=note)
        for number, (title, draw, note) in sorted(drawings.items())
    ]


EXHIBITS: Final = (
    *_critical((2, 3, 1), _MSE, ", squared error"),
    Exhibit(
        "figure-4",
        "χ_10 when SGD is switched to GD",
        ("switching",),
        draw=partial(alignment_at_switch, name="SGD to GD"),
        note="χ is near 1, and drops to 0 at the switch, at step 20,000.",
    ),
    Exhibit(
        "figure-5",
        "χ_10 when GD is switched to SGD",
        ("switching",),
        draw=partial(alignment_at_switch, name="GD to SGD"),
        note="χ is near 0, and jumps to about 1 at the switch.",
    ),
    Exhibit(
        "figure-6",
        "Paths on the toy quadratic",
        ("toy",),
        draw=toy_paths,
        note="both reach the y-axis at once and follow it down; SGD's path is noisy.",
    ),
    Exhibit(
        "figure-7",
        "χ_1 on the toy quadratic",
        ("toy",),
        draw=toy_alignment,
        note="GD's χ_1 falls to 0 at once, SGD's stays near 1.",
    ),
    Exhibit(
        "figure-9",
        "GD at the edge of stability, and its projections",
        ("edge",),
        draw=partial(edge, run="edge", column="chi_gradient", threshold="threshold", text="2/η"),
        note="the sharpness settles at 2/η, χ_10 then is near 1; Dom-GD is flat, Bulk-GD goes down "
        "as GD does.",
    ),
    Exhibit(
        "figure-10",
        "SAM at its edge, and its projections",
        ("sam",),
        draw=partial(edge, run="sam", column="chi_update", threshold="sam_edge", text="SAM-edge"),
        note="the same with SAM's edge, which is far below 2/η.",
    ),
    *(
        Exhibit(
            f"figure-{number}",
            f"Training loss of GD and Adam: {_title(run)}",
            (run,),
            draw=partial(losses_of_optimizers, run=run),
            note="the loss falls fastest with Adam, then with momentum.",
        )
        for number, run in ((11, "rates-transformer"), (23, "rates-mlp"), (24, "rates-cnn"))
    ),
    *_critical((12, 13, 14), _CE, ", cross-entropy"),
    *_critical((15, 16, 17), _STANDARD, ", VGG11 and ResNet8"),
    Exhibit(
        "figure-18",
        "χ_k of the gradient along GD at a small rate",
        _GD,
        draw=alignment_along_gd,
        note="after a few steps the values are near 0.",
    ),
    Exhibit(
        "figure-19",
        "Distances of GD and SGD",
        _GD,
        draw=distances_of_gd_and_sgd,
        note="both go equally far from the start, and stay near each other.",
    ),
    Exhibit(
        "figure-20",
        "Switching SGD to GD",
        ("switching",),
        draw=partial(all_at_switch, name="SGD to GD"),
        note="loss and eigenvalues go on smoothly at the switch.",
    ),
    Exhibit(
        "figure-21",
        "Switching GD to SGD",
        ("switching",),
        draw=partial(all_at_switch, name="GD to SGD"),
        note="loss and eigenvalues go on smoothly at the switch.",
    ),
    Exhibit(
        "figure-22",
        "Distance from the switch",
        _MSE,
        draw=distances_of_branches,
        note="Dom-SGD stays near the switch; SGD and Bulk-SGD go on alike.",
    ),
    Exhibit(
        "table-1",
        "Mean effective rates over the first 1,000 steps: transformer",
        ("rates-transformer",),
        table=partial(table_of_rates, run="rates-transformer", papers=_PAPERS_TABLE_1),
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
