"""The page of a paper: what came out, the verdicts, and all exhibits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Final

from benchmarks.papers.raw_files import RawFiles, Record
from benchmarks.papers.reproduction import KINDS, Exhibit, Kind, Paper, Rows, Scale
from benchmarks.papers.verdicts import WORDS, Cell, Verdict, Word, explained, shown

PICTURES: Final = "pictures"
_TEMPLATES: Final = Path(__file__).parent / "templates"
COUNTS: Final = ("all", *WORDS, "explained")
"""Heads of the columns of ``tally``."""

Verdicts = Mapping[tuple[str, Scale], Sequence[Verdict]]
"""By paper and scale."""


# --- what the index has too ----------------------------------------------------------------------


def picture(paper: Paper, exhibit: Exhibit, scale: Scale) -> str:
    """Returns the picture's file, from the folder of the pages."""
    suffix = "" if scale == "small" else f"-{scale}"
    return f"{PICTURES}/{paper.key}-{exhibit.name}{suffix}.png"


def markdown(rows: Rows) -> str:
    """Returns a table, its first row the header."""
    head, *body = (["", *(cell.replace("|", "\\|") for cell in row), ""] for row in rows)
    rule = ["", *("---" for _ in head[1:-1]), ""]
    return "\n".join(" | ".join(row).strip() for row in (head, rule, *body))


def filled(template: str, **words: object) -> str:
    """Returns a template with its words; what is empty leaves no gap."""
    text = (_TEMPLATES / f"{template}.md").read_text(encoding="utf-8")
    return re.sub(r"\n{3,}", "\n\n", Template(text).substitute(words).strip() + "\n")


def measured(results: RawFiles, paper: Paper, exhibit: Exhibit, scale: Scale) -> bool:
    """Returns whether anything was, that an exhibit shows."""
    return any(results.of(paper, run, scale) for run in exhibit.runs)


def records(results: RawFiles, paper: Paper, scale: Scale) -> list[Record]:
    """Returns all that was measured of a paper."""
    return [r for run in paper.runs for r in results.of(paper, run.name, scale).values()]


def hours(made: Iterable[Record]) -> float:
    """Returns how long it took."""
    return sum(record.seconds for record in made) / 3600


def consecutive(seeds: Iterable[int]) -> str:
    """Returns numbers as a text, such as "10 to 14, 16"."""
    found: list[list[int]] = []
    for seed in sorted(seeds):
        if found and seed == found[-1][-1] + 1:
            found[-1].append(seed)
        else:
            found.append([seed])
    return ", ".join(f"{part[0]} to {part[-1]}" if part[1:] else f"{part[0]}" for part in found)


def of_kind(verdicts: Iterable[Verdict], kind: Kind) -> list[Verdict]:
    """Returns those on claims of that kind."""
    return [verdict for verdict in verdicts if verdict.claim.kind == kind]


def tally(paper: Paper, kind: Kind, verdicts: Sequence[Verdict]) -> list[str]:
    """Returns how many claims of a kind there are, by their verdicts, and how many are explained.

    Args:
        paper: it is of.
        kind: of the claims that are counted.
        verdicts: on all claims of the paper.
    """
    counted = of_kind(verdicts, kind)
    told = sum(explained(paper, found, verdicts) for found in counted)
    return [*_tally([found.word for found in counted]), str(told)]


def tally_cells(verdicts: Iterable[Verdict]) -> list[str]:
    """Returns how many claims there are network by network, by their verdicts there."""
    return _tally([cell.word for found in verdicts for cell in found.cells])


def _tally(words: Sequence[Word]) -> list[str]:
    """How many words there are, and how often each of them."""
    return list(map(str, [len(words), *map(words.count, WORDS)]))


# --- the page ------------------------------------------------------------------------------------


