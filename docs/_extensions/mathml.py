"""Formulas as MathML, which browsers show by themselves: no script, no font, no other site.

A command that has no MathML is a warning, and so an error of the build.
"""

import html
import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(tex: str, display: str, place: nodes.Element) -> str:
    """Returns a formula as MathML, with its TeX as the text for those who cannot see it."""
    tex = tex.replace(r"\arg", r"\operatorname{arg}\,")
    if "\\\\" in tex and "\\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    markup = convert(tex, display=display)
    for unknown in re.findall(r">(\\[A-Za-z]+)<", markup):
        logger.warning("no MathML for %s in %s", unknown, tex, location=place)
    return markup.replace("<math ", f'<math alttext="{html.escape(" ".join(tex.split()))}" ', 1)


def visit_inline(translator: Any, node: nodes.math) -> None:
    """Writes a formula within a line.

    Raises:
        SkipNode: always, as there is nothing inside of it.
    """
    translator.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """Writes formulas of their own lines: those with an empty line between them, one by one.

    Raises:
        SkipNode: always, as there is nothing inside of them.
    """
    for tex in re.split(r"\n\s*\n", node.astext().strip()):
        translator.body.append(f'<div class="formula">{mathml(tex, "block", node)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Is called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
