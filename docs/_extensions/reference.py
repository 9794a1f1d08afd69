"""The reference: a page for each public name, written when the site is built."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from docutils import nodes
from public import ALIASES, documents, entries
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def write(app: Sphinx) -> None:
    """Writes all pages, but leaves alone the files of those that are as they were."""
    folder = Path(app.srcdir)
    files = {folder / f"{name}.rst": text for name, text in documents(folder).items()}
    for old in set((folder / "reference").rglob("*.rst")) - set(files):
        old.unlink()
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def resolve(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element
) -> nodes.Node | None:
    """Leads the name of a file's own class, as in a type, to the page of the public name."""
    target = node.get("reftarget", "")
    last = target.rpartition(".")[2]
    if node.get("refdomain") != "py":
        return None
    found = [e for e in entries() if e.name == last and inspect.isclass(e.value)]
    if len(found) == 1:
        where = found[0].path
        return env.domains["py"].resolve_xref(
            env, node["refdoc"], app.builder, "obj", where, node, content
        )
    return content if target.startswith("subspace_optim.") and _is_private(target) else None


def _is_private(target: str) -> bool:
    """Whether it is there, and no public name: a type that users have no need to write."""
    module, _, name = target.rpartition(".")
    return hasattr(sys.modules.get(module), name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Is called by Sphinx."""
    for alias, name in ALIASES.items():
        sys.modules[alias] = importlib.import_module(name)
    app.connect("builder-inited", write)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
