"""The pictures show what was measured, and can be read: checked in what the renderer draws."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy.stats import norm

import subspace_optim as so
from subspace_optim import diagnostics
from subspace_optim.diagnostics import SpectralDensity, class_gradient_cosines, plots
from subspace_optim.diagnostics.plots.style import THEMES
from subspace_optim.linalg import EigenBasis
from tests.optim.naive import DenseOperator, Quartic

nan, inf = math.nan, math.inf
NUMBERS = (
    "loss",
    "gradient_norm",
    "update_norm",
    "chi_gradient",
    "chi_update",
    "dom_lr",
    "bulk_lr",
    "distance",
    "sharpness",
    "gap",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "preconditioned_sharpness",
    "angle_estimate",
    "gradients",
    "products",
)


def history(rows: int = 30, k: int = 4, more: int = 3, seed: int = 0) -> dict[str, list[Any]]:
    """A run that could be: all columns are there, and no two of them are equal."""
    random = np.random.default_rng(seed)
    t = np.arange(rows)
    noise = 1 + 0.05 * random.standard_normal((len(NUMBERS), rows))
    top = 3.0 * 1.6 ** np.arange(k, 0, -1) * (1 + t[:, None] / 100)
    following = 0.8 * 0.7 ** np.arange(more) * (1 + t[:, None] / 200)
    typical = {
        "loss": 0.5 * np.exp(-t / 10),
        "update_norm": 0.02,
        "chi_gradient": 0.9,
        "chi_update": 0.7,
        "dom_lr": 0.01,
        "bulk_lr": 0.1,
        "distance": 0.3 * np.sqrt(t),
        "threshold": 40.0,
        "sam_edge": 33.0,
        "adam_threshold": 3800.0,
        "preconditioned_sharpness": 3000.0,
    }
    columns: dict[str, list[Any]] = {
        name: (typical.get(name, 1.0) * noise[i]).tolist() for i, name in enumerate(NUMBERS)
    }
    return columns | {
        "step": (20 * t).tolist(),
        "eigenvalues": top.tolist(),
        "next_eigenvalues": following.tolist(),
        "sharpness": top[:, 0].tolist(),
        "gap": (top[:, -1] - following[:, 0] if more else top[:, -1] / 2).tolist(),
    }


SHARPNESSES = {
    "sharpness": 25.0,
    "critical_sharpness": 20.0,
    "update_sharpness": 15.0,
    "gradient_sharpness": 18.0,
    "batch_sharpness": 36.0,
    "norm_sharpness": 900.0,
    "preconditioned_sharpness": 3000.0,
}
THRESHOLDS = {
    "threshold": 76.0,
    "sam_edge": 33.0,
    "critical_threshold": 40.0,
    "small_batch_threshold": 4.0,
    "large_batch_threshold": 77.0,
    "norm_threshold": 1200.0,
    "adam_threshold": 3800.0,
}


def at_the_edge(rows: int = 30, blocks: int = 7, seed: int = 0) -> dict[str, list[Any]]:
    """A run with every sharpness there is, each with its threshold, and blocks."""
    random = np.random.default_rng(seed)
    rising = 1 - np.exp(-(np.arange(rows) + 1) / 8)

    def column(size: float) -> list[float]:
        return (size * rising * np.exp(0.05 * random.standard_normal(rows))).tolist()

    return {
        "step": (50 * np.arange(rows)).tolist(),
        **{name: column(size) for name, size in SHARPNESSES.items()},
        "batch_sharpness_error": [2.0] * rows,
        **{name: [size] * rows for name, size in THRESHOLDS.items()},
        **{f"sharpness[h.{i}]": column(2.0 + 3 * i) for i in range(blocks)},
        "actual_change": column(-0.02),
        "predicted_change": column(-0.03),
    }


def in_the_valley(rows: int = 30, seed: int = 0) -> dict[str, list[Any]]:
    random = np.random.default_rng(seed)
    river = 0.5 * np.exp(-np.arange(rows) / 10)
    return {
        "step": (50 * np.arange(rows)).tolist(),
        "loss": (river * (1.1 + 0.2 * random.random(rows))).tolist(),
        "river_loss": river.tolist(),
        "hill_share": (0.4 + 0.2 * random.standard_normal(rows)).tolist(),
    }


def spectrum(probes: int = 4, nodes: int = 12, seed: int = 0) -> SpectralDensity:
    """A bulk around 0 and one eigenvalue at 8."""
    random = np.random.default_rng(seed)
    places = np.sort(random.normal(0, 0.5, (probes, nodes)), axis=1)
    places[:, -1] = 8.0
    weights = random.uniform(0.5, 1, (probes, nodes))
    weights[:, -1] = 1e-3
    weights /= weights.sum(axis=1, keepdims=True)
    return SpectralDensity(torch.tensor(places), torch.tensor(weights), 1000, probes * nodes)


def cosines(classes: int = 6, k: int = 7) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (classes, k))


NO_ROWS: dict[str, list[Any]] = {"step": [], "loss": [], "eigenvalues": []}
OVERLAPS = 0.4 + 0.6 * np.exp(-np.abs(np.subtract.outer(np.arange(9), np.arange(9))) / 3)
ASSIGNMENT = [3, 1, 0, 6, 2, -1]
RATES = {
    "GD": history(seed=1),
    "Adam, no momentum": history(seed=2) | {"bulk_lr": np.geomspace(0.05, 3, 30).tolist()},
    "an optimizer of a long name": history(seed=3) | {"dom_lr": [nan] * 30},
}
PICTURES: dict[str, Callable[..., Figure]] = {
    "dashboard": lambda **options: plots.dashboard(history(), **options),
    "eigenvalue_history": lambda **options: plots.eigenvalue_history(history(), **options),
    "stability": lambda **options: plots.stability(at_the_edge(), **options),
    "valley": lambda **options: plots.valley(in_the_valley(), **options),
    "overlap_heatmap": lambda **options: plots.overlap_heatmap(
        OVERLAPS, [0, 5, 10, 20, 50, 100, 1000, 10000, 100000], **options
    ),
    "density": lambda **options: plots.density(spectrum(), [8.0, 8.3], **options),
    "effective_rates": lambda **options: plots.effective_rates(RATES, **options),
    "cosine_matrix": lambda **options: plots.cosine_matrix(cosines(), ASSIGNMENT, **options),
}
# Other pictures of the same functions, in which other labels could collide.
MORE: dict[str, Callable[..., Figure]] = {
    "dashboard, empty": lambda **options: plots.dashboard({}, **options),
    "dashboard, of everything": lambda **options: plots.dashboard(everything(), **options),
    "dashboard, stability alone": lambda **options: plots.dashboard(stability_rows(), **options),
    "stability, empty": lambda **options: plots.stability({}, **options),
    "stability, one row": lambda **options: plots.stability(at_the_edge(1), **options),
    "stability, negative": lambda **options: plots.stability(downhill(), **options),
    "valley, empty": lambda **options: plots.valley({}, **options),
    "valley, a spike": lambda **options: plots.valley(
        in_the_valley() | {"hill_share": [0.5] * 29 + [-900.0]}, **options
    ),
    "eigenvalue_history, empty": lambda **options: plots.eigenvalue_history(NO_ROWS, **options),
    "effective_rates, of nothing": lambda **options: plots.effective_rates(
        {"a": NO_ROWS}, **options
    ),
    "cosine_matrix, empty": lambda **options: plots.cosine_matrix(np.empty((0, 3)), **options),
    "dashboard, one row": lambda **options: plots.dashboard(
        history(1) | {"distance": [2.0]}, **options
    ),
    "dashboard, spikes, late": lambda **options: plots.dashboard(
        spiked() | {"step": list(range(0, 6_000_000, 200_000))}, **options
    ),
    "dashboard, negative": lambda **options: plots.dashboard(negative(), **options),
    "eigenvalue_history, flat": lambda **options: plots.eigenvalue_history(
        history() | {"threshold": [7.0] * 30, "eigenvalues": [[6.5, 6.0]] * 30}, **options
    ),
    "overlap_heatmap, empty": lambda **options: plots.overlap_heatmap(np.empty((0, 0)), **options),
    "overlap_heatmap, one": lambda **options: plots.overlap_heatmap([[1.0]], **options),
    "overlap_heatmap, many": lambda **options: plots.overlap_heatmap(np.eye(200), **options),
    "effective_rates, empty": lambda **options: plots.effective_rates({}, **options),
    "effective_rates, signs": lambda **options: plots.effective_rates(
        {"a": negative(), "b": history()}, **options
    ),
    "effective_rates, equal": lambda **options: plots.effective_rates(
        {"a": {"step": [0], "dom_lr": [0.1], "bulk_lr": [0.1]}}, **options
    ),
    "cosine_matrix, many": lambda **options: plots.cosine_matrix(
        cosines(100, 40), list(range(40)) + [-1] * 60, **options
    ),
    "density, no outliers": lambda **options: plots.density(spectrum(), **options),
}
ALL = PICTURES | MORE
CASES = [(name, "light") for name in ALL] + [(name, "dark") for name in PICTURES]


def parts(recorded: dict[str, list[Any]], *columns: str) -> dict[str, list[Any]]:
    """Of a history a few columns: panels without any take no time to draw."""
    return {column: recorded[column] for column in ("step", *columns)}


def stability_rows() -> dict[str, list[Any]]:
    """The columns of ``measures.stability()`` for gradient descent: a threshold of 2/η."""
    names = ("critical_sharpness", "update_sharpness", "gradient_sharpness")
    changes = ("predicted_change", "actual_change")
    rows = parts(at_the_edge(), *names, *changes, "critical_threshold")
    nothing = [nan] * 30
    return rows | {
        "critical_multiple": [1.5] * 30,
        "threshold": rows["critical_threshold"],
        "sam_edge": nothing,
        "adam_threshold": nothing,
    }


def everything() -> dict[str, list[Any]]:
    """Columns of all measures, and of one that nobody knows."""
    further = {
        "lowest_eigenvalue": [-0.1 * i for i in range(30)],
        "localization_1": [0.1 + 0.001 * i for i in range(30)],
        "localization_2": [0.2 + 0.001 * i for i in range(30)],
        "displacement": [[nan, nan]] + [[0.1, 0.2 + 0.001 * i] for i in range(29)],
        "of_my_own": [math.sin(i) for i in range(30)],
        "of_my_own_error": [0.1] * 30,
    }
    return history() | at_the_edge() | in_the_valley() | further


def downhill() -> dict[str, list[Any]]:
    """Curvature that is negative now and then, and steps that went uphill."""
    rows = at_the_edge()
    rows["update_sharpness"][3], rows["update_sharpness"][9] = -2.0, 0.0
    rows["critical_sharpness"][5], rows["gradient_sharpness"][20] = inf, -1e3
    return rows


def spiked() -> dict[str, list[Any]]:
    changed = parts(history(), "dom_lr", "bulk_lr")
    changed["dom_lr"][4], changed["dom_lr"][9], changed["bulk_lr"][20] = 1e6, -1e6, 1e3
    return changed


def negative() -> dict[str, list[Any]]:
    changed = parts(history(), "eigenvalues", "gap", "bulk_lr")
    changed["dom_lr"] = [-0.02 + 0.002 * i for i in range(30)]
    changed["next_eigenvalues"] = [[0.1, -0.1, -2.0]] * 30
    changed["loss"] = [-1.0 - i for i in range(30)]
    return changed


# --- what the renderer draws ---------------------------------------------------------------------


@dataclass
class Written:
    """A text as it was drawn: where, in pixels, and on what colour."""

    text: str
    box: Bbox
    color: str
    background: str
    axes: Axes | None


@contextmanager
def watched(drawn: list[tuple[Text, Bbox]]) -> Iterator[None]:
    """Notes each text that is drawn: those that are not (outside, hidden) do not count."""
    original = Text.draw

    def draw(self: Text, renderer: Any) -> None:
        original(self, renderer)
        if self.get_visible() and self.get_text().strip():
            drawn.append((self, self.get_window_extent(renderer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        yield


def render(figure: Figure) -> tuple[np.ndarray, list[Written]]:
    """Draws the figure: pixels (height, width, 3) from the lower left, and all texts."""
    drawn: list[tuple[Text, Bbox]] = []
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # as `savefig` does
    with watched(drawn):
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3]
    written = []
    for text, box in drawn:
        x0, y0, x1, y1 = (round(end) for end in box.extents)
        inside = pixels[max(y0, 0) : y1, max(x0, 0) : x1].reshape(-1, 3)
        packed, counts = np.unique(inside @ [1 << 16, 1 << 8, 1], return_counts=True)
        color = to_hex(text.get_color())
        background = f"#{packed[counts.argmax()]:06x}"
        written.append(Written(text.get_text(), box, color, background, text.axes))
    return pixels, written


@dataclass(frozen=True)
class Picture:
    """A figure, what the renderer drew, and the texts in it."""

    figure: Figure
    pixels: np.ndarray
    written: list[Written]


@functools.cache
def _drawn(name: str, theme: str) -> Picture:
    figure = ALL[name](theme=theme)
    return Picture(figure, *render(figure))


def picture(name: str, theme: str = "light") -> Picture:
    """A picture that is drawn once, for all tests that only look at it."""
    return _drawn(name, theme)


def overlap(a: Bbox, b: Bbox) -> bool:
    both = Bbox.intersection(a, b)
    return both is not None and both.width > 1 and both.height > 1


def panels_of(figure: Figure) -> list[Axes]:
    """Panels, with their colour bars."""
    return [axes for panel in figure.axes for axes in (panel, *panel.child_axes)]


@pytest.mark.parametrize(("name", "theme"), CASES)
def test_no_text_is_clipped_or_lies_on_another(name: str, theme: str) -> None:
    drawn = picture(name, theme)
    figure, written = drawn.figure, drawn.written
    assert written
    for text in written:
        x0, y0, x1, y1 = text.box.extents
        inside = x0 >= 0 and y0 >= 0 and x1 <= figure.bbox.width and y1 <= figure.bbox.height
        assert inside, f"{text.text!r} leaves the figure"
    for a, b in itertools.combinations(written, 2):
        assert not overlap(a.box, b.box), f"{a.text!r} lies on {b.text!r}"
    for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
        box = legend.get_window_extent()
        assert not any(overlap(box, axes.bbox) for axes in panels_of(figure)), "a key hides data"
    for text, axes in itertools.product(written, panels_of(figure)):
        if text.axes is not axes:
            assert not overlap(text.box, axes.bbox), f"{text.text!r} lies in another panel"


@pytest.mark.parametrize(("name", "theme"), CASES)
def test_text_can_be_read(name: str, theme: str) -> None:
    """Contrast as the web's guidelines (WCAG 2.1) compute it and ask for it, and 6 points."""
    drawn = picture(name, theme)
    for text in drawn.written:
        assert contrast(text.color, text.background) >= 4.5, text
    for text in drawn.figure.findobj(Text):
        assert text.get_fontsize() >= 6 or not text.get_text()


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)  # their own example


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_lines_stand_out(name: str, theme: str) -> None:
    figure = picture(name, theme).figure
    for axes in figure.axes:
        assert to_hex(axes.get_facecolor()) == to_hex(figure.get_facecolor())
        for line in axes.get_lines():
            assert line.get_alpha() is None
            assert contrast(to_hex(line.get_color()), to_hex(axes.get_facecolor())) >= 3


