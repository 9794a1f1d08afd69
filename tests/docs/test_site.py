"""What the site must hold, told without building it: ``make docs`` does that, strictly."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import public
import pytest

import subspace_optim as so

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = [
    ".".join(["subspace_optim", *file.parent.relative_to(so.__path__[0]).parts])
    for file in sorted(Path(so.__path__[0]).rglob("__init__.py"))
    if "__all__" in file.read_text()
]
HANDED_OUT = {"ParameterSpace", "Row", "Step", "Subspace", "Training"}
"""What users read and are given, and do not make."""
PAGES = public.documents(DOCS)


def test_packages_are_found():
    assert {"subspace_optim", "subspace_optim.diagnostics.measures"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_one_page(package):
    """Whichever of its names it is reached by; a name that is a package has its room's."""
    module = importlib.import_module(package)
    pages = {id(entry.value): entry.page for entry in public.entries()}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            room = value.__name__.removeprefix("subspace_optim.")
            assert f"reference/{room}/index" in PAGES
        else:
            directives = re.findall(r"^\.\. auto(\w+):: (\w+)$", PAGES[pages[id(value)]], re.M)
            assert [directive[1] for directive in directives] == [name]


def test_no_two_pages_are_one_file_where_case_does_not_count():
    assert max(Counter(page.lower() for page in PAGES).values()) == 1


def test_a_name_is_shown_as_users_write_it():
    shown = {entry.shown for entry in public.entries()}
    assert {"so.BulkSGD", "so.measures.valley", "so.diagnostics.valley"} <= shown


def test_every_page_of_the_reference_is_in_the_table_of_a_room():
    rooms = re.findall(r"^   (\S+/index)$", PAGES["reference/index"], re.M)
    tables = "".join(PAGES[f"reference/{room}"] for room in rooms)
    listed = {"reference/index", *(f"reference/{room}" for room in rooms)}
    assert set(PAGES) == listed | set(re.findall(r":doc:`so\S+ </(\S+)>`", tables))


@pytest.mark.parametrize("room", ["optim", "subspaces", "curvature", "diagnostics.measures"])
def test_what_users_make_is_in_an_example_that_is_run(room):
    """Each class and function of these rooms that can be called, under the name users write."""
    names = [entry for entry in public.entries() if entry.room == room]
    made = {
        entry.shown
        for entry in names
        if (entry.path.count(".") == 1 or room == "diagnostics.measures")
        and callable(entry.value)
        and not inspect.isabstract(entry.value)
        and entry.name not in HANDED_OUT
    }
    assert len(made) >= 4
    code = "\n".join(public.examples(DOCS).values())
    assert {name for name in made if not re.search(rf"\b{re.escape(name)}\b", code)} == set()


def contents() -> set[str]:
    """The documents of all tables of contents, which the first page has."""
    trees = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    patterns = [re.sub(r".* <(\S+)>", r"\1", line) for line in lines]
    return {name_of(path) for pattern in patterns for path in DOCS.glob(f"{pattern}.md")}


def name_of(path: Path) -> str:
    return path.relative_to(DOCS).with_suffix("").as_posix()


def test_every_page_is_in_the_contents():
    assert {name_of(path) for path in DOCS.rglob("*.md")} - {"index"} == contents()


def test_every_guide_is_in_the_table_of_guides():
    table = (DOCS / "guides" / "index.md").read_text()
    guides = {path.name for path in (DOCS / "guides").glob("*.md")} - {"index.md"}
    assert guides == set(re.findall(r"\]\(([\w-]+\.md)\)", table))
