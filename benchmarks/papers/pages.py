"""``docs/papers``: raw files, pictures, ``claims.json``, and a page for each paper.

The pages hold nothing but what follows from the raw files and the papers' own files, so that
``render`` gives them again, letter by letter. What they say around that is in ``templates``; the
page of a paper is made by ``paper_page``.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gallery import save
from benchmarks.papers.paper_page import (
    COUNTS,
    PICTURES,
    Verdicts,
    consecutive,
    filled,
    hours,
    markdown,
    measured,
    page,
    picture,
    records,
    tally,
)
from benchmarks.papers.raw_files import RawFiles
from benchmarks.papers.reproduction import (
    FIRST,
    KINDS,
    LEAST_SEEDS,
    SCALES,
    SECOND_LOOK,
    Paper,
    Rows,
    Scale,
)
from benchmarks.papers.verdicts import (
    CONFIDENCE,
    CONFIDENCE_AGAIN,
    Cell,
    Verdict,
    shown,
    verdict,
)

RAW: Final = "raw"
CLAIMS: Final = "claims.json"


def publish(results: RawFiles, papers: Mapping[str, Paper], folder: Path) -> list[Path]:
    """Copies the raw files, draws the pictures from them, and writes the pages; the rest goes.

    Args:
        results: of runs.
        papers: those to publish.
        folder: such as ``docs/papers``.

    Returns:
        What was written, without the raw files.
    """
    published = RawFiles(folder / RAW)
    _copy(results, published, papers)
    written = []
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for paper in papers.values():
        for scale in SCALES:
            for exhibit in paper.exhibits:
                if exhibit.draw is not None and measured(published, paper, exhibit, scale):
                    written.append(folder / picture(paper, exhibit, scale))
                    raws = published.raws(paper, exhibit.runs, scale)
                    save(exhibit.draw(raws), written[-1])
    for undrawn in set((folder / PICTURES).iterdir()) - set(written):
        undrawn.unlink()  # of runs whose raw files are gone
    for path, text in render(published, papers).items():
        (folder / path).write_text(text, encoding="utf-8")
        written.append(folder / path)
    return written


def _copy(results: RawFiles, published: RawFiles, papers: Mapping[str, Paper]) -> None:
    """Copies the raw files, and removes trials and those of no run of the present sizes."""
    valid = set()
    same = results.folder.resolve() == published.folder.resolve()
    for paper in papers.values():
        for scale in SCALES:
            for run in paper.runs:
                for seed in [] if same else results.of(paper, run.name, scale):
                    target = published.path(paper.key, run.name, scale, seed)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(results.path(paper.key, run.name, scale, seed), target)
                for seed in published.of(paper, run.name, scale):
                    if seed >= FIRST:
                        valid.add(published.path(paper.key, run.name, scale, seed))
    for path in published.folder.rglob("*.json"):
        if path not in valid:
            path.unlink()


def judged(results: RawFiles, papers: Mapping[str, Paper]) -> Verdicts:
    """Returns the verdict on each claim, by paper and scale."""
    return {
        (key, scale): [verdict(results, paper, claim, scale) for claim in paper.claims]
        for scale in SCALES
        for key, paper in papers.items()
    }


def claims(results: RawFiles, papers: Mapping[str, Paper], verdicts: Verdicts) -> str:
    """Returns the text of ``claims.json``: all claims that are decided."""
    entries = [
        _entry(results, papers[key], found, of_paper, scale)
        for (key, scale), of_paper in verdicts.items()
        for found in of_paper
        if found.complete
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def render(results: RawFiles, papers: Mapping[str, Paper]) -> dict[str, str]:
    """Returns the text of ``claims.json``, of the index and of each page, by the file's name."""
    # Once: each verdict reads its raw files.
    verdicts = judged(results, papers)
    pages = {CLAIMS: claims(results, papers, verdicts)}
    pages["index.md"] = _index(results, papers, verdicts)
    for key, paper in papers.items():
        of_scales = {scale: verdicts[key, scale] for scale in SCALES}
        pages[f"{paper.key}.md"] = page(results, paper, of_scales)
    return pages