# Linear maps of linear RGB to what is seen without one kind of cones: Machado, Oliveira & Fernandes
# 2009, severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def lab(color: str, blindness: str) -> np.ndarray:
    """CIELAB (D65) of a colour as it is seen: distances of 2 can just be told apart."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(BLINDNESS[blindness] @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_lab_of_known_colours() -> None:
    np.testing.assert_allclose(lab("white", "none"), [100, 0, 0], atol=0.05)
    np.testing.assert_allclose(lab("red", "none"), [53.24, 80.09, 67.20], atol=0.1)
    # Red and green of one lightness are one colour without the cones for one of them.
    red, green = ("#b05a32", "#6e7d32")
    far = np.linalg.norm(lab(red, "none") - lab(green, "none"))
    near = np.linalg.norm(lab(red, "deuteranopia") - lab(green, "deuteranopia"))
    assert near < far / 2


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_lines_of_a_panel_differ_for_every_eye(name: str, theme: str, blindness: str) -> None:
    for axes in picture(name, theme).figure.axes:
        colors = {to_hex(line.get_color()) for line in axes.get_lines()}
        for a, b in itertools.combinations(colors, 2):
            assert np.linalg.norm(lab(a, blindness) - lab(b, blindness)) >= 15, (a, b)


@pytest.mark.parametrize(
    "name",
    [
        "dashboard",
        "dashboard, of everything",
        "dashboard, one row",
        "eigenvalue_history",
        "stability",
        "stability, one row",
        "valley",
    ],
)
def test_lines_of_a_panel_differ_in_grey_print(name: str) -> None:
    """By their dashes, or by their markers where there are points alone."""
    for axes in picture(name).figure.axes:
        styles = {}
        for line in axes.get_lines():
            dashes = line._unscaled_dash_pattern if line.get_linestyle() != "None" else None
            styles.setdefault((str(dashes), line.get_marker()), set()).add(line.get_color())
        assert all(len(colors) == 1 for colors in styles.values()), styles


OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def test_themes_are_of_one_palette() -> None:
    light, dark = THEMES["light"], THEMES["dark"]
    assert luminance(light.background) > 0.9
    assert luminance(dark.background) < 0.1
    for theme in (light, dark):
        # Blue stays blue, vermillion stays vermillion, and all are of Okabe and Ito's palette.
        assert {theme.dominant, theme.bulk, theme.third, theme.fourth} <= OKABE_ITO
        assert to_rgb(theme.dominant)[2] == max(to_rgb(theme.dominant))
        assert to_rgb(theme.bulk)[0] == max(to_rgb(theme.bulk))
    assert (light.dominant, light.bulk) == (plots.DOMINANT, plots.BULK)


# --- labels and scales ---------------------------------------------------------------------------

LABELS = {
    "dashboard": [
        ("step", "training loss"),
        ("step", r"sharpness $\lambda_1$"),
        ("step", r"eigenvalues $\lambda_i$"),
        ("step", r"alignment $\chi_k$"),
        ("step", "effective learning rate"),
        ("step", "norm"),
    ],
    "eigenvalue_history": [("step", r"eigenvalues $\lambda_i$")],
    "stability": [
        ("step", "sharpness"),
        ("step", r"$\lambda_1$ of blocks"),
        ("step", "change of the loss"),
    ],
    "valley": [("step", "training loss"), ("step", "share of the hill")],
    "overlap_heatmap": [("saved at step", "saved at step"), ("", "subspace overlap")],
    "density": [(r"eigenvalue $\lambda$", "spectral density")],
    "effective_rates": [
        ("Dom-LR: mean, and 10 to 90 % of the steps", ""),
        ("Bulk-LR: mean, and 10 to 90 % of the steps", ""),
    ],
    "cosine_matrix": [("eigenvector", "class"), ("", "|cosine|")],
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_axis_says_what_it_is(name: str) -> None:
    figure = picture(name).figure
    assert [(a.get_xlabel(), a.get_ylabel()) for a in panels_of(figure)] == LABELS[name]


def keys_of(figure: Figure) -> list[list[str]]:
    legends = [axes.get_legend() for axes in figure.axes]
    return [[t.get_text() for t in legend.get_texts()] if legend else [] for legend in legends]


def test_keys_name_the_lines() -> None:
    assert keys_of(picture("dashboard").figure) == [
        [],
        [
            r"$\lambda_{1}$",
            "stability threshold",
            "SAM-edge",
            r"preconditioned $\lambda_1$",
            "Adam's threshold",
        ],
        [r"$\lambda_{1}$ to $\lambda_{4}$", r"$\lambda_{5}$ to $\lambda_{7}$", "gap"],
        ["gradient", "update"],
        ["Dom-LR", "Bulk-LR"],
        [r"distance from $\theta_0$", "update"],
    ]
    one = plots.eigenvalue_history(history(k=1, more=1))
    assert keys_of(one) == [
        [r"$\lambda_{1}$", r"$\lambda_{2}$", "stability threshold", "SAM-edge", "gap"]
    ]


@pytest.mark.parametrize(
    "name",
    [
        "dashboard",
        "dashboard, negative",
        "dashboard, of everything",
        "eigenvalue_history",
        "eigenvalue_history, flat",
        "stability",
        "stability, negative",
        "valley",
        "effective_rates",
        "effective_rates, signs",
        "effective_rates, equal",
        "density",
    ],
)
def test_every_scale_has_labels(name: str) -> None:
    """At least two numbers an axis, which a logarithmic one does not have by itself."""
    for axes in filter(Axes.has_data, picture(name).figure.axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = axis.get_ticklabels()
            shown = [
                t.get_text()
                for t, at in zip(labels, axis.get_ticklocs(), strict=False)
                if low <= at <= high
            ]
            hidden = name.startswith("effective_rates") and axis is axes.yaxis
            assert hidden or sum(map(bool, shown)) >= 2, (axes.get_ylabel(), shown)


def test_steps_are_whole_numbers() -> None:
    for rows, expected in ((1, ["0"]), (3, ["0", "10", "20", "30", "40"])):
        (axes,) = plots.eigenvalue_history(history(rows)).axes
        axes.figure.draw_without_rendering()
        low, high = axes.get_xlim()
        labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        assert [t.get_text() for at, t in labels if low <= at <= high] == expected


def test_scales_are_logarithmic_where_positive_values_span_a_decade() -> None:
    def scales(changed: dict[str, list[Any]]) -> list[str]:
        return [axes.get_yscale() for axes in plots.dashboard(history() | changed).axes]

    assert scales({}) == ["log", "log", "log", "linear", "linear", "log"]
    assert scales({"loss": [1 + i / 30 for i in range(30)]})[0] == "linear"
    assert scales({"loss": [0.0] + [1.5**i for i in range(29)]})[0] == "linear"
    assert scales({"next_eigenvalues": [[-1.0]] * 30})[2] == "linear"
    # A distance of 0 at the start is left out; where there is nothing else it is shown.
    still = {"distance": [0.0] * 30, "update_norm": [0.0] * 30}
    assert scales(still)[5] == "linear"
    assert "nothing recorded" not in said(plots.dashboard(history() | still))


def said(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# --- the data ------------------------------------------------------------------------------------


def drawn(axes: Axes) -> list[list[float]]:
    """What the lines show; for each the steps are those of the history."""
    return [np.asarray(line.get_ydata(), float).tolist() for line in axes.get_lines()]


def columns_of(table: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*table, strict=True)]


def test_dashboard_draws_every_column() -> None:
    recorded = history()
    panels = picture("dashboard").figure.axes
    expected = [
        [recorded["loss"]],
        [
            recorded[name]
            for name in (
                "sharpness",
                "threshold",
                "sam_edge",
                "preconditioned_sharpness",
                "adam_threshold",
            )
        ],
        columns_of(recorded["eigenvalues"]) + columns_of(recorded["next_eigenvalues"]),
        [recorded["chi_gradient"], recorded["chi_update"]],
        [recorded["dom_lr"], recorded["bulk_lr"]],
        [[nan, *recorded["distance"][1:]], recorded["update_norm"]],
    ]
    for axes, columns in zip(panels, expected, strict=True):
        np.testing.assert_array_equal(drawn(axes), columns)
        for line in axes.get_lines():
            np.testing.assert_array_equal(line.get_xdata(), recorded["step"])


def test_eigenvalue_history_draws_eigenvalues_and_thresholds() -> None:
    recorded = history()
    (axes,) = plots.eigenvalue_history(recorded).axes
    expected = columns_of(recorded["eigenvalues"]) + columns_of(recorded["next_eigenvalues"])
    np.testing.assert_array_equal(
        drawn(axes), [*expected, recorded["threshold"], recorded["sam_edge"]]
    )
    lines = axes.get_lines()
    top, following = lines[0], lines[4]
    assert top.get_linestyle() == "-"
    assert following.get_linestyle() == "--"
    assert following.get_linewidth() < top.get_linewidth()


def band(axes: Axes) -> np.ndarray:
    """Lower and upper edge of the filled band, at each step."""
    (filled,) = axes.collections
    (path,) = filled.get_paths()
    edges: dict[float, set[float]] = {}
    for x, y in path.vertices:
        edges.setdefault(x, set()).add(y)
    return np.array([(x, min(ys), max(ys)) for x, ys in sorted(edges.items())])


@pytest.mark.parametrize("more", [0, 3])
def test_the_band_is_the_gap(more: int) -> None:
    """Down to the eigenvalue that was recorded; without it, as far as ``gap`` says."""
    recorded = history(more=more)
    upper = [row[-1] for row in recorded["eigenvalues"]]
    if more:
        lower = [row[0] for row in recorded["next_eigenvalues"]]
        recorded["gap"] = [nan] * 30
    else:
        lower = [last - gap for last, gap in zip(upper, recorded["gap"], strict=True)]
    (axes,) = plots.eigenvalue_history(recorded).axes
    expected = np.transpose([recorded["step"], lower, upper])
    np.testing.assert_allclose(band(axes), expected, rtol=1e-12)


def bands(axes: Axes) -> list[np.ndarray]:
    """The corners of the areas that are filled between curves, without those of a gap."""
    return [
        path.vertices
        for area in axes.collections
        if not str(area.get_label()).startswith("gap")
        for path in area.get_paths()
    ]


ERRORS = {"loss": 0.03, "chi_gradient": 0.02, "dom_lr": 0.001, "bulk_lr": 0.01}


def test_bands_are_two_standard_errors() -> None:
    table = history() | {f"{name}_error": [error] * 30 for name, error in ERRORS.items()}
    panels = plots.dashboard(table).axes
    where = {"loss": 0, "chi_gradient": 3, "dom_lr": 4, "bulk_lr": 4}
    for name, error in ERRORS.items():
        values, found = np.array(table[name]), bands(panels[where[name]])
        low = values - 2 * error
        if name == "loss":  # the scale is logarithmic
            low = np.maximum(low, values / 10)
        edges = {(s, round(v, 9)) for s, v in zip(table["step"], low, strict=True)}
        edges |= {(s, round(v + 2 * error, 9)) for s, v in zip(table["step"], values, strict=True)}
        corners = [{(s, round(v, 9)) for s, v in band.tolist()} for band in found]
        assert any(edges <= band for band in corners), name
    limits = [panel.get_ylim() for panel in plots.dashboard(history()).axes[3:5]]
    assert [panel.get_ylim() for panel in panels[3:5]] == limits


def test_of_all_data_there_are_no_bands() -> None:
    table = history() | {f"{name}_error": [0.0] * 29 + [nan] for name in ERRORS}
    assert not any(bands(panel) for panel in plots.dashboard(table).axes)


def test_a_gap_to_below_zero_ends_at_the_edge_of_a_logarithmic_scale() -> None:
    (axes,) = plots.eigenvalue_history(history(k=8, more=0) | {"gap": [100.0] * 30}).axes
    assert axes.get_yscale() == "log"
    assert (band(axes)[:, 1] > 0).all()


def test_what_was_not_recorded_is_not_drawn() -> None:
    """Thresholds that do not apply, and Adam's without the sharpness that it is for."""
    recorded = history(more=0) | {
        "threshold": [nan] * 30,
        "sam_edge": [None] * 30,
        "preconditioned_sharpness": [nan] * 30,
    }
    panels = plots.dashboard(recorded).axes
    assert drawn(panels[1]) == [recorded["sharpness"]]
    assert keys_of(plots.dashboard(recorded))[1] == []
    assert len(drawn(panels[2])) == 4


