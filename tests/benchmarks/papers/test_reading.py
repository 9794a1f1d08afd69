"""Papers from data files: what they may tell, what is refused, and how panels and tables follow."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.papers import reductions as r
from benchmarks.papers.reading import read
from benchmarks.papers.reductions import column
from benchmarks.papers.reproduction import Cause
from benchmarks.papers.song_2024 import analysis

TOLD = Path(__file__).parent / "told"
"""A paper that tells a bit of all that can be told."""
RAW = {"GD": {"x": [4.0, 2.0], "y": [2.0, 1.0]}, "SGD": {"x": [1.0, 2.0], "y": [3.0, 4.0]}}
RAW |= {"switch": 7}


@pytest.fixture
def paper(tmp_path, monkeypatch):
    def component(raw, number):
        return [number, number + raw["switch"]]

    monkeypatch.setattr(analysis, "component", component, raising=False)
    rises = lambda raw: raw["switch"] > 0  # noqa: E731
    monkeypatch.setattr(analysis, "rises", rises, raising=False)
    shutil.copytree(TOLD, tmp_path, dirs_exist_ok=True)
    return read("song_2024", tmp_path)


def test_runs_have_their_sizes_and_the_last_part_counts(paper):
    toy, other = paper.runs
    assert toy.small == {"lr": 1e-4, "steps": 40, "keep": 3}
    assert toy.paper == {"lr": 1e-4, "steps": 100, "keep": 3}
    assert other.small == other.paper == {"lr": 1e-4, "steps": 40, "keep": 5}
    assert (toy.title, other.title, toy.seeds, other.seeds) == ("Toy", "", 5, 10)
    assert paper.readings_of("toy") == (other,)
    assert (other.reading, paper.readings_of("other")) == ("by eye", ())
    assert toy.measure.__name__ == "toy_quadratic"


def test_claims_have_their_bounds_reductions_and_texts(paper):
    low, high = paper.claims
    assert (low.name, low.says, low.runs) == ("ends-low", "It ends low.", ("toy", "other"))
    assert (low.at_least, low.at_most, low.kind, low.threshold) == (
        None,
        2,
        "number",
        'It says "2".',
    )
    assert (low.premise(RAW), low.premise(RAW | {"switch": 0})) == (True, False)
    assert low.changed == "It was 3. Too late. No cost of $late."
    assert low.measure(RAW) == 1.0
    assert (high.at_least, high.runs, high.kind, high.premise) == (0.5, ("toy",), "claim", None)
    assert high.measure(RAW) == 1.0
    # Also of the run that is another reading of it.
    assert paper.claims_about(paper.run("other")) == (low, high)


def test_the_rule_of_a_claim_has_all_that_decides(paper):
    low, high = paper.claims
    assert low.rule == 'number: mean of ["value", "GD.y.-1"] in [None, 2]'
    assert high.rule == 'claim: mean of ["value", "GD.y.0 / GD.x.-1"] in [0.5, None]'
    assert "geometric mean" in replace(low, geometric=True).rule


def test_the_page_has_its_prose(paper):
    assert paper.citation == "Nobody 1900, On lines"
    assert paper.address == "https://example.org"
    assert paper.rules == "`abc123`; of `steep` `def456`"
    assert paper.came_out == ("Lines go up.", "And on.")
    assert (paper.depends, paper.did_not) == ((), ())
    assert paper.causes == {
        "ends-low": Cause("It is told.", ("toy",), {"other": ("starts-high",)}),
        "starts-high": Cause("Nobody knows."),
    }
    assert paper.differences == ("There is no paper.", "And n - 1 lines.")


def test_panels_have_their_lines_looks_and_titles(paper):
    more = RAW | {"GD": {"x": [1.0, 1.0], "y": [9.0, 9.0]}}
    figure = paper.exhibit("figure-1").draw({"toy": {0: RAW, 2: more}, "other": {}})
    toy, other, zero, one = figure.axes
    assert [panel.get_title() for panel in figure.axes] == [
        "Toy: 2.0, –",
        "other: –, –",
        "at 0",
        "at 1",
    ]
    assert other.texts[0].get_text() == "not measured"
    # The first seed comes last, with what is of the first alone.
    thin, dashes, level, strong, later, *_ = lines = toy.get_lines()
    assert (list(thin.get_ydata()), list(strong.get_ydata())) == ([9.0, 9.0], [2.0, 1.0])
    assert (list(later.get_xdata()), list(later.get_ydata())) == ([7, 8], [4.0, 2.0])
    assert (later.get_linestyle(), later.get_color()) == ("--", "#D55E00")
    assert list(dashes.get_xdata()) == [7, 7]
    assert list(level.get_ydata()) == [0.25, 0.25]
    assert len(lines) == 7
    assert [text.get_text() for text in toy.get_legend().get_texts()] == ["GD", "later"]
    assert (toy.get_ylim()[0], toy.get_ylabel(), zero.get_xlabel()) == (0, "y", "first")
    assert one.get_xlabel() == ""
    assert list(one.get_lines()[-1].get_ydata()) == [1, 8]
    assert list(one.get_lines()[-1].get_xdata()) == [1, 2]


def test_an_exhibit_like_another_has_what_it_does_not_tell(paper):
    one, two = paper.exhibit("figure-1"), paper.exhibit("figure-2")
    assert (two.title, two.runs, two.note) == ("Others", ("other",), one.note)
    figure = two.draw({"other": {0: RAW, 2: RAW}})
    (line,) = figure.axes[0].get_lines()  # of the first seed alone
    assert (list(line.get_ydata()), line.get_label()) == ([3.0, 4.0], "SGD")
    assert one.note == "a $shared dollar"


def test_tables_have_a_row_for_each_run_or_quantity(paper):
    more = RAW | {"switch": 9, "GD": {"x": [1.0], "y": [3.0]}}
    rows = paper.exhibit("figure-1").table({"toy": {2: more, 0: RAW}, "other": {}})
    assert rows == [
        ["run", "ends", "mean", "each"],
        ["Toy toy", "2 (1 to 3)", "8.0", "7 9"],
        ["other other", "–", "–", ""],
    ]
    rows = paper.exhibit("table-1").table({"toy": {0: RAW}})
    assert rows == [["quantity", "paper", "ours"], ["end", "0.1", "1"]]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("claims.toml", '"value"', '"vlaue"', r"claims.toml: \[ends-low\]: there is no .*'vlaue'"),
        ("claims.toml", "at_most", "at_mots", r"\[ends-low\]: .*unexpected.*'at_mots'"),
        ("claims.toml", "at_most = 2\n", "", r"\[ends-low\]: .*neither at_least nor at_most"),
        ("claims.toml", '"both"', '"bothe"', "ends-low needs runs that there are not: {'bothe'}"),
        ("claims.toml", 'source = "eq. 1"\n', "", r"\[ends-low\]: .*missing.*'source'"),
        ("exhibits.toml", '"toy"\ntable', '"toi"\ntable', r"exhibits.toml: \[table-1\]: 'toi'"),
        ("exhibits.toml", 'like = "high"', 'like = "low"', r"\[figure-1\]: 'low'"),
        ("exhibits.toml", 'show = "each', 'shwo = "each', r"\[figure-1\]: .*'shwo'"),
        ("exhibits.toml", "columns = 2", "colums = 2", r"\[figure-1\]: .*has no colums"),
        ("runs.toml", '["usual",', '["unusual",', r"runs.toml: \[toy\]: 'unusual'"),
        ("runs.toml", "quadratic.toy_quadratic", "toi", r"runs.toml: \[toy\]: .*'toi'"),
        ("page.md", "`ends-low`", "`ends`", "causes of claims that there are not: {'ends'}"),
        ("page.md", "(`toy`", "(`toi`", "nothing shows the cause of ends-low: {'toi'}"),
        ("page.md", "for `other`", "for `toi`", "ends-low is not about {'toi'}, as its cause is"),
    ],
)
def test_what_a_file_tells_wrongly_is_refused(tmp_path, paper, file, old, new, message):
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read("song_2024", tmp_path)


def test_a_column_is_a_path_through_dicts_and_lists():
    rows = {"rows": [{"a": [1, 2]}, {"a": [3, 4]}], "SGD to GD": {"0": 5}}
    assert column(rows, "rows.a") == [[1, 2], [3, 4]]
    assert column(rows, "rows.a.-1") == [2, 4]
    assert column(rows, "rows.1.a.0") == 3
    assert column(rows, "SGD to GD.0") == 5
    with pytest.raises(KeyError):
        column(rows, "rows.b")


def test_reductions_are_of_the_column_that_is_told():
    raw = {"y": [3.0, -5.0, 1.0, 2.0], "none": [], "one": 4}
    assert (r.value(raw, "y.0"), r.value(raw, "y.-1"), r.value(raw, "one")) == (3, 2, 4)
    assert (r.mean(raw, "y"), r.late_mean(raw, "y")) == (0.25, 1.5)
    assert (r.largest(raw, "y"), r.smallest(raw, "y"), r.largest_size(raw, "y")) == (3, -5, 5)
    assert (r.value(raw, "one / y.3"), r.value(raw, "one - y.3")) == (2, 2)
    assert (r.largest(raw, "y / one"), r.smallest(raw, "y - one", "one")) == (0.75, -9)
    assert r.median_of([3, 1, 2, 9]) == 2.5
    for empty in (r.mean(raw, "none"), r.late_mean(raw, "none"), r.median_of([])):
        assert math.isnan(empty)
