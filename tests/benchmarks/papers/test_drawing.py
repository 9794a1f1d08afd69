"""What all reproductions draw and write alike."""

import math

import numpy as np
import pytest

from benchmarks.papers.drawing import (
    finished,
    grid,
    in_turn,
    line,
)
from benchmarks.papers.tables import over_seeds

SEEDS = {3: {"y": [3, 4]}, 1: {"y": [1, 2]}, 2: {"y": [2, 3]}}


def test_the_first_seed_is_strong_on_top_and_alone_in_the_key():
    (axes,) = grid([""])
    for raw, first in in_turn(SEEDS):
        line(axes, [0, 1], raw["y"], first, "a", color="red")
        line(axes, [0, 1], raw["y"], first, "b", color="blue", lw=5)
    finished([axes])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    *thin, strong, _ = axes.get_lines()
    assert list(strong.get_ydata()) == [1, 2]
    assert strong.get_color() == "red"
    assert strong.get_alpha() == 1 > max(each.get_alpha() for each in thin)
    assert [each.get_linewidth() for each in axes.get_lines()[1::2]] == [5, 5, 5]
    assert strong.get_linewidth() > max(each.get_linewidth() for each in thin[::2])


def test_a_grid_has_a_panel_for_each_title_in_rows():
    panels = grid(["a", "b", "c"], 2, width=3.0, height=2.0)
    assert [axes.get_title() for axes in panels] == ["a", "b", "c"]
    figure = finished(panels)
    assert tuple(figure.get_size_inches()) == (6.0, 4.0)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    assert tuple(grid(["a", "b"])[0].figure.get_size_inches()) == (6.8, 2.8)


@pytest.mark.parametrize("lines", [1, 2, 3, 7])
def test_titles_are_above_the_keys_at_one_height(lines):
    panels = grid(["some", "none"], width=5.0)
    for number in range(lines):
        line(panels[0], [0, 1], [0, number], True, f"line {number}")
    line(panels[1], [0, 1], [0, 1], True, "one line needs no key")
    finished(panels, columns=2).draw_without_rendering()
    some, none = (axes.title.get_window_extent() for axes in panels)
    assert some.y0 == pytest.approx(none.y0)
    assert panels[1].get_legend() is None
    legend = panels[0].get_legend()
    below = panels[0].bbox.y1 if legend is None else legend.get_window_extent().y1
    assert (legend is None) == (lines == 1)
    assert below < some.y0 < below + 20  # pixels


def test_columns_0_is_no_key():
    (axes,) = grid([""])
    for name in ("a", "b"):
        line(axes, [0, 1], [0, 1], True, name)
    finished([axes], columns=0)
    assert axes.get_legend() is None


def test_logarithmic_axes_have_numbers_and_others_keep_theirs():
    both, neither = panels = grid(["", ""])
    for axes in panels:
        line(axes, [1, 1000], [1, 1000], True)
    both.set(xscale="log", yscale="log", xlabel="x", ylabel="y")
    finished(panels).draw_without_rendering()
    for axis in (both.xaxis, both.yaxis):
        shown = [label.get_text() for label in axis.get_ticklabels()]
        assert {"1", "10", "100", "1000"} <= set(shown)
    assert (both.get_xlabel(), both.get_ylabel()) == ("x", "y")
    assert neither.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([0.5], "0.5"),
        ([2.0, 2.0], "2"),
        ([1.0, 1.0001], "1"),  # they differ in nothing that is shown
        ([1.0, 2.0, 6.0], "3 (1 to 6)"),
        ([math.inf, 1.0], "inf (1 to inf)"),
        ([math.inf, math.inf], "inf"),
        ([math.inf, -math.inf], "nan"),
        ([1.0, math.nan, 2.0], "nan"),
        (np.array([1, 3]), "2 (1 to 3)"),
    ],
)
def test_seeds_as_a_text(values, text):
    assert over_seeds(values) == text
    assert over_seeds(iter(values)) == text


def test_digits_of_the_text():
    assert over_seeds([1.23456, 2.34567], 2) == "1.8 (1.2 to 2.3)"
