"""How Sphinx makes a site of these pages: ``make docs``.

The pages stay plain Markdown, which any browser of repositories shows. What they cannot say there
is done while they are read, by the extensions beside this file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "subspace_optim"
author = "the subspace_optim authors"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",  # formulas without a script from elsewhere
    "pictures",  # the dark version of a picture, where there is one
    "reference",  # a page for each public name
    "names",  # `so.BulkSGD` in a text leads to its page
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "notes_style")]

# Every reference must lead somewhere; what is not ours has no page here, as the site is built
# without asking other sites.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!subspace_optim\.).*")]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp"
