"""The example of a sharded training, as its own first lines say that it is run."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fsdp2.py"

pytestmark = pytest.mark.distributed


def run(folder: Path, processes: int, steps: int) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--steps", str(steps), "--checkpoint", "checkpoint"]
    command = [*launch, f"--nproc-per-node={processes}", str(EXAMPLE), *options]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_trains_and_goes_on_from_its_checkpoint_also_with_another_number(tmp_path):
    first = run(tmp_path, 2, steps=3)
    assert first.startswith("2 processes; this one has 9,256 of the 18,512 coordinates")
    run(tmp_path, 1, steps=3)
    rows = (tmp_path / "run.csv").read_text().splitlines()
    steps = [int(row.split(",")[0]) for row in rows[1:]]
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert steps == [0, 5]
    assert losses == sorted(losses, reverse=True)
