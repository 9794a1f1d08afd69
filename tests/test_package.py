"""What the package shows at its door."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import subspace_optim as so
from subspace_optim.__main__ import main

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


def test_the_versions_for_a_bug_report() -> None:
    """In a process of its own, as a user asks for them."""
    done = subprocess.run(
        [sys.executable, "-m", "subspace_optim", "--versions"],
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    for name in ("subspace_optim", "torch", "numpy", "scipy"):
        assert told[name] == importlib.metadata.version(name)
    assert told["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"platform", "devices", "threads", "matplotlib", "wandb"} <= told.keys()
    assert done.stderr == ""


def test_without_an_option_it_tells_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "--versions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version-of-what"])


def test_the_import_loads_no_library_but_torch_and_numpy() -> None:
    """What it adds to ``import torch`` is its own, numpy's and the standard library's."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import subspace_optim\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - sys.stdlib_module_names
    assert {name for name in loaded if "cython" not in name} == {"subspace_optim", "numpy"}


def test_the_citation_is_of_this_version() -> None:
    root = Path(__file__).resolve().parent.parent
    lines = (root / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] not in " -")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fields["version"] == project["version"]
    assert fields["license"] == project["license"]
    assert fields["title"].strip('"') == project["name"]
    assert fields["abstract"].strip('"') == f"{project['description']}."
