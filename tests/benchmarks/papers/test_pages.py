"""The pages say what the raw files say."""

import json
import shutil

import pytest

from benchmarks.papers.pages import PICTURES, RAW, publish, render
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import Job
from tests.benchmarks.papers.made_up import PAPER


@pytest.fixture
def folder(tmp_path):
    results = RawFiles(tmp_path / "results")
    for run in PAPER.runs:
        for seed in range(3):
            results.write(measure(PAPER, run, "small", Job(seed)))
    publish(results, {"made_up": PAPER}, tmp_path / "docs")
    return tmp_path / "docs"


def test_a_page_has_claims_figures_tables_and_differences(folder):
    page = (folder / "made_up.md").read_text()
    assert "\n\nLines go up.\n\nAt `small`, of 3 claims" in page
    assert (
        "At `small`, of 3 claims: 1 reproduced, 1 not reproduced, 1 undecided; and 1 that" in page
    )
    assert "`near`: It is near 2. *(identity)*" in page
    assert "- `fast`: It is slow." in page
    assert "- `up`" not in page  # causes of what was reproduced are left out
    assert "- `near`: It was 3.\n" in page
    # A figure for which the inequality fails is in bold; what was changed is not decided by the
    # seed that it was changed on.
    assert "`steep` (2) 2.01 **2.02** | **not reproduced** |" in page
    assert "| `up`: It goes up. | eq. 1 | y(1) ≥ 0.1 |" in page
    assert "`steep` 2 2.01 2.02<br>`flat` 0.5 0.51 0.52 | reproduced |" in page
    assert "`flat` nan nan nan" in page
    assert f"![A line]({PICTURES}/made_up-figure-1.png)" in page
    assert "| 1 | 0.51 |" in page
    assert "it goes up." in page
    assert "- There is no paper." in page
    assert "Nothing was run at `paper`: the paper's own sizes are for a GPU" in page
    assert "Of the same size at both: `flat`." in page
    assert (folder / PICTURES / "made_up-figure-1.png").read_bytes().startswith(b"\x89PNG")
    index = (folder / "index.md").read_text()
    link = "[Nobody 1900, On lines](made_up.md)"
    assert f"| {link} | `small` | 1 | 1 | 1 | 0 | 0 of 1 |" in index
    assert "`paper` |" not in index  # nothing was run at it, as the page says
    assert "| `steep` | a steep line | figure-1 | slope 2 | 0 1 2 | 0.0 |" in index


def test_claims_have_their_raw_files_and_hashes(folder):
    claims = json.loads((folder / "claims.json").read_text())
    assert [claim["claim"] for claim in claims] == ["up", "fast", "near", "empty"]
    assert claims[0]["figures"] == {
        "steep": {"0": 2.0, "1": 2.01, "2": 2.02},
        "flat": {"0": 0.5, "1": 0.51, "2": 0.52},
    }
    assert claims[3]["figures"]["flat"]["0"] == "nan"
    assert [claim["decided_by"] for claim in claims] == [[0, 1, 2], [0, 1, 2], [1, 2], [0, 1, 2]]
    results = RawFiles(folder / RAW)
    for name, digest in claims[0]["raw"].items():
        scale, paper, run, file = name.split("/")
        seed = int(file.removeprefix("seed-").removesuffix(".json"))
        assert results.digest(paper, run, scale, seed) == digest
    assert len(claims[0]["raw"]) == 6


def test_pages_follow_the_raw_files(folder):
    results, papers = RawFiles(folder / RAW), {"made_up": PAPER}
    before = render(results, papers)
    assert before == {name: (folder / name).read_text() for name in before}
    path = results.path("made_up", "steep", "small", 0)
    path.write_text(path.read_text().replace("[2.0,4.0]", "[0.05,4.0]"))
    after = render(results, papers)
    assert "**0.05**" in after["made_up.md"]
    assert json.loads(after["claims.json"])[0]["verdict"] == "not reproduced"


def test_publishing_again_drops_what_is_no_run_any_more(folder, tmp_path):
    stale = folder / RAW / "small" / "made_up" / "gone" / "seed-0.json"
    stale.parent.mkdir()
    shutil.copyfile(folder / RAW / "small" / "made_up" / "flat" / "seed-0.json", stale)
    undrawn = folder / PICTURES / "made_up-figure-0.png"
    undrawn.touch()
    publish(RawFiles(tmp_path / "nothing"), {"made_up": PAPER}, folder)
    assert not stale.exists()
    assert not undrawn.exists()
    assert (folder / PICTURES / "made_up-figure-1.png").exists()
    assert (folder / RAW / "small" / "made_up" / "flat" / "seed-2.json").exists()


def test_a_paper_at_its_own_size_is_told_apart(folder):
    results, papers = RawFiles(folder / RAW), {"made_up": PAPER}
    results.write(measure(PAPER, PAPER.run("steep"), "paper", Job(0)))
    publish(results, papers, folder)
    page = (folder / "made_up.md").read_text()
    assert "At `paper`, of 0 claims: 0 reproduced" in page
    assert "`steep` (2) | **not measured** |" in page  # by no seed that decides
    assert (folder / PICTURES / "made_up-figure-1-paper.png").exists()
    assert "Not run." in page  # the table, whose run was not made