def test_histories_without_the_later_columns_are_drawn() -> None:
    old = {
        name: column
        for name, column in history().items()
        if name in ("step", "loss", "dom_lr", "eigenvalues")
    }
    panels = plots.dashboard(old).axes
    assert [drawn(axes) for axes in panels] == [
        [old["loss"]],
        columns_of(old["eigenvalues"]),
        [old["dom_lr"]],
    ]
    assert keys_of(panels[0].figure) == [[]] * 3  # no gap either
    assert said(panels[0].figure) == []


EMPTY = {
    "dashboard, empty": 1,
    "stability, empty": 1,
    "valley, empty": 2,
    "eigenvalue_history, empty": 1,
    "effective_rates, empty": 2,
    "effective_rates, of nothing": 2,
    "overlap_heatmap, empty": 1,
    "cosine_matrix, empty": 1,
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_history_is_an_empty_picture(name: str) -> None:
    figure = picture(name).figure
    assert said(figure) == ["nothing recorded"] * EMPTY[name]
    # No numbers on scales that measure nothing.
    assert {text.text for text in picture(name).written} <= {
        "nothing recorded",
        *(axes.get_xlabel() for axes in figure.axes),
        *(axes.get_ylabel() for axes in figure.axes),
    }


def count(pixels: np.ndarray, axes: Axes, color: str) -> int:
    """Pixels of a colour in a panel."""
    x0, y0, x1, y1 = (round(end) for end in axes.bbox.extents)
    wanted = np.round(np.array(to_rgb(color)) * 255)
    near = np.abs(pixels[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] - wanted).max(axis=2) <= 2
    return int(near.sum())


def test_a_single_row_can_be_seen() -> None:
    drawn, look = picture("dashboard, one row"), THEMES["light"]
    colors = [
        [look.ink],
        [look.dominant, look.ink, look.third, look.fourth],
        [look.dominant, look.bulk],
        [look.dominant, look.bulk],
        [look.dominant, look.bulk],
        [look.ink, look.third],
    ]
    for axes, expected in zip(drawn.figure.axes, colors, strict=True):
        for color in expected:
            assert count(drawn.pixels, axes, color) >= 8, (axes.get_ylabel(), color)


def test_a_value_between_gaps_is_a_point() -> None:
    loss = [1.0, nan, 2.0, inf, 3.0, 4.0, None, 1e300]
    figure = plots.dashboard({"step": list(range(8)), "loss": loss})
    assert len(figure.axes) == 1
    line, points = figure.axes[0].get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [1, nan, 2, nan, 3, 4, nan, nan])
    np.testing.assert_array_equal(points.get_xdata(), [0, 2])
    np.testing.assert_array_equal(points.get_ydata(), [1, 2])
    assert points.get_marker() != "None"