def _entry(
    results: RawFiles, paper: Paper, found: Verdict, verdicts: Sequence[Verdict], scale: Scale
) -> dict[str, Any]:
    claim = found.claim
    readings = [cell for cells in found.readings.values() for cell in cells]
    cause = paper.causes.get(claim.name)
    return {
        "paper": paper.key,
        "claim": claim.name,
        "scale": scale,
        "kind": claim.kind,
        "says": claim.says,
        "source": claim.source,
        "inequality": claim.inequality,
        "threshold": claim.threshold,
        "rule": claim.rule,
        "verdict": found.word,
        "runs": {cell.run: _cell(cell) for cell in found.cells},
        "readings": {cell.run: _cell(cell) for cell in readings},
        "cause": "" if cause is None else cause.text,
        "cause_shown_by": {run: list(by) for run, by in shown(paper, found, verdicts).items()},
        "untestable": claim.untestable,
        "evidence": claim.evidence,
        "changed": claim.changed,
        "raw": {
            results.path(paper.key, cell.run, scale, seed)
            .relative_to(results.folder)
            .as_posix(): results.digest(paper.key, cell.run, scale, seed)
            for cell in (*found.cells, *readings)
            for seed in cell.figures
        },
    }


def _cell(cell: Cell) -> dict[str, Any]:
    low, mean, high = map(_number, cell.interval)
    found: dict[str, Any] = {"verdict": cell.word, "mean": mean, "interval": [low, high]}
    found["confidence"] = cell.confidence
    if cell.first is not None:
        found["at_first"] = {"verdict": cell.first.word, "interval": str(cell.first)}
    found["figures"] = {str(seed): _number(figure) for seed, figure in cell.figures.items()}
    if cell.premises:
        found["premise"] = {str(seed): bool(met) for seed, met in cell.premises.items()}
    return found


def _number(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


# --- the index ---------------------------------------------------------------------------------


def _index(results: RawFiles, papers: Mapping[str, Paper], verdicts: Verdicts) -> str:
    counts = [["paper", "scale", *COUNTS]]
    for paper in papers.values():
        for scale in SCALES:
            if scale == "small" or records(results, paper, scale):
                link = f"[{paper.citation}]({paper.key}.md)"
                counts.append(
                    [link, f"`{scale}`", *tally(paper, "claim", verdicts[paper.key, scale])]
                )
    made = [r for paper in papers.values() for r in records(results, paper, "small")]
    sizes = [
        f"### {paper.key}\n\n{markdown(_sizes(results, paper))}\n" for paper in papers.values()
    ]
    return filled(
        "index",
        counts=markdown(counts),
        kinds=markdown(_kinds(papers, verdicts)),
        confidence=_percent(CONFIDENCE),
        confidence_again=_percent(CONFIDENCE_AGAIN),
        again=SECOND_LOOK,
        seeds=LEAST_SEEDS,
        first=FIRST,
        hours=f"{hours(made):.1f}",
        sizes="\n".join(sizes),
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _kinds(papers: Mapping[str, Paper], verdicts: Verdicts) -> Rows:
    """The counts of all papers together at ``small``, by the kind of claim."""
    rows = [["what is decided", *COUNTS]]
    for kind, heading in KINDS.items():
        found = [tally(paper, kind, verdicts[key, "small"]) for key, paper in papers.items()]
        rows.append([heading, *(str(sum(map(int, column))) for column in zip(*found, strict=True))])
    return rows


def _sizes(results: RawFiles, paper: Paper) -> Rows:
    rows = [["run", "what", "for", "size", "seeds", "minutes"]]
    for run in paper.runs:
        made = results.of(paper, run.name, "small")
        shown = ", ".join(e.name for e in paper.exhibits if run.name in e.runs)
        size = ", ".join(f"{name} {_text(value)}" for name, value in run.small.items())
        seconds = [record.seconds for record in made.values()]
        minutes = f"{statistics.median(seconds) / 60:.1f}" if seconds else "not run"
        rows.append([f"`{run.name}`", run.what, shown, size, consecutive(made), minutes])
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
