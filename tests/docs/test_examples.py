"""The examples of the documents run as they are printed, each document by itself."""

import contextlib
import io
import os
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch

import subspace_optim as so
from tests.processes import together

ROOT = Path(__file__).parents[2]
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
    name: re.findall(
        r"^from (transformers|lightning|accelerate|ignite|skorch)\b", "\n".join(blocks), re.M
    )
    for name, blocks in EXAMPLES.items()
}
SEVERAL_RANKS = "docs/guides/several-devices.md"
SLOW = {
    "docs/faq.md",
    *(f"docs/guides/{name}.md" for name in ("checkpoints", "measures", "nanogpt-loop")),
    "docs/guides/sam-under-a-scaler.md",
}
ONE_PROCESS = [name for name, blocks in EXAMPLES.items() if blocks and name != SEVERAL_RANKS]


def marks(document):
    found = [pytest.mark.clients] if TRAINERS[document] else []
    return found + [pytest.mark.slow] * (document in SLOW)


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=marks(name)) for name in ONE_PROCESS],
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


def as_rank(rank: int, code: str, port: int, folder: str) -> None:
    """Runs it as ``torchrun --nproc-per-node 2`` does; what it prints goes to a file."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.chdir(folder)
    Path(f"{rank}.txt").write_text(run(code, SEVERAL_RANKS))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_example_of_several_ranks_runs_on_two(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    together(as_rank, ("\n".join(EXAMPLES[SEVERAL_RANKS]), port, str(tmp_path)), 2)
    assert (tmp_path / "0.txt").read_text().startswith("2 ranks: ")
    assert (tmp_path / "1.txt").read_text() == ""
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 5  # names, and a row in five


def test_readme_shows_that_bulk_sgd_leaves_the_dominant_subspace_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(EXAMPLES["README.md"][0] + "\nprint(*monitor.history['dom_lr'])", "README.md")
    rates = [float(number) for number in printed.splitlines()[-1].split()]
    assert len(rates) == 4
    assert max(map(abs, rates)) < 1e-4


def test_links_lead_to_files():
    for document in EXAMPLES:
        text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.S)
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"