anything = st.none() | st.floats() | st.sampled_from([0.0, nan, inf, -inf, 1e-300, 5e-324, 1e99])


@st.composite
def histories(draw: st.DrawFn) -> dict[str, list[Any]]:
    rows = draw(st.integers(0, 4))
    names = draw(st.sets(st.sampled_from(NUMBERS)))
    table = {name: draw(st.lists(anything, min_size=rows, max_size=rows)) for name in names}
    for name in draw(st.sets(st.sampled_from(["eigenvalues", "next_eigenvalues"]))):
        lists = st.lists(anything, max_size=3)
        table[name] = draw(st.lists(lists, min_size=rows, max_size=rows))
    return table | {"step": draw(st.lists(st.integers(0, 10**7), min_size=rows, max_size=rows))}


@example({"step": [0], "bulk_lr": [5e-324]}, "rates")
@example({"step": [0], "sharpness": [5e-324], "update_sharpness": [1.0]}, plots.stability)
@example({"step": [0], "loss": [1e99], "river_loss": [-1e99]}, plots.valley)
@given(
    histories(),
    st.sampled_from(
        [plots.dashboard, plots.eigenvalue_history, plots.stability, plots.valley, "rates"]
    ),
)
@settings(max_examples=20)
def test_no_history_breaks_a_picture(table: dict[str, list[Any]], picture: Any) -> None:
    """Warnings are errors, in drawing too."""
    figure = plots.effective_rates({"a": table}) if picture == "rates" else picture(table)
    figure.set_layout_engine("none")  # half of the time, and not what a number can break
    figure.set_dpi(30)
    FigureCanvasAgg(figure).draw()


