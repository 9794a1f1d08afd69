"""What the package shows at its door."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import subspace_optim as so

NAMES = {
    "ArgumentError",
    "BulkSGD",
    "ConvergenceWarning",
    "DataChangedError",
    "DomSGD",
    "DominantSubspace",
    "EigenBasis",
    "HessianOperator",
    "Monitor",
    "NonFiniteError",
    "StaleBasisWarning",
    "diagnostics",
}
ROOMS = ["subspace_optim"] + [
    f"subspace_optim.{room}"
    for room in ("curvature", "diagnostics", "linalg", "optim", "subspaces")
]


def test_the_names_that_users_write_are_there() -> None:
    """Those of the first section of the design; more may come, none may go."""
    assert set(so.__all__) >= NAMES


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_can_be_imported_and_has_a_docstring(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


def test_the_package_shows_no_name_by_accident() -> None:
    """Besides its public names: its rooms, which are modules, and what starts with a mark."""
    module = type(so)
    shown = {n for n, v in vars(so).items() if not n.startswith("_") and not isinstance(v, module)}
    assert shown - {"version"} == set(so.__all__) - {"diagnostics", "measures"}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert so.__version__ == importlib.metadata.version("subspace_optim")


def test_the_import_needs_no_plotting_library() -> None:
    """pandas and matplotlib are an extra: in a process without them everything else works."""
    code = (
        "import sys; sys.modules.update(pandas=None, matplotlib=None)\n"
        "import subspace_optim as so\n"
        "print(sorted(so.__all__) == sorted(n for n in so.__all__ if hasattr(so, n)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
