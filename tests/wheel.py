"""What a distribution must bring: run where it is installed, with the package's files as arguments.

It is no test of pytest's, because the environment has the wheel, what that asks for, and no more.
"""

import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

import subspace_optim

installed = pathlib.Path(subspace_optim.__file__).resolve().parent.parent
version = importlib.metadata.version("subspace_optim")
prefix = pathlib.Path(sys.prefix).resolve()
metadata = importlib.metadata.metadata("subspace_optim")
told = subprocess.run(
    [sys.executable, "-I", "-m", "subspace_optim", "--versions"],
    capture_output=True,
    text=True,
    check=False,
)
checks = {
    "the package comes from the wheel": installed.is_relative_to(prefix),
    "the readme is in the metadata": "## Five minutes" in (metadata.get_payload() or ""),
    "--versions tells the version": f"subspace_optim    {version}\n" in told.stdout,
    "py.typed is in place": (installed / "subspace_optim" / "py.typed").is_file(),
    "__version__ is the wheel's": getattr(subspace_optim, "__version__", version) == version,
}
for file in sys.argv[1:]:
    checks[f"{file} is in place"] = (installed / file).is_file()
for name in subspace_optim.__all__:
    checks[f"subspace_optim.{name} imports"] = hasattr(subspace_optim, name)
for name in ("benchmarks", "tests"):
    checks[f"{name} cannot be imported"] = importlib.util.find_spec(name) is None
failed = [what for what, holds in checks.items() if not holds]
print(f"subspace_optim {version}: {len(checks)} checks of the wheel, failed: {failed or 'none'}")
sys.exit(bool(failed))