def test_a_spike_flattens_nothing_and_is_counted() -> None:
    recorded = spiked()
    (axes,) = plots.dashboard(recorded).axes
    low, high = axes.get_ylim()
    normal = [v for name in ("dom_lr", "bulk_lr") for v in history()[name]]
    assert low <= 0 <= max(normal) <= high < 2 * max(normal)
    assert low > -0.5 * max(normal)
    assert axes.get_ylabel() == "effective learning rate\n(3 beyond the limits: triangles)"
    dom, bulk, *edges = axes.get_lines()
    np.testing.assert_array_equal(dom.get_ydata(), recorded["dom_lr"])
    np.testing.assert_array_equal(bulk.get_ydata(), recorded["bulk_lr"])
    shown = [(e.get_marker(), *e.get_xdata(), *e.get_ydata(), e.get_color()) for e in edges]
    assert shown == [
        ("^", 80, high, plots.DOMINANT),
        ("v", 180, low, plots.DOMINANT),
        ("^", 400, high, plots.BULK),
    ]
    assert not any(edge.get_clip_on() for edge in edges)


def test_rates_near_their_median_are_all_inside() -> None:
    """Equal rates, as of gradient descent, or all but equal ones; and negative ones."""
    nearly = [0.1] * 20 + [0.14] * 10  # their median deviation is 0
    for rates in ([0.1] * 30, nearly, [-0.1] * 30, np.linspace(-1, 1, 30).tolist(), [0.0] * 30):
        recorded = {"step": list(range(30)), "dom_lr": rates, "bulk_lr": rates}
        (axes,) = plots.dashboard(recorded).axes
        low, high = axes.get_ylim()
        assert low < min(rates) <= max(rates) < high
        assert low < 0 < high
        assert "beyond" not in axes.get_ylabel()


# --- what there is -------------------------------------------------------------------------------


