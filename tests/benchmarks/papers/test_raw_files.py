"""Raw files and verdicts: what is written is what is read, and decides by the inequality alone."""

import hashlib
import json
import math
import os
import re
from dataclasses import replace
from importlib.metadata import version

import pytest

from benchmarks.files import ForeignFileError
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import Claim, Job, Paper
from tests.benchmarks.papers.made_up import PAPER, first


@pytest.fixture
def results(tmp_path):
    made = RawFiles(tmp_path)
    for run in PAPER.runs:
        for seed in range(3):
            made.write(measure(PAPER, run, "small", Job(seed)))
    return made


def test_a_raw_file_holds_what_was_measured(results):
    run = PAPER.run("steep")
    record = results.read("made_up", run, "small", 2)
    assert record.raw["values"] == [2.02, 4.02]
    assert math.isnan(record.raw["nothing"])
    assert record.raw["text"] == "a], b"
    assert record.size == {"slope": 2.0}
    assert (record.run, record.seed, record.scale) == ("steep", 2, "small")
    assert record.versions["torch"] == version("torch")
    path = results.path("made_up", "steep", "small", 2)
    assert path.relative_to(results.folder).as_posix() == "small/made_up/steep/seed-2.json"
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["raw"]["nothing"] is None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert results.digest("made_up", "steep", "small", 2) == digest


def test_numbers_are_rounded_to_six_digits(tmp_path):
    run = replace(PAPER.runs[0], measure=lambda _job, **_: {"x": [1 / 3, 2e-20 / 3, (1, 2)]})
    results = RawFiles(tmp_path)
    results.write(measure(PAPER, run, "small", Job()))
    assert results.read("made_up", run, "small", 0).raw["x"] == [0.333333, 6.66667e-21, [1, 2]]


def test_a_record_has_the_rules_of_the_claims_about_its_run(results):
    """Also of those about a run that it is another reading of; one from before has none."""
    rules = results.read("made_up", PAPER.run("eyed"), "small", 0).rules
    assert rules == {claim.name: claim.rule for claim in PAPER.claims if "flat" in claim.runs}
    path = results.path("made_up", "eyed", "small", 0)
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: told[name] for name in told if name != "rules"}))
    assert results.read("made_up", PAPER.run("eyed"), "small", 0).rules == {}


def test_a_record_of_another_size_does_not_count(results):
    run = PAPER.run("flat")
    other = replace(run, small={"slope": 0.5, "points": (1, 3)})
    assert results.read("made_up", other, "small", 0) is None
    assert results.read("made_up", run, "paper", 0) is None
    assert results.read("made_up", replace(run, version=2), "small", 0) is None
    paper = replace(PAPER, runs=(PAPER.runs[0], other, PAPER.runs[2]))
    assert results.of(paper, "flat", "small") == {}
    assert list(results.of(PAPER, "flat", "small")) == [0, 1, 2]
    # Tuples of a size are lists in the file, and the same size all the same.
    results.write(measure(paper, other, "small", Job(0)))
    assert results.read("made_up", other, "small", 0).size["points"] == [1, 3]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"paper": "made_up", "raw'])
def test_what_is_no_raw_file_is_told(results, text):
    path = results.path("made_up", "flat", "small", 1)
    path.with_name("seed-0-copy.json").write_text(text)  # is none by its name
    assert list(results.of(PAPER, "flat", "small")) == [0, 1, 2]
    path.write_text(text)
    with pytest.raises(ForeignFileError, match=re.escape(f"{path} is no raw file")):
        results.of(PAPER, "flat", "small")


@pytest.mark.parametrize(("field", "value"), [("seed", 2), ("run", "steep"), ("raw", [1, 2])])
def test_a_record_of_something_else_is_told(results, field, value):
    path = results.path("made_up", "flat", "small", 1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ForeignFileError, match="no figures of this run"):
        results.of(PAPER, "flat", "small")


def test_a_file_is_whole_or_not_there(results, monkeypatch):
    path = results.path("made_up", "flat", "small", 0)
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write(measure(PAPER, PAPER.run("flat"), "small", Job(0)))
    assert path.read_text() == before


def test_inequalities_and_their_texts():
    def claim(**bounds):
        return Claim("a", "b", "c", "χ", (), first, **bounds)

    assert claim(at_least=0.9).inequality == "χ ≥ 0.9"
    assert claim(at_most=0.2).inequality == "χ ≤ 0.2"
    assert claim(at_least=0.9, at_most=1.1).inequality == "0.9 ≤ χ ≤ 1.1"
    assert claim(at_least=0.9).holds(0.9)
    assert not claim(at_least=0.9).holds(0.89)
    assert claim(at_most=0.2).holds(-5.0)
    assert not claim(at_most=0.2).holds(math.nan)
    assert not claim(at_least=0.9, at_most=1.1).holds(1.2)
    with pytest.raises(ValueError, match="neither at_least nor at_most"):
        claim()


def test_a_paper_is_consistent():
    with pytest.raises(ValueError, match=r"table-1 needs runs that there are not: \{'flat'\}"):
        Paper("a", "b", "c", PAPER.runs[:1], PAPER.exhibits, (), (), ())
