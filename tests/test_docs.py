"""The examples of the documents run as they are printed, each document by itself."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

import subspace_optim as so

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


def run(code: str, document: str) -> str:
    """Runs it as a program of its own, and returns what it prints. Warnings are errors."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        exec(compile(code, document, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


TRAINERS = {
    name: re.findall(r"^from (transformers|lightning|accelerate)\b", "\n".join(blocks), re.M)
    for name, blocks in EXAMPLES.items()
}


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(name, marks=[pytest.mark.clients] if TRAINERS[name] else [])
        for name, blocks in EXAMPLES.items()
        if blocks
    ],
)
def test_examples_run(document, tmp_path, monkeypatch):
    for library in TRAINERS[document]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if TRAINERS[document]:  # which warn of their own, but of nothing of ours
            warnings.simplefilter("ignore")
            for found in vars(so).values():
                if isinstance(found, type) and issubclass(found, Warning):
                    warnings.simplefilter("error", found)
        printed = run("\n".join(EXAMPLES[document]), document)
    assert re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed)  # each prints what it has measured


def test_readme_shows_that_bulk_sgd_leaves_the_dominant_subspace_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(EXAMPLES["README.md"][0] + "\nprint(*monitor.history['dom_lr'])", "README.md")
    rates = [float(number) for number in printed.splitlines()[-1].split()]
    assert len(rates) == 4
    assert max(map(abs, rates)) < 1e-4


def test_links_lead_to_files():
    for document in EXAMPLES:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"
