"""``docs/papers``: raw files, pictures, ``claims.json``, and a page for each paper.

The pages hold nothing but what follows from the raw files and the papers' own files, so that
``render`` gives them again, letter by letter. What they say around that is in ``templates``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Final

from benchmarks.gallery import save
from benchmarks.papers.raw_files import RawFiles, Record
from benchmarks.papers.reproduction import SCALES, TRIAL, Exhibit, Paper, Rows, Scale
from benchmarks.papers.verdicts import WORDS, Verdict, Word, verdict, written

RAW: Final = "raw"
PICTURES: Final = "pictures"
CLAIMS: Final = "claims.json"
_TEMPLATES: Final = Path(__file__).parent / "templates"

Verdicts = Mapping[tuple[str, Scale], Sequence[Verdict]]
"""By paper and scale."""


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
                if exhibit.draw is not None and _measured(published, paper, exhibit, scale):
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
    """Copies the raw files, and removes those that belong to no run of the present sizes."""
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
        _entry(results, papers[key], found, scale)
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
        pages[f"{paper.key}.md"] = _page(results, paper, of_scales)
    return pages


def picture(paper: Paper, exhibit: Exhibit, scale: Scale) -> str:
    """Returns the picture's file, from the folder of the pages."""
    suffix = "" if scale == "small" else f"-{scale}"
    return f"{PICTURES}/{paper.key}-{exhibit.name}{suffix}.png"


def markdown(rows: Rows) -> str:
    """Returns a table, its first row the header."""
    head, *body = (["", *(cell.replace("|", "\\|") for cell in row), ""] for row in rows)
    rule = ["", *("---" for _ in head[1:-1]), ""]
    return "\n".join(" | ".join(row).strip() for row in (head, rule, *body))


def _measured(results: RawFiles, paper: Paper, exhibit: Exhibit, scale: Scale) -> bool:
    return any(results.of(paper, run, scale) for run in exhibit.runs)


def _records(results: RawFiles, paper: Paper, scale: Scale) -> list[Record]:
    return [r for run in paper.runs for r in results.of(paper, run.name, scale).values()]


def _entry(results: RawFiles, paper: Paper, found: Verdict, scale: Scale) -> dict[str, Any]:
    claim = found.claim
    return {
        "paper": paper.key,
        "claim": claim.name,
        "scale": scale,
        "says": claim.says,
        "source": claim.source,
        "inequality": claim.inequality,
        "figures": {
            run: {
                str(seed): float(f"{value:.6g}") if math.isfinite(value) else str(value)
                for seed, value in seeds.items()
            }
            for run, seeds in found.figures.items()
        },
        "raw": {
            results.path(paper.key, run, scale, seed)
            .relative_to(results.folder)
            .as_posix(): results.digest(paper.key, run, scale, seed)
            for run, seeds in found.figures.items()
            for seed in seeds
        },
        "identity": claim.identity,
        "changed": claim.changed,
        "decided_by": sorted(
            {s for seeds in found.figures.values() for s in seeds if claim.decided_by(s)}
        ),
        "verdict": found.word,
    }


def _filled(template: str, **words: object) -> str:
    """A template with its words; what is empty leaves no gap."""
    text = (_TEMPLATES / f"{template}.md").read_text(encoding="utf-8")
    return re.sub(r"\n{3,}", "\n\n", Template(text).substitute(words).strip() + "\n")


