"""Code in a line of text that is a public name leads to its page: `so.BulkSGD`, `stability()`.

So the Markdown pages and the docstrings need no marks of Sphinx's for it. The first one of a
section is a link, the others stay as they are. The short name of a paper leads to its page.
"""

import re
from functools import cache
from pathlib import Path

from docutils import nodes
from public import entries
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

CODE = re.compile(r"(?:so\.|subspace_optim\.)?([\w.]+)(\(.*\))?", re.DOTALL)
INSIDE = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature, nodes.term)


@cache
def known() -> dict[str, str]:
    """Returns the public names as texts write them, and the full name of each.

    A function's name by itself is written with parentheses, and means the measure before the
    function under it. One that methods have too, such as ``update``, is told by its full name.
    """
    shortest = sorted(entries(), key=lambda e: (".measures." not in e.path, e.path.count(".")))
    methods = {name for e in shortest if isinstance(e.value, type) for name in dir(e.value)}
    names = {e.path.removeprefix("subspace_optim."): e.path for e in shortest}
    inside = {n.removeprefix("diagnostics."): path for n, path in names.items()}
    names |= {name: path for name, path in inside.items() if "." in name}
    for e in reversed(shortest):
        if e.name not in methods:
            names[e.name if isinstance(e.value, type) else f"{e.name}()"] = e.path
    return names


def full_name(code: str) -> str | None:
    """Returns the public name that a piece of code is, or calls."""
    match = CODE.fullmatch(code)
    if match is None:
        return None
    name, call = match.groups()
    return known().get(name) or (known().get(f"{name}()") if call else None)


class Links(SphinxTransform):
    """Makes links of the names in a page."""

    default_priority = 600

    def apply(self, **_: object) -> None:
        """Looks at the code, and the short names of papers, in the lines of a page."""
        page, seen = self.env.docname, set()
        for text in [
            *self.document.findall(nodes.literal),
            *self.document.findall(nodes.title_reference),
        ]:
            if (target := self.target(text.astext())) is None or target["reftarget"] == f"/{page}":
                continue
            above = text.parent
            while above.parent is not None and not isinstance(above, (nodes.section, *INSIDE)):
                above = above.parent
            first = (id(above), target["reftarget"])
            if isinstance(above, INSIDE) or first in seen:
                continue
            seen.add(first)
            link = addnodes.pending_xref("", refdoc=page, refexplicit=True, **target)
            text.replace_self(link)
            link += text

    def target(self, text: str) -> dict[str, str] | None:
        """Returns where a text leads, in the words of Sphinx."""
        if path := full_name(text):
            return {"refdomain": "py", "reftype": "obj", "reftarget": path}
        if text.isidentifier() and (Path(self.env.srcdir) / "papers" / f"{text}.md").is_file():
            return {"refdomain": "std", "reftype": "doc", "reftarget": f"/papers/{text}"}
        return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Is called by Sphinx."""
    app.add_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
