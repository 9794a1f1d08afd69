"""What holds for every paper: each run has the figures of its claims, each exhibit shows them."""

import inspect
import json
import math
from dataclasses import fields

import pytest

from benchmarks.experiment import Settings
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.reproduction import Job
from tests.benchmarks.papers import tiny as sizes

RUNS = [(key, run.name) for key, paper in PAPERS.items() for run in paper.runs]
EXHIBITS = [(key, each.name) for key, paper in PAPERS.items() for each in paper.exhibits]
UNSCATHED = ("sagun_2017",)
"""Whose premises hold at any size, so that all figures are numbers."""
pytestmark = [
    # Tiny networks have no gap, now and then.
    pytest.mark.filterwarnings("ignore::subspace_optim.NoGapWarning"),
    pytest.mark.filterwarnings("ignore::subspace_optim.ConvergenceWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), RUNS)
def test_a_run_has_the_figures_of_its_claims(key, name, tiny):
    raw, paper = tiny(key, name), PAPERS[key]
    assert len(json.dumps(raw)) < 100_000
    for claim in paper.claims_about(paper.run(name)):  # also of readings
        figure = claim.measure(raw)
        assert isinstance(figure, float), claim.name
        assert key not in UNSCATHED or math.isfinite(figure), claim.name
        assert claim.premise is None or isinstance(claim.premise(raw), bool), claim.name


@pytest.mark.parametrize(("key", "name"), EXHIBITS)
def test_an_exhibit_shows_what_there_is_and_says_what_there_is_not(key, name, tiny):
    exhibit = PAPERS[key].exhibit(name)
    raws = {run: {1: tiny(key, run), 3: tiny(key, run)} for run in exhibit.runs}
    nothing = {run: {} for run in exhibit.runs}
    if exhibit.draw is not None:
        figure = exhibit.draw(raws)
        figure.draw_without_rendering()  # warns of a key that leaves a panel no room
        panels = [panel for panel in figure.axes if panel.get_visible()]
        assert all(panel.has_data() for panel in panels)
        empty = exhibit.draw(nothing)
        assert {text.get_text() for panel in empty.axes for text in panel.texts} == {"not measured"}
    if exhibit.table is not None:
        for found in (raws, nothing):
            rows = exhibit.table(found)
            assert {len(row) for row in rows} == {len(rows[0])}
            assert all(isinstance(cell, str) for row in rows for cell in row)
        assert len(exhibit.table(raws)) > 1


CHEAP = [("sagun_2017", "gd-tanh"), ("gur_ari_2018", "two-samples"), ("song_2024", "toy")]


@pytest.mark.parametrize(("key", "name"), [*CHEAP, ("class_gradient_2020", "batch-sizes")])
def test_a_seed_decides_what_is_measured(key, name, tiny, tmp_path):
    assert sizes.measured(key, name, tmp_path) == tiny(key, name)
    assert sizes.measured(key, name, tmp_path, seed=3) != tiny(key, name)


def test_the_sizes_of_the_paper_are_arguments_of_what_measures():
    """Of runs that nobody made at that size: a name that is misspelt would be told by a GPU."""
    settings = {field.name for field in fields(Settings)}
    for paper in PAPERS.values():
        for run in paper.runs:
            assert run.paper.keys() >= run.small.keys()
            bound = inspect.signature(run.measure).bind(Job(), **run.paper)
            assert bound.arguments.get("settings", {}).keys() <= settings, run.name