def _items(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _tally(verdicts: Iterable[Verdict]) -> tuple[list[Word], list[Word]]:
    """The words of the claims, and apart from them those of the identities."""
    verdicts = list(verdicts)
    words = [each.word for each in verdicts if not each.claim.identity]
    return words, [each.word for each in verdicts if each.claim.identity]


# --- the index ---------------------------------------------------------------------------------


def _index(results: RawFiles, papers: Mapping[str, Paper], verdicts: Verdicts) -> str:
    table = [["paper", "scale", *WORDS, "not measured", "identities, reproduced"]]
    for paper in papers.values():
        for scale in SCALES:
            if scale == "small" or _records(results, paper, scale):
                words, identities = _tally(verdicts[paper.key, scale])
                of = f"{identities.count('reproduced')} of {len(identities)}" if identities else ""
                counts = [str(words.count(word)) for word in (*WORDS, "not measured")]
                link = f"[{paper.citation}]({paper.key}.md)"
                table.append([link, f"`{scale}`", *counts, of])
    made = [r for paper in papers.values() for r in _records(results, paper, "small")]
    sizes = [
        f"### {paper.key}\n\n{markdown(_sizes(results, paper))}\n" for paper in papers.values()
    ]
    return _filled(
        "index", verdicts=markdown(table), hours=f"{_hours(made):.1f}", sizes="\n".join(sizes)
    )


def _sizes(results: RawFiles, paper: Paper) -> Rows:
    rows = [["run", "what", "for", "size", "seeds", "minutes"]]
    for run in paper.runs:
        records = results.of(paper, run.name, "small")
        shown = ", ".join(e.name for e in paper.exhibits if run.name in e.runs)
        size = ", ".join(f"{name} {_text(value)}" for name, value in run.small.items())
        seconds = [record.seconds for record in records.values()]
        minutes = f"{statistics.median(seconds) / 60:.1f}" if seconds else "not run"
        seeds = " ".join(map(str, records))
        rows.append([f"`{run.name}`", run.what, shown, size, seeds, minutes])
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hours(records: Iterable[Record]) -> float:
    return sum(record.seconds for record in records) / 3600


# --- a paper's page ----------------------------------------------------------------------------


def _page(results: RawFiles, paper: Paper, of_scales: Mapping[Scale, Sequence[Verdict]]) -> str:
    parts = [_scale(results, paper, scale, verdicts) for scale, verdicts in of_scales.items()]
    return _filled(
        "page",
        citation=paper.citation,
        address=paper.address,
        key=paper.key,
        scales="\n".join(parts),
        differences=_items(paper.differences),
    )


def _scale(results: RawFiles, paper: Paper, scale: Scale, verdicts: Sequence[Verdict]) -> str:
    records = _records(results, paper, scale)
    if not records:
        # What a GPU is for was not run without one, and the page says so.
        return _filled("not-measured", scale=scale, reason=_why_not(paper, scale))
    small = scale == "small"
    complete = [verdict for verdict in verdicts if verdict.complete]
    words, identities = _tally(complete)
    also = f"; and {len(identities)} that follow from definitions (*identities*)"
    return _filled(
        "measured",
        scale=scale,
        outcome="\n\n".join(paper.outcome) if small else "",
        claims=len(words),
        counts=", ".join(f"{words.count(word)} {word}" for word in WORDS),
        identities=also if identities else "",
        machines=_machines(records),
        seeds=", ".join(map(str, sorted({record.seed for record in records}))),
        hours=f"{_hours(records):.1f}",
        table=markdown(_claims(verdicts)),
        causes=_causes(paper, complete) if small else "",
        changes=_changes(paper) if small else "",
        exhibits="\n".join(_exhibit(results, paper, each, scale) for each in paper.exhibits),
    )


def _why_not(paper: Paper, scale: Scale) -> str:
    if scale == "small":
        return "`make papers` does it."
    same = [f"`{run.name}`" for run in paper.runs if run.size("small") == run.size("paper")]
    already = f" Of the same size at both: {', '.join(same)}." if same else ""
    return f"the paper's own sizes are for a GPU, and none was at hand.{already}"


def _machines(records: Iterable[Record]) -> str:
    kinds = {
        f"{r.machine['gpu'] or r.machine['cpu']}, {r.machine['threads']} threads a run, "
        f"torch {r.versions['torch']}".replace(" 1 threads", " one thread")
        for r in records
    }
    return "; ".join(sorted(kinds))


def _claims(verdicts: Iterable[Verdict]) -> Rows:
    rows = [["claim", "source", "holds if", "figures", "verdict"]]
    for found in verdicts:
        claim = found.claim
        figures = "<br>".join(
            f"`{run}` " + " ".join(written(claim, *each, failing="**") for each in seeds.items())
            for run, seeds in found.figures.items()
        )
        word = found.word if found.word == "reproduced" else f"**{found.word}**"
        says = f"`{claim.name}`: {claim.says}" + " *(identity)*" * claim.identity
        rows.append([says, claim.source, claim.inequality, figures, word])
    return rows


def _causes(paper: Paper, verdicts: Iterable[Verdict]) -> str:
    """The causes that are known of what was not reproduced."""
    names = [v.claim.name for v in verdicts if v.word != "reproduced"]
    told = [f"`{name}`: {paper.causes[name]}" for name in names if name in paper.causes]
    return f"### Why some were not reproduced\n\n{_items(told)}" if told else ""


def _changes(paper: Paper) -> str:
    """What was changed of the claims after a first trial; claims of one text are one line."""
    names: dict[str, list[str]] = {}
    for claim in paper.claims:
        if claim.changed:
            known = ", ".join(map(str, claim.seen))
            late = "" if claim.seen == (TRIAL,) else f" Seeds {known} were known by then."
            names.setdefault(claim.changed + late, []).append(f"`{claim.name}`")
    told = [f"{', '.join(of_text)}: {text}" for text, of_text in names.items()]
    return f"### Changed after a first trial\n\n{_items(told)}" if told else ""


def _exhibit(results: RawFiles, paper: Paper, exhibit: Exhibit, scale: Scale) -> str:
    words = dict.fromkeys(("picture", "table", "note"), "")
    runs = "Not run."
    if _measured(results, paper, exhibit, scale):
        runs = f"From {', '.join(f'`{run}`' for run in exhibit.runs)}."
        words["note"] = exhibit.note
        if exhibit.draw is not None:
            words["picture"] = f"![{exhibit.title}]({picture(paper, exhibit, scale)})"
        if exhibit.table is not None:
            words["table"] = markdown(exhibit.table(results.raws(paper, exhibit.runs, scale)))
    return _filled("exhibit", name=exhibit.name, title=exhibit.title, runs=runs, **words)