def labels_of(figure: Figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def test_the_dashboard_has_a_panel_for_what_was_recorded_and_no_other() -> None:
    figure = picture("dashboard, stability alone").figure
    assert labels_of(figure) == ["sharpness", "change of the loss"]
    assert said(figure) == []
    every = picture("dashboard, of everything").figure
    assert labels_of(every) == [
        "training loss",
        "sharpness",
        *(label for _, label in LABELS["dashboard"][2:]),
        "change of the loss",
        r"$\lambda_1$ of blocks",
        "share of the hill",
        "lowest eigenvalue",
        "localization",
        "displacement",
        "of my own",
    ]
    # A panel stays where its columns are, also while there is nothing in them.
    unknown = {name: [nan] * 30 for name in history() if "eigenvalues" not in name}
    rows = history() | unknown | {"step": list(range(30))}
    assert labels_of(plots.dashboard(rows)) == [label for _, label in LABELS["dashboard"]]


@pytest.mark.parametrize("count", range(1, 8))
def test_panels_stand_three_in_a_row(count: int) -> None:
    columns = {f"column{'abcdefg'[i]}": [1.0, 2.0] for i in range(count)}
    figure = plots.dashboard({"step": [0, 1]} | columns)
    figure.draw_without_rendering()
    assert labels_of(figure) == list(columns)
    places = [(round(a.bbox.y0), round(a.bbox.x0)) for a in figure.axes]
    assert sorted(places, key=lambda place: (-place[0], place[1])) == places
    rows = [len(list(group)) for _, group in itertools.groupby(y for y, _ in places)]
    assert rows == [3] * (count // 3) + [count % 3] * (count % 3 > 0)


def test_columns_of_ones_own_are_drawn_under_their_names() -> None:
    recorded = everything()
    figure = picture("dashboard, of everything").figure
    lowest, localization, displacement, own = figure.axes[-4:]
    assert drawn(lowest) == [recorded["lowest_eigenvalue"]]
    assert drawn(localization) == [recorded["localization_1"], recorded["localization_2"]]
    np.testing.assert_array_equal(drawn(displacement), columns_of(recorded["displacement"]))
    assert drawn(own) == [recorded["of_my_own"]]
    assert len(bands(own)) == 1
    assert not bands(lowest)
    lists = {"step": [0, 1], "of_lists": [[1.0, 2.0], [3.0]]}
    (axes,) = plots.dashboard(lists).axes
    np.testing.assert_array_equal(drawn(axes)[:2], [[1, 3], [2, nan]])


# --- stability -----------------------------------------------------------------------------------


def test_stability_draws_sharpnesses_against_their_thresholds() -> None:
    recorded = at_the_edge()
    sharpness, blocks, change = picture("stability").figure.axes
    names = [
        "sharpness",
        "critical_sharpness",
        "update_sharpness",
        "gradient_sharpness",
        "batch_sharpness",
        "norm_sharpness",
        *list(THRESHOLDS)[:-1],
        "preconditioned_sharpness",
        "adam_threshold",
    ]
    np.testing.assert_array_equal(drawn(sharpness), [recorded[name] for name in names])
    assert keys_of(sharpness.figure)[0] == [
        r"$\lambda_{1}$",
        r"critical $\lambda_c$",
        "along the update",
        "along the gradient",
        "batch sharpness",
        "in the optimizer's norm",
        "stability threshold",
        "SAM-edge",
        r"$2/\eta$",
        r"$2(1-\mu)/\eta$",
        r"$2(1+\mu)/\eta$",
        "threshold in the norm",
        r"preconditioned $\lambda_1$",
        "Adam's threshold",
    ]
    assert sharpness.get_yscale() == "log"
    (area,) = bands(sharpness)
    values = np.array(recorded["batch_sharpness"])
    edges = {round(v, 9) for v in np.maximum(values - 4.0, values / 10)}
    edges |= {round(v, 9) for v in values + 4.0}
    assert edges <= {round(y, 9) for _, y in area.tolist()}
    # The sharpest blocks have names, the others are one kind of line.
    order = [6, 5, 4, 3, 2, 0, 1]
    np.testing.assert_array_equal(drawn(blocks), [recorded[f"sharpness[h.{i}]"] for i in order])
    assert keys_of(sharpness.figure)[1] == ["h.6", "h.5", "h.4", "h.3", "h.2", "2 more"]
    assert drawn(change) == [recorded["actual_change"], recorded["predicted_change"]]
    low, high = change.get_ylim()
    assert low < min(recorded["predicted_change"]) < 0 < high


def test_thresholds_that_are_the_same_are_drawn_once() -> None:
    """Of plain gradient descent; with momentum they are two, and of Adam there is the one."""
    assert keys_of(plots.stability(stability_rows()))[0] == [
        r"critical $\lambda_c$",
        "along the update",
        "along the gradient",
        "stability threshold",
    ]
    momentum = stability_rows() | {"threshold": [76.0] * 30}
    assert keys_of(plots.stability(momentum))[0][3:] == ["stability threshold", r"$2/\eta$"]
    both = {"small_batch_threshold": [4.0] * 30, "large_batch_threshold": [76.0] * 30}
    batches = keys_of(plots.stability(momentum | both))[0][3:]
    assert batches == ["stability threshold", r"$2/\eta$", r"$2(1-\mu)/\eta$"]
    adam = stability_rows() | {"threshold": [nan] * 30, "adam_threshold": [3800.0] * 30}
    assert keys_of(plots.stability(adam))[0][3:] == [r"$2/\eta$"]  # no sharpness for the other


def test_what_is_not_above_zero_is_marked_at_the_edge_of_the_scale() -> None:
    axes = picture("stability, negative").figure.axes[0]
    low, high = axes.get_ylim()
    assert axes.get_ylabel() == "sharpness\n(3 not above 0: triangles)"
    assert axes.get_yscale() == "log"
    assert 0 < low < min(at_the_edge()["update_sharpness"])
    assert high > 3800
    marked = [line for line in axes.get_lines() if line.get_marker() == "v"]
    places = {(x, y) for line in marked for x, y in zip(*line.get_data(), strict=True)}
    assert places == {(150, low), (450, low), (1000, low)}
    assert not any(line.get_clip_on() for line in marked)
    # Where nothing spans a decade there is room for it on a linear scale.
    flat = parts(at_the_edge(), "update_sharpness") | {"update_sharpness": [-1.0, 2.0] * 15}
    (axes,) = plots.stability(flat).axes
    assert axes.get_yscale() == "linear"
    assert drawn(axes) == [[-1.0, 2.0] * 15]


def test_the_panels_of_stability_are_those_of_what_was_recorded() -> None:
    rows = at_the_edge(blocks=0)
    assert labels_of(plots.stability(rows)) == ["sharpness", "change of the loss"]
    alone = parts(rows, "sharpness", "threshold")
    assert labels_of(plots.stability(alone)) == [r"sharpness $\lambda_1$"]
    three = at_the_edge(blocks=3)
    assert keys_of(plots.stability(three))[1] == ["h.2", "h.1", "h.0"]


# --- the valley ----------------------------------------------------------------------------------


def test_the_valley_is_the_loss_above_the_river() -> None:
    recorded = in_the_valley()
    loss, share = picture("valley").figure.axes
    assert drawn(loss) == [recorded["loss"], recorded["river_loss"]]
    assert keys_of(loss.figure) == [["loss", "river", "hill"], []]
    expected = np.transpose([recorded["step"], recorded["river_loss"], recorded["loss"]])
    np.testing.assert_allclose(band(loss), expected, rtol=1e-12)
    assert drawn(share) == [recorded["hill_share"]]
    low, high = share.get_ylim()
    assert low < 0
    assert high > 1


def test_a_share_of_any_size_flattens_nothing() -> None:
    share = picture("valley, a spike").figure.axes[1]
    low, high = share.get_ylim()
    assert -0.2 < low < 0
    assert 1 < high < 1.2
    assert share.get_ylabel() == "share of the hill\n(1 beyond the limits: triangles)"
    *_, edge = share.get_lines()
    assert (edge.get_marker(), *edge.get_xdata(), *edge.get_ydata()) == ("v", 1450, low)


def test_a_river_below_zero_is_shown_on_a_linear_scale() -> None:
    """A Newton step may go further down than there is a loss."""
    rows = in_the_valley()
    rows["river_loss"][3] = -1.0
    axes = plots.valley(rows).axes[0]
    assert axes.get_yscale() == "linear"
    np.testing.assert_allclose(band(axes)[3], [150, -1.0, rows["loss"][3]])


# --- effective rates of several ------------------------------------------------------------------


def test_effective_rates_are_means_and_quantiles() -> None:
    dom, bulk = plots.effective_rates(RATES).axes
    means = []
    for axes, column, marker in ((dom, "dom_lr", "o"), (bulk, "bulk_lr", "s")):
        lines = axes.get_lines()
        assert len(lines) == 2 * len(RATES)
        for row, table in enumerate(RATES.values()):
            bar, point = lines[2 * row : 2 * row + 2]
            values = np.array(table[column])
            np.testing.assert_allclose(bar.get_xdata(), np.quantile(values, [0.1, 0.9]))
            np.testing.assert_allclose(point.get_xdata(), [values.mean()])
            assert point.get_marker() == marker
            means.append("none" if np.isnan(values).all() else f"{values.mean():.3g}")
            assert set(bar.get_ydata()) == set(point.get_ydata()) == {row}
    assert [label.get_text() for label in dom.get_yticklabels()] == list(RATES)
    assert said(dom.figure) == means
    assert dom.get_ylim() == (2.5, -0.5)  # the first on top


def test_effective_rates_leave_out_what_is_not_finite() -> None:
    table = {"step": [0, 1, 2, 3], "dom_lr": [1.0, nan, inf, 3.0], "bulk_lr": [None, 2.0, 2.0, 2.0]}
    dom, bulk = plots.effective_rates({"a": table}).axes
    assert dom.get_lines()[1].get_xdata() == [2.0]
    assert bulk.get_lines()[1].get_xdata() == [2.0]


@pytest.mark.parametrize(
    ("rates", "scale"),
    [([0.1, 0.2], "log"), ([0.1], "log"), ([-0.1, 0.2], "symlog"), ([0.0, 0.0], "symlog")],
)
def test_scale_of_effective_rates(rates: list[float], scale: str) -> None:
    """Both panels have the scale, and the limits, of all that is shown."""
    positive = {"step": [0, 1], "dom_lr": [2.0, 2.0], "bulk_lr": [5.0, 5.0]}
    steps = list(range(len(rates)))
    other = {"step": steps, "dom_lr": rates, "bulk_lr": [2.0] * len(rates)}
    figure = plots.effective_rates({"positive": positive, "other": other})
    dom, bulk = figure.axes
    assert dom.get_xscale() == bulk.get_xscale() == scale
    assert dom.get_xlim() == bulk.get_xlim()
    for axes in (dom, bulk):
        for line in axes.get_lines():
            low, high = axes.get_xlim()
            assert low < min(line.get_xdata()) <= max(line.get_xdata()) < high


# --- matrices ------------------------------------------------------------------------------------


def test_overlap_heatmap_has_a_fixed_scale_and_the_steps() -> None:
    matrix = torch.tensor([[1.0, 0.6, nan], [0.6, 1.0, 0.5], [nan, 0.5, 1.0]])
    figure = plots.overlap_heatmap(matrix.requires_grad_(), [0, 50, 1000])
    (axes,) = figure.axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array().filled(nan), matrix.detach().numpy())
    assert image.get_clim() == (0, 1)
    assert image.origin == "lower"
    assert image.get_cmap().name == "viridis"
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["0", "50", "1000"]
        assert axis.get_ticklocs().tolist() == [0, 1, 2]
    (bar,) = axes.child_axes
    assert bar.get_ylim() == (0, 1)
    numbers = {text.text for text in picture("overlap_heatmap").written}
    assert numbers >= {"0.0", "0.2", "0.4", "0.6", "0.8", "1.0"}
    (numbered,) = plots.overlap_heatmap(matrix.detach()).axes
    assert [label.get_text() for label in numbered.get_xticklabels()] == ["0", "1", "2"]


def test_many_steps_are_labelled_in_part() -> None:
    (axes,) = plots.overlap_heatmap(np.eye(50), [10 * i for i in range(50)]).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(labels) <= 6
    assert [10 * place for place in axes.get_xticks()] == [float(label) for label in labels]


def test_cosine_matrix_frames_the_assignment() -> None:
    values = cosines()
    figure = plots.cosine_matrix(torch.tensor(values), torch.tensor(ASSIGNMENT))
    (axes,) = figure.axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), np.abs(values))
    assert image.get_clim() == (0, 1)
    assert image.origin == "upper"
    pairs = {(row, column) for row, column in enumerate(ASSIGNMENT) if column >= 0}
    centres = {
        (round(p.get_y() + p.get_height() / 2, 9), round(p.get_x() + p.get_width() / 2, 9))
        for p in axes.patches
    }
    assert centres == pairs
    numbers = {text.get_position()[::-1]: text.get_text() for text in axes.texts[:-1]}
    assert numbers == {pair: f"{abs(values[pair]):.2f}" for pair in pairs}
    mean = np.mean([abs(values[pair]) for pair in pairs])
    assert axes.texts[-1].get_text() == f"marked: the optimal assignment, mean {mean:.2f}"
    assert [label.get_text() for label in axes.get_xticklabels()] == list("1234567")
    assert [label.get_text() for label in axes.get_yticklabels()] == list("012345")


