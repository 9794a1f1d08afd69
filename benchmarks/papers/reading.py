"""A paper from the files of its folder.

* ``runs.toml``: what is measured, by which function, at which sizes; groups of runs
* ``claims.toml``: sentences of the paper, and the inequalities that decide them
* ``exhibits.toml``: its figures and tables, panel by panel and column by column
* ``page.md``: what came out and what did not, explanations, and what differs from the paper
* ``runs.py``, and modules beside it: functions that measure
* ``analysis.py``: reductions of raw figures, for claims, pictures and tables alike
* ``pictures.py``: what no data can say of a picture or a table
* ``cases.toml``, ``table-1.toml``: tables as they are printed, for those that put ours beside

In TOML files texts may be broken into lines, ``$name`` is a text of ``[shared]``, and ``"none"`` is
``None``, for which TOML has no word. A function is told by its name, or in a list that has its
further arguments.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from string import Template
from typing import Any, Final

from benchmarks.papers import reductions
from benchmarks.papers.panels import Line, Panel, Picture
from benchmarks.papers.reproduction import Cause, Claim, Exhibit, Paper, Raw, Run
from benchmarks.papers.tables import Cell, rows_of_quantities, rows_of_runs

FOLDER: Final = Path(__file__).parent
Data = dict[str, Any]
Function = Callable[..., Any]
_GRID: Final = ("order", "columns", "key", "width", "height")
_EXHIBIT: Final = {"title", "runs", "seeds", "names", "panels", "draw", "table", "note", *_GRID}


def read(key: str, folder: Path | None = None) -> Paper:
    """Returns a paper.

    Args:
        key: of the paper, and the name of the package with its functions.
        folder: of its data files; ``None``: that of the package.

    Returns:
        The paper; a ``ValueError`` names what a file tells in another form, or that there is not.
    """
    folder = folder or FOLDER / key
    runs, claims, exhibits = (
        _toml(folder / f"{name}.toml") for name in ("runs", "claims", "exhibits")
    )
    names = _Names(key, runs, exhibits.pop("looks", {}))
    made = _made(folder / "runs.toml", runs, names.run)
    names.titles = {run.name: run.title or run.name for run in made}
    return Paper(
        key,
        runs=made,
        exhibits=_made(folder / "exhibits.toml", exhibits, names.exhibit),
        claims=_made(folder / "claims.toml", claims, names.claim),
        **_prose((folder / "page.md").read_text(encoding="utf-8")),
    )


def _made(path: Path, data: Data, make: Callable[[str, Data], Any]) -> tuple[Any, ...]:
    made = []
    for name, each in data.items():
        try:
            made.append(make(name, dict(each)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: [{name}]: {error}") from error
    return tuple(made)


def _toml(path: Path) -> Data:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    shared: dict[str, Any] = {}
    for name, text in data.pop("shared", {}).items():
        shared[name] = _filled(text, shared)
    filled: Data = _filled(data, shared)
    return filled


class _Text(Template):
    idpattern = r"(?a:[a-z][a-z0-9_]*(?:-[a-z0-9]+)*)"  # words with hyphens too, as names have them


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """The value with its texts on one line, names filled in, and ``None`` for "none"."""
    if isinstance(value, dict):
        return {key: _filled(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, names) for each in value]
    if not isinstance(value, str):
        return value
    if value == "none":
        return None
    if value.startswith("$") and value[1:] in names:
        return names[value[1:]]  # a number stays one
    text = _Text(value).safe_substitute(names)  # dollars of mathematics stay
    return " ".join(text.split()) if "\n" in text else text


_SECTIONS: Final = {
    "What came out": "came_out",
    "What depends on the regime": "depends",
    "What did not come out": "did_not",
    "Explanations": "causes",
    "What differs from the paper": "differences",
}
"""Of ``page.md``, in this order; each may be missing but the last."""


def _prose(text: str) -> Data:
    """What a page is to say: head, address and commit of the rules, and then its sections.

    Raises:
        ValueError: there is a section of another name, or an explanation in another form.
    """
    opening, *parts = text.split("\n## ")
    head, address, *rules = _paragraphs(opening)
    told: Data = {"citation": head.removeprefix("# "), "address": address.strip("<>")}
    if rules:
        told["rules"] = rules[0].removeprefix("Rules: ").rstrip(".")
    for part in parts:
        heading, _, body = part.partition("\n")
        name = _SECTIONS.get(heading.strip())
        if name is None:
            raise ValueError(f"page.md has no section {heading!r}: it has {list(_SECTIONS)}")
        told[name] = _items(body) if name in ("causes", "differences") else _paragraphs(body)
    told["causes"] = dict(map(_cause, told.get("causes", ())))
    return told


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in re.split(r"\n\n+", text.strip()) if part)


def _cause(item: str) -> tuple[str, Cause]:
    """The claim of an item ```name` (`shown by`, `in one run by` for `run`): text``, and the cause.

    Raises:
        ValueError: it is of another form.
    """
    found = re.fullmatch(r"`([^`]+)`(?: \(([^)]*)\))?: (.*)", item)
    if found is None:
        raise ValueError(f"an explanation is '`claim` (`shown by`): text', not {item!r}")
    name, named, text = found.groups()
    everywhere: list[str] = []
    in_runs: dict[str, tuple[str, ...]] = {}
    for shown, run in re.findall(r"`([^`]+)`(?: for `([^`]+)`)?", named or ""):
        if run:
            in_runs[run] = (*in_runs.get(run, ()), shown)
        else:
            everywhere.append(shown)
    return name, Cause(text, tuple(everywhere), in_runs)


def _items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in f"\n{text}".split("\n- ")[1:])


def _size(parts: Any, sizes: Mapping[str, Any]) -> Data:
    """What is told in full, or by its name in ``[sizes]``; of several parts, the last counts."""
    size: Data = {}
    for part in parts if isinstance(parts, list) else [parts]:
        size |= _size(sizes[part], sizes) if isinstance(part, str) else part
    return size


def _each(data: Data) -> Iterator[Data]:
    """A panel for each of the values that are to stand for ``$each``; the first may have more."""
    more = data.pop("first", {})
    for number, value in enumerate(data.pop("each", (None,))):
        yield _filled(data, {"each": value}) | ({} if number else more)


class _Names:
    """What the data of a paper may name.

    Args:
        key: of the paper.
        runs: as ``runs.toml`` has them.
        looks: of panels and lines, by name.
    """

    def __init__(self, key: str, runs: Data, looks: Mapping[str, Data]) -> None:
        self.key, self.looks = key, looks
        self.groups, self.sizes = (runs.pop(name, {}) for name in ("groups", "sizes"))
        self.titles: Mapping[str, str] = {}
        self.exhibits: dict[str, Data] = {}

    def run(self, name: str, data: Data) -> Run:
        """Returns a run."""
        module, _, function = data.pop("measure").rpartition(".")
        measure = getattr(self.module(module or "runs"), function)
        small = _size(data.pop("small"), self.sizes)
        paper = small | _size(data.pop("paper", {}), self.sizes)
        return Run(name, measure=measure, small=small, paper=paper, **data)

    def claim(self, name: str, data: Data) -> Claim:
        """Returns a claim."""
        data["formula"] = json.dumps(data["measure"])
        for of_raw in {"measure", "premise"} & data.keys():
            data[of_raw] = self.function(data[of_raw])
        data["runs"] = self.runs(data["runs"])
        return Claim(name, **data)

    def exhibit(self, name: str, data: Data) -> Exhibit:
        """Returns a figure or table; ``like`` another one, it has all of it that is not told.

        Raises:
            ValueError: something is told that no exhibit has.
        """
        self.exhibits[name] = data = self._like(data, self.exhibits)
        data = _filled(data, data.get("names", {}))
        if unknown := data.keys() - _EXHIBIT:
            raise ValueError(f"an exhibit has no {', '.join(unknown)}: it has {sorted(_EXHIBIT)}")
        runs = self.runs(data["runs"])
        titles = {run: self.titles[run] for run in runs}
        draw = self._picture(data, runs, titles)
        table = self._table(data.get("table"), runs, titles)
        if "seeds" in data:
            draw, table = (show and self._of_some(show, data["seeds"]) for show in (draw, table))
        note = data.get("note", "")
        return Exhibit(name, data["title"], runs, draw=draw, table=table, note=note)

    def _of_some(self, show: Function, seeds: str) -> Function:
        """A picture or table of the first seed, or of those for which a function holds."""

        def chosen(of_seeds: Mapping[int, Raw]) -> Mapping[int, Raw]:
            if seeds == "first":
                return {seed: raw for seed, raw in of_seeds.items() if seed == min(of_seeds)}
            return {seed: raw for seed, raw in of_seeds.items() if self.function(seeds)(raw)}

        return lambda raws: show({run: chosen(of_seeds) for run, of_seeds in raws.items()})

    def _picture(
        self, data: Data, runs: Sequence[str], titles: Mapping[str, str]
    ) -> Function | None:
        if "panels" not in data:
            return self.function(data["draw"]) if "draw" in data else None
        panels = tuple(
            self.panel(one, runs) for each in data["panels"] for one in _each(dict(each))
        )
        grid = {name: data[name] for name in _GRID if name in data}
        return Picture(panels, titles, **grid)

    def panel(self, data: Data, runs: Sequence[str]) -> Panel:
        """Returns a panel; what it does not know is a look."""
        told, look = _told(self._like(data, self.looks), Panel)
        told["runs"] = self.runs(told["runs"]) if "runs" in told else tuple(runs)
        told["lines"] = tuple(self.line(dict(each)) for each in told.get("lines", ()))
        if isinstance(told.get("title"), list):
            told["title"] = "\n".join(told["title"])
        if "paint" in told:
            told["paint"] = self.function(told["paint"])
        return Panel(**told, look=look)

    def line(self, data: Data) -> Line:
        """Returns a line; what it does not know is a look."""
        told, look = _told(self._like(data, self.looks), Line)
        for name in {"x", "y", "start", "curves", "at", "level"} & told.keys():
            told[name] = self.values(told[name])
        return Line(**told, look=look)

    def _table(self, data: Any, runs: Sequence[str], titles: Mapping[str, str]) -> Function | None:
        if not isinstance(data, list) or not isinstance(data[0], dict):
            return None if data is None else self.function(data)
        cells = [Cell(**{**each, "value": self.values(each.get("value"))}) for each in data]
        if cells[0].quantity:
            return lambda raws: rows_of_quantities(raws[runs[0]], cells)
        return lambda raws: rows_of_runs(raws, cells, titles, runs)

    def _like(self, data: Data, others: Mapping[str, Data]) -> Data:
        other = others[data["like"]] if "like" in data else {}
        return other | {name: value for name, value in data.items() if name != "like"}

    def runs(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """Returns the names of runs, those of groups one by one."""
        listed = [names] if isinstance(names, str) else names
        return tuple(run for name in listed for run in self.groups.get(name, (name,)))

    def values(self, spec: Any) -> Function | None:
        """Returns what gives a number that is told, a column, or what a function in a list does."""
        if spec is None or isinstance(spec, list):
            return None if spec is None else self.function(spec)
        if isinstance(spec, str):
            return lambda raw: reductions.column(raw, spec)
        return lambda _: spec

    def function(self, spec: Any) -> Function:
        """Returns a function of ``analysis``, ``pictures`` or the reductions that papers share.

        Raises:
            ValueError: there is none of that name.
        """
        name, *arguments = [spec] if isinstance(spec, str) else spec
        for module in (self.module("analysis"), self.module("pictures"), reductions):
            if hasattr(module, name):
                found = getattr(module, name)
                return lambda *given: found(*given, *arguments)
        where = "analysis.py, pictures.py or reductions.py"
        raise ValueError(f"there is no function {name!r} in {where}")

    def module(self, name: str) -> Any:
        """Returns a module of the paper."""
        return importlib.import_module(f"{__package__}.{self.key}.{name}")


def _told(data: Data, kind: type) -> tuple[Data, Data]:
    """The fields of a dataclass, and the rest."""
    known = {field.name for field in fields(kind)}
    return (
        {name: value for name, value in data.items() if name in known},
        {name: value for name, value in data.items() if name not in known},
    )
