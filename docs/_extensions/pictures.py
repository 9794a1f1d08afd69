"""A picture that has a dark version beside it, ``name-dark.png``, is shown as the theme asks."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class DarkVersions(SphinxTransform):
    """Puts the dark version beside each picture; the theme's style sheet shows one of them."""

    default_priority = 100  # before the files of pictures are collected

    def apply(self, **_: object) -> None:
        """Looks at the pictures of a page."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for picture in list(self.document.findall(nodes.image)):
            path = Path(picture["uri"])
            dark = path.with_stem(f"{path.stem}-dark")
            if (folder / dark).is_file():
                other = picture.deepcopy()
                other["uri"] = str(dark)
                other["classes"].append("only-dark")
                picture["classes"].append("only-light")
                picture.parent.insert(picture.parent.index(picture) + 1, other)


def setup(app: Sphinx) -> dict[str, bool]:
    """Is called by Sphinx."""
    app.add_transform(DarkVersions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
