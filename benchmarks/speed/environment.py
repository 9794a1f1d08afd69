"""The environment of the peers: made by the command itself, with the versions of ``peers.txt``."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parents[2]
PINS: Final = Path(__file__).with_name("peers.txt")
PEERS: Final = ("hessian-eigenthings", "curvlinops-for-pytorch", "pyhessian")
_SOURCES: Final = (PINS, ROOT / "constraints.txt", ROOT / "pyproject.toml")


def make(folder: Path, *, seconds: float | None = None) -> Path:
    """Makes the environment, or brings it up to date, and returns its interpreter.

    Args:
        folder: where it is, or is to be.
        seconds: that pip may take (default: as long as it needs).

    Returns:
        The path of its Python.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "peers.stamp"
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    print(f"installing the peers into {folder}", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    wishes = ["-c", str(_SOURCES[1]), "-r", str(PINS), "-e", f"{ROOT}[bench]"]
    subprocess.run([*pip, *wishes], check=True, timeout=seconds)  # noqa: S603 (arguments of our own)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def continue_in(
    python: Path, arguments: list[str], *, module: str = "benchmarks.speed"
) -> NoReturn:
    """Goes on as the same command in another interpreter; this one ends.

    Args:
        python: the interpreter.
        arguments: as on the command line; ``--here`` is added, so that it stays there.
        module: of the command.
    """
    sys.stdout.flush()
    command = [str(python), "-m", module, *arguments, "--here"]
    os.execv(command[0], command)  # noqa: S606 (arguments of our own)
