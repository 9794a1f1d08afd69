"""The pages say what the raw files say."""

import json
import shutil

import pytest

from benchmarks.papers.pages import RAW, publish, render
from benchmarks.papers.paper_page import PICTURES, consecutive
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import Job
from tests.benchmarks.papers.made_up import PAPER


@pytest.fixture
def folder(tmp_path):
    results = RawFiles(tmp_path / "results")
    for run in PAPER.runs:
        for seed in range(9, 15):  # the first is a trial
            results.write(measure(PAPER, run, "small", Job(seed)))
    publish(results, {"made_up": PAPER}, tmp_path / "docs")
    return tmp_path / "docs"


def test_a_page_has_verdicts_figures_tables_and_differences(folder):
    page = (folder / "made_up.md").read_text()
    assert "## What came out\n\nLines go up.\n\n## What depends on the regime\n\nSome are" in page
    assert "## What did not come out" not in page  # there is nothing beneath it
    # All; hold, partly, fail, inconclusive, untestable, not measured; and explained.
    assert "| Claims | 3 | 1 | 1 | 0 | 0 | 1 | 0 | 1 |" in page
    assert "| network by network | 5 | 3 | 0 | 1 | 0 | 1 | 0 |" in page
    assert "| Claims of ours | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 0 |" in page
    assert "They are those of commit `abc123`, of `steep` `def456`." in page
    assert "| `up`: It goes up. | eq. 1 | y(1) ≥ 0.3 | `steep` 2.12 [2.1, 2.14]<br>" in page
    # Where the claim does not hold, the figure is in bold.
    assert "y(1) ≥ 1<br>Standing still is 0. |" in page
    fast = "`steep` 2.12 [2.1, 2.14]<br>**`flat`** 0.62 [0.605, 0.635]"
    assert (
        f"| {fast} | 5 of 5<br>0 of 5 | **holds in 1 of 2**: fails in `flat`; explained |" in page
    )
    assert "**`flat`** – (0 of 5)" in page
    assert "`flat` †: It is flat." in page
    assert "- `fast` (shown by `two`): It is slow." in page
    assert "- `flat`: Nobody knows." in page
    assert "- `up`: It is told." in page
    assert "- `near`: It was 3.\n" in page
    first, *_, second = (line for line in page.splitlines() if "by ruler: " in line)
    assert first == (
        "| `up` | `flat` | by ruler: 0.62 [0.605, 0.635], holds | "
        "by eye: 0.17 [0.155, 0.185], fails | yes |"
    )
    assert second.startswith("| `empty` |")
    assert second.endswith("| no |")
    assert f"![A line]({PICTURES}/made_up-figure-1.png)" in page
    assert "| 11 | 0.61 |" in page
    assert "it goes up." in page
    assert "- There is no paper." in page
    assert "Nothing was run at `paper`: the paper's own sizes are for a GPU" in page
    assert "Of the same size at both: `flat`, `eyed`." in page
    assert "Seeds 10 to 14;" in page
    assert (folder / PICTURES / "made_up-figure-1.png").read_bytes().startswith(b"\x89PNG")
    index = (folder / "index.md").read_text()
    link = "[Nobody 1900, On lines](made_up.md)"
    assert f"| {link} | `small` | 3 | 1 | 1 | 0 | 0 | 1 | 0 | 1 |" in index
    assert "| Identities | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |" in index
    assert "`paper` |" not in index  # nothing was run at it, as the page says
    assert "| `steep` | a steep line | figure-1 | slope 2 | 10 to 14 | 0.0 |" in index


def test_seeds_that_follow_one_another_are_told_by_their_ends():
    assert consecutive({12, 10, 11, 16, 14, 15}) == "10 to 12, 14 to 16"
    assert consecutive([7]) == "7"
    assert consecutive([]) == ""


def test_claims_have_their_raw_files_and_hashes(folder):
    claims = json.loads((folder / "claims.json").read_text())
    assert [claim["claim"] for claim in claims] == ["up", "fast", "near", "two", "flat", "empty"]
    up, fast = claims[:2]
    assert up["runs"]["flat"] == {
        "verdict": "holds",
        "mean": 0.62,
        "interval": [0.604926, 0.635074],
        "confidence": 0.9,
        "figures": {"10": 0.6, "11": 0.61, "12": 0.62, "13": 0.63, "14": 0.64},
    }
    assert up["readings"]["eyed"]["verdict"] == "fails"
    assert (up["cause"], up["cause_shown_by"]) == ("It is told.", {})
    assert fast["cause"] == "It is slow."
    assert fast["cause_shown_by"] == {"flat": ["two"]}
    assert fast["runs"]["steep"]["premise"]["10"] is True
    assert claims[5]["runs"]["flat"]["figures"]["10"] == "nan"
    results = RawFiles(folder / RAW)
    for name, digest in up["raw"].items():
        scale, paper, run, file = name.split("/")
        seed = int(file.removeprefix("seed-").removesuffix(".json"))
        assert results.digest(paper, run, scale, seed) == digest
    assert len(up["raw"]) == 15


def test_pages_follow_the_raw_files(folder):
    results, papers = RawFiles(folder / RAW), {"made_up": PAPER}
    before = render(results, papers)
    assert before == {name: (folder / name).read_text() for name in before}
    path = results.path("made_up", "steep", "small", 10)
    path.write_text(path.read_text().replace("[2.1,4.1]", "[-9.0,4.1]"))
    after = render(results, papers)
    assert "**`steep`** -0.1 [-4.84, 4.64]" in after["made_up.md"]
    assert json.loads(after["claims.json"])[0]["runs"]["steep"]["verdict"] == "inconclusive"


def test_publishing_again_drops_what_is_no_run_any_more(folder, tmp_path):
    stale = folder / RAW / "small" / "made_up" / "gone" / "seed-10.json"
    stale.parent.mkdir()
    shutil.copyfile(folder / RAW / "small" / "made_up" / "flat" / "seed-10.json", stale)
    undrawn = folder / PICTURES / "made_up-figure-0.png"
    undrawn.touch()
    publish(RawFiles(tmp_path / "nothing"), {"made_up": PAPER}, folder)
    assert not stale.exists()
    assert not undrawn.exists()
    assert (folder / PICTURES / "made_up-figure-1.png").exists()
    assert (folder / RAW / "small" / "made_up" / "flat" / "seed-12.json").exists()


def test_a_paper_at_its_own_size_is_told_apart(folder):
    results, papers = RawFiles(folder / RAW), {"made_up": PAPER}
    results.write(measure(PAPER, PAPER.run("steep"), "paper", Job(10)))
    publish(results, papers, folder)
    page = (folder / "made_up.md").read_text()
    assert "| Claims | 3 | 0 | 0 | 0 | 0 | 0 | 3 | 0 |" in page  # by one seed alone
    assert "`steep` nan (1 of 1)" not in page
    assert (folder / PICTURES / "made_up-figure-1-paper.png").exists()
    assert "Not run." in page  # the table, whose run was not made