def page(results: RawFiles, paper: Paper, of_scales: Mapping[Scale, Sequence[Verdict]]) -> str:
    """Returns the page of a paper.

    Args:
        results: raw files.
        paper: see there.
        of_scales: the verdict on each claim, by scale.
    """
    prose = {
        "What came out": paper.came_out,
        "What depends on the regime": paper.depends,
        "What did not come out": paper.did_not,
    }
    parts = [_scale(results, paper, scale, found) for scale, found in of_scales.items()]
    return filled(
        "page",
        citation=paper.citation,
        address=paper.address,
        key=paper.key,
        prose="\n".join(_section(2, head, "\n\n".join(text)) for head, text in prose.items()),
        scales="\n".join(parts),
        differences=_items(paper.differences),
    )


def _section(level: int, heading: str, body: str) -> str:
    """A heading and what is beneath it; nothing where there is nothing."""
    return f"{'#' * level} {heading}\n\n{body}\n" if body else ""


def _items(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _scale(results: RawFiles, paper: Paper, scale: Scale, verdicts: Sequence[Verdict]) -> str:
    made = records(results, paper, scale)
    if not made:
        # What a GPU is for was not run without one, and the page says so.
        return filled("not-measured", scale=scale, reason=_why_not(paper, scale))
    small = scale == "small"
    claims = [_claims(paper, kind, verdicts) for kind in KINDS]
    return filled(
        "measured",
        scale=scale,
        counts=markdown(_counts(paper, verdicts)),
        rules=_rules(paper),
        machines=_machines(made),
        seeds=consecutive({record.seed for record in made}),
        hours=f"{hours(made):.1f}",
        claims="\n".join(claims),
        readings=_section(3, "Readings", _readings(paper, verdicts)),
        causes=_section(3, "Explanations", _causes(paper, verdicts)) if small else "",
        changes=_section(2, "What was changed of the claims", _changes(paper)) if small else "",
        exhibits="\n".join(_exhibit(results, paper, each, scale) for each in paper.exhibits),
    )


def _why_not(paper: Paper, scale: Scale) -> str:
    if scale == "small":
        return "`make papers` does it."
    same = [f"`{run.name}`" for run in paper.runs if run.size("small") == run.size("paper")]
    already = f" Of the same size at both: {', '.join(same)}." if same else ""
    return f"the paper's own sizes are for a GPU, and none was at hand.{already}"


def _counts(paper: Paper, verdicts: Sequence[Verdict]) -> Rows:
    rows = [
        [heading, *tally(paper, kind, verdicts)]
        for kind, heading in KINDS.items()
        if of_kind(verdicts, kind)
    ]
    rows.insert(1, ["network by network", *tally_cells(of_kind(verdicts, "claim")), ""])
    return [["", *COUNTS], *rows]


def _rules(paper: Paper) -> str:
    return f" They are those of commit {paper.rules}." if paper.rules else ""


def _machines(made: Iterable[Record]) -> str:
    kinds = {
        f"{r.machine['gpu'] or r.machine['cpu']}, {r.machine['threads']} threads a run, "
        f"torch {r.versions['torch']}".replace(" 1 threads", " one thread")
        for r in made
    }
    return "; ".join(sorted(kinds))


# --- claims --------------------------------------------------------------------------------------


def _claims(paper: Paper, kind: Kind, verdicts: Sequence[Verdict]) -> str:
    shown = of_kind(verdicts, kind)
    if not shown:
        return ""
    premises = any(found.claim.premise for found in shown)
    head = ["claim", "source", "holds if", "mean [interval]"]
    rows = [[*head, *["premise"] * premises, "verdict"]]
    for found in shown:
        claim = found.claim
        says = f"`{claim.name}`{' †' * (kind == 'ours')}: {claim.says}"
        inequality = f"{claim.inequality}{', geometric mean' * claim.geometric}"
        rule = "<br>".join(filter(None, (inequality, claim.threshold)))
        figures = "<br>".join(_figures(cell) for cell in found.cells)
        row = [says, claim.source, rule, figures]
        if premises:
            row.append("<br>".join(_premise(cell) for cell in found.cells))
        rows.append([*row, _word(paper, found, verdicts)])
    evidence = [
        f"`{found.claim.name}`: {found.claim.evidence}" for found in shown if found.claim.evidence
    ]
    return _section(3, KINDS[kind], "\n\n".join(filter(None, (markdown(rows), _items(evidence)))))


def _figures(cell: Cell) -> str:
    """The run, in bold where the claim does not hold, and its mean."""
    run = f"`{cell.run}`"
    return f"{run if cell.word in ('holds', 'not measured') else f'**{run}**'} {cell}"


def _premise(cell: Cell) -> str:
    return f"{sum(cell.premises.values())} of {len(cell.premises)}" if cell.premises else ""


_PRINTED: Final = {"holds": "as printed", "fails": "not as printed"}
"""Of misprints, where to hold is nothing good."""


def _word(paper: Paper, found: Verdict, verdicts: Sequence[Verdict]) -> str:
    """The verdict, with the runs that are exceptions to it, and why it cannot be tested."""
    claim, told = found.claim, str(found)
    if claim.untestable:
        return f"untestable: {claim.untestable}"
    if claim.kind == "misprint":
        return _PRINTED.get(told, told)
    text = told if told == "holds" else f"**{told}**"
    if len(found.cells) > 1 and len({cell.word for cell in found.cells}) > 1:
        text += ": " + ", ".join(f"{word} in `{run}`" for run, word in found.exceptions.items())
    if not found.granted:
        text += "; what it takes for granted is not so"
    return f"{text}; explained" if explained(paper, found, verdicts) else text


def _readings(paper: Paper, verdicts: Iterable[Verdict]) -> str:
    """Claims about runs that have other readings: first those that depend on it."""
    rows: list[list[str]] = []
    for found in verdicts:
        primary = {cell.run: cell for cell in found.cells}
        for run, others in found.readings.items():
            for other in others:
                cells = (primary[run], other)
                told = [f"{paper.run(c.run).reading}: {c}, {c.word}" for c in cells]
                rows.append([f"`{found.claim.name}`", f"`{run}`", *told, _depends(*cells)])
    if not rows:
        return ""
    rows.sort(key=lambda row: row[-1] != "yes")
    return markdown([["claim", "run", "primary reading", "other reading", "depends on it"], *rows])


def _depends(primary: Cell, other: Cell) -> str:
    if "not measured" in (primary.word, other.word):
        return "not measured"
    return "no" if primary.word == other.word else "yes"


def _causes(paper: Paper, verdicts: Sequence[Verdict]) -> str:
    """The causes that are known of what does not hold, with what shows them."""
    told = []
    for found in verdicts:
        cause = paper.causes.get(found.claim.name)
        if cause is not None:
            by = _shown(shown(paper, found, verdicts))
            told.append(f"`{found.claim.name}`{by}: {cause.text}")
    return _items(told)


def _shown(of_runs: Mapping[str, tuple[str, ...]]) -> str:
    """What shows a cause: for all runs in which the claim does not hold, or for some of them."""
    together = {names: [r for r in of_runs if of_runs[r] == names] for names in of_runs.values()}
    told = []
    for names, runs in together.items():
        if names:
            of = "" if len(together) == 1 else f"for {', '.join(f'`{run}`' for run in runs)} "
            told.append(of + ", ".join(f"`{name}`" for name in names))
    return f" (shown by {'; '.join(told)})" if told else ""


def _changes(paper: Paper) -> str:
    """What was changed of the claims; those of one text are one line."""
    names: dict[str, list[str]] = {}
    for claim in paper.claims:
        if claim.changed:
            names.setdefault(claim.changed, []).append(f"`{claim.name}`")
    return _items(f"{', '.join(of_text)}: {text}" for text, of_text in names.items())


def _exhibit(results: RawFiles, paper: Paper, exhibit: Exhibit, scale: Scale) -> str:
    words = dict.fromkeys(("picture", "table", "note"), "")
    runs = "Not run."
    if measured(results, paper, exhibit, scale):
        runs = f"From {', '.join(f'`{run}`' for run in exhibit.runs)}."
        words["note"] = exhibit.note
        if exhibit.draw is not None:
            words["picture"] = f"![{exhibit.title}]({picture(paper, exhibit, scale)})"
        if exhibit.table is not None:
            words["table"] = markdown(exhibit.table(results.raws(paper, exhibit.runs, scale)))
    return filled("exhibit", name=exhibit.name, title=exhibit.title, runs=runs, **words)
