"""The pages of the docs are those that their raw files give."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.pages import RAW, render
from benchmarks.papers.paper_page import PICTURES, measured, picture
from benchmarks.papers.raw_files import RawFiles
from benchmarks.papers.reproduction import FIRST, LEAST_SEEDS

DOCS = Path(__file__).parents[3] / "docs" / "papers"
PUBLISHED = RawFiles(DOCS / RAW)


def test_the_docs_are_what_their_raw_files_give():
    for name, text in render(PUBLISHED, PAPERS).items():
        assert (DOCS / name).read_text() == text, (
            f"{name}: run python -m benchmarks.papers --publish"
        )


def test_every_raw_file_of_the_docs_belongs_to_a_run_of_its_present_size():
    known = {
        PUBLISHED.path(paper.key, run.name, scale, seed)
        for paper in PAPERS.values()
        for run in paper.runs
        for scale in ("small", "paper")
        for seed in PUBLISHED.of(paper, run.name, scale)
    }
    assert set((DOCS / RAW).rglob("*.json")) == known


def test_every_picture_of_the_docs_is_there_and_no_other():
    links = {
        part.split(")")[0]
        for page in DOCS.glob("*.md")
        for part in page.read_text().split("](")[1:]
        if part.startswith(PICTURES)
    }
    assert links == {f"{PICTURES}/{path.name}" for path in (DOCS / PICTURES).glob("*.png")}


DECIDED = {key: paper for key, paper in PAPERS.items() if paper.rules}
"""Those of which all seeds were run: their pages name the commit of their rules."""
CLAIMS = json.loads((DOCS / "claims.json").read_text())
SMALL = [claim for claim in CLAIMS if claim["scale"] == "small" and claim["paper"] in DECIDED]


def test_what_does_not_hold_has_its_cause():
    """Of a misprint the evidence is the cause."""
    for claim in SMALL:
        if claim["verdict"] in ("partly", "fails", "inconclusive"):
            assert claim["cause"] or claim["kind"] == "misprint", claim["claim"]


def test_every_page_begins_with_what_came_out():
    assert all(paper.came_out for paper in DECIDED.values())


def test_every_seed_was_measured_under_the_present_rules():
    """None was changed after its seeds were seen: raw files keep what decided when they ran."""
    for paper in PAPERS.values():
        for run in paper.runs:
            rules = {claim.name: claim.rule for claim in paper.claims_about(run)}
            for record in PUBLISHED.of(paper, run.name, "small").values():
                assert record.rules == rules, f"{paper.key} {run.name} {record.seed}"


def test_every_claim_is_decided_by_five_seeds_and_says_where_its_threshold_comes_from():
    assert len(SMALL) == sum(len(paper.claims) for paper in DECIDED.values())
    for claim in SMALL:
        assert claim["verdict"] != "not measured", claim["claim"]
        assert claim["threshold"] or claim["kind"] not in ("claim", "number"), claim["claim"]
        for cell in claim["runs"].values():
            seeds = list(map(int, cell["figures"]))
            assert seeds == list(range(FIRST, FIRST + len(seeds))), claim["claim"]
            assert len(seeds) >= LEAST_SEEDS, claim["claim"]


DRAWN = [
    (key, exhibit.name)
    for key, paper in PAPERS.items()
    for exhibit in paper.exhibits
    if exhibit.draw and measured(PUBLISHED, paper, exhibit, "small")
]


@pytest.mark.parametrize(("key", "name"), DRAWN[::5])
def test_a_picture_of_the_docs_shows_its_raw_files(key, name):
    """All but a few pixels are near those on disk, whose colours are reduced to 256."""
    exhibit = PAPERS[key].exhibit(name)
    drawn, path = io.BytesIO(), DOCS / picture(PAPERS[key], exhibit, "small")
    exhibit.draw(PUBLISHED.raws(PAPERS[key], exhibit.runs, "small")).savefig(drawn, format="png")
    with Image.open(drawn) as ours, Image.open(path) as published:
        assert ours.size == published.size
        first, second = (np.asarray(each.convert("RGB"), dtype=int) for each in (ours, published))
    assert (np.abs(first - second).max(axis=2) > 64).mean() < 2e-4