def test_cosine_matrix_without_an_assignment_and_with_too_many_for_numbers() -> None:
    (axes,) = plots.cosine_matrix(cosines()).axes
    assert not axes.patches
    assert not axes.texts
    (axes,) = plots.cosine_matrix(cosines(13, 5), [3, 1, 2, 0, 4] + [-1] * 8).axes
    assert not axes.patches
    assert len(axes.texts) == 1
    dots = [(*dot.get_ydata(), *dot.get_xdata()) for dot in axes.get_lines()]
    assert dots == [(0, 3), (1, 1), (2, 2), (3, 0), (4, 4)]
    assert axes.get_aspect() == "auto"  # the cells of a narrow matrix fill the panel
    assert plots.cosine_matrix(cosines(5, 5)).axes[0].get_aspect() == 1


def test_cosine_matrix_draws_what_the_diagnostic_returns() -> None:
    """A class gradient that is an eigenvector: cosine 1, and framed."""
    basis = EigenBasis(torch.tensor([2.0, 1.0]), torch.eye(2, 5), torch.zeros(2))
    found = class_gradient_cosines(torch.eye(2, 5).flip(0) * 3, basis)
    (axes,) = plots.cosine_matrix(found.cosines, found.assignment).axes
    assert [text.get_text() for text in axes.texts[:2]] == ["1.00", "1.00"]
    assert {p.get_x() + 0.43 for p in axes.patches if p.get_y() < 0} == {1.0}


def test_matrices_that_do_not_fit_are_refused() -> None:
    figure = Figure()
    axes = figure.subplots()
    for bad, call in {
        "the shape of matrix": lambda: plots.overlap_heatmap(np.ones((2, 3)), axes=axes),
        "the shape of matrix is (2,)": lambda: plots.overlap_heatmap([1.0, 2.0], axes=axes),
        "the length of steps is 3": lambda: plots.overlap_heatmap(np.eye(2), [1, 2, 3], axes=axes),
        "the shape of cosines": lambda: plots.cosine_matrix(np.ones(3), axes=axes),
        "assignment is [0, 3]": lambda: plots.cosine_matrix(np.eye(2, 3), [0, 3], axes=axes),
        "assignment is [-2, 0]": lambda: plots.cosine_matrix(np.eye(2, 3), [-2, 0], axes=axes),
        "assignment is [0]": lambda: plots.cosine_matrix(np.eye(2, 3), [0], axes=axes),
    }.items():
        with pytest.raises(so.ArgumentError) as caught:
            call()
        assert str(caught.value).startswith(bad)
    assert not axes.get_xlabel()
    assert not axes.has_data()


# --- the density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 0.2])
def test_density_is_the_mixture_with_its_standard_error(width: float | None) -> None:
    measured = spectrum()
    (axes,) = plots.density(measured, width=width).axes
    (line,) = axes.get_lines()
    grid = line.get_xdata()
    nodes, weights = measured.nodes.numpy(), measured.weights.numpy()
    sigma = width or measured.width
    each = (norm.pdf(grid[:, None, None], nodes, sigma) * weights).sum(axis=2)
    mean, error = each.mean(axis=1), each.std(axis=1, ddof=1) / np.sqrt(len(nodes))
    seen = mean > axes.get_ylim()[0]
    assert seen.sum() > 300
    np.testing.assert_allclose(line.get_ydata()[seen], mean[seen], rtol=1e-9)
    edges = band(axes)
    at = np.isin(edges[:, 0], grid[seen])
    np.testing.assert_allclose(edges[at, 2], (mean + error)[seen], rtol=1e-9)
    lower = np.maximum((mean - error)[seen], axes.get_ylim()[0] / 10)
    np.testing.assert_allclose(edges[at, 1], lower, rtol=1e-9)
    # Every node is on the grid, and every peak in sight.
    assert np.isin(nodes, grid).all()
    assert axes.get_ylim()[0] < mean[np.isin(grid, nodes)].min()
    assert axes.get_ylim()[1] > mean.max()
    assert axes.get_yscale() == "log"
    assert keys_of(axes.figure)[0] == ["mean of 4 probes", "± standard error"]


def test_tails_of_the_kernel_do_not_stretch_the_scale() -> None:
    measured = spectrum()
    measured.weights[:, 0] = 0  # of copies, where a Krylov space was complete
    low, high = plots.density(measured, width=0.01).axes[0].get_ylim()
    assert high / low < 1e9


def test_outliers_are_marked_and_counted() -> None:
    (axes,) = plots.density(spectrum(), torch.tensor([8.0, 9.5, nan])).axes
    line, rug = axes.get_lines()
    assert line.get_xdata().max() > 9.5
    np.testing.assert_array_equal(rug.get_xdata(), [8.0, 9.5])
    assert rug.get_marker() == "^"
    assert axes.get_xlim()[1] > 9.5
    assert keys_of(axes.figure)[0][-1] == "2 outliers"
    assert keys_of(plots.density(spectrum(), [8.0]))[0][-1] == "1 outlier"
    assert keys_of(plots.density(spectrum(), []))[0][-1] == "± standard error"


def test_density_of_one_value() -> None:
    """All nodes at 0, as of a zero matrix."""
    zero = SpectralDensity(torch.zeros(2, 3).double(), torch.full((2, 3), 1 / 3).double(), 5, 6)
    render(plots.density(zero))


# --- the user's figure, settings and files -------------------------------------------------------


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[::-1]


def own_figure() -> Figure:
    """A figure of the user's, with seven panels."""
    figure = Figure(figsize=(12, 6), dpi=50, facecolor="#abcdef")
    figure.subplots(2, 3)
    figure.add_axes((0.9, 0.9, 0.05, 0.05))
    return figure


@pytest.fixture(scope="module")
def before() -> np.ndarray:
    return pixels(own_figure())


@pytest.mark.parametrize("name", PICTURES)
def test_axes_are_drawn_into_and_nothing_else_changes(name: str, before: np.ndarray) -> None:
    count = {"dashboard": 6, "effective_rates": 2, "stability": 3, "valley": 2}.get(name, 1)
    figure = own_figure()
    panels = list(figure.axes)
    given = panels[:count]
    drawing = PICTURES[name](axes=given[0] if count == 1 else given, theme="dark")
    assert drawing is figure
    assert figure.axes == panels
    assert to_hex(figure.get_facecolor()) == "#abcdef"
    assert figure.get_layout_engine() is None
    for axes in given:
        assert to_hex(axes.get_facecolor()) == THEMES["dark"].background
    after = pixels(figure)
    for axes in panels[count:]:
        x0, y0, x1, y1 = (round(end) for end in axes.bbox.extents)
        np.testing.assert_array_equal(before[y0:y1, x0:x1], after[y0:y1, x0:x1])
    assert all(label.get_text() for axes in given for label in axes.get_yticklabels())
    assert all(axes.get_yticklabels() for axes in given)
    assert [(a.get_xlabel(), a.get_ylabel()) for a in given] == LABELS[name][:count]


def test_panels_come_as_matplotlib_gives_them() -> None:
    """An array of 2 by 3; and of a subfigure, whose figure is returned."""
    figure = Figure()
    part, _ = figure.subfigures(1, 2)
    panels = part.subplots(2, 3)
    assert plots.dashboard(history(), axes=panels) is figure
    assert [axes.get_ylabel() for axes in panels.flat] == [
        label for _, label in LABELS["dashboard"]
    ]


