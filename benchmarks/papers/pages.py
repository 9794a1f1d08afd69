"""``docs/papers``: raw files, pictures, ``claims.json``, and a page for each paper.

The pages hold nothing but what follows from the raw files and the modules of the papers, so that
``render`` gives them again, letter by letter.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gallery import save
from benchmarks.papers.reproduction import (
    SCALES,
    TRIAL,
    Exhibit,
    Paper,
    Rows,
    Run,
    Scale,
)
from benchmarks.papers.results import Record, Results
from benchmarks.papers.verdicts import WORDS, Verdict, Word, verdict, written

RAW: Final = "raw"
PICTURES: Final = "pictures"
CLAIMS: Final = "claims.json"

Verdicts = Mapping[tuple[str, Scale], Sequence[Verdict]]
"""By paper and scale."""


def publish(results: Results, papers: Mapping[str, Paper], folder: Path) -> list[Path]:
    """Copies the raw files, draws the pictures from them, and writes the pages; the rest goes.

    Args:
        results: of runs.
        papers: those to publish.
        folder: such as ``docs/papers``.

    Returns:
        What was written, without the raw files.
    """
    published = Results(folder / RAW)
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


def _copy(results: Results, published: Results, papers: Mapping[str, Paper]) -> None:
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


def judged(results: Results, papers: Mapping[str, Paper]) -> Verdicts:
    """Returns the verdict on each claim, by paper and scale."""
    return {
        (key, scale): [verdict(results, paper, claim, scale) for claim in paper.claims]
        for scale in SCALES
        for key, paper in papers.items()
    }


def claims(results: Results, papers: Mapping[str, Paper], verdicts: Verdicts) -> str:
    """Returns the text of ``claims.json``: all claims that are decided."""
    entries = [
        _entry(results, papers[key], found, scale)
        for (key, scale), of_paper in verdicts.items()
        for found in of_paper
        if found.complete
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def render(results: Results, papers: Mapping[str, Paper]) -> dict[str, str]:
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


def _measured(results: Results, paper: Paper, exhibit: Exhibit, scale: Scale) -> bool:
    return any(results.of(paper, run, scale) for run in exhibit.runs)


def _records(results: Results, paper: Paper, scale: Scale) -> list[Record]:
    return [r for run in paper.runs for r in results.of(paper, run.name, scale).values()]


def _tally(verdicts: Iterable[Verdict]) -> tuple[list[Word], list[Word]]:
    """The words of the claims, and apart from them those of the identities."""
    verdicts = list(verdicts)
    words = [each.word for each in verdicts if not each.claim.identity]
    return words, [each.word for each in verdicts if each.claim.identity]


def _entry(results: Results, paper: Paper, found: Verdict, scale: Scale) -> dict[str, Any]:
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


# --- the index ---------------------------------------------------------------------------------

_HEAD: Final = """# The papers, reproduced

Every figure and table of the four papers is a command, and every claim an inequality. `make papers`
runs all of them at `small`, on a CPU; `python -m benchmarks.papers` lists them.

A claim is *reproduced* if its inequality holds in every run that it is about, for every seed; it is
*not reproduced* if it fails in one, and *undecided* if it holds wherever its premise does, and
that is not everywhere: that a network was trained, that its gradient was dominant. Claims that were
changed after a first trial, in their rule or in the size of their runs, say so, with the reason;
the seeds that were known by then, mostly seed 0 alone, do not decide those, and are in parentheses.
*Identities* follow from definitions: they tell of formulas, misprints among them, not of networks.
"""
_SIZES: Final = """\
The raw figures of each run and seed are in `raw`, with size, seconds, machine and versions;
[claims.json](claims.json) has each claim with its figures, the raw files and their SHA-256.

## Sizes

