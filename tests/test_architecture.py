"""The arrows of the imports point downward only.

The tree is divided into rooms, and `ALLOWED` says which rooms each may import from. `violations` is
a pure function of one module's source, so it is tested itself, on sources that break each rule.
"""

import ast
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "subspace_optim"

# room: the rooms that it may import from. A leading dot stands for the package, and a dot alone for
# the package's own public names. A room is a module, or a package with all that is in it but for
# what has a row of its own; `__init__` is that one file. A module in no room is an error.
_COMMON = {"._validation", "._display", "._inner_product"}
_VALUES = {".linalg.eigenbasis", ".linalg.low_rank"}  # bases: the rest of linalg makes them
_ARITHMETIC = {".linalg.products", ".linalg.rows"}
_SUBSPACES = {
    *_COMMON,
    "._progress",
    ".linalg",
    *_ARITHMETIC,
    *_VALUES,
    ".curvature",
    ".step_hooks",
    ".subspaces",
}
_OPTIM = {
    "._validation",
    "._inner_product",
    *_VALUES,
    ".curvature",
    ".subspaces",
    ".step_hooks",
    ".optim._checks",
}
ALLOWED: dict[str, set[str]] = {
    "._validation": set(),
    ".__main__": set(),
    "._display": set(),
    "._inner_product": set(),
    "._progress": {"._validation"},
    ".linalg.products": {"._validation"},
    ".linalg.rows": {"._validation", "._inner_product", ".linalg.products"},
    ".linalg.eigenbasis": {*_COMMON, ".linalg.products"},
    ".linalg.low_rank": {*_COMMON, *_ARITHMETIC, ".linalg.eigenbasis"},
    ".linalg": {*_COMMON, "._progress", *_ARITHMETIC, *_VALUES, ".linalg"},
    ".curvature": {*_COMMON, "._progress", ".curvature"},
    ".step_hooks": {"._validation", "._inner_product", ".curvature", ".step_hooks"},
    ".subspaces": _SUBSPACES,
    # An optimizer is one formula: it knows the base, no other optimizer, and no eigensolver.
    ".optim._checks": {"._validation", ".curvature"},
    ".optim._base": _OPTIM,
    ".optim": {*_OPTIM, ".optim._base"},
    ".optim.__init__": {".optim._base", ".optim"},
    ".diagnostics": {*_SUBSPACES, ".diagnostics"},
    # Callbacks for the trainers of others: nothing here imports them.
    ".integrations": {
        "._validation",
        ".curvature",
        ".subspaces",
        ".step_hooks",
        ".diagnostics",
        ".integrations",
    },
    ".__init__": {
        "._validation",
        "._progress",
        ".linalg",
        ".curvature",
        ".subspaces",
        ".optim",
        ".diagnostics",
    },
    "benchmarks": {
        ".",
        "._validation",
        "._inner_product",
        ".linalg",
        ".linalg.rows",
        *_VALUES,
        ".curvature",
        ".subspaces",
        ".optim",
        ".diagnostics",
        "benchmarks",
    },
}
# Everything of ours that an import can name. All else is the standard library or a dependency.
TARGETS = {".", "tests", *ALLOWED}


def room_of(name: str, rooms: Collection[str]) -> str | None:
    """Return the innermost of `rooms` that holds the full dotted `name`, if one does."""
    if name == PACKAGE or name.startswith(f"{PACKAGE}."):
        name = name.removeprefix(PACKAGE)
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) or "." for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in rooms), None)


