"""The pages of the docs are those that their raw files give."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.pages import PICTURES, RAW, picture, render
from benchmarks.papers.raw_files import RawFiles

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


def test_what_was_not_reproduced_has_its_cause():
    claims = json.loads((DOCS / "claims.json").read_text())
    assert claims
    for claim in claims:
        if claim["scale"] == "small" and claim["verdict"] != "reproduced":
            assert claim["claim"] in PAPERS[claim["paper"]].causes, claim["claim"]


def test_every_page_begins_with_what_came_out():
    assert all(paper.outcome for paper in PAPERS.values())


def test_there_are_enough_claims_and_seeds():
    claims = json.loads((DOCS / "claims.json").read_text())
    small = [claim for claim in claims if claim["scale"] == "small"]
    assert len(small) == sum(len(paper.claims) for paper in PAPERS.values()) >= 40
    for key in PAPERS:
        assert sum(claim["paper"] == key for claim in small) >= 8, key
    for claim in small:
        assert all(len(seeds) >= 3 for seeds in claim["figures"].values()), claim["claim"]
        assert claim["decided_by"], claim["claim"]


DRAWN = [(key, e.name) for key, paper in PAPERS.items() for e in paper.exhibits if e.draw]


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