def test_wrong_panels_and_themes_are_refused_before_anything_is_drawn() -> None:
    figure = Figure()
    panels = list(figure.subplots(2, 3).flat)
    for call in (
        lambda: plots.dashboard(history(), axes=panels[:5]),
        lambda: plots.dashboard(history(), axes=panels[0]),
        lambda: plots.eigenvalue_history(history(), axes=panels[:2]),
        lambda: plots.dashboard(stability_rows(), axes=panels),
        lambda: plots.stability(stability_rows(), axes=panels[:3]),
        lambda: plots.valley(in_the_valley(), axes=panels[0]),
        lambda: plots.effective_rates(RATES, axes=panels[:3]),
        lambda: plots.overlap_heatmap(OVERLAPS, axes=figure),
    ):
        with pytest.raises(so.ArgumentError, match=r"axes is .* of matplotlib's Axes"):
            call()
    for name, picture in PICTURES.items():
        count = {"dashboard": 6, "effective_rates": 2, "stability": 3, "valley": 2}.get(name, 1)
        some = panels[:count] if count > 1 else panels[0]
        with pytest.raises(so.ArgumentError, match="theme is 'sepia', but must be 'light' or 'da"):
            picture(axes=some, theme="sepia")
    with pytest.raises(so.ArgumentError, match=r"Pass `monitor.history`"):
        plots.dashboard(watch(0), axes=panels)
    with pytest.raises(so.ArgumentError, match=r"history\['loss'\] is 2, but must be 3"):
        plots.dashboard({"step": [0, 1, 2], "loss": [1.0, 2.0]}, axes=panels)
    assert not any(axes.has_data() or axes.get_xlabel() for axes in panels)


STRANGE = {
    "figure.facecolor": "green",
    "figure.dpi": 37,
    "savefig.facecolor": "pink",
    "savefig.dpi": 41,
    "axes.facecolor": "red",
    "axes.edgecolor": "red",
    "axes.labelcolor": "yellow",
    "axes.grid": True,
    "axes.grid.which": "both",
    "axes.labelsize": 30,
    "axes.spines.top": True,
    "axes.linewidth": 4,
    "grid.color": "red",
    "grid.linestyle": ":",
    "grid.alpha": 0.2,
    "legend.facecolor": "red",
    "legend.frameon": True,
    "legend.fontsize": 30,
    "lines.linewidth": 9,
    "lines.marker": "x",
    "lines.linestyle": ":",
    "text.color": "yellow",
    "font.size": 25,
    "image.cmap": "jet",
    "image.origin": "lower",
    "image.interpolation": "bilinear",
    "xtick.color": "red",
    "xtick.direction": "in",
    "xtick.labelsize": 30,
    "xtick.top": True,
    "xtick.labeltop": True,
    "xtick.major.size": 12,
    "ytick.right": True,
    "ytick.minor.visible": True,
}


@pytest.mark.parametrize(
    "name",
    [
        "dashboard, spikes, late",
        "eigenvalue_history",
        "effective_rates",
        "density",
        "cosine_matrix",
    ],
)
def test_settings_are_neither_changed_nor_read(name: str) -> None:
    """Those for files have a test of their own, below."""

    def look() -> np.ndarray:
        figure = ALL[name](theme="dark")
        figure.set_layout_engine("none")
        figure.set_dpi(60)
        return pixels(figure)

    before = dict(mpl.rcParams)
    expected = look()
    assert dict(mpl.rcParams) == before
    with mpl.rc_context(STRANGE):
        strange = dict(mpl.rcParams)
        np.testing.assert_array_equal(look(), expected)
        assert dict(mpl.rcParams) == strange


def test_pictures_are_drawn_without_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps figures and a backend for the whole process, which are the user's to choose."""
    forget_plots(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    anew = importlib.import_module("subspace_optim.diagnostics.plots")
    assert anew is not plots
    anew.dashboard({})
    for make in PICTURES.values():
        make()


def forget_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next import of the pictures is a first one, until the test ends."""
    monkeypatch.setattr(diagnostics, "plots", plots)
    for module in [name for name in sys.modules if ".diagnostics.plots" in name]:
        monkeypatch.delitem(sys.modules, module)


def test_text_stays_text_in_vector_files(tmp_path: Path) -> None:
    for name in ("run.svg", "again.svg"):
        figure = plots.eigenvalue_history(history(2, k=1, more=0))
        figure.savefig(tmp_path / name, metadata={"Date": None})
    svg = (tmp_path / "run.svg").read_text()
    assert "stability threshold</text>" in svg
    assert svg.count("<text") > 10
    assert (tmp_path / "again.svg").read_text() == svg
    figure.savefig(tmp_path / "run.pdf")
    pdf = (tmp_path / "run.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # a font, of which the text can be copied and edited
    assert b"/Type3" not in pdf


def test_the_first_file_is_laid_out_as_every_later_one() -> None:
    """Matplotlib lays a figure out for the tick labels of the drawing before."""
    name = "dashboard, one row"
    figure, drawn_before = ALL[name](), picture(name).figure
    figure.savefig(io.BytesIO(), format="png")
    places, later = ([axes.bbox.extents for axes in f.axes] for f in (figure, drawn_before))
    np.testing.assert_allclose(places, later, atol=1.0)  # pixels


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_background_is_saved(tmp_path: Path, theme: str) -> None:
    from matplotlib.image import imread

    path = tmp_path / "run.png"
    figure = plots.eigenvalue_history(history(5), theme=theme)
    with mpl.rc_context({"savefig.facecolor": "pink", "savefig.dpi": 41}):
        figure.savefig(path)
    image = imread(path)
    assert to_hex(image[0, 0]) == THEMES[theme].background
    assert image.shape[:2] == (480, 840)  # 4 by 7 inches at 120
    figure.savefig(path, dpi=50, facecolor="#123456")
    image = imread(path)
    assert to_hex(image[0, 0]) == "#123456"
    assert image.shape[:2] == (200, 350)


# --- the monitor's own picture -------------------------------------------------------------------


def watch(steps: int = 4, k: int = 3) -> so.Monitor:
    model = Quartic()
    model.b.mul_(0.01)  # with c > 0 and a shift, the loss is positive along the path
    subspace = so.DominantSubspace(DenseOperator(model), k)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return monitor


def test_the_monitor_draws_what_its_measures_record() -> None:
    model = Quartic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with so.Monitor(optimizer, DenseOperator(model)) as monitor:  # the measures are stability()
        for _ in range(3):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    sharpness, change = monitor.plot().axes
    names = ("critical_sharpness", "update_sharpness", "gradient_sharpness")
    np.testing.assert_array_equal(drawn(sharpness)[:3], [monitor.history[n] for n in names])
    assert drawn(change)[0] == monitor.history["actual_change"]


def test_the_monitor_draws_its_history() -> None:
    monitor = watch()
    panels = monitor.plot().axes
    assert drawn(panels[0]) == [monitor.history["loss"]]
    assert drawn(panels[1])[:2] == [monitor.history["sharpness"], monitor.history["threshold"]]
    assert drawn(panels[4]) == [monitor.history["dom_lr"], monitor.history["bulk_lr"]]


@pytest.mark.parametrize(("kind", "magic"), [(Path, b"\x89PNG\r\n"), (str, b"%PDF")])
def test_the_ending_chooses_the_format(
    tmp_path: Path, kind: Callable[[Path], Path | str], magic: bytes
) -> None:
    path = tmp_path / ("run.png" if kind is Path else "run.pdf")
    watch(0).plot(kind(path))
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize(("steps", "k"), [(0, 3), (3, 9), (3, 1)])
def test_short_histories_and_missing_rates_can_be_drawn(steps: int, k: int) -> None:
    """No row; k = P, where every Bulk-LR is NaN; a single eigenvalue."""
    figure = watch(steps, k).plot()
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = watch(0)
    forget_plots(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'subspace_optim\[plots\]'"):
        monitor.plot()