def imported_names(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the full dotted name of everything that `source` imports, wherever.

    `from a import b` gives `a.b`, which lies in the same room whether or not `b` is a module. The
    `module` of a package ends in `__init__`, so that one dot always means "beside this file".
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            beside = module.split(".")[: -node.level] if node.level else []
            base = [*beside, node.module] if node.module else beside
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def violations(source: str, module: str) -> list[str]:
    """Return one sentence for each import in `source` that `ALLOWED` does not allow to `module`."""
    room = room_of(module, ALLOWED)
    if room is None:
        return [f"{module} is in no room of ALLOWED: give it a row"]
    return [
        f"{module}:{line} imports {name}, but {room} may not import from {target}"
        for line, name in imported_names(source, module)
        if (target := room_of(name, TARGETS)) is not None and target not in ALLOWED[room]
    ]


@pytest.mark.parametrize("top", [PACKAGE, "benchmarks"])
def test_no_import_points_upward(top: str) -> None:
    files = sorted((ROOT / top).rglob("*.py"))
    assert files, f"{top} holds no module, so nothing was tested"
    found = []
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found += violations(file.read_text(encoding="utf-8"), module)
    assert not found, "\n".join(found)


def test_the_rooms_themselves_have_no_cycle() -> None:
    order = TopologicalSorter({room: allowed - {room} for room, allowed in ALLOWED.items()})
    order.prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("subspace_optim._validation", "import torch"),
        ("subspace_optim.linalg.lanczos", "from subspace_optim._validation import check_k"),
        ("subspace_optim.linalg.lanczos", "from .eigenbasis import EigenBasis"),
        ("subspace_optim.linalg.__init__", "from .eigenbasis import EigenBasis"),
        ("subspace_optim.linalg.lanczos", "from .. import _validation"),
        ("subspace_optim.curvature.hessian", "import subspace_optim.curvature.operator as o"),
        ("subspace_optim.subspaces.class_gradients", "from subspace_optim import linalg"),
        ("subspace_optim.subspaces.dominant", "from ..curvature.operator import LinearOperator"),
        ("subspace_optim.subspaces.dominant", "from ..linalg import EigenBasis"),
        ("subspace_optim.optim._base", "from subspace_optim.subspaces import DominantSubspace"),
        ("subspace_optim.optim.sgd", "from ._base import SubspaceOptimizer"),
        ("subspace_optim.optim.sgd", "from ..linalg.eigenbasis import EigenBasis"),
        ("subspace_optim.optim.sgd", "from . import _base"),
        ("subspace_optim.optim.sgd", "from subspace_optim.optim import _base"),
        ("subspace_optim.optim.__init__", "from .sgd import BulkSGD\nfrom ._base import group"),
        ("subspace_optim.diagnostics.monitor", "from .alignment import alignment"),
        ("subspace_optim.diagnostics.spectrum", "from ..linalg import spectral_density"),
        ("subspace_optim.__init__", "from .optim.sgd import BulkSGD\nfrom . import diagnostics"),
        ("benchmarks.compare", "import subspace_optim as so\nfrom benchmarks.data import load"),
        ("benchmarks.papers.song_2024", "from subspace_optim.linalg.lanczos import lanczos"),
        # Names that only look like ours.
        ("subspace_optim.linalg.lanczos", "import subspace_optim_extras, testsuite"),
        ("subspace_optim.linalg.lanczos", "from torch import optim\nimport torch.optim.sgd"),
    ],
)
def test_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        # Each arrow that would point upward, absolute or relative.
        ("subspace_optim._validation", "from .linalg import EigenBasis", ".linalg"),
        ("subspace_optim.linalg.lanczos", "from ..curvature.operator import Op", ".curvature"),
        (
            "subspace_optim.linalg.__init__",
            "from ..subspaces import DominantSubspace",
            ".subspaces",
        ),
        ("subspace_optim.curvature.hessian", "import subspace_optim.subspaces", ".subspaces"),
        ("subspace_optim.curvature.hessian", "from subspace_optim import optim", ".optim"),
        (
            "subspace_optim.subspaces.dominant",
            "from ..diagnostics.alignment import alignment",
            ".diagnostics",
        ),
        (
            "subspace_optim.subspaces.dominant",
            "from subspace_optim.optim._base import x",
            ".optim._base",
        ),
        # Optimizers know neither each other, nor the eigensolver, nor the diagnostics.
        ("subspace_optim.optim.sam", "from .sgd import BulkSGD", ".optim"),
        ("subspace_optim.optim.sam", "from . import sgd", ".optim"),
        ("subspace_optim.optim.sam", "from subspace_optim.optim import BulkSGD", ".optim"),
        ("subspace_optim.optim._base", "from .sgd import BulkSGD", ".optim"),
        ("subspace_optim.optim.sgd", "from ..linalg.lanczos import top_eigenpairs", ".linalg"),
        ("subspace_optim.optim._base", "import subspace_optim.linalg", ".linalg"),
        ("subspace_optim.optim.__init__", "from ..linalg import EigenBasis", ".linalg"),
        ("subspace_optim.optim.sgd", "from ..diagnostics import alignment", ".diagnostics"),
        ("subspace_optim.diagnostics.monitor", "from ..optim import BulkSGD", ".optim"),
        (
            "subspace_optim.diagnostics.monitor",
            "from subspace_optim.optim._base import gather",
            ".optim._base",
        ),
        # The public names are for those outside.
        ("subspace_optim.diagnostics.plots", "import subspace_optim as so", "."),
        ("subspace_optim.curvature.hessian", "from .. import DominantSubspace", "."),
        ("subspace_optim.linalg.lanczos", "from subspace_optim import *", "."),
        # Nothing below imports what is above the package; benchmarks import no tests.
        ("subspace_optim.diagnostics.plots", "import numpy, benchmarks.data", "benchmarks"),
        ("subspace_optim.__init__", "from benchmarks import data", "benchmarks"),
        ("subspace_optim.__init__", "from tests.helpers import quadratic", "tests"),
        ("benchmarks.compare", "import tests", "tests"),
        # Wherever the import stands.
        ("subspace_optim.linalg.lanczos", "def f():\n    from ..subspaces import x", ".subspaces"),
        (
            "subspace_optim.optim.sgd",
            "if TYPE_CHECKING:\n    from ..linalg.lanczos import top_eigenpairs",
            ".linalg",
        ),
        ("subspace_optim.linalg.lanczos", "try:\n    import benchmarks\nfinally: 0", "benchmarks"),
    ],
)
def test_what_is_not_allowed(module: str, source: str, target: str) -> None:
    (violation,) = violations(source, module)
    assert violation.startswith(f"{module}:")
    assert violation.endswith(f"may not import from {target}")


def test_each_violation_is_reported_with_its_line() -> None:
    source = "import torch\nfrom ..curvature import a, b\n\nimport benchmarks\n"
    found = violations(source, "subspace_optim.linalg.lanczos")
    assert [sentence.split()[0] for sentence in found] == [
        "subspace_optim.linalg.lanczos:2",
        "subspace_optim.linalg.lanczos:2",
        "subspace_optim.linalg.lanczos:4",
    ]


@pytest.mark.parametrize("module", ["subspace_optim.utils", "subspace_optim.helpers.flat"])
def test_a_module_needs_a_room(module: str) -> None:
    (violation,) = violations("", module)
    assert violation == f"{module} is in no room of ALLOWED: give it a row"
