"""The examples of the documents run as they are printed, a process for each document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("document", [name for name, blocks in EXAMPLES.items() if blocks])
def test_examples_run(document):
    done = run("\n".join(EXAMPLES[document]))
    assert done.returncode == 0, done.stderr
    values = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout)]
    assert values  # each example prints what it has measured


def test_readme_shows_that_bulk_sgd_leaves_the_dominant_subspace_alone():
    done = run(EXAMPLES["README.md"][0] + "\nprint(*monitor.history['dom_lr'])")
    assert done.returncode == 0, done.stderr
    rates = [float(number) for number in done.stdout.splitlines()[-1].split()]
    assert len(rates) == 4
    assert max(map(abs, rates)) < 1e-4


def test_links_lead_to_files():
    for document in EXAMPLES:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"