What each run takes at `small`: its arguments, and core-minutes for one seed (of a seed that was
stopped and taken up again, those since then; the median is shown). The sizes of `paper` are beside
them in the code, `benchmarks/papers/<paper>`.
"""


def _index(
    results: Results,
    papers: Mapping[str, Paper],
    verdicts: Verdicts,
) -> str:
    lines = [_HEAD]
    table = [["paper", "scale", *WORDS, "not measured", "identities, reproduced"]]
    for paper in papers.values():
        for scale in SCALES:
            if scale != "small" and not _records(results, paper, scale):
                continue
            link = f"[{paper.citation}]({paper.key}.md)"
            counts = _counts(verdicts[paper.key, scale])
            table.append([link, f"`{scale}`", *counts])
    lines += [markdown(table), ""]
    made = [r for paper in papers.values() for r in _records(results, paper, "small")]
    lines += [_SIZES, f"All seeds together take {_hours(made):.1f} core-hours.", ""]
    for paper in papers.values():
        rows = [["run", "what", "for", "size", "seeds", "minutes"]]
        for run in paper.runs:
            records = results.of(paper, run.name, "small")
            shown = ", ".join(e.name for e in paper.exhibits if run.name in e.runs)
            seeds = " ".join(map(str, records))
            minutes = _minutes(records.values())
            rows.append([f"`{run.name}`", run.what, shown, _size(run), seeds, minutes])
        lines += [f"### {paper.key}", "", markdown(rows), ""]
    return "\n".join(lines)


def _counts(verdicts: Iterable[Verdict]) -> list[str]:
    """How many claims have each verdict; and of the identities, which are not among these."""
    words, identities = _tally(verdicts)
    of = f"{identities.count('reproduced')} of {len(identities)}" if identities else ""
    return [*(str(words.count(word)) for word in (*WORDS, "not measured")), of]


def _size(run: Run) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in run.small.items())


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hours(records: Iterable[Record]) -> float:
    return sum(record.seconds for record in records) / 3600


def _minutes(records: Iterable[Record]) -> str:
    seconds = [record.seconds for record in records]
    return f"{statistics.median(seconds) / 60:.1f}" if seconds else "not run"


# --- a paper's page ----------------------------------------------------------------------------


def _page(results: Results, paper: Paper, of_scales: Mapping[Scale, Sequence[Verdict]]) -> str:
    lines = [f"# {paper.citation}", "", f"[The paper]({paper.address}); here `{paper.key}`.", ""]
    for scale, verdicts in of_scales.items():
        records = _records(results, paper, scale)
        if not records:
            # What a GPU is for was not run without one, and the page says so.
            lines += [f"## Figures and tables, `{scale}`", ""]
            lines += [f"Nothing was run at `{scale}`: {_why_not(paper, scale)}", ""]
            continue
        complete = [v for v in verdicts if v.complete]
        if scale == "small":
            lines += [line for part in paper.outcome for line in (part, "")]
        lines += [_summary(complete, scale), "", _hardware(records), ""]
        lines += [f"## Claims, `{scale}`", "", markdown(_claims(verdicts)), ""]
        if scale == "small":
            lines += _causes(paper, complete) + _changes(paper)
        lines += [f"## Figures and tables, `{scale}`", ""]
        for exhibit in paper.exhibits:
            lines += _exhibit(results, paper, exhibit, scale)
    lines += ["## What differs from the paper", ""]
    lines += [f"- {sentence}" for sentence in paper.differences]
    return "\n".join([*lines, ""])


def _why_not(paper: Paper, scale: Scale) -> str:
    if scale == "small":
        return "`make papers` does it."
    same = [f"`{run.name}`" for run in paper.runs if run.size("small") == run.size("paper")]
    already = f" Of the same size at both: {', '.join(same)}." if same else ""
    return f"the paper's own sizes are for a GPU, and none was at hand.{already}"


def _summary(verdicts: Sequence[Verdict], scale: Scale) -> str:
    """How many claims were reproduced, identities apart."""
    words, identities = _tally(verdicts)
    counts = ", ".join(f"{words.count(word)} {word}" for word in WORDS)
    also = (
        f"; and {len(identities)} that follow from definitions (*identities*)" if identities else ""
    )
    return (
        f"At `{scale}`, of {len(words)} claims: {counts}{also}. "
        "In pictures the first seed is drawn strongly, and the others thinly, or it alone."
    )


def _hardware(records: Sequence[Record]) -> str:
    kinds = sorted(
        {
            f"{r.machine['gpu'] or r.machine['cpu']}, {r.machine['threads']} threads a run, "
            f"torch {r.versions['torch']}".replace(" 1 threads", " one thread")
            for r in records
        }
    )
    seeds = sorted({r.seed for r in records})
    return (
        f"Measured on {'; '.join(kinds)}. Seeds {', '.join(map(str, seeds))}; "
        f"{_hours(records):.1f} hours of runs in all "
        "(of what was interrupted, since the last time)."
    )


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


def _causes(paper: Paper, verdicts: Iterable[Verdict]) -> list[str]:
    """The causes that are known of what was not reproduced."""
    names = [v.claim.name for v in verdicts if v.word != "reproduced"]
    lines = [
        f"- `{name}`: {' '.join(paper.causes[name].split())}"
        for name in names
        if name in paper.causes
    ]
    return ["### Why some were not reproduced", "", *lines, ""] if lines else []


def _changes(paper: Paper) -> list[str]:
    """What was changed of the claims after a first trial; claims of one text are one line."""
    names: dict[str, list[str]] = {}
    for claim in paper.claims:
        if claim.changed:
            known = ", ".join(map(str, claim.seen))
            late = "" if claim.seen == (TRIAL,) else f" Seeds {known} were known by then."
            names.setdefault(claim.changed + late, []).append(f"`{claim.name}`")
    lines = [f"- {', '.join(of_text)}: {text}" for text, of_text in names.items()]
    return ["### Changed after a first trial", "", *lines, ""] if lines else []


def _exhibit(results: Results, paper: Paper, exhibit: Exhibit, scale: Scale) -> list[str]:
    lines = [f"### {exhibit.name}: {exhibit.title}", ""]
    if not _measured(results, paper, exhibit, scale):
        return [*lines, "Not run.", ""]
    if exhibit.draw is not None:
        lines += [f"![{exhibit.title}]({picture(paper, exhibit, scale)})", ""]
    if exhibit.table is not None:
        lines += [markdown(exhibit.table(results.raws(paper, exhibit.runs, scale))), ""]
    if exhibit.note:
        lines += [exhibit.note, ""]
    runs = ", ".join(f"`{run}`" for run in exhibit.runs)
    return [*lines, f"From {runs}.", ""]
