"""All tests that are marked ``gpu``, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Tree

from benchmarks.speed.environment import ROOT

_MARK = "mark.gpu"


def files(folder: Path) -> list[Path]:
    """Returns the test files that mark a test ``gpu``: the others need not be imported."""
    return sorted(p for p in folder.rglob("test_*.py") if _MARK in p.read_text(encoding="utf-8"))


def measure(device: str, seconds: float, rows: dict[str, Any]) -> None:
    """Runs the tests on a device.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        seconds: after which they are ended; those that came to an end by then are not lost.
        rows: how many passed, failed and were skipped, and the names of those that failed or were
            skipped, with the reason.

    Raises:
        RuntimeError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--device", device, "-v"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [str(path) for path in files(ROOT / "tests")]
        try:
            with log.open("w", encoding="utf-8") as output:
                subprocess.run(  # noqa: S603 (arguments of our own)
                    command,
                    cwd=ROOT,
                    timeout=seconds,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            rows["ended"] = f"after {seconds:.0f} s"
        text = log.read_text(encoding="utf-8", errors="replace")
        if report.exists():
            rows.update(_counted(report))
        elif "ended" in rows:
            rows.update({"passed": text.count(" PASSED"), "failed": text.count(" FAILED")})
        else:
            raise RuntimeError(f"pytest could not run them: {text.strip().splitlines()[-1:]}")


def _counted(report: Path) -> dict[str, Any]:
    """What pytest's own report says."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in Tree.parse(report).iter("testcase"):  # noqa: S314 (written by ourselves)
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            child = next((c for tag in tags if (c := case.find(tag)) is not None), None)
            if child is not None:
                found[kind][name] = (child.get("message") or "").split("\n")[0]
                break
        else:
            found["passed"] += 1
    return found
