"""What is public, and the page of each name: plain text, for which Sphinx is not needed.

What is public is what the package's ``__all__`` hold, so that no list here can go stale. A name has
its page in the room in which it is defined, under the shortest name by which users reach it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import subspace_optim

FIRST = ("optim", "subspaces", "curvature", "diagnostics.measures", "diagnostics")
"""The rooms that most readers come for; the others follow, by the alphabet."""

ALIASES = {"subspace_optim.measures": "subspace_optim.diagnostics.measures"}
"""Rooms that users reach under another name."""


@dataclass(frozen=True)
class Entry:
    """A public name: ``room``, where its page is, and ``path``, under which users reach it."""

    room: str
    path: str
    value: Any

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rpartition(".")[2]

    @property
    def shown(self) -> str:
        """What users write: ``so.BulkSGD``."""
        return self.path.replace("subspace_optim.", "so.", 1)

    @property
    def file(self) -> str:
        """Where it is written."""
        module = getattr(self.value, "__module__", "")
        if not module.startswith("subspace_optim."):  # a constant, or a name for a type
            module = self.path.rpartition(".")[0]
        return module.replace(".", "/") + ".py"

    @property
    def page(self) -> str:
        """The document; a class and a function may differ in their case alone, files may not."""
        kind = "-class" if inspect.isclass(self.value) and self.name.lower() in _functions() else ""
        return f"reference/{self.room}/{self.name}{kind}"

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        doc = inspect.getdoc(self.value) if callable(self.value) else ""
        return re.split(r"(?<=[.:?]) |\n\n", (doc or "").replace("\n", " "))[0].rstrip(":")


@cache
def rooms() -> dict[str, ModuleType]:
    """Returns the packages that say what is public, by their names within the package."""
    found = pkgutil.walk_packages(subspace_optim.__path__, "subspace_optim.")
    modules = [importlib.import_module(info.name) for info in found if info.ispkg]
    named = {
        m.__name__.removeprefix("subspace_optim."): m for m in modules if hasattr(m, "__all__")
    }
    first = {name: named[name] for name in FIRST}
    return first | named | {"errors": subspace_optim}


@cache
def entries() -> list[Entry]:
    """Returns every public name that is not itself a room, each once."""
    public: dict[int, tuple[str, Any]] = {}
    paths = {"subspace_optim": subspace_optim}
    paths |= {alias: importlib.import_module(name) for alias, name in ALIASES.items()}
    paths |= {module.__name__: module for module in rooms().values()}
    for path, module in paths.items():
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                public.setdefault(id(value), (f"{path}.{name}", value))
    return [Entry(_room_of(path, value), path, value) for path, value in public.values()]


def _room_of(path: str, value: Any) -> str:
    """Returns the innermost room that has the file in which it is defined."""
    module = getattr(value, "__module__", "")
    if not module.startswith("subspace_optim."):
        module = path
    inside = [r for r, m in rooms().items() if f"{module}.".startswith(f"{m.__name__}.")]
    return max(inside, key=lambda room: len(rooms()[room].__name__))


@cache
def _functions() -> set[str]:
    return {name for m in rooms().values() for name in m.__all__ if name.islower()}


def examples(folder: Path) -> dict[str, str]:
    """Returns the code of each page, all of which tests run."""
    pages = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.md")}
    found = {n: re.findall(r"```python\n(.*?)```", p.read_text(), re.S) for n, p in pages.items()}
    return {name: "\n".join(blocks) for name, blocks in sorted(found.items()) if blocks}


def title(text: str, line: str = "=") -> str:
    """Returns a heading."""
    return f"{text}\n{line * len(text)}\n"


def page(entry: Entry, code: dict[str, str]) -> str:
    """Returns the page of a name. Contents would be long with all of them: its room's has it."""
    module, _, name = entry.path.rpartition(".")
    if inspect.isclass(entry.value):
        kind = "autoexception" if issubclass(entry.value, Exception) else "autoclass"
        options = "   :members:\n   :inherited-members: Optimizer, Exception, tuple, object\n"
    else:
        kind, options = ("autofunction" if callable(entry.value) else "autodata"), ""
    users = [n for n, text in code.items() if re.search(rf"\b{re.escape(entry.shown)}\b", text)]
    where = "\n".join(f"* :doc:`/{user}`" for user in users)
    seen = f".. rubric:: Examples\n\nCode that tests run:\n\n{where}\n" if users else ""
    return (
        f":orphan:\n\n{title(entry.shown)}\n:doc:`{entry.room} <index>` · ``{entry.file}``\n\n"
        f".. currentmodule:: {module}\n\n.. {kind}:: {name}\n{options}\n{seen}"
    )


def room_page(room: str, module: ModuleType, names: list[Entry]) -> str:
    """Returns the page of a room: its names, in one line each."""
    about = "Errors and warnings." if room == "errors" else inspect.getdoc(module) or ""
    rows = "".join(f"   * - :doc:`{e.shown} </{e.page}>`\n     - {e.summary}\n" for e in names)
    table = f".. list-table::\n   :class: names\n   :widths: 35 65\n\n{rows}"
    return f"{title(room)}\n{about}\n\n{table}"


def index(names: list[str]) -> str:
    """Returns the first page of the reference."""
    tree = "".join(f"   {name}/index\n" for name in names)
    return (
        f"{title('Reference')}\nEvery public name has a page, made from its docstring. ``so`` is "
        "``subspace_optim``. A room is a package, and each file in it is about one thing.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{tree}"
    )


def documents(folder: Path) -> dict[str, str]:
    """Returns the text of every page of the reference, by its name within the docs.

    Args:
        folder: of the docs, whose examples the pages point to.
    """
    code, known = examples(folder), entries()
    found = {"reference/index": index(list(rooms()))}
    for room, module in rooms().items():
        names = sorted((e for e in known if e.room == room), key=lambda e: e.shown.lower())
        found[f"reference/{room}/index"] = room_page(room, module, names)
    return found | {entry.page: page(entry, code) for entry in known}
